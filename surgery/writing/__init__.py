"""Writing a checkpoint: plan the shards, fill them in a staging directory, check, publish."""

from surgery.writing.parts import Part
from surgery.writing.plan import Plan, plan
from surgery.writing.write import PartWritten, Written, write, write_part

__all__ = ["Part", "PartWritten", "Plan", "Written", "plan", "write", "write_part"]
