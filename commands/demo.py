"""`surgery demo`."""


def demo() -> None:
    """Placeholder."""
