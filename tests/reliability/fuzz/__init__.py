"""Fuzzing of everything that reads a stranger's file: `run.py` is the driver."""
