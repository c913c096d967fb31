"""What else of an MLP has something for every neuron: a norm over the hidden activation, a
depthwise convolution between up and down, the second matrix of an adapter beside up.

Only shapes and places are known here, so what could be two things is taken for the one that allows
less, and what could be a matrix isn't taken for a follower at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from surgery.anatomy.matrices import bias_name, follows_width, module_of
from surgery.anatomy.mlp import MLP, Follower
from surgery.anatomy.places import Place, Role
from surgery.tensor import LazyTensor

Tensors = Mapping[str, LazyTensor]

_ROLES = (Role.UNKNOWN, Role.NORM, Role.MLP)
WIDEST_KERNEL = 31
_STATISTICS = ("running_mean", "running_var")


def with_followers(
    mlp: MLP,
    loose: Tensors,
    inside: Tensors,
    places: Mapping[str, Place],
    hidden: int | None = None,
) -> tuple[MLP, str | None]:
    """The MLP with its followers, and the reason why it can't be grown, if there is one: of `loose`
    others have its width and aren't understood. `inside` is all that is in its block, `hidden` the
    size that the block has, if it may be another than the MLP's."""
    block = "" if mlp.block is None else f"{mlp.stack}.{mlp.block}."
    own = module_of(block, mlp.tensors)
    found, strange = [], []
    for name in follows_width(mlp, loose, hidden):
        follower = None
        if own and mlp.width not in (mlp.hidden, hidden) and places[name].role in _ROLES:
            follower = _follower(name, mlp, own, inside)
        if follower is None:
            strange.append(name)
        else:
            found.append(follower)
    said = f"{', '.join(strange)} follows the MLP's width of {mlp.width:,}"
    return replace(mlp, followers=(*mlp.followers, *found)), said if strange else None


def apart(mlps: list[tuple[MLP, str | None]]) -> list[tuple[MLP, str | None]]:
    """The same, with the reason for those that a follower can't belong to all of."""
    owners: dict[str, int] = {}
    for mlp, _ in mlps:
        for follower in mlp.followers:
            owners[follower.name] = owners.get(follower.name, 0) + 1
    made = []
    for mlp, problem in mlps:
        shared = [follower.name for follower in mlp.followers if owners[follower.name] > 1]
        said = f"which of its MLPs {', '.join(shared)} belongs to isn't known"
        made.append((mlp, problem or said if shared else problem))
    return made


def follower_axis(shape: tuple[int, ...], width: int) -> int | None:
    """The axis of a follower along which the neurons lie: rows that are theirs alone, or columns.
    None for a shape that can't be one's."""
    if shape.count(width) != 1:
        return None
    axis = shape.index(width)
    return axis if axis == len(shape) - 1 or prod(shape[:axis]) == 1 else None


def as_matrix(name: str, tensors: Tensors) -> LazyTensor | None:
    """The kernel of a convolution over all channels as a tensor of the matrix's shape; None for
    what can't be one, as where its sizes aren't those of a kernel, or its bias isn't one's."""
    shape = tensors[name].shape
    kernel = 3 <= len(shape) <= 5 and name.endswith("weight") and min(shape[:2]) > 1
    if not kernel or max(shape[2:]) > WIDEST_KERNEL:
        return None
    bias = tensors.get(bias_name(name))
    if bias is not None and bias.shape != shape[:1]:
        return None
    return replace(tensors[name], shape=shape[:2])


def _follower(name: str, mlp: MLP, own: str, inside: Tensors) -> Follower | None:
    """A tensor of the MLP's module `own` as a follower; None for what may be anything."""
    tensor = inside[name]
    if len(tensor.shape) == 2:
        return _of_adapter(name, mlp, own, inside)
    shape, axis = tensor.shape, follower_axis(tensor.shape, mlp.width)
    if axis is None or _in_another_module(name, mlp, own, inside):
        return None
    if _is_depthwise(name, mlp.width, inside):
        return Follower(name, axis)
    if len(shape) == 1:
        module, _, last = name.rpartition(".")
        of_kernel = last == "bias" and _is_depthwise(f"{module}.weight", mlp.width, inside)
        return Follower(name, axis, even=not of_kernel and not _of_batch_norm(module, mlp, inside))
    vector = prod(shape) == mlp.width and axis in (0, len(shape) - 1)
    return Follower(name, axis, even=True) if vector else None


def _of_adapter(name: str, mlp: MLP, own: str, inside: Tensors) -> Follower | None:
    """The second matrix of an adapter whose numbers are added to those of the one up projection,
    which its name has in it: the first leads from the hidden size, and both are alone in a module
    of theirs."""
    up, last = mlp.ups[0], mlp.ups[0].weight.removesuffix(".weight").rpartition(".")[2]
    module = name.removesuffix(".weight").rpartition(".")[0] + "."
    pair = [other for other in inside if other.startswith(module)]
    firsts = [other for other in pair if other != name]
    parts, rank = up.parts, inside[name].shape[1]
    fitting = (
        len(mlp.ups) == len(firsts) == 1
        and len(module) > len(own)
        and last in name.removeprefix(own)
        and not (up.in_out or up.interleaved)
        and inside[name].shape[0] == parts * mlp.width
        and inside[firsts[0]].shape == (rank, mlp.hidden)
        and rank not in (mlp.width, parts * mlp.width, mlp.hidden)
    )
    return Follower(name, parts=parts) if fitting else None


def _in_another_module(name: str, mlp: MLP, own: str, inside: Tensors) -> bool:
    """Whether a matrix is beside it that makes it something of that matrix (a scale, a vector of
    spectral norm), or it belongs to a module with matrices that aren't the MLP's."""
    module = name.rpartition(".")[0] + "."
    first = True
    while len(module) > len(own):
        matrices = {n for n, t in inside.items() if len(t.shape) == 2 and n.startswith(module)}
        if matrices - set(mlp.tensors) or (first and matrices):
            return True
        module = module[:-1].rpartition(".")[0] + "."
        first = False
    return False


def _is_depthwise(name: str, width: int, inside: Tensors) -> bool:
    """Whether it is the kernel of a convolution of each channel by itself, (channels, 1, size...)
    with more than one value for each."""
    shape = inside[name].shape if name in inside else ()
    if len(shape) < 3 or shape[:2] != (width, 1) or prod(shape[2:]) == 1:
        return False
    bias = inside.get(bias_name(name))
    return bias is None or bias.shape == (width,)


def _of_batch_norm(module: str, mlp: MLP, inside: Tensors) -> bool:
    """Whether the module keeps a mean and a variance of each neuron by itself."""
    kept = [inside.get(f"{module}.{statistic}") for statistic in _STATISTICS]
    return all(tensor is not None and tensor.shape == (mlp.width,) for tensor in kept)
