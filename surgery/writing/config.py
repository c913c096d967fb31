"""`config.json` as it was given: its own bytes where nothing changed, else its keys in order."""

from __future__ import annotations

import json

from surgery.checkpoint import Checkpoint


def config_bytes(checkpoint: Checkpoint) -> bytes:
    """The bytes of the output's `config.json`."""
    given = checkpoint.source.path / "config.json"
    if given.is_file():
        raw = given.read_bytes()
        if json.loads(raw) == checkpoint.config:
            return raw
    return (json.dumps(checkpoint.config, indent=2, ensure_ascii=False) + "\n").encode()
