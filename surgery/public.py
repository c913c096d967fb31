"""What `import surgery` offers, by name."""

from surgery.checkpoint import Checkpoint, Edit
from surgery.errors import (
    ArgumentError,
    FormatError,
    InputError,
    MismatchError,
    NotFoundError,
    OutputError,
    RecipeError,
    SurgeryError,
    UnsupportedError,
    VerificationError,
)
from surgery.integrity.check import check
from surgery.lora.adapter import Adapter, open_adapter
from surgery.lora.bake import adapter_task_vector, apply_adapter
from surgery.lora.extract import extract_lora
from surgery.lora.written import LoraAdapter
from surgery.models import open_checkpoint, open_update
from surgery.operations.blocks import compose
from surgery.operations.dequantize import dequantize
from surgery.operations.diff import diff
from surgery.operations.expand import expand
from surgery.operations.grow import grow
from surgery.operations.lines import lines
from surgery.operations.merge import merge
from surgery.operations.task_vectors import apply, task_vector
from surgery.tensor import LazyTensor
from surgery.vectors import TaskVector, open_task_vector
from surgery.verification import Verification, certify, find_growths, verify
from surgery.writing import Part, PartWritten, Plan, Written, plan, write, write_part

__all__ = [
    "Adapter",
    "ArgumentError",
    "Checkpoint",
    "Edit",
    "FormatError",
    "InputError",
    "LazyTensor",
    "LoraAdapter",
    "MismatchError",
    "NotFoundError",
    "OutputError",
    "Part",
    "PartWritten",
    "Plan",
    "RecipeError",
    "SurgeryError",
    "TaskVector",
    "UnsupportedError",
    "Verification",
    "VerificationError",
    "Written",
    "adapter_task_vector",
    "apply",
    "apply_adapter",
    "certify",
    "check",
    "compose",
    "dequantize",
    "diff",
    "expand",
    "extract_lora",
    "find_growths",
    "grow",
    "lines",
    "merge",
    "open_adapter",
    "open_checkpoint",
    "open_task_vector",
    "open_update",
    "plan",
    "task_vector",
    "verify",
    "write",
    "write_part",
]
