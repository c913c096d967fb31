"""The models that ``surgery demo`` works on, and the text that it judges them by."""
