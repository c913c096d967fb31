"""Where a norm or an activation looks at all neurons of an MLP, each has to be copied as often as
the others: it goes by a mean over all, which anything else would change."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.errors import UnsupportedError
from surgery.growth import Growth


def check_even(growths: Sequence[Growth]) -> None:
    """Raise UnsupportedError for growths that copy some neurons more often, or add zeros, where
    something looks at all of them."""
    UnsupportedError.raise_if(
        f"{growth.mlp.stack}.{growth.mlp.block} can't be {_done(growth)}: {why}, whose mean stays "
        f"what it is only if each is copied as often: {_remedy(growth)}"
        for growth in growths
        if (why := growth.mlp.even_because) and not growth.even
    )


def _done(growth: Growth) -> str:
    if growth.padding:
        return f"padded with zero neurons to a width of {growth.width:,}"
    return f"grown from {growth.mlp.width:,} to {growth.width:,}"


def _remedy(growth: Growth) -> str:
    if growth.padding:
        return "grow all layers by the same whole factor, or without uniform (--uniform)"
    width = growth.mlp.width
    return (
        f"a whole factor works, here a width of {2 * width:,} or {3 * width:,}; or choose other "
        f"layers (--layers)"
    )
