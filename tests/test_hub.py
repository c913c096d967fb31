"""References: what is taken from disk, what is fetched from the Hub, and what is said if not."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hub_standin import TOKEN, Hub, hub, offline

from surgery.errors import FormatError, NotFoundError, OutputError, SurgeryError, UnsupportedError
from surgery.hub import RemoteFile, resolve

__all__ = ["hub"]  # a fixture, which pytest finds by its name here
ROOT = Path(__file__).parents[1]
SMALL = {
    "config.json": b'{"model_type": "made_up"}',
    "generation_config.json": b"{}",
    "tokenizer.model": b"pieces",
    "tokenizer.model.v3": b"more pieces",
    "tokenizer[1].json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_made_up.py": b"class Model: ...",
    "merges.txt": b"a b",
    "LICENSE": b"do as you like",
    "README.md": b"# made up",
    "1_Pooling/config.json": b"{}",
}
HEAVY = {
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "tokenizer.bin": b"pickle",
    "tf_model.h5": b"h5",
    "flax_model.msgpack": b"msgpack",
    "model-q4.gguf": b"gguf",
    "optimizer.pt": b"state",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "original/params.json": b"{}",
    "checkpoint-5/model.safetensors": b"not fetched",
    "model.fp16.safetensors.index.json": b"{}",
}


def shard(values: int = 4) -> bytes:
    """A safetensors file with one tensor of `values` float32 zeros."""
    table = {"w": {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + bytes(4 * values)


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def index(*files: Any) -> bytes:
    return json.dumps({"weight_map": {f"w{i}": file for i, file in enumerate(files)}}).encode()


def sharded(count: int = 3, values: int = 4) -> dict[str, bytes]:
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    files = {name: shard(values + i) for i, name in enumerate(names)}
    return {**files, "model.safetensors.index.json": index(*names)}


def files_in(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def problem(reference: str | Path, kind: type[SurgeryError] = NotFoundError, **how: bool) -> str:
    with pytest.raises(kind) as caught:
        resolve(reference, **how)
    assert type(caught.value) is kind
    return str(caught.value)


# ---- on disk


def test_a_directory_or_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(shard())
    for given in (str(tmp_path), tmp_path, tmp_path / "one.safetensors"):
        source = resolve(given)
        assert (source.reference, source.path) == (str(given), Path(given))
        assert (source.repo_id, source.revision, source.remote_headers) == (None, None, {})


def test_a_local_directory_wins_over_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("org/name", {"model.safetensors": shard()})
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name").path == Path("org/name")
    assert hub.requests == []


def test_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model").path == tmp_path / "model"


@pytest.mark.parametrize("given", ["./gone", "/gone", "~/gone", "a\\b", "a/b/c", "", Path("gone")])
def test_a_path_that_is_not_there(given: str | Path, hub: Hub) -> None:
    assert problem(given) == (
        f"{str(given)!r}: there is no such directory. A model on the Hub is written org/name or "
        f"org/name@revision"
    )
    assert hub.requests == []


def test_a_file_that_is_not_there_or_not_safetensors(hub: Hub, tmp_path: Path) -> None:
    assert problem("model.safetensors").startswith("'model.safetensors': there is no such file. ")
    (tmp_path / "model.gguf").touch()
    assert problem(tmp_path / "model.gguf", FormatError) == (
        f"{tmp_path}/model.gguf is a file, and not a *.safetensors one: give the checkpoint's "
        f"directory"
    )
    assert hub.requests == []


def test_a_local_path_does_not_import_huggingface_hub(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from surgery.errors import NotFoundError
        from surgery.hub import resolve
        resolve(sys.argv[1], headers_only=True)
        try:
            resolve("./gone")
        except NotFoundError:
            pass
        print([name for name in ("huggingface_hub", "httpx", "requests") if name in sys.modules])
    """
    assert run(code, str(tmp_path)) == "[]\n"


def run(code: str, *arguments: str) -> str:
    """The output of a new Python, which reads the environment afresh."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- what is fetched


@pytest.mark.parametrize("weights", [{"model.safetensors": shard()}, sharded()])
@pytest.mark.parametrize("repo_id", ["org/name", "legacy"])
def test_weights_and_small_files_and_nothing_else(
    hub: Hub, weights: dict[str, bytes], repo_id: str
) -> None:
    twins = {"consolidated.safetensors": shard(), "original/model.safetensors": shard()}
    commit = hub.push(repo_id, {**SMALL, **HEAVY, **twins, **weights})
    source = resolve(repo_id)
    assert files_in(source.path) == {**SMALL, **weights}
    assert (source.reference, source.repo_id, source.revision) == (repo_id, repo_id, commit)
    assert source.remote_headers == {}
    assert source.path.parts[-2:] == ("snapshots", commit)


@pytest.mark.parametrize("name", ["branch", "tag", "commit"])
def test_a_revision_and_then_offline(hub: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = hub.push("org/name", {**SMALL, **sharded(2)})
    hub.repos["org/name"].refs |= {"refs/pr/1": old, "v1.0": old}
    new = hub.push("org/name", {**SMALL, "model.safetensors": shard()})
    revision = {"branch": "refs/pr/1", "tag": "v1.0", "commit": old}[name]
    online = [resolve(f"org/name@{revision}"), resolve("org/name")]
    assert [source.revision for source in online] == [old, new]
    assert files_in(online[0].path) == {**SMALL, **sharded(2)}
    hub.requests.clear()
    offline(monkeypatch)
    assert [resolve(f"org/name@{revision}"), resolve("org/name")] == online
    assert resolve(f"org/name@{revision}", headers_only=True) == online[0]
    assert hub.requests == []


def test_the_cache_serves_when_the_hub_is_gone(hub: Hub) -> None:
    hub.push("org/name", {**SMALL, **sharded()})
    source = resolve("org/name")
    hub.status = 503
    assert resolve("org/name") == source
    hub.close()
    assert resolve("org/name") == source


def test_a_second_run_asks_for_the_commit_alone(hub: Hub) -> None:
    hub.push("org/name", {**SMALL, **sharded()})
    source = resolve("org/name")
    hub.requests.clear()
    assert resolve("org/name") == source
    assert resolve("org/name", headers_only=True) == source
    assert {r.path for r in hub.requests} == {
        "/api/models/org/name",
        "/api/models/org/name/revision/main",
    }


def test_a_new_commit_is_seen(hub: Hub) -> None:
    hub.push("org/name", {"config.json": b"1", "model.safetensors": shard(1)})
    resolve("org/name")
    commit = hub.push("org/name", {"config.json": b"2", "model.safetensors": shard(2)})
    source = resolve("org/name")
    assert source.revision == commit
    assert files_in(source.path) == {"config.json": b"2", "model.safetensors": shard(2)}


def test_a_push_between_two_requests(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import surgery.hub as module

    hub.push("org/name", {**SMALL, **sharded(2)})
    choose = module._weights
    pushed: list[str] = []

    def push_meanwhile(*arguments: Any) -> list[str]:
        if not pushed:
            pushed.append(hub.push("org/name", {**SMALL, **sharded(4)}))
        return choose(*arguments)

    monkeypatch.setattr(module, "_weights", push_meanwhile)
    source = resolve("org/name")
    assert source.revision == pushed[0]
    assert files_in(source.path) == {**SMALL, **sharded(4)}


def test_a_cache_that_another_program_filled(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import hf_hub_download

    weights = sharded(2)
    commit = hub.push("org/name", {**SMALL, **weights})
    first, second, table = sorted(weights)
    for name in (table, first):
        hf_hub_download("org/name", name)
    with monkeypatch.context() as patch:
        offline(patch)
        assert "isn't in the cache, or not all of it" in problem("org/name")
    hf_hub_download("org/name", second)
    offline(monkeypatch)
    source = resolve("org/name")
    assert (source.revision, files_in(source.path)) == (commit, weights)


def test_a_cache_that_lacks_a_small_file(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push("org/name", {**SMALL, **sharded(2)})
    source = resolve("org/name")
    (source.path / "merges.txt").unlink()
    with monkeypatch.context() as patch:
        offline(patch)
        assert "isn't in the cache, or not all of it" in problem("org/name")
    assert resolve("org/name") == source
    assert (source.path / "merges.txt").read_bytes() == SMALL["merges.txt"]


@pytest.mark.parametrize(
    "weights",
    [
        {"adapter_model.safetensors": shard()},
        {n.replace("model", "odd"): d for n, d in sharded().items() if n.endswith("tensors")},
        {"odd-00001-of-00001.safetensors": shard()},
        {"odd.safetensors.index.json": index("a.safetensors"), "a.safetensors": shard()},
    ],
)
def test_weights_by_other_names(
    hub: Hub, weights: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("org/name", weights)
    source = resolve("org/name", quiet=True)
    assert files_in(source.path) == weights
    offline(monkeypatch)
    assert resolve("org/name") == source


# ---- headers only


@pytest.mark.parametrize("ignores_ranges", [False, True])
@pytest.mark.parametrize("weights", [{"model.safetensors": shard(5)}, sharded(12)])
def test_headers_only(hub: Hub, weights: dict[str, bytes], ignores_ranges: bool) -> None:
    hub.ignores_ranges = ignores_ranges
    commit = hub.push("org/name", {**SMALL, **HEAVY, **weights})
    source = resolve("org/name", headers_only=True)
    shards = {name: data for name, data in weights.items() if name.endswith(".safetensors")}
    rest = {name: data for name, data in weights.items() if name not in shards}
    assert files_in(source.path) == {**SMALL, **rest}
    assert source.revision == commit
    assert source.remote_headers == {
        name: RemoteFile(len(data), header_of(data)) for name, data in shards.items()
    }
    if not ignores_ranges:
        sent = dict.fromkeys(shards, 0)
        for request in hub.fetched():
            sent[request.path.rpartition("/")[2]] += request.sent
        assert sent == {name: 8 + len(header_of(data)) for name, data in shards.items()}
    assert resolve("org/name").path == source.path
    assert files_in(source.path) == {**SMALL, **weights}


def test_of_a_server_without_ranges_the_tensors_are_not_read(hub: Hub) -> None:
    hub.ignores_ranges = True
    data = shard(5_000_000)
    hub.push("org/name", {"model.safetensors": data})
    remote = resolve("org/name", headers_only=True).remote_headers["model.safetensors"]
    assert remote == RemoteFile(len(data), header_of(data))
    deadline = time.monotonic() + 10
    while hub.hang_ups < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert hub.hang_ups == 2


@pytest.mark.parametrize(
    ("data", "length"),
    [
        ((10**9).to_bytes(8, "little") + b"{}", "1,000,000,000"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "18,446,744,073,709,551,615"),
        ((3).to_bytes(8, "little") + b"{}", "3"),
        (bytes(10), "0"),
    ],
)
def test_an_absurd_header(hub: Hub, data: bytes, length: str) -> None:
    hub.push("org/name", {**SMALL, "model.safetensors": data})
    assert problem("org/name", FormatError, headers_only=True) == (
        f"org/name: model.safetensors isn't a safetensors file, or it was cut short: it has 10 "
        f"bytes and asks for a header of {length}"
    )


def test_a_header_over_the_limit_of_a_file_that_would_hold_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.hub.LONGEST", 50)
    hub.push("org/name", {"model.safetensors": shard()})
    assert "asks for a header of" in problem("org/name", FormatError, headers_only=True)
    assert [r.range for r in hub.fetched()] == ["bytes=0-7"]


def test_headers_only_fails_offline_and_so_does_the_rest_after_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("org/name", {**SMALL, **sharded()})
    resolve("org/name", headers_only=True)
    offline(monkeypatch)
    message = (
        "org/name isn't in the cache, or not all of it, and HF_HUB_OFFLINE forbids to fetch it: "
        "unset it, or give a local directory"
    )
    assert problem("org/name") == message
    assert problem("org/name", headers_only=True) == message


# ---- which weights, and none


@pytest.mark.parametrize(
    ("files", "only"),
    [
        (
            {"pytorch_model.bin": b"", "training_args.bin": b"", "optimizer.pt": b""},
            "only pytorch_model.bin. ",
        ),
        (
            {f"a-{i}.bin": b"" for i in range(1, 6)},
            "only a-1.bin, a-2.bin, a-3.bin and 2 more. ",
        ),
        ({}, "and no other weights. "),
    ],
)
def test_no_safetensors(hub: Hub, files: dict[str, bytes], only: str) -> None:
    hub.push("org/name", {**SMALL, **files})
    assert problem("org/name") == (
        f"org/name has no *.safetensors, {only}Surgery unpickles nothing: if you trust the files, "
        f"convert them to safetensors, and give that directory"
    )
    assert not any("/resolve/" in r.path for r in hub.requests)


@pytest.mark.parametrize(
    "names",
    [
        ["a.safetensors", "b.safetensors"],
        ["unet/model.safetensors", "vae/model.safetensors"],
        ["a-00001-of-00003.safetensors", "a-00003-of-00003.safetensors"],
        ["a-00001-of-00002.safetensors", "b-00002-of-00002.safetensors"],
    ],
)
def test_it_does_not_guess_between_weights(hub: Hub, names: list[str]) -> None:
    hub.push("org/name", {**SMALL, **dict.fromkeys(names, shard())})
    assert problem("org/name", UnsupportedError) == (
        f"org/name has neither model.safetensors nor model.safetensors.index.json, but "
        f"{', '.join(names)}. Download the model you mean, and give its directory"
    )


def test_an_index_beside_a_single_file(hub: Hub) -> None:
    both = {**sharded(), "model.safetensors": shard()}
    hub.push("org/both", both)
    assert problem("org/both", FormatError) == (
        "org/both has both model.safetensors and model.safetensors.index.json, and loaders differ "
        "in which they take. Download the set you mean, and give its directory"
    )
    assert hub.fetched() == []
    named = {"model.safetensors.index.json": index("model.safetensors")}
    named["model.safetensors"] = shard()
    hub.push("org/named", named)
    assert files_in(resolve("org/named").path) == named


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", " has no weight_map of tensor -> file"),
        (b"[]", " has no weight_map of tensor -> file"),
        (b'{"weight_map": ["a"]}', " has no weight_map of tensor -> file"),
        (index("gone.safetensors"), " names files that aren't beside it: gone.safetensors"),
        (index("../../x"), " names files that aren't beside it: ../../x"),
        (index("sub/x.safetensors"), " names files that aren't beside it: sub/x.safetensors"),
        (index(None, 7), " names files that aren't beside it: 7, None"),
        (index(), " names no file"),
    ],
)
def test_a_damaged_index(hub: Hub, text: bytes, message: str) -> None:
    files = {"model.safetensors.index.json": text, "sub/x.safetensors": shard()}
    hub.push("org/name", files)
    assert problem("org/name", FormatError) == (f"org/name: model.safetensors.index.json{message}")
    assert hub.fetched() == []


# ---- errors


@pytest.mark.parametrize("given", ["a b", "org/na--me", "org/", "naïve", "org/name.git"])
def test_no_id(given: str, hub: Hub) -> None:
    assert problem(given) == (
        f"{given!r} is neither a directory here nor an id on the Hub. A model on the Hub is "
        f"written org/name or org/name@revision"
    )
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["", "../../x", "/etc"])
def test_no_revision(revision: str, hub: Hub) -> None:
    assert problem(f"org/name@{revision}") == (
        f"'org/name@{revision}': {revision!r} can't be a revision. After the @, give a branch, a "
        f"tag or a commit hash"
    )
    assert hub.requests == []


def test_no_repository_or_a_private_one(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push("org/private", {"model.safetensors": shard()})
    hub.repos["org/private"].private = True
    for name in ("org/gone", "org/private"):
        assert problem(name) == (
            f"There is no directory '{name}' here and no model '{name}' on the Hub, or it is "
            f"private: check the id, or log in with `hf auth login`"
        )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert resolve("org/private", headers_only=True).remote_headers
    assert {r.token for r in hub.requests if r.path.startswith("/cdn")} == {None}
    assert "no model 'org/gone' on the Hub" in problem("org/gone")


def test_a_gated_repository(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push("org/gated", {**SMALL, "model.safetensors": shard()})
    hub.repos["org/gated"].gated = True
    message = (
        f"org/gated is gated: ask for access at {hub.endpoint}/org/gated, then log in with `hf "
        f"auth login` or set HF_TOKEN"
    )
    assert problem("org/gated") == message
    assert problem("org/gated", headers_only=True) == message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert resolve("org/gated").revision


@pytest.mark.parametrize("revision", ["gone", "0" * 40])
def test_no_such_revision(hub: Hub, revision: str) -> None:
    hub.push("org/name", {"model.safetensors": shard()})
    message = (
        f"org/name has no branch, tag or commit '{revision}': see {hub.endpoint}/org/name/tree/main"
        f" for those it has"
    )
    assert problem(f"org/name@{revision}") == message


def test_a_deleted_branch_is_not_served_from_the_cache(hub: Hub) -> None:
    hub.push("org/name", {"model.safetensors": shard()}, branch="draft")
    resolve("org/name@draft")
    del hub.repos["org/name"].refs["draft"]
    assert "no branch, tag or commit 'draft'" in problem("org/name@draft")


def test_offline_with_an_empty_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push("org/name", {"model.safetensors": shard()})
    offline(monkeypatch)
    assert problem("org/name@main") == (
        "org/name@main isn't in the cache, or not all of it, and HF_HUB_OFFLINE forbids to fetch "
        "it: unset it, or give a local directory"
    )
    assert hub.requests == []


def test_nobody_answers(hub: Hub) -> None:
    hub.close()
    assert problem("org/name") == (
        f"org/name is no directory here, it isn't in the cache, and it can't be fetched from "
        f"{hub.endpoint} ([Errno {errno.ECONNREFUSED}] Connection refused): check the network and "
        f"HF_ENDPOINT, or give a local directory"
    )


def test_an_answer_that_does_not_come(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.1)
    hub.delay = 1.0
    assert problem("org/name").startswith(
        f"org/name is no directory here, it isn't in the cache, and it can't be fetched from "
        f"{hub.endpoint} (timed out)"
    )


@pytest.mark.parametrize("status", [403, 500, 503])
def test_the_hub_refuses(hub: Hub, status: int) -> None:
    hub.status = status
    assert problem("org/name") == (
        f"org/name: {hub.endpoint} answered with HTTP status {status}. Try again later, or, if it "
        f"is 401 or 403, check your token (`hf auth whoami`)"
    )


def test_a_cache_that_can_not_be_written(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push("org/name", {"model.safetensors": shard()})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    assert problem("org/name", OutputError) == (
        "org/name can't be written into the Hub cache: [Errno 28] No space left on device"
    )


def test_errors_carry_their_cause(hub: Hub) -> None:
    with pytest.raises(NotFoundError) as caught:
        resolve("org/gone")
    assert type(caught.value.__cause__).__name__ == "RepositoryNotFoundError"


# ---- quiet, and the environment


def test_quiet_hides_the_bars_and_changes_nothing(
    hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    hub.push("org/quiet", {**SMALL, **sharded()})
    resolve("org/quiet", quiet=True)
    assert capfd.readouterr().err == ""
    assert not are_progress_bars_disabled()
    hub.push("org/loud", {**SMALL, **sharded()})
    resolve("org/loud")
    assert "Fetching" in capfd.readouterr().err


def test_the_environment_is_the_library_s(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """if True:
        import sys
        from surgery.hub import resolve
        source = resolve(sys.argv[1])
        print(source.path, source.revision)
    """
    commit = hub.push("org/name", {**SMALL, **sharded()}, branch="draft")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    printed = run(code, "org/name@draft")
    assert printed.split()[1] == commit
    assert files_in(Path(printed.split()[0])) == {**SMALL, **sharded()}
    asked = len(hub.requests)
    offline(monkeypatch)
    assert run(code, "org/name@draft") == printed
    assert len(hub.requests) == asked
