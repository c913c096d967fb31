"""Where a tensor stands: its stack of blocks, its block, and its role, from name and shape."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from surgery.tensor import LazyTensor


class Role(str, Enum):
    """What a tensor does in the model."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MIXER = "mixer"
    """What mixes tokens other than by attention: a state space, a recurrence, a convolution."""
    MLP = "mlp"
    EXPERT = "expert"
    ROUTER = "router"
    NORM = "norm"
    HEAD = "head"
    BUFFER = "buffer"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Place:
    """Block `block` of `stack` (both None outside the stacks), and `inner`, the name in there."""

    role: Role
    inner: str
    stack: str | None = None
    block: int | None = None


_NUMBER = re.compile(r"(?<![^.])([0-9]{1,9})\.")
_MOST_NUMBERS = 4
"""Lists in one another in a name. More are looked at nowhere: each is a copy of the name."""
_STATE = re.compile(r"\.(A_log|dt_bias|time_decay|recurrent_param)$")
_MIXER = re.compile(r"\.(dt_proj|dt_layernorm|x_proj|conv_?1d|short_conv|[if]gate_preact)([._]|$)")

NORM = re.compile(r"(^|[._])(ln\d*|[^\W_]*norm\d*)([._]|$)", re.IGNORECASE)
ATTENTION = re.compile(
    r"(^|[._])([^\W_]*attn|[^\W_]*attention|[qkvo]_proj|[qkv]_lin|out_lin|w?qkv(_proj)?|att)"
    r"([._]|$)",
    re.IGNORECASE,
)

# Words of a name, most telling first. A word counts where it stands between dots and
# underscores, so that "proj" isn't in "projector"; "ln_1" and "layernorm" are patterns.
_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    (
        Role.BUFFER,
        re.compile(
            r"(^|\.)(inv_freq|masked_bias|position_ids|num_batches_tracked|(in|out)put_(min|max))$"
        ),
    ),
    (Role.EXPERT, re.compile(r"(^|[._])experts?([._]|$)", re.IGNORECASE)),
    (
        Role.ROUTER,
        re.compile(
            r"(^|[._])(router|e_score_correction_bias)([._]|$)|(mlp|moe)\.gate\.", re.IGNORECASE
        ),
    ),
    (Role.NORM, NORM),
    (Role.ATTENTION, ATTENTION),
)
_OUTSIDE: tuple[tuple[Role, re.Pattern[str]], ...] = (
    (Role.BUFFER, _ROLES[0][1]),
    (Role.HEAD, re.compile(r"(^|[._])(lm_head|embed_out)([._]|$)")),
    (
        Role.EMBEDDING,
        re.compile(
            r"(^|[._])(embed[^\W_]*|[^\W_]*embeddings?|wte|wpe|shared)([._]|$)", re.IGNORECASE
        ),
    ),
    (
        Role.HEAD,
        re.compile(
            r"(^|[._])([^\W_]*head|score|classifier|predictions|pooler)([._]|$)", re.IGNORECASE
        ),
    ),
    (Role.NORM, NORM),
    (Role.HEAD, re.compile(r"^output\.", re.IGNORECASE)),
)
_LISTS = {"layers", "layer", "h", "blocks", "block"}


def find_places(
    tensors: Mapping[str, LazyTensor], depth: int | None
) -> tuple[dict[str, Place], dict[str, int]]:
    """The place of every tensor, and the number of blocks of every stack.

    A stack is a prefix that is followed by 0, 1, ... L-1 with like names inside; of stacks in one
    another, the outermost. `depth` is the number of layers in the config, which settles whether a
    list of one is a stack.
    """
    blocks, lengths = _in_stacks(tensors, depth)
    mixers = _mixers(tensors)
    places = {}
    stacks: dict[str, int] = {}
    for name, tensor in tensors.items():
        if (where := blocks.get(name)) is not None:
            stack, number, inner = where
            stacks[stack] = lengths[stack]
            role = _role(inner, tensor)
            block = len(name) - len(inner)
            places[name] = Place(_mixing(name, role, mixers, block), inner, stack, number)
        else:
            places[name] = Place(_role(name, tensor, outside=True), name)
    return places, stacks


def place_in_block(inner: str, tensor: LazyTensor, stack: str, block: int) -> Place:
    """The place of a tensor that is called `inner` in a block."""
    return Place(_role(inner, tensor), inner, stack, block)


Spot = tuple[str, int, str]
"""Prefix, number, and what follows, of a name."""


def _in_stacks(names: Iterable[str], depth: int | None) -> tuple[dict[str, Spot], dict[str, int]]:
    """Where a name has the number of its block, and the number of blocks of every stack. Lists are
    looked at from without: there are no stacks in a stack."""
    spots: dict[str, Spot] = {}
    stacks: dict[str, int] = {}
    levels = []
    left = dict.fromkeys(names, 0)  # and where in a name to go on
    for _ in range(_MOST_NUMBERS):
        numbers = {n: match for n, start in left.items() if (match := _NUMBER.search(n, start))}
        level = {name: _around(match) for name, match in numbers.items()}
        lists: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for prefix, number, inner in level.values():
            lists[prefix][number].add(inner)
        found = {p: len(blocks) for p, blocks in lists.items() if _is_stack(p, blocks, depth)}
        spots |= {name: spot for name, spot in level.items() if spot[0] in found}
        stacks |= found
        left = {n: match.end() for n, match in numbers.items() if level[n][0] not in found}
        levels.append((level, lists))
    if not stacks:  # ALBERT: one block that is run again and again
        for level, lists in levels:
            found = {p: 1 for p, blocks in lists.items() if _is_one_block(p, blocks)}
            spots |= {n: spot for n, spot in level.items() if spot[0] in found and n not in spots}
            stacks |= found
    return spots, stacks


def _around(number: re.Match[str]) -> Spot:
    name = number.string
    return name[: number.start()].removesuffix("."), int(number[1]), name[number.end() :]


def _is_stack(prefix: str, blocks: Mapping[int, set[str]], depth: int | None) -> bool:
    """Numbers from 0 without a gap, and blocks that resemble each other: the numbered members of
    an `nn.Sequential` have gaps (activations hold no tensor) or names of their own. Where layers
    are all of different kinds, what the list is called and one name in common will do."""
    if set(blocks) != set(range(len(blocks))):
        return False
    if len(blocks) == 1:
        return depth == 1 and prefix.rsplit(".", 1)[-1] in _LISTS
    often = Counter(inner for block in blocks.values() for inner in block)
    repeated = sum(count for count in often.values() if count > 1)
    several = max(len(block) for block in blocks.values()) > 2
    listed = prefix.rsplit(".", 1)[-1] in _LISTS and len(blocks) in often.values()
    return several and (listed or 2 * repeated >= sum(often.values()))


def _is_one_block(prefix: str, blocks: Mapping[int, set[str]]) -> bool:
    """Whether a list of one holds a whole block, with norms: which counts where nothing repeats."""
    listed = re.search(r"(^|_)(layers?|blocks?)($|_)", prefix.rsplit(".", 1)[-1])
    return bool(listed) and set(blocks) == {0} and any(NORM.search(name) for name in blocks[0])


def _mixers(tensors: Mapping[str, LazyTensor]) -> dict[str, bool]:
    """The modules, with a dot behind, that mix tokens by a recurrence or a convolution: those
    that hold a decay or a step size (True), or a convolution along the tokens (False)."""
    found: dict[str, bool] = {}
    for name, tensor in tensors.items():
        if (match := _STATE.search(name)) or (match := _MIXER.search(name)):
            module = name[: match.start() + 1]
        elif len(tensor.shape) == 3 and tensor.shape[1] == 1 and "conv" in name:
            module = name.rpartition(".")[0].rpartition(".")[0] + "."  # a channel at a time
        else:
            continue
        if not re.search(r"(^|\.)\d+\.$", module):  # not the whole block
            found[module] = found.get(module, False) or _STATE.search(name) is not None
    return found


def _mixing(name: str, role: Role, mixers: Mapping[str, bool], block: int) -> Role:
    """The role of a tensor of a block, given the modules that mix tokens other than by attention;
    `block` is where its name in the block begins, for those around the blocks say nothing.

    One with a state does so whatever it is called (`linear_attn`); attention may have a
    convolution on its way in.
    """
    if role in (Role.UNKNOWN, Role.ATTENTION):
        for dot in re.finditer(r"\.", name[block:]):
            state = mixers.get(name[: block + dot.end()])
            if state or (state is False and role is Role.UNKNOWN):
                return Role.MIXER
    return role


def _role(name: str, tensor: LazyTensor, *, outside: bool = False) -> Role:
    if tensor.dtype.kind == "integer":
        return Role.BUFFER
    if name.endswith(("attn.bias", "attention.bias")) and len(tensor.shape) == 4:
        return Role.BUFFER  # the causal mask of GPT-2, GPT-Neo(X): a float in old files
    return _named_role(name, outside)


@lru_cache(maxsize=1 << 12)  # blocks have the same names inside
def _named_role(name: str, outside: bool) -> Role:
    rules = _OUTSIDE if outside else _ROLES
    return next((role for role, pattern in rules if pattern.search(name)), Role.UNKNOWN)
