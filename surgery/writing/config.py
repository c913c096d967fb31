"""`config.json` as it was given: its own bytes where nothing changed, else its keys in order."""

from __future__ import annotations

import json

from surgery.checkpoint import Checkpoint


def config_bytes(checkpoint: Checkpoint) -> bytes | None:
    """The bytes of the output's `config.json`; None if the input had none and none was made."""
    given = checkpoint.source.path / "config.json"
    if given.is_file():
        raw = given.read_bytes()
        if json.dumps(json.loads(raw)) == json.dumps(checkpoint.config):  # 1 isn't true or 1.0
            return raw
    elif not checkpoint.config:
        return None
    return (json.dumps(checkpoint.config, indent=2, ensure_ascii=False) + "\n").encode()
