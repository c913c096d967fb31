"""Packed weights: what they are, by name, and those (FP8 with scales) that can be turned back."""
