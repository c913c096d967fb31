"""The tokenizer that lies beside a checkpoint's tensors, through transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.modeling.quiet import quiet

if TYPE_CHECKING:
    import torch


def tokenize(checkpoint: Checkpoint, text: str) -> torch.Tensor:
    """The tokens of a text, (1, count). No code beside the checkpoint is run.

    Raises UnsupportedError where there is no tokenizer that transformers can load.
    """
    import torch
    from transformers import AutoTokenizer

    folder = checkpoint.source.path
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            ids = tokenizer(text)["input_ids"]
    except Exception as error:  # tokenizers raise errors of many types
        raise UnsupportedError(
            f"{checkpoint.source.reference}: its tokenizer can't be loaded, so a text can't be "
            f"compared on: {' '.join(str(error).split())[:200]}"
        ) from error
    return torch.tensor([ids], dtype=torch.int64)
