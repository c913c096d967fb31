"""Reading is never executing: a checkpoint full of code goes through the verbs under Python's own
audit hooks, and nothing in it is imported, compiled, unpickled or even opened as weights."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

from .fuzz.readers import CONFIG, llama, shard

MARK = "EVIL_7f3a"
"""In every line of code of the checkpoint, so that its text is known wherever it turns up."""

DRIVER = """
import os, sys
folder, log = os.environ["EVIL"], os.environ["LOG"]
fired = []

def hook(event, args):
    said = None
    if event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork",
                 "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen"):
        said = args
        if event == "ctypes.dlopen" and not str(args[0]).startswith(folder):
            return
    elif event == "compile":
        source = args[0]
        source = source.decode("latin1") if isinstance(source, bytes) else source
        if isinstance(source, str) and "EVIL_MARK" in source:
            said = args[1:]
    elif event == "exec":
        if folder in str(getattr(args[0], "co_filename", "")):
            said = args
    elif event == "import":
        if str(args[1] or "").startswith(folder):
            said = args
    elif event == "open":
        name = str(args[0])
        if name.startswith(folder) and name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")):
            said = args
    if said is not None:
        fired.append(f"{event} {said!r}")

if not os.environ.get("CONTROL"):
    import torch, transformers, peft, tokenizers, pydantic, yaml  # what they do is theirs
sys.addaudithook(hook)
from typer.testing import CliRunner
from surgery.commands.main import app
import json
for line in json.loads(os.environ["VERBS"]):
    result = CliRunner().invoke(app, line)
    print(result.exit_code, line[0], result.stderr.strip()[:300].replace(chr(10), " | "))
with open(log, "w") as file:
    file.write(chr(10).join(fired))
""".replace("EVIL_MARK", MARK)


class _Owned:
    """A pickle that makes a file as it is read."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.at),)


def evil(folder: Path, owned: Path) -> Path:
    """A small model with every kind of code beside it that something might run."""
    code = f"import os; {MARK} = os.makedirs({str(owned)!r}, exist_ok=True)  # {MARK}\n"
    code += f"class Evil: pass  # {MARK}\n"
    maps = {f"Auto{kind}": "modeling_evil.Evil" for kind in ("Config", "Model", "ModelForCausalLM")}
    config = {
        **CONFIG,
        "auto_map": {**maps, "AutoTokenizer": ["tokenization_evil.Evil", None]},
        "custom_pipelines": {"x": {"impl": "pipeline_evil.Evil", "pt": ["AutoModel"]}},
        "trust_remote_code": True,
        "attn_implementation": "evil/kernel",
        "_attn_implementation": "eager",
    }
    folder.mkdir()
    values = sum(prod(shape) for _, shape in llama().values())
    data = struct.pack(f"<{values}f", *(0.01 * (at % 7 + 1) for at in range(values)))
    (folder / "model.safetensors").write_bytes(shard(llama(), data))
    (folder / "config.json").write_text(json.dumps(config))
    tokens = {
        "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
        "tokenizer_class": "Evil",
        "trust_remote_code": True,
        "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "evil"}))
    names = ("modeling_evil", "tokenization_evil", "pipeline_evil", "torch", "transformers", "json")
    names += ("sitecustomize", "conftest", "__init__", "setup", "surgery", "modeling_mlp_widths")
    for name in names:
        (folder / f"{name}.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "a.pkl"):
        (folder / name).write_bytes(pickle.dumps(_Owned(owned)))
    return folder


def audited(tmp_path: Path, verbs: list[list[str]]) -> tuple[list[str], str]:
    """What fired while the verbs ran in the checkpoint's own folder, and what they said."""
    driver = tmp_path / "driver" / "driver.py"
    driver.parent.mkdir(exist_ok=True)
    driver.write_text(DRIVER)
    folder = tmp_path / "evil"
    given = {"EVIL": str(folder), "LOG": str(tmp_path / "log"), "VERBS": json.dumps(verbs)}
    done = subprocess.run(
        [sys.executable, str(driver)],
        env={**os.environ, **given},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return (tmp_path / "log").read_text().splitlines(), done.stdout


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    return tmp_path / "owned"


def test_the_verbs_run_nothing_of_a_checkpoint(tmp_path: Path, owned: Path) -> None:
    folder = str(evil(tmp_path / "evil", owned))
    out = str(tmp_path / "out")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"inputs: {{a: {folder}}}\nsteps: {{m: {{lines: {{base: a, tuned: a, alpha: 0.5}}}}}}\n"
    )
    verbs = [
        ["inspect", folder],
        ["inspect", ".", "--json"],
        ["diff", folder, folder],
        ["lines", folder, folder, "--alpha", "0.5", "-o", f"{out}-lines"],
        ["grow", folder, "--factor", "1.5", "-o", f"{out}-grow"],
        ["expand", folder, "--copies", "1", "-o", f"{out}-expand"],
        ["merge", folder, folder, "--method", "ties", "--tokenizer", "union", "-o", f"{out}-merge"],
        ["lora", folder, folder, "--rank", "1", "-o", f"{out}-lora", "--dry-run"],
        ["verify", folder, folder],
        ["run", str(recipe), "-o", f"{out}-run"],
    ]
    fired, said = audited(tmp_path, verbs)
    assert fired == []
    assert not owned.exists()
    codes = [line.split()[0] for line in said.splitlines()]
    assert len(codes) == len(verbs), said
    assert codes[:5] == ["0"] * 5, said
    assert set(codes) <= {"0", "2", "3", "4"}, said
    # the code travels as text, and the pickles don't
    assert (tmp_path / "out-lines" / "modeling_evil.py").is_file()
    assert not list((tmp_path / "out-lines").glob("*.bin"))


def test_the_hooks_see_what_they_should(tmp_path: Path, owned: Path) -> None:
    """The same hooks while that code is run on purpose: else silence would prove nothing."""
    folder = evil(tmp_path / "evil", owned)
    code = DRIVER.partition("from typer.testing")[0] + (
        f"import pickle; sys.path.insert(0, {str(folder)!r}); import modeling_evil\n"
        f"os.rmdir({str(owned)!r}); pickle.load(open({str(folder / 'a.pkl')!r}, 'rb'))\n"
        "print(chr(10).join(fired))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "EVIL": str(folder), "LOG": "x", "CONTROL": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    seen = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"compile", "exec", "open", "pickle.find_class"} <= seen, done.stdout + done.stderr
    assert owned.exists()
