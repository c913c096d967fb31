"""What an MLP is: its projections, what follows its width, and along which axes neurons lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import numpy


_T = TypeVar("_T")
Kind = Literal["dense", "routed", "shared"]
"""Plain, or an expert of a mixture: one that tokens are routed to, or one that all go through."""


@dataclass(frozen=True)
class Projection:
    """A matrix of an MLP, by its name, with its bias if it has one; or the kernel of a convolution,
    (out, in, size...), which is a matrix at each place.

    `in_out` is True for GPT-2's Conv1D, stored (in, out); torch's Linear is (out, in). `parts`
    is 2 where gate and up lie in one matrix: gate first, then up, or, if `interleaved`, the two
    rows (or columns) of a neuron beside each other. `experts` is their number where a tensor
    holds those of a layer along a first axis, or, if `flat`, below each other in one matrix.
    """

    weight: str
    bias: str | None = None
    in_out: bool = False
    parts: int = 1
    interleaved: bool = False
    experts: int | None = None
    flat: bool = False

    def axis(self, *, down: bool, bias: bool = False) -> int:
        """The axis of the weight (or bias) along which the neurons lie."""
        stacked = int(self.experts is not None and not self.flat)
        return stacked + int(not bias and down != self.in_out)

    def pieces(self, shape: tuple[int, ...], axis: int) -> int:
        """How often the neurons are gone through along the rows of a tensor of that shape: once for
        each expert, or for each output of a kernel."""
        return prod(shape[:axis]) if axis else self.experts or 1

    def moved(self, module: str, other: str) -> Projection:
        """The same of tensors that are called alike in `other`, where these are in `module`."""
        return _with(
            self,
            weight=other + self.weight.removeprefix(module),
            bias=None if self.bias is None else other + self.bias.removeprefix(module),
        )

    def indices(self, neurons: numpy.ndarray, width: int, *, below: bool = False) -> numpy.ndarray:
        """Where these neurons, of `width`, lie along the axis: part by part in the order given,
        and -1 where that was given. With `below` all experts are rows of one matrix, else they
        are alike."""
        import numpy

        parts = numpy.arange(self.parts)
        if self.interleaved:
            found = neurons[:, None] * self.parts + parts
            kept = numpy.repeat(neurons, self.parts) >= 0
        else:
            found = parts[:, None] * width + neurons
            kept = numpy.tile(neurons, self.parts) >= 0
        offsets = numpy.arange((self.experts or 1) if below else 1) * self.parts * width
        whole = offsets[:, None] + found.reshape(-1)
        return numpy.where(kept, whole, -1).reshape(-1)


@dataclass(frozen=True)
class Follower:
    """A tensor beside the projections that has something for every neuron, along `axis`: all other
    sizes before it are 1, or it is the last.

    A copied neuron takes its part along. Where that part acts on the neuron by itself (a depthwise
    convolution), that is all; with `even` it may be of a norm, which looks at all neurons: their
    mean and mean square stay what they were only if each of them is copied as often. `parts` is 2
    for what is added to gate and up in one matrix: the second matrix of an adapter (Zamba 2).
    """

    name: str
    axis: int = 0
    even: bool = False
    parts: int = 1


@dataclass(frozen=True)
class MLP:
    """An MLP of a block: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate.

    `ups` are the projections into the hidden activation (gate and up, or one), `width` is its
    size p, `hidden` the size of x. Experts that are stacked in one tensor are one MLP here. One
    outside the stacks has no `block`, and its module for a `stack`. `followers` are the tensors
    between up and down that go by neuron too.
    """

    stack: str
    block: int | None
    ups: tuple[Projection, ...]
    down: Projection
    width: int
    hidden: int
    kind: Kind = "dense"
    followers: tuple[Follower, ...] = ()
    sparse: str | None = None
    """The setting by which its activation keeps only the largest values, if it does."""
    idle: tuple[Projection, ...] = ()
    """Matrices into hidden activations that nothing is made of, which are as wide: those of
    LongCat's experts that return their input."""

    @property
    def even_because(self) -> str | None:
        """Why every neuron has to be copied as often as the others, if it has to."""
        if norms := [follower.name for follower in self.followers if follower.even]:
            return f"{', '.join(norms)} may be of a norm over all its neurons"
        return self.sparse and f"its activation goes by all its neurons ({self.sparse})"

    @property
    def gated(self) -> bool:
        return len(self.ups) == 2 or self.ups[0].parts == 2

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors that widen with the MLP (all but the bias of `down`)."""
        return tuple(name for name, _, _ in self.axes())

    def moved(self, module: str, other: str, block: int | None = None) -> MLP:
        """The same of tensors that are called alike in `other`, where these are in `module`; in
        `block`, if it is given."""
        return _with(
            self,
            block=self.block if block is None else block,
            ups=tuple(up.moved(module, other) for up in self.ups),
            down=self.down.moved(module, other),
            followers=tuple(
                replace(each, name=other + each.name.removeprefix(module))
                for each in self.followers
            ),
            idle=tuple(up.moved(module, other) for up in self.idle),
        )

    def axes(self) -> Iterator[tuple[str, Projection, int]]:
        """Every tensor that widens, its projection (for a follower one that lies as it does), and
        the axis along which its neurons lie."""
        for up in (*self.ups, *self.idle):
            yield up.weight, up, up.axis(down=False)
            if up.bias is not None:
                yield up.bias, up, up.axis(down=False, bias=True)
        yield self.down.weight, self.down, self.down.axis(down=True)
        for follower in self.followers:
            yield follower.name, Projection(follower.name, parts=follower.parts), follower.axis


def _with(one: _T, **values: object) -> _T:
    """`dataclasses.replace` for what checks nothing and holds nothing but its fields, in a third of
    the time: a mixture has tens of thousands of experts."""
    made = object.__new__(type(one))
    vars(made).update(vars(one), **values)
    return made
