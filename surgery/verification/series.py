"""Series of numbers over time, as models that forecast take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from surgery.verification.draws import Values, noise, ones

PAST, FUTURE = 64, 8


def series(config: Any, accepts: Mapping[str, bool], batch: int, seed: int) -> Iterator[Values]:
    """The past, alone, and with the future and the features of both where a model takes these;
    of one channel, or of as many as the config has."""
    if "past_values" not in accepts:
        return
    context = _number(config, "context_length", default=PAST)
    past = context + max(getattr(config, "lags_sequence", None) or [0])
    future = _number(config, "prediction_length", default=FUTURE)
    channels = _number(config, "input_size", "num_input_channels", default=1)
    times = _number(config, "num_time_features", default=0)
    statics = {
        "static_categorical_features": _number(config, "num_static_categorical_features"),
        "static_real_features": _number(config, "num_static_real_features"),
    }
    for behind in dict.fromkeys([(), (channels,)] if channels == 1 else [(channels,), ()]):
        values = {"past_values": noise((batch, past, *behind), seed)}
        with_mask = {"past_observed_mask": ones((batch, past, *behind)).float()}
        features = {
            "past_time_features": noise((batch, past, times), seed),
            "future_time_features": noise((batch, future, times), seed),
            "future_values": noise((batch, future, *behind), seed),
            **{
                name: (ones((batch, n)) * 0 if "categorical" in name else noise((batch, n), seed))
                for name, n in statics.items()
                if n
            },
        }
        features |= {
            "past_values_padding": 0 * ones((batch, past)),
            "freq": 0 * ones((batch, 1)),
        }
        for more in (features | with_mask, with_mask, {}):
            yield values | {name: value for name, value in more.items() if name in accepts}


def _number(config: Any, *keys: str, default: int = 0) -> int:
    for key in keys:
        if type(value := getattr(config, key, None)) is int and value > 0:
            return value
    return default
