"""Train the demo's weights: a byte-level Llama on prose (base), then tuned on code (tuned).

    python -m surgery.demo.train --out surgery/demo/weights

About twelve minutes on two idle CPU cores, most of it the base; a base that is already in the
folder is used as it is. Everything is seeded; on another CPU, or from another Python's text, the
bits may differ, and the losses should stay close.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.demo import text

CONTEXT = 256


def config() -> LlamaConfig:
    """Deep and narrow, so that what differs by depth has room to differ."""
    return LlamaConfig(
        vocab_size=256,  # a token is a byte, and its id is the byte's value
        hidden_size=80,
        intermediate_size=216,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def save_tokenizer(folder: Path) -> None:
    """One token per byte: byte-level BPE without merges, ids in the order of the bytes."""
    # ByteLevel writes a byte as a printable character: itself if it is one in Latin-1, else
    # the next free one from U+0100 on.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    letters.update({byte: chr(256 + i) for i, byte in enumerate(hidden)})
    made = Tokenizer(models.BPE(vocab={letters[i]: i for i in range(256)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    # By hand, because save_pretrained names a class that only the newest transformers have.
    settings = {
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def loss_of(model: Any, batch: Tensor) -> Tensor:
    """Mean next-byte loss, in nats per byte."""
    logits = model(input_ids=batch, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Any, domain: str) -> float:
    """Mean loss over (at most 128 windows of) the held-out text of `domain`."""
    model.eval()
    pieces = text.windows(text.held_out(domain), CONTEXT, most=128)
    batch = torch.tensor([list(piece) for piece in pieces])
    parts = [batch[i : i + 16] for i in range(0, len(batch), 16)]
    return sum(loss_of(model, part).item() * len(part) for part in parts) / len(batch)


def fit(
    model: Any,
    domain: str,
    *,
    steps: int,
    rate: float,
    warmup: int,
    batch: int = 16,
    decay: float = 0.0,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """AdamW on random windows of `domain`: linear warm-up, then a cosine down to a tenth."""
    torch.manual_seed(seed)
    data = torch.frombuffer(bytearray(text.training(domain)), dtype=torch.uint8).long()
    # Llama has no dropout of its own on what a block adds, and the prose is read many times.
    added = [part for b in model.model.layers for part in (b.self_attn.o_proj, b.mlp)]
    hooks = [part.register_forward_hook(_dropping(dropout)) for part in added if dropout]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    started = time.time()
    for step in range(steps):
        if step % 200 == 0:
            report(model, step, started)
        model.train()
        fall = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warmup) * fall
        starts = torch.randint(len(data) - CONTEXT, (batch, 1))
        loss: Any = loss_of(model, data[starts + torch.arange(CONTEXT)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    report(model, steps, started)
    for hook in hooks:
        hook.remove()


def _dropping(share: float) -> Callable[[Any, Any, Tensor], Tensor]:
    return lambda module, _, output: functional.dropout(output, share, module.training)


def report(model: Any, step: int, started: float) -> None:
    """Print where the training stands."""
    losses = ", ".join(f"{domain} {evaluate(model, domain):.4f}" for domain in text.DOMAINS)
    print(f"  step {step:4d}: held-out {losses} ({time.time() - started:.0f} s)", flush=True)


def save(model: Any, folder: Path) -> None:
    """Write `model` in bfloat16, with its tokenizer, as Hugging Face lays a checkpoint out."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)


def load(folder: Path) -> Any:
    """The checkpoint in `folder`, computing in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    """Make `base` and `tuned` in the folder asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for base/ and tuned/")
    out: Path = parser.parse_args().out
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    base, tuned = out / "base", out / "tuned"
    if not (base / "model.safetensors").exists():
        print("base, on prose:")
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config())
        fit(model, "prose", steps=1000, rate=3e-3, warmup=100, decay=0.1, dropout=0.1)
        save(model, base)
    print("tuned, on code:")
    # From the base as it is published, rounding and all: that is what people tune.
    model = load(base)
    fit(model, "code", steps=100, rate=3e-4, warmup=10, seed=1)
    save(model, tuned)
    print("as written:")
    for folder in (base, tuned):
        model = load(folder)
        losses = ", ".join(f"{name} {evaluate(model, name):.4f}" for name in text.DOMAINS)
        print(f"  {folder.name}: held-out {losses} nats per byte")


if __name__ == "__main__":
    main()
