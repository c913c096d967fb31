"""Following zeros through a block's operations: what passes returns its input for all values,
and what doesn't is told apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from surgery.modeling.identity import _trace_class, _Watched

Forward = Callable[["Block", torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """A block whose `o_proj` and `down_proj` are taken to be zero; `up` and the norms aren't."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.o_proj = nn.Linear(4, 4)
        self.down_proj = nn.Linear(8, 4, bias=False)
        self.up = nn.Linear(4, 8)
        self.biased = nn.LayerNorm(4)
        self.unbiased = nn.LayerNorm(4, bias=False)
        self.rms = nn.RMSNorm(4)
        self.computes = forward

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.computes(self, hidden)


def why(forward: Forward) -> str | None:
    with torch.device("meta"):
        block = Block(forward).eval()
    trace = _trace_class()()
    watched = _Watched(block, trace)
    with torch.no_grad(), trace:
        block(torch.empty(2, 4, 4, device="meta"))
    return watched.why


def truly(forward: Forward) -> bool:
    """The same with values: does it return its input?"""
    torch.manual_seed(0)
    block = Block(forward).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
        for projection in (block.o_proj, block.down_proj):
            for parameter in projection.parameters():
                parameter.zero_()
        hidden = torch.randn(2, 4, 4)
        return torch.equal(block(hidden.clone()), hidden)


def written_into(b: Block, x: torch.Tensor) -> torch.Tensor:
    made = torch.ones_like(x)
    made[:, :2] = b.o_proj(x)[:, :2]
    return x + made


def written_over(b: Block, x: torch.Tensor) -> torch.Tensor:
    made = b.o_proj(x)
    made[:, :1] += 1
    return x + made


def half_of_it_zeroed(b: Block, x: torch.Tensor) -> torch.Tensor:
    x[:, :1] = b.o_proj(x)[:, :1]
    return x


def added_in_place(b: Block, x: torch.Tensor) -> torch.Tensor:
    x += b.o_proj(b.biased(x))
    return x


IDENTITIES: dict[str, Forward] = {
    "pre-norm": lambda b, x: x + b.down_proj(b.up(b.biased(x)).relu()),
    "parallel": lambda b, x: b.o_proj(b.rms(x)) + b.down_proj(b.up(b.rms(x))) + x,
    "sandwich": lambda b, x: x + b.rms(b.o_proj(b.rms(x))),
    "unbiased norm behind": lambda b, x: x + b.unbiased(b.o_proj(x)),
    "gated": lambda b, x: x + b.o_proj(x) * torch.sigmoid(b.biased(x)),
    "scaled": lambda b, x: x + 0.5 * b.o_proj(x),
    "reshaped": lambda b, x: x + b.o_proj(x.view(8, 4)).view(2, 4, 4),
    "joined": lambda b, x: x + torch.cat([b.o_proj(x)[..., :2], b.o_proj(x)[..., 2:]], -1),
    "in place": added_in_place,
    "less": lambda b, x: x - b.o_proj(x),
    "twice": lambda b, x: (x + b.o_proj(x)) + b.down_proj(b.up(x + b.o_proj(x))),
}
OTHERS: dict[str, Forward] = {
    "post-norm": lambda b, x: b.rms(x + b.o_proj(x)),
    "biased norm behind": lambda b, x: x + b.biased(b.o_proj(x)),
    "scaled residual": lambda b, x: 0.5 * x + b.o_proj(x),
    "no residual": lambda b, x: b.o_proj(x),
    "normed residual": lambda b, x: b.rms(x) + b.o_proj(x),
    "another projection": lambda b, x: x + b.up(x)[..., :4],
    "a constant": lambda b, x: x + (b.o_proj(x) + 1),
    "zeros softmaxed": lambda b, x: x + b.o_proj(x).softmax(-1),
    "of itself": lambda b, x: b.o_proj(x) - x,
    "added twice": lambda b, x: torch.add(b.o_proj(x), x, alpha=2),
    "zeros over zeros": lambda b, x: x + b.o_proj(x) / b.o_proj(x),
    "a power of zeros": lambda b, x: x + b.o_proj(x).pow(-1.0),
    "transposed": lambda b, x: x.transpose(1, 2) + b.o_proj(x),
    "transposed alone": lambda b, x: x.transpose(1, 2),
    "a part": lambda b, x: x[:1] + b.o_proj(x),
    "another order": lambda b, x: x.flip(1) + b.o_proj(x),
    "written into": written_into,
    "written over": written_over,
    "half of it zeroed": half_of_it_zeroed,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_what_returns_its_input_is_seen_to(name: str) -> None:
    assert truly(IDENTITIES[name])
    assert why(IDENTITIES[name]) is None


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_return_its_input_never_passes(name: str) -> None:
    assert not truly(OTHERS[name])
    assert why(OTHERS[name]) is not None


def test_the_input_of_an_earlier_block_is_not_its_own() -> None:
    seen: list[torch.Tensor] = []

    def first(b: Block, x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x + b.up(x)[..., :4]

    with torch.device("meta"):
        blocks = [Block(first), Block(lambda b, x: seen[0] + b.o_proj(x))]
    trace = _trace_class()()
    watched = [_Watched(block, trace) for block in blocks]
    with torch.no_grad(), trace:
        blocks[1](blocks[0](torch.empty(2, 4, 4, device="meta")))
    assert None not in [block.why for block in watched]


def test_the_reason_is_named() -> None:
    assert why(OTHERS["post-norm"]) == "what it returns comes out of rms, behind the addition"
    assert why(OTHERS["biased norm behind"]) == (
        "biased makes something else of zeros, as a bias does"
    )
    assert "scaled by nothing" in (why(OTHERS["scaled residual"]) or "")
