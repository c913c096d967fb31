"""Mutations that keep a document a document: one value, key or line becomes what nobody expects."""

from __future__ import annotations

import json
import random
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**9, 10**40, -(10**9),
    0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"), "", "a", "0", "../../x", "/etc/passwd",
    "..", ".", "a/b", "a\\b", "\x00", "\x1b[31m", "\x1b]8;;http://x\x07", "[red]", "[/x]", "\ud800",
    "\u202e", "\x85", "\n---\n", "`", "a" * 300, "." * 300, "_" * 300, "9" * 30, "1" * 5000, "(a+)+$", "(a|a)*", "(a{1000}){1000}", "(?i)q", "(", "[[",
    "a{99999999999}", "é", "\U0001d54f", "F32", "BF16", "U8", "BOOL", "F4", "F8_E4M3", "llama", "gpt_oss", "gpt2",
    "mlp.experts.0.w1.weight", "model.layers.0.mlp.down_proj.weight", "lora_A", "weight_scale_inv",
    [], {}, [[]], [{}], {"a": []}, [0], [-1], [1, 2], [2**63], ["a"], {"__float__": "Infinity"},
    {"a": {"b": {"c": 1}}}, [None], [1.5], ["a", 1], [[0, 1]], [[1, 0]], [0] * 100,
)  # fmt: skip
WORDS: tuple[str, ...] = (
    "&a [*a]", "*a", "&a", "<<: *a", "!!python/object/apply:os.system [x]", "!!int ''", "!!bool x",
    "!!timestamp x", "!!binary x", "!!set {a}", "!!omap [a]", "!!float .", "? [a]", "? {a: b}", "---", "...",
    "%YAML 1.1", "%TAG ! x", "null", "~", ".inf", "-.inf", ".nan", "1e999", "0x" + "f" * 300, "1:30:30",
    "2001-99-99", "0o9", "0b", "1_000", "[", "]", "{", "}", "|", ">", "- ", ": ", "'", '"\\ud800"', '"\\0"',
    '"\\x1b[31m"', "\t", "\x00", "\ufeff", "\u2028", "a: ", "a: b: c", "true", "yes", "merge", "models", "model",
    "base", "weight", "density", "layers", "0-3", "-1", "all", "slices", "sources", "layer_range", "[0, 1]",
    "[[0, 1], [1, 0]]", "merge_method", "ties", "parameters", "{}", "[]", "{value: [0, 1]}", "steps", "inputs",
    "license: x\n---\n# y", "\n---\n",
)  # fmt: skip


def mutated(data: bytes, kind: str, rng: random.Random) -> bytes:
    """The document with one to four changes; one that isn't a document comes back as it is."""
    if kind == "yaml":
        text = data.decode("utf-8", "surrogateescape")
        for _ in range(rng.randint(1, 4)):
            text = _line(text, rng)
        return text.encode("utf-8", "surrogateescape")
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for _ in range(rng.randint(1, 4)):
        tree = _tree(tree, rng)
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return data


def _tree(tree: Any, rng: random.Random) -> Any:
    """One value somewhere below is another, gone, doubled or under another name."""
    holder: Any = {"": tree}
    key: Any = ""
    root = holder
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.85:
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    choice = rng.random()
    if choice < 0.5:
        holder[key] = rng.choice(NASTY)
    elif choice < 0.6:
        del holder[key]
        root.setdefault("", {})
    elif choice < 0.75:
        new = rng.choice([v for v in NASTY if isinstance(v, str)])
        if rng.random() < 0.5:
            new = f"{key}{new}" if rng.random() < 0.5 else f"{new}{key}"
        if isinstance(holder, dict) and holder is not root:
            holder[new] = holder[key]
            if rng.random() < 0.5:
                holder.pop(key, None)
    elif choice < 0.85 and isinstance(holder, list):
        holder.extend([holder[key]] * rng.randint(1, 3))
    elif isinstance(value := holder[key], (int, float)) and not isinstance(value, bool):
        holder[key] = rng.choice(
            [value + 1, value - 1, -value, value * 2, value * 2**32, value / 2]
        )
    else:
        holder[key] = [value] if rng.random() < 0.5 else {"text_config": value}
    return root[""]


def _line(text: str, rng: random.Random) -> str:
    """One word or line is another, doubled, moved or gone."""
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    choice = rng.random()
    if choice < 0.15:
        del lines[at]
    elif choice < 0.3:
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    elif choice < 0.4:
        lines[at] = " " * rng.randrange(6) + lines[at].lstrip()
    else:
        words = lines[at].split(" ")
        spot = rng.randrange(len(words))
        word = rng.choice(WORDS)
        words[spot] = word if choice < 0.7 else f"{words[spot]}{word}"
        lines[at] = " ".join(words)
    return "\n".join(lines)
