"""Files of a stranger who means harm, through the real command line: each ends with its documented
exit code and a message that names the file, in little time and little memory."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import processes
import pytest
import yaml
from conftest import INDEX, entry, safetensors_bytes, write_index
from surgery.commands.main import app
from typer.testing import CliRunner, Result
from zoo.build import build
from zoo.kinds import kinds_of

from .fuzz.readers import CONFIG, FORBIDDEN, llama, shard

Attack = Callable[[Path], object]
W = {"w": entry("F32", [2], 0, 8)}
MODEL = "model.safetensors"
MEMORY = 1_000_000_000
SECONDS = 60
"""Two cores that others use too; each takes a second or two."""
ESC = "\x1b]0;owned\x07\x1b[2J"


def surgery(*args: object, memory: int | None = MEMORY) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own that can't have more memory."""

    def limit() -> None:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    done = processes.surgery(*args, errors="surrogateescape", timeout=SECONDS, preexec_fn=limit)
    assert "Traceback" not in done.stderr, done.stderr
    assert not {ord(c) for c in done.stdout + done.stderr} & FORBIDDEN
    return done


def here(*args: object) -> Result:
    """The same in this process, which has imported what takes seconds."""
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert not {ord(c) for c in done.output} & FORBIDDEN
    return done


def refused(args: tuple[object, ...], code: int, *said: str, memory: int | None = MEMORY) -> str:
    """What is said when this is refused: every line is a problem."""
    done = surgery(*args, memory=memory)
    assert done.returncode == code, done.stderr or done.stdout
    assert all(line.startswith(("error: ", "  ", "note: ")) for line in done.stderr.splitlines())
    assert len(done.stderr) < 20_000
    for text in said:
        assert text in done.stderr, done.stderr
    return done.stderr


def model(folder: Path, content: bytes | None = None, config: Any = CONFIG) -> Path:
    """A checkpoint of one file."""
    folder.mkdir(exist_ok=True)
    (folder / MODEL).write_bytes(shard(llama()) if content is None else content)
    raw = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "config.json").write_bytes(raw)
    return folder


def two_shards(folder: Path) -> list[str]:
    """A checkpoint of two files and an index; their names."""
    folder.mkdir(exist_ok=True)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, tensor in zip(names, "ab", strict=True):
        (folder / name).write_bytes(shard({tensor: ("F32", [2])}))
    write_index(folder, dict(zip("ab", names, strict=True)))
    return names


def header(table: Any, data: int = 8, **how: Any) -> Attack:
    return lambda folder: model(folder, safetensors_bytes(table, bytes(data), **how))


def text(raw: str, data: int = 8) -> Attack:
    return lambda folder: model(folder, safetensors_bytes(raw.encode(), bytes(data)))


def terabyte(folder: Path) -> None:
    """A sparse file whose header is said to be half of it."""
    model(folder)
    with (folder / MODEL).open("wb") as file:
        file.write((1 << 39).to_bytes(8, "little"))
        file.truncate(1 << 40)


def many(item: bytes, size: int = 99_000_000) -> Attack:
    """A header of almost the largest size that the format allows, full of small things."""

    def make(folder: Path) -> None:
        model(folder, safetensors_bytes(b'{"a":[' + item * (size // len(item)) + b"0]}"))

    return make


def offsets(*ends: tuple[int, int], data: int) -> Attack:
    table = {f"t{n}": entry("U8", [b - a], a, b) for n, (a, b) in enumerate(ends)}
    return header(table, data)


JSON = "isn't JSON"
HEADERS: dict[str, tuple[Attack, str]] = {
    "a header of a terabyte": (terabyte, "asks for a header of 549,755,813,888"),
    "a header that is longer than the file": (header(W, length=1 << 20), "asks for a header of"),
    "a length of 2^64 - 1": (header(W, length=2**64 - 1), "18,446,744,073,709,551,615"),
    "tensors that overlap": (offsets((0, 8), (4, 12), data=12), "t1 starts at byte 4 and overlaps"),
    "all tensors the same bytes": (offsets(*[(0, 8)] * 9, data=8), "overlaps the tensor"),
    "a gap between tensors": (offsets((0, 4), (8, 12), data=12), "leaves a gap after"),
    "a tensor past the end": (offsets((0, 8), data=4), "the file was cut short"),
    "bytes behind the last tensor": (offsets((0, 4), data=64), "the file was added to"),
    "an offset of 2^62": (header({"w": entry("F32", [2], 2**62, 2**62 + 8)}), "leaves a gap"),
    "a negative offset": (header({"w": entry("F32", [2], -8, 0)}), "data_offsets [-8, 0]"),
    "offsets that run backwards": (header({"w": entry("F32", [2], 8, 0)}), "and has -8"),
    "a negative side": (header({"w": entry("F32", [-1, -2], 0, 8)}), "shape [-1, -2]"),
    "sides whose product overflows": (
        header({"w": entry("F32", [2**32, 2**32, 2**32], 0, 8)}),
        "takes 316,912,650,057,057,350,374,175,801,344 bytes, and has 8",
    ),
    "sides whose product is 0 in 64 bits": (
        header({"w": entry("U8", [2**32, 2**32], 0, 0)}, 0),
        "and has 0",
    ),
    "a million axes": (header({"w": entry("U8", [2**62] * 10**6, 0, 8)}), "1,000,000 axes"),
    "a side of 5,000 digits": (text('{"w":{"shape":[%s]}}' % ("9" * 5000)), JSON),
    "a side of 1e999": (
        text('{"w":{"dtype":"U8","shape":[1e999],"data_offsets":[0,8]}}'),
        "shape [inf]",
    ),
    "a name twice": (text('{"w":%s,"w":%s}' % ((json.dumps(W["w"]),) * 2)), "names w twice"),
    "JSON a million deep": (text("[" * 10**6), JSON),
    "tables half a million deep": (text('{"a":' * 500_000), JSON),
    "a type that is 900 lists deep": (
        text('{"w":{"dtype":%s,"shape":[],"data_offsets":[0,1]}}' % ("[" * 900 + "]" * 900)),
        "has the type [...]",
    ),
    "wrong UTF-8": (header(b'{"\xff\xfe":1}'), JSON),
    "half a surrogate pair": (
        header(b'{"\\ud800":' + json.dumps(W["w"]).encode() + b"}"),
        "no encoding can write",
    ),
    "a name of a megabyte": (header({"_" * 10**6: W["w"]}), "a name of 1,000,000 characters"),
    "33 million lists": (many(b"[],"), "some 66,000,002 values"),
    "25 million numbers": (many(b"[0],"), "values, and 2,000,000 are the most"),
    "one name of 25 million emoji": (
        lambda f: model(f, safetensors_bytes(b'{"' + "\U0001f600".encode() * 24_000_000 + b'":0}')),
        "a name of 24,000,000 characters",
    ),
    "a pickle under the wrong name": (
        lambda f: model(f, b"\x80\x04cos\nsystem\n(S'touch owned'\ntR." + bytes(64)),
        "isn't a safetensors file",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, tmp_path: Path) -> None:
    make, said = HEADERS[name]
    make(tmp_path / "m")
    refused(("inspect", tmp_path / "m"), 3, str(tmp_path / "m" / MODEL), said)


def indexed(*values: Any) -> Attack:
    def make(folder: Path) -> None:
        names = two_shards(folder)
        write_index(folder, {"a": names[0], **{f"b{n}": v for n, v in enumerate(values)}})

    return make


def linked(target: str) -> Attack:
    """The second shard is a link."""

    def make(folder: Path) -> None:
        _, second = two_shards(folder)
        (folder.parent / "outside.safetensors").write_bytes((folder / second).read_bytes())
        (folder / second).unlink()
        (folder / second).symlink_to(target.format(outside=folder.parent / "outside.safetensors"))

    return make


def fifo(name: str) -> Attack:
    def make(folder: Path) -> None:
        model(folder)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def bound(name: str) -> Attack:
    """A socket under the name of a file."""

    def make(folder: Path) -> None:
        model(folder)
        (folder / name).unlink(missing_ok=True)
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket is short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(name)
        finally:
            os.chdir(here)

    return make


def pipe_of_shards(folder: Path) -> None:
    names = two_shards(folder)
    (folder / names[1]).unlink()
    os.mkfifo(folder / names[1])


def nested(depth: int) -> Attack:
    """Folders in one another, made one by one: their path may be longer than a path can be."""

    def make(folder: Path) -> None:
        model(folder)
        here = Path.cwd()
        os.chdir(folder)
        try:
            for _ in range(depth):
                os.mkdir("d")  # in the folder that we are in
                os.chdir("d")
            Path("deep.txt").write_text("x")
        finally:
            os.chdir(here)

    return make


def config(value: Any) -> Attack:
    return lambda folder: model(folder, config=value)


def file(name: str, content: bytes | str, keep: str | None = MODEL) -> Attack:
    """One more file; or instead of the weights."""

    def make(folder: Path) -> None:
        model(folder)
        if keep is None:
            (folder / MODEL).unlink()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def link(name: str, target: str) -> Attack:
    def make(folder: Path) -> None:
        model(folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def folder_as(name: str) -> Attack:
    def make(folder: Path) -> None:
        model(folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


OUTSIDE = "which isn't the plain name of a file beside it"
DIRECTORIES: dict[str, tuple[Attack, str]] = {
    "an index that points up": (indexed("../../etc/passwd"), OUTSIDE),
    "an index with an absolute path": (indexed("/etc/passwd"), OUTSIDE),
    "an index with a path of Windows": (indexed("..\\..\\x"), OUTSIDE),
    "an index with a zero byte": (indexed("a\0.safetensors"), OUTSIDE),
    "an index with half a surrogate pair": (indexed("\ud800.safetensors"), OUTSIDE),
    "an index with an escape sequence": (indexed(ESC), OUTSIDE),
    "an index with a name of 5,000 letters": (indexed("x" * 5000), OUTSIDE),
    "an index of other things": (indexed(None, 1, [], {}, True), "weight_map names None"),
    "an index that is a list": (file(INDEX, "[1, 2]"), "isn't a JSON table"),
    "an index a million deep": (file(INDEX, "[" * 10**6), JSON),
    "an index of many millions": (file(INDEX, "[" + "0," * 10**7 + "0]"), "values"),
    "shards that there aren't": (indexed("model-00009.safetensors"), "it isn't there"),
    "a shard that is a link out": (linked("{outside}"), "outside the checkpoint"),
    "a shard that is a link up": (linked("../outside.safetensors"), "outside the checkpoint"),
    "a shard that is a link to itself": (
        linked("model-00002-of-00002.safetensors"),
        "leads nowhere",
    ),
    "a shard that is a link to a device": (linked("/dev/zero"), "outside the checkpoint"),
    "a shard that is a pipe": (pipe_of_shards, "it is a pipe or a device, and no file"),
    "weights that are a pipe": (fifo(MODEL), "it is a pipe or a device, and no file"),
    "weights that are a socket": (bound(MODEL), "can't be read"),
    "weights that are a directory": (folder_as(MODEL), "Is a directory"),
    "a config that is a pipe": (fifo("config.json"), "it is a pipe or a device, and no file"),
    "a config that is a directory": (folder_as("config.json"), "Is a directory"),
    "a config that is a link out": (link("config.json", "/etc/passwd"), "outside the checkpoint"),
    "a companion that is a link out": (link("vocab.txt", "/etc/passwd"), "outside the checkpoint"),
    "a companion that is a link to a device": (link("a.txt", "/dev/zero"), "outside"),
    "a companion that is a link to nothing": (link("a.txt", "b.txt"), "which isn't there"),
    "folders a thousand deep": (nested(1000), "nested more than 50 deep"),
    "folders deeper than a path can say": (nested(3000), "nested more than 50 deep"),
    "a config that is no table": (config([1]), "isn't a JSON table"),
    "a config 900 deep": (config(b'{"a":' * 900 + b"1" + b"}" * 900), "nested more than 100 deep"),
    "a config a million deep": (config(b'{"a":' * 10**6), JSON),
    "a config that isn't UTF-8": (config(b'{"a": "\xff"}'), JSON),
    "a config of 30 million lists": (config(b'{"a":[' + b"[]," * 30_000_000 + b"0]}"), "values"),
    "a number of 5,000 digits": (config(b'{"hidden_size": ' + b"9" * 5000 + b"}"), JSON),
    "only a pickle": (file("pytorch_model.bin", b"cos\nsystem\n", None), "convert it"),
    "an adapter with no model": (file("adapter_config.json", "{}", None), "is a LoRA adapter"),
}


@pytest.fixture(autouse=True)
def _without_deep_folders(tmp_path: Path) -> Iterator[None]:
    """Python's own rmtree, with which pytest clears up, can't remove what is a thousand deep."""
    yield
    subprocess.run(["rm", "-rf", tmp_path / "m" / "d"], check=True)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_directories(name: str, tmp_path: Path) -> None:
    make, said = DIRECTORIES[name]
    make(tmp_path / "m")
    refused(("inspect", tmp_path / "m"), 3, str(tmp_path / "m"), said)


HUGE = {**CONFIG, "num_hidden_layers": 10**9, "num_experts": 10**9, "vocab_size": 10**18}
ODD_CONFIGS: dict[str, Any] = {
    "10^9 layers": HUGE,
    "numbers that aren't": b'{"hidden_size": NaN, "vocab_size": 1e999, "model_type": -Infinity}',
    "a type that is a list": {**CONFIG, "model_type": ["llama"]},
    "classes that are a table": {**CONFIG, "architectures": {"0": "x"}},
    "widths that are lists": {**CONFIG, "mlp_widths": [[1], {}, None, 6]},
    "a list of another length": {**CONFIG, "layer_types": ["full_attention"] * 7},
    "no experts": {**CONFIG, "num_experts": 0, "num_local_experts": -3},
    "text_config in text_config": {"text_config": {"text_config": {"text_config": CONFIG}}},
    "markup and escapes": {"model_type": f"[red]{ESC}", "architectures": ["[link=http://x]y[/]"]},
    "half a surrogate pair": {**CONFIG, "model_type": "\ud800"},
    "quantized by nobody": {**CONFIG, "quantization_config": {"quant_method": {"a": 1}}},
}


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_what_a_config_says_is_only_looked_at(name: str, tmp_path: Path) -> None:
    """The tensors tell what there is: `inspect` makes nothing of a number in a config."""
    made = model(tmp_path / "m", config=ODD_CONFIGS[name])
    for args in (("inspect", made), ("inspect", made, "--json"), ("inspect", made, "--as-anatomy")):
        done = surgery(*args)
        assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 100


def test_names_are_text_to_a_terminal(tmp_path: Path) -> None:
    """Escape sequences, markup, text that runs backwards, and lines that pass for ours."""
    names = [
        f"[red]{ESC}",
        "[link=http://x]y[/link]",
        "a\nerror: owned",
        "\u202eb",
        "../../x",
        "\x85",
    ]
    made = model(tmp_path / "m", shard({name: ("F32", [2]) for name in names}), config={})
    (made / f"{ESC[:4]}.txt").write_text("x")
    done = surgery("inspect", made)
    assert done.returncode == 0
    assert "[red]\\x1b]0;owned" in done.stdout
    assert "\n  a\\nerror: owned\n" in done.stdout
    assert "[link=http://x]y[/link]" in done.stdout
    assert "\\u202eb" in done.stdout
    assert "../../x" in done.stdout
    # the same in an error
    table = {f"{ESC}\nerror: owned": {**W["w"], "dtype": "F33"}}
    made = model(tmp_path / "n", safetensors_bytes(table, bytes(8)))
    said = refused(("inspect", made), 3, "\\x1b]0;owned\\x07\\x1b[2J\n  error: owned has the type")
    assert sum(line.startswith("error:") for line in said.splitlines()) == 1


def test_a_link_inside_and_the_links_of_the_hub_are_followed(tmp_path: Path) -> None:
    here = model(tmp_path / "m")
    (here / "vocab.txt").write_text("x")
    (here / "again.txt").symlink_to("vocab.txt")
    assert "again.txt" in json.loads(surgery("inspect", here, "--json").stdout)["companions"]
    repo = tmp_path / "models--org--x"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (MODEL, "config.json"):
        (here / name).rename(blobs / f"blob-{name}")
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    assert surgery("inspect", snapshot).returncode == 0
    (snapshot / "vocab.txt").symlink_to("../../../../../etc/passwd")
    refused(("inspect", snapshot), 3, "outside the checkpoint")


def test_what_is_no_file_is_left_behind(tmp_path: Path) -> None:
    """Pipes, sockets and links to folders among the companions: told, never opened."""
    here = model(tmp_path / "m")
    fifo("pipe.txt")(here)
    bound("socket.txt")(here)
    (here / "inner").mkdir()
    (here / "folder").symlink_to("inner")
    report = json.loads(surgery("inspect", here, "--json").stdout)
    assert report["left_behind"] == ["folder", "pipe.txt", "socket.txt"]
    done = surgery("lines", here, here, "-o", tmp_path / "out", "--alpha", "0.5", memory=None)
    assert done.returncode == 0, done.stderr
    assert not {"folder", "pipe.txt", "socket.txt"} & {p.name for p in (tmp_path / "out").iterdir()}


def test_many_files(tmp_path: Path) -> None:
    here = model(tmp_path / "m")
    for number in range(2000):
        (here / f"{number}.txt").touch()
    report = json.loads(surgery("inspect", here, "--json").stdout)
    assert len(report["companions"]) == 2000


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


RECIPES: dict[str, tuple[str | bytes, str]] = {
    "anchors that explode": (laughs(10), "too many values"),
    "an anchor that holds itself": ("steps: &a [*a]", "unconstructed|nested too deeply|isn't YAML"),
    "a tag that makes an object": (
        "steps: !!python/object/apply:os.system ['touch owned']",
        "python/object/apply:os.system isn't allowed",
    ),
    "a tag that imports": ("steps: !!python/module:os x", "isn't allowed"),
    "lists a million deep": ("[" * 999_999, "nested too deeply"),
    "a gigabyte": ("x" * 2_000_000, "no recipe is that long"),
    "a number of a million digits": ("inputs: {a: " + "9" * 900_000 + "}", "is no int"),
    "a key twice": ("inputs: {a: x, a: y}", "a second time"),
    "an escape sequence": ('inputs: {a: "\\x1b[2J"}', "isn't allowed in text"),
    "not UTF-8": (b"inputs: \xff", "isn't UTF-8"),
    "markup in a name": ("inputs: {'[red]x': y}", "is no name"),
    "a merge of nothing known": ("steps: {a: {merge: {method: [ties], models: 3}}}", "steps.a"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, tmp_path: Path) -> None:
    raw, said = RECIPES[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    done = here("run", path, "-o", tmp_path / "out")
    found = done.stderr
    assert done.exit_code == 3, found
    assert str(path) in found
    assert any(each in found for each in said.split("|")), found
    assert not (tmp_path / "out").exists()
    assert not Path("owned").exists()


def adapter(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    table = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(table))
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    weights = {f"{q}A.weight": ("F32", [2, 4]), f"{q}B.weight": ("F32", [4, 2])}
    (folder / "adapter_model.safetensors").write_bytes(shard(weights))
    return folder


ADAPTERS: dict[str, tuple[dict[str, Any], int, str]] = {
    "a pattern that never ends": (
        {"rank_pattern": {r"(\w|[a-z]|[._0-9])*(?<!j)": 3}},
        3,
        "doesn't come to an end",
    ),
    "a pattern that fills the memory": ({"rank_pattern": {"(a{1000}){1000}": 1}}, 3, "repeats"),
    "a count that overflows": ({"alpha_pattern": {"a{99999999999}": 1}}, 3, "repeats"),
    "a pattern 5,000 deep": ({"alpha_pattern": {"(" * 450 + ")" * 450: 1}}, 3, "pattern"),
    "a rank of 10^300": ({"r": 10**300}, 3, "has to be a whole number"),
    "an alpha that isn't one": ({"lora_alpha": float("nan")}, 3, "has to be a number"),
    "another kind": ({"peft_type": ESC}, 4, "peft_type"),
    "modules of tables": ({"modules_to_save": [{}]}, 3, "has to be a list of names"),
    "rows for tokens": ({"trainable_token_indices": {"a": [-1]}}, 0, ""),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str, tmp_path: Path) -> None:
    changes, code, said = ADAPTERS[name]
    base, made = model(tmp_path / "m"), adapter(tmp_path / "a", **changes)
    done = here("inspect", f"{base}+{made}")
    assert done.exit_code == code, done.stderr
    assert not said or any(each in done.stderr for each in said.split("|")), done.stderr


def test_an_adapter_of_pickles(tmp_path: Path) -> None:
    base, made = model(tmp_path / "m"), adapter(tmp_path / "a")
    (made / "adapter_model.safetensors").rename(made / "adapter_model.bin")
    refused(("inspect", f"{base}+{made}"), 3, "a pickle", "Surgery unpickles nothing")


def tokenizer(**changes: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 2, "content": "a" * 30 + "!", "normalized": True, **flags}],
        "normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": "y"},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated"},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
        **changes,
    }


@pytest.mark.parametrize(
    ("table", "code"),
    [
        (tokenizer(), 0),
        (tokenizer(model={"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}), 3),
        (tokenizer(model={"type": "BPE", "vocab": {"a": 2**40}, "merges": []}), 3),
        (tokenizer(model={"type": "Unigram", "vocab": [], "unk_id": 7}), 3),
        (tokenizer(added_tokens=[{"id": 2**31}]), 3),
    ],
)
def test_tokenizers(table: Any, code: int, tmp_path: Path) -> None:
    """A normalizer whose regular expression doesn't end is never run."""
    one, two = model(tmp_path / "a"), model(tmp_path / "b")
    for folder in (one, two):
        (folder / "tokenizer.json").write_text(json.dumps(table))
    options = (
        "--method",
        "linear",
        "--no-base",
        "--tokenizer",
        "union",
        "--dry-run",
        "-o",
        tmp_path / "out",
    )
    done = here("merge", one, two, two, *options)
    assert done.exit_code == code, done.stderr


BUILT: dict[str, tuple[dict[str, Any], str]] = {
    "10^9 layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1e+09"),
    "10^9 experts": ({"model_type": "mixtral", "num_local_experts": 10**9}, "num_local_experts"),
    "3,000 layers that aren't there": ({"num_hidden_layers": 3000, "hidden_size": 4096}, ""),
    "a vocabulary of 10^18": ({"vocab_size": 10**18}, ""),
    "no vocabulary": ({"vocab_size": 0}, "embed_tokens"),
    "a negative length": ({"max_position_embeddings": -5}, ""),
    "heads that don't divide": ({"num_attention_heads": 3}, ""),
    "no heads": ({"num_attention_heads": 0}, ""),
    "an activation that isn't one": ({"hidden_act": "../../x"}, ""),
    "text where a number is": ({"hidden_size": "4"}, ""),
    "a type that is a list": ({"model_type": ["llama"]}, "model type ['llama']"),
    "classes that are a number": ({"architectures": 3}, ""),
    "an infinity that isn't": ({"rms_norm_eps": {"__float__": []}}, ""),
}


@pytest.mark.parametrize("name", BUILT)
def test_configs_that_a_model_is_built_of(name: str, tmp_path: Path) -> None:
    """`verify` builds the stock model: refused (4), or done where nothing comes of the value."""
    changes, said = BUILT[name]
    one = model(tmp_path / "a", config={**CONFIG, **changes})
    done = here("verify", one, one)
    assert done.exit_code in ((4,) if said else (0, 3, 4)), (done.exit_code, done.stderr)
    assert said in done.stderr


def test_building_a_model_asks_nothing_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class of Jev looks for files of its own, and where there is no folder on the Hub."""
    [kind] = kinds_of("jev")
    one = build(kind, tmp_path / "one").folder
    asked = []

    def refuse(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    here("verify", one, one)
    assert asked == []
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("huggingface.co", 443))
    assert asked == ["huggingface.co"]


CARDS: dict[str, str | bytes] = {
    "a million line breaks": "---" + "\n" * 10**6,
    "a million fences": "---\n" * 10**6,
    "tags that raise": "---\nlicense: !!bool maybe\nlanguage: !!timestamp x\n---\n",
    "a tag that makes an object": "---\nlicense: !!python/object/apply:os.mkdir [owned]\n---\n",
    "anchors that explode": f"---\n{laughs(10)}\nlicense: *a9\n---\n",
    "a list in itself": "---\nlicense: &a [*a]\n---\n",
    "a way out": '---\nlicense: "x\\n---\\n# Owned"\nlanguage: ["a\\nb: c"]\n---\n',
    "not UTF-8": b"---\nlicense: \xff\xfe\n---\n\x00",
}


@pytest.mark.parametrize("name", CARDS)
def test_cards(name: str, tmp_path: Path) -> None:
    """The model card of the output says what it says, whatever the input's was."""
    raw = CARDS[name]
    base = model(tmp_path / "a: b\n---\n# Owned")
    (base / "README.md").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    (base / "README.input.md").write_text("mine")
    done = here("lines", base, base, "--alpha", "0.5", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    front = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    assert front.keys() <= {"base_model", "library_name", "tags", "license", "language"}
    assert front["base_model"] == ["a: b\n---\n# Owned"[: len(base.name)]]
    assert [line for line in lines if line.startswith("#")] == ["# Edited with Surgery"]
    assert (tmp_path / "out" / "README.input.md").read_text() == "mine"
    assert (tmp_path / "out" / "README.input1.md").read_bytes() == (base / "README.md").read_bytes()
    assert not Path("owned").exists()


@pytest.mark.parametrize("name", ["README.md", "surgery.json", "model.safetensors.index.json"])
def test_folders_under_the_names_of_outputs(name: str, tmp_path: Path) -> None:
    """They travel, or are refused (3), or the output can't be written (5): nothing lies there half done."""
    base = model(tmp_path / "m")
    (base / name).mkdir()
    (base / name / "x.txt").write_text("x")
    done = here("lines", base, base, "--alpha", "0.5", "-o", tmp_path / "out")
    assert done.exit_code in (0, 3, 5), done.stderr
    assert (done.exit_code == 0) == (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"m", "out"}


def test_a_companion_is_copied_in_pieces(tmp_path: Path) -> None:
    """A large file beside the weights takes no memory."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the most memory of a process is read from /proc")
    base = model(tmp_path / "m")
    with (base / "extra.dat").open("wb") as file:
        file.truncate(700 << 20)
    code = (
        "from surgery.commands.main import app\n"
        "try: app()\n"
        "finally: print(open('/proc/self/status').read())"
    )
    verb = ["lines", base, base, "--alpha", "0.5", "-o", tmp_path / "out", "--json"]
    done = processes.surgery(*verb, code=code)
    assert done.returncode == 0, done.stderr
    most = re.search(r"^VmHWM:\s+(\d+) kB$", done.stdout, re.MULTILINE)
    assert most is not None
    assert int(most[1]) * 1024 < MEMORY
    assert (tmp_path / "out" / "extra.dat").stat().st_size == 700 << 20


def test_more_tensors_than_can_be_held(tmp_path: Path) -> None:
    """Two files of 180,000 empty tensors each, which take no room on a disk."""
    here_ = tmp_path / "m"
    here_.mkdir()
    for number in (1, 2):
        table = {f"t{number}.{n}": entry("U8", [0], 0, 0) for n in range(180_000)}
        name = f"model-{number:05d}-of-00002.safetensors"
        (here_ / name).write_bytes(safetensors_bytes(table))
    refused(("inspect", here_), 3, "tensors: no model has")
