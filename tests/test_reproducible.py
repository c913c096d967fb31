"""`--checksums`, signatures, and that the same recipe gives the same digests anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import files_in
from surgery.commands.main import app
from surgery.commands.output import command_line
from typer.testing import CliRunner

from surgery import ArgumentError, check, lines, open_checkpoint, write
from surgery.integrity.digests import read_sums
from surgery.integrity.signing import Signer

Make = Callable[..., Path]
CODE = "from surgery.commands.main import run; run()"

RECIPE = """
inputs: {base: ./base, tuned: ./tuned}
steps:
  merged:
    merge: {base: base, models: [tuned], method: dare_ties, density: 0.5, seed: 3, lines: auto}
  grown:
    grow: {model: merged, factor: 2}
"""


def surgery(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files_in(folder).items()}


@pytest.fixture
def pair(make_model: Make) -> tuple[Path, Path]:
    base = make_model(name="base")
    return base, make_model(name="tuned", seed=1)


# --- the same anywhere ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb",
    [
        "lines base tuned --alpha 0.3 --max-shard-size 9KB",
        "merge base tuned --method ties --density 0.4 --lines auto",
        "grow base --factor 1.5 --no-logits",
        "run recipe.yaml --no-logits",
    ],
)
def test_the_same_recipe_gives_the_same_digests(
    pair: tuple[Path, Path], tmp_path: Path, verb: str
) -> None:
    """In directories of other names, on other days, at other numbers of threads."""
    found = []
    for place, threads, day in (("here", "1", "2001-01-01"), ("else/where", "3", "2031-12-31")):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        for model in pair:
            copied = subprocess.run(["cp", "-r", str(model), str(folder)], check=False)
            assert copied.returncode == 0
            for path in (folder / model.name).iterdir():
                subprocess.run(["touch", "-d", day, str(path)], check=True)
        (folder / "recipe.yaml").write_text(RECIPE)
        out = folder / f"out-{threads}"
        command = [*verb.split(), "--threads", threads, "--checksums", "-o", str(out)]
        subprocess.run(
            [sys.executable, "-c", CODE, *command],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONHASHSEED": threads,
                "OMP_NUM_THREADS": threads,
                "TZ": f"X{threads}",
            },
            check=True,
            capture_output=True,
        )
        found.append(digests(out))
    assert found[0] == found[1]
    assert {"SHA256SUMS", "surgery.json", "README.md"} <= found[0].keys()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("lines a b -o x/y --alpha 1", "surgery lines a b -o OUT --alpha 1"),
        ("lines a b --out=x --json --overwrite", "surgery lines a b --out=OUT"),
        ("lines a b -ox --threads 4 --threads=2", "surgery lines a b -oOUT"),
        ("run r.yaml --report j.xml --sign-key k", "surgery run r.yaml"),
    ],
)
def test_the_command_without_what_decides_no_byte(
    monkeypatch: pytest.MonkeyPatch, given: str, kept: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["surgery", *given.split()])
    assert command_line() == kept


# --- checksums ------------------------------------------------------------------------------


def test_every_file_of_the_output_is_listed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    edited = lines(*map(open_checkpoint, pair), alpha=0.5)
    write(edited, tmp_path / "out", checksums=True, max_shard_bytes=9000)
    expected = digests(tmp_path / "out")
    del expected["SHA256SUMS"]
    assert read_sums(tmp_path / "out" / "SHA256SUMS") == expected
    assert len(expected) > 5
    run = ["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"]
    subprocess.run(run, cwd=tmp_path / "out", check=True)
    assert check(tmp_path / "out").sound


def test_every_file_of_the_inputs_is_recorded(pair: tuple[Path, Path], tmp_path: Path) -> None:
    edited = lines(*map(open_checkpoint, pair), alpha=0.5)
    record = write(edited, tmp_path / "out", checksums=True).record
    for role, folder in zip(("base", "tuned"), pair, strict=True):
        found = record["edits"][0]["inputs"][role]["files"]
        assert {name: one["sha256"] for name, one in found.items()} == digests(folder)
        assert found["config.json"]["size"] == (folder / "config.json").stat().st_size


def test_without_the_option_nothing_is_hashed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    edited = lines(*map(open_checkpoint, pair), alpha=0.5)
    record = write(edited, tmp_path / "out").record
    assert not (tmp_path / "out" / "SHA256SUMS").exists()
    files = record["edits"][0]["inputs"]["base"]["files"]
    assert files == {
        "model.safetensors": {"size": files["model.safetensors"]["size"], "sha256": None}
    }


def test_the_digests_of_an_input_dont_travel(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("SHA256SUMS", "model.sig"):
        (pair[1] / name).write_text("of other bytes")
    write(lines(*map(open_checkpoint, pair), alpha=0.5), tmp_path / "out")
    assert not (tmp_path / "out" / "SHA256SUMS").exists()
    assert not (tmp_path / "out" / "model.sig").exists()


@pytest.mark.parametrize(
    "verb",
    [
        "lines BASE TUNED --alpha 0.3",
        "merge BASE TUNED --method task_arithmetic",
        "grow BASE --factor 2 --no-logits",
        "expand BASE --copies 1 --no-logits",
        "task-vector BASE TUNED",
        "lora BASE TUNED --rank 2",
    ],
)
def test_verbs_that_write_take_the_option(
    pair: tuple[Path, Path], tmp_path: Path, verb: str
) -> None:
    names = {"BASE": str(pair[0]), "TUNED": str(pair[1])}
    words = [names.get(word, word) for word in verb.split()]
    result = surgery(*words, "--checksums", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    result = surgery("check", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["compared"] == ["SHA256SUMS"]
    for path in sorted((tmp_path / "out").glob("*.safetensors"))[:1]:
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        assert surgery("check", tmp_path / "out").exit_code == 3


# --- signatures -----------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    pytest.importorskip("model_signing", exc_type=ImportError)
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture
def signed(pair: tuple[Path, Path], keys: tuple[Path, Path], tmp_path: Path) -> Path:
    out = tmp_path / "out"
    result = surgery(
        "lines", *pair, "--alpha", "0.3", "--checksums", "--sign-key", keys[0], "-o", out
    )
    assert result.exit_code == 0, result.stderr
    return out


def test_a_signature_holds(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / ".gitattributes").write_text("what the Hub adds")
    result = surgery("check", signed, "--public-key", keys[1], "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["signed"] == f"the key {keys[1]}"
    assert str(keys[0]) not in "".join(map(str, files_in(signed).values()))


def test_the_packages_own_verifier_agrees(signed: Path, keys: tuple[Path, Path]) -> None:
    from model_signing import verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=keys[1])
    config.verify(signed, signed / "model.sig")


def test_what_the_package_has_signed_holds(
    pair: tuple[Path, Path], keys: tuple[Path, Path]
) -> None:
    from model_signing import hashing, signing

    for how in (hashing.Config(), hashing.Config().use_shard_serialization(shard_size=1000)):
        config = signing.Config().use_elliptic_key_signer(private_key=keys[0])
        how.set_ignored_paths(paths=[pair[0] / "model.sig"])
        config.set_hashing_config(how).sign(pair[0], pair[0] / "model.sig")
        assert check(pair[0], signer=Signer(keys[1])).sound


@pytest.mark.parametrize(
    "damage", ["differs", "extra", "missing", "other key", "no signature", "junk"]
)
def test_a_signature_that_doesnt_hold(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, damage: str
) -> None:
    (signed / "SHA256SUMS").unlink() if damage == "missing" else None
    public = keys[1]
    if damage == "differs":
        (signed / "config.json").write_text("{}")
    elif damage == "extra":
        (signed / "modeling_x.py").write_text("boom")
    elif damage == "other key":
        made = tmp_path / "other.pem"
        subprocess.run(
            ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(made)],
            check=True,
        )
        public = tmp_path / "other.pub"
        run = ["openssl", "ec", "-in", str(made), "-pubout", "-out", str(public)]
        subprocess.run(run, check=True, capture_output=True)
    elif damage == "no signature":
        (signed / "model.sig").unlink()
    elif damage == "junk":
        (signed / "model.sig").write_text("{}")
    report = check(signed, signer=Signer(public))
    texts = [problem.text for problem in report.problems if problem.kind == "signature"]
    assert report.signed is None
    expected = {
        "differs": "config.json isn't the file that was signed",
        "extra": "extra by the signature model.sig: modeling_x.py",
        "missing": "missing by the signature model.sig: SHA256SUMS",
        "other key": "model.sig isn't a signature by",
        "no signature": "model.sig isn't there",
        "junk": "is no signature that model-signing makes",
    }[damage]
    assert len(texts) == 1
    assert expected in texts[0]


def test_a_key_that_cant_sign_is_refused_before_any_work(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("model_signing", exc_type=ImportError)
    (tmp_path / "key").write_text("nonsense")
    result = surgery(
        "lines", *pair, "--alpha", "1", "--sign-key", tmp_path / "key", "-o", tmp_path / "out"
    )
    assert result.exit_code == 2
    assert "is no private key" in result.stderr


def test_who_is_to_have_signed() -> None:
    with pytest.raises(ArgumentError, match="goes with its provider"):
        Signer(identity="me@example.org")
    with pytest.raises(ArgumentError, match="either the public key or the identity"):
        Signer()


def test_without_the_package_the_extra_is_named(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (pair[0] / "model.sig").write_text("{}")
    for name in ("signing", "verifying", "hashing"):
        monkeypatch.setitem(sys.modules, f"model_signing.{name}", None)
    (tmp_path / "k").write_text("")
    with pytest.raises(ArgumentError, match=r"model-surgery\[signing\]"):
        check(pair[0], signer=Signer(tmp_path / "k"))
