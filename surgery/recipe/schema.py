"""What a recipe may say: inputs, steps, and what has to hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from surgery.merging.parameters import unknown
from surgery.recipe.document import Document, Steps
from surgery.recipe.settings import Setting

MEASURES = ("max_difference", "relative", "kl_mean", "kl_max", "top1")
"""What thresholds can be put on: fields of surgery.verification.Logits."""


class Arguments(BaseModel):
    """The arguments of one step. `refers` names the fields that hold names of inputs or steps."""

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    refers: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def references_in(cls, given: Mapping[str, Any]) -> Iterator[tuple[Steps, str]]:
        """Every name that arguments refer to, and where in them it stands. They may be wrong in
        other ways."""
        for name in cls.refers:
            yield from _names_in(given.get(name), (name,))

    def references(self) -> Iterator[tuple[Steps, str]]:
        """Every name that is referred to, and where in the arguments it stands."""
        return self.references_in(self.model_dump())


def _names_in(value: Any, at: Steps) -> Iterator[tuple[Steps, str]]:
    """Names: one, several, or those of the models in tables."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, Mapping):
        yield from _names_in(value.get("model"), (*at, "model"))
    elif isinstance(value, list) and len(at) == 1:
        for number, item in enumerate(value):
            yield from _names_in(item, (*at, number))


class Source(BaseModel):
    """A model to merge, with parameters of its own."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str


class MergeArguments(Arguments):
    """`merge`: every further key is a parameter of the method."""

    model_config = ConfigDict(extra="allow", strict=True, arbitrary_types_allowed=True)
    refers = ("base", "models", "tokenizer")

    models: list[str | Source] = Field(min_length=1)
    base: str | None = None
    method: str
    lines: Literal["auto"] | list[float] | None = None
    seed: int = 0
    dtype: Literal["float32", "float64", "float16", "bfloat16"] | None = None
    tokenizer: str | None = None
    pad_to_multiple_of: int | None = None
    scope: str | None = None

    @property
    def names(self) -> list[str]:
        """The models, by name."""
        return [item if isinstance(item, str) else item.model for item in self.models]

    @classmethod
    def references_in(cls, given: Mapping[str, Any]) -> Iterator[tuple[Steps, str]]:
        for at, name in super().references_in(given):
            if at != ("tokenizer",) or name not in ("base", "union"):
                yield at, name

    @field_validator("lines")
    @classmethod
    def _are_two(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) != 2:
            raise ValueError("lines is auto, or alpha and beta: [0.3, 0.7]")
        return value


class LinesArguments(Arguments):
    """`lines`: LiNeS on a fine-tune."""

    refers = ("base", "tuned")

    base: str
    tuned: str
    alpha: float
    beta: float | None = None
    outside: Literal["alpha", "depth"] = "alpha"
    scope: str | None = None


class GrowArguments(Arguments):
    """`grow`: wider MLPs, the same function."""

    refers = ("model",)

    model: str
    factor: float | None = None
    width: int | None = None
    layers: str | int = "all"
    scope: str | None = None
    experts: Literal["all", "routed", "shared"] = "all"
    multiple_of: int = 1
    choose: Literal["first", "random", "norm"] = "first"
    break_symmetry: float = 0.0
    seed: int = 0
    uniform: bool = False
    verify: bool = True


class ExpandArguments(Arguments):
    """`expand`: more blocks, the same function."""

    refers = ("model",)

    model: str
    copies: int | None = None
    after: str | int | None = None
    verify: bool = True


class DequantizeArguments(Arguments):
    """`dequantize`: 8-bit floats times their scales."""

    refers = ("model",)

    model: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class TaskVectorArguments(Arguments):
    """`task_vector`: what fine-tuning did."""

    refers = ("base", "tuned")

    base: str
    tuned: str
    dtype: Literal["float32", "tuned"] = "float32"


class ApplyArguments(Arguments):
    """`apply`: add task vectors to a base."""

    refers = ("base", "vectors")

    base: str
    vectors: list[str] = Field(min_length=1)
    scale: float | list[float] = 1.0


class LoraArguments(Arguments):
    """`lora`: a fine-tune as an adapter."""

    refers = ("base", "tuned")

    base: str
    tuned: str
    rank: int | None = None
    energy: float | None = None
    modules: list[str] | None = None
    method: Literal["exact", "randomized"] = "exact"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    save_rest: bool = False
    seed: int = 0


class Blocks(BaseModel):
    """Blocks of one model, by number and in that order: "0-23", "-4--1", "0-7,4-11", "all"."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    layers: str | int = "all"


class ComposeArguments(Arguments):
    """`compose`: blocks of several models, one after another."""

    refers = ("blocks", "before", "after")

    blocks: list[Blocks] = Field(min_length=1)
    before: str | None = None
    after: str | None = None


OPERATIONS: Mapping[str, type[Arguments]] = {
    "merge": MergeArguments,
    "lines": LinesArguments,
    "grow": GrowArguments,
    "expand": ExpandArguments,
    "dequantize": DequantizeArguments,
    "task_vector": TaskVectorArguments,
    "apply": ApplyArguments,
    "compose": ComposeArguments,
    "lora": LoraArguments,
}


class Requirement(BaseModel):
    """What has to hold: `same` names two models that compute the same, bit for bit in exact
    arithmetic; `compare` two whose logits may differ, `at_most` and `at_least` by so much."""

    model_config = ConfigDict(extra="forbid", strict=True)

    same: list[str] | None = None
    compare: list[str] | None = None
    at_most: dict[str, float] = Field(default_factory=dict)
    at_least: dict[str, float] = Field(default_factory=dict)

    @property
    def pair(self) -> list[str]:
        """The two models: what is compared with, and what is compared."""
        return self.same or self.compare or []

    @model_validator(mode="after")
    def _can_be_meant(self) -> Requirement:
        if (self.same is None) == (self.compare is None) or len(self.pair) != 2:
            raise ValueError("give either same or compare, with two names: same: [base, grown]")
        if self.same is not None and (self.at_most or self.at_least):
            raise ValueError("same has no thresholds: use compare")
        if self.compare is not None and not (self.at_most or self.at_least):
            raise ValueError(f"compare needs at_most or at_least, of {', '.join(MEASURES)}")
        for name, bound in (*self.at_most.items(), *self.at_least.items()):
            if name not in MEASURES:
                raise ValueError(unknown("measure", name, MEASURES))
            if not 0 <= bound <= (1 if name == "top1" else float("inf")):
                raise ValueError(f"{name} is never {bound:g}")
        return self


@dataclass(frozen=True)
class Step:
    """A named step: what to do, and where to write what comes of it, if anywhere. `settings` are
    a merge's parameters; `spans` are lengths of runs of blocks over which gradients run, and
    `behind` is how deep what comes after all blocks (the final norm, the head) counts. `theirs`
    says that it is from a configuration of mergekit's; `required` are parameters that every
    tensor needs a value of, and where in the file they are."""

    name: str
    operation: str
    arguments: Arguments
    at: Steps
    write: str | None = None
    settings: Mapping[str, Setting | tuple[Setting | None, ...]] = field(default_factory=dict)
    spans: tuple[int, ...] | None = None
    behind: float = 1.0
    theirs: bool = False
    required: Mapping[str, Steps] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Inputs by name, steps in an order in which they can be made, the step to write, and what
    has to hold. `anatomy` says, for an input, which file has corrections of its anatomy, or where
    in the recipe they are. `document` says on which line of which file things stand; `data` is
    the recipe as it was read, for the record."""

    inputs: Mapping[str, str]
    steps: tuple[Step, ...]
    output: str
    requirements: tuple[tuple[Requirement, Steps], ...]
    document: Document
    notes: tuple[str, ...] = ()
    anatomy: Mapping[str, str | Steps] = field(default_factory=dict)

    @property
    def data(self) -> Any:
        return self.document.data
