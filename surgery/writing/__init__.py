"""Writing a checkpoint: plan the shards, fill them in a staging directory, check, publish."""

from surgery.writing.plan import Plan, plan
from surgery.writing.write import Written, write

__all__ = ["Plan", "Written", "plan", "write"]
