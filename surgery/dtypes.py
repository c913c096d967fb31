"""The element types that safetensors knows, by the names its headers use.

Headers are read without torch, so the types are described here, and torch's own are looked up
only when bytes are turned into numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from surgery.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import dtype as TorchDType

Kind = Literal["float", "integer", "packed"]


@dataclass(frozen=True, eq=False)
class DType:
    """An element type: `bits` wide, `torch_name` its name in torch.

    `kind` is what arithmetic may do with it: "float" can be scaled and averaged, "integer"
    (bool too) is only ever copied, and "packed" (8 bits and fewer) holds quantized values that
    mean nothing without their scales.
    """

    name: str
    bits: int
    kind: Kind
    torch_name: str | None = None

    def __reduce__(self) -> tuple[Callable[[str], DType], tuple[str]]:
        return _known, (self.name,)  # there is one of each, which is compared by being it

    def __str__(self) -> str:
        return self.name

    @cached_property
    def torch(self) -> TorchDType:
        """The torch type. Raises UnsupportedError where torch has none."""
        import torch

        if self.torch_name is None or not hasattr(torch, self.torch_name):
            raise UnsupportedError(f"torch has no type for {self.name}: it can only be copied")
        found: TorchDType = getattr(torch, self.torch_name)
        return found

    @property
    def compute(self) -> DType:
        """The type to compute in: float64 for float64, float32 for every other float."""
        return DTYPES["F64" if self.name == "F64" else "F32"]


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("F64", 64, "float", "float64"),
        DType("F32", 32, "float", "float32"),
        DType("F16", 16, "float", "float16"),
        DType("BF16", 16, "float", "bfloat16"),
        DType("F8_E5M2", 8, "packed", "float8_e5m2"),
        DType("F8_E4M3", 8, "packed", "float8_e4m3fn"),
        DType("F8_E8M0", 8, "packed", "float8_e8m0fnu"),
        DType("F8_E5M2FNUZ", 8, "packed", "float8_e5m2fnuz"),
        DType("F8_E4M3FNUZ", 8, "packed", "float8_e4m3fnuz"),
        DType("F6_E2M3", 6, "packed"),
        DType("F6_E3M2", 6, "packed"),
        DType("F4", 4, "packed"),
        DType("I64", 64, "integer", "int64"),
        DType("I32", 32, "integer", "int32"),
        DType("I16", 16, "integer", "int16"),
        DType("I8", 8, "integer", "int8"),
        DType("U64", 64, "integer", "uint64"),
        DType("U32", 32, "integer", "uint32"),
        DType("U16", 16, "integer", "uint16"),
        DType("U8", 8, "integer", "uint8"),
        DType("BOOL", 8, "integer", "bool"),
        DType("C64", 64, "packed", "complex64"),
    )
}


def _known(name: str) -> DType:
    return DTYPES[name]
