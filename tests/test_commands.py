"""The command line: exit codes, messages, JSON, and what is (not) touched. Real processes where
the process matters, typer's runner elsewhere."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_standin import Hub, hub  # noqa: F401  (a fixture)
from mixtures import build_mixture
from processes import RUN, started
from processes import surgery as installed
from surgery.commands.main import app
from typer.testing import CliRunner, Result

from surgery import files

Make = Callable[..., Path]


def surgery(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_inspect_tells_what_is_there_as_json(make_model: Make) -> None:
    report = json.loads(surgery("inspect", make_model(), "--json").stdout)
    assert report["architecture"] == "LlamaForCausalLM"
    assert report["dtypes"] == {"F32": 21}
    assert report["heads"] == 4
    assert report["key_value_heads"] == 2
    assert [block["mlp"]["width"] for block in report["blocks"]] == [24, 24]
    assert report["unrecognised"] == []
    assert report["parameters"] == sum(block["parameters"] for block in report["blocks"]) + (
        2 * 64 * 16 + 16
    )


def test_inspect_prints_a_table(make_model: Make) -> None:
    result = surgery("inspect", make_model())
    assert result.exit_code == 0
    for text in ("LlamaForCausalLM", "model.layers", "0-1", "24", "attention", "gated", "yes"):
        assert text in result.stdout


TOLD = """
def told(code):
    heavy = {"torch", "transformers", "huggingface_hub", "numpy"} & set(sys.modules)
    print(code, sorted(heavy), file=sys.stderr, flush=True)
    leave(code)
"""


@pytest.mark.parametrize("args", [["--help"], ["inspect", "MODEL"], ["lines", "--help"]])
def test_no_torch_where_headers_suffice(args: list[str], make_model: Make) -> None:
    args = [str(make_model()) if arg == "MODEL" else arg for arg in args]
    code = f"import os, sys\nleave, os._exit = os._exit, lambda code: told(code)\n{TOLD}\n{RUN}"
    done = installed(*args, code=code)
    assert done.stderr == "0 []\n"


@pytest.mark.parametrize(
    "verb",
    [
        ["lines", "--alpha", "0.5"],
        ["merge", "--method", "task_arithmetic"],
        ["merge", "--method", "ties", "--density", "0.2"],
        ["merge", "--method", "slerp", "--param", "t=0.5"],
        ["merge", "--method", "dare_ties", "--density", "0.5"],
        ["task-vector"],
    ],
)
def test_no_torch_where_nothing_is_computed(
    verb: list[str], make_model: Make, tmp_path: Path
) -> None:
    model = str(make_model())
    code = f"import os, sys\nleave, os._exit = os._exit, lambda code: told(code)\n{TOLD}\n{RUN}"
    args = [verb[0], model, model, *verb[1:], "-o", str(tmp_path / "out"), "--dry-run"]
    done = installed(*args, code=code)
    assert done.stderr.startswith("0 ["), done.stderr
    assert "torch" not in done.stderr


def test_lines_writes_and_shows_scales_and_norms(make_model: Make, tmp_path: Path) -> None:
    base, tuned = make_model(name="base"), make_model(name="tuned", seed=1)
    result = surgery("lines", base, tuned, "-o", tmp_path / "out", "--alpha", "0.25", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["edits"][0]["details"]["scales"] == {"model.layers": [0.25, 1.0]}
    norms = record["norms"]["blocks"]["model.layers"]
    assert norms[0]["after"] == pytest.approx(0.25 * norms[0]["before"], rel=1e-5)
    assert norms[1]["after"] == norms[1]["before"] > 0
    assert record["command"].startswith("surgery")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_grow_verifies_writes_and_verify_agrees(make_model: Make, tmp_path: Path) -> None:
    base, out = make_model(), tmp_path / "out"
    result = surgery("grow", base, "-o", out, "--factor", "1.5", "--layers", "1", "--json")
    assert result.exit_code == 0, result.output
    verification = json.loads(result.stdout)["verification"]
    assert verification["passed"] is True
    assert verification["certificate"]["grown_mlps"] == 1
    assert verification["logits"]["noise_floor"] > 0
    again = surgery("verify", base, out, "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["certificate"]["failures"] == []


def test_experts_are_grown_by_kind_and_shown(tmp_path: Path) -> None:
    base, out = build_mixture("qwen2_moe"), tmp_path / "out"
    result = surgery("grow", base, "-o", out, "--experts", "routed", "--factor", "1.25")
    assert result.exit_code == 0, result.output
    assert "routed experts" in result.stdout
    assert "through 8 of 8 routed experts" in result.stdout
    assert "rows that aren't multiples of 16 bytes" in result.stderr  # 30 in float32
    shown = surgery("inspect", out)
    assert "4 routed of 30, 1 shared of 40" in " ".join(shown.stdout.split())
    refused = surgery("grow", base, "-o", tmp_path / "none", "--experts", "some")
    assert refused.exit_code == 2


def test_a_failed_proof_writes_nothing(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.kernels import split

    def forgotten(weight, *noise, sources, ordinals, copies, **_):  # type: ignore[no-untyped-def]
        return weight.index_select(1, sources)

    monkeypatch.setattr(split, "split_columns", forgotten)
    result = surgery("grow", make_model(), "-o", tmp_path / "out", "--layers", "1")
    assert result.exit_code == 6
    assert "model.layers.1.mlp.down_proj.weight: the outgoing weights" in result.stderr
    assert "the first to depart is model.layers.1" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_dry_run_reads_no_tensor_and_writes_nothing(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = make_model(name="base"), make_model(name="tuned", seed=1)

    def refuse(*args: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(files.InputFile, "read_into", refuse)
    out = tmp_path / "out"
    for args in (
        ["lines", base, tuned, "--alpha", "0.5"],
        ["grow", base, "--factor", "1.5"],
        ["grow", base, "--factor", "1.5", "--choose", "norm"],
    ):
        result = surgery(*args, "-o", out, "--dry-run", "--json")
        assert result.exit_code == 0, result.output
        plan = json.loads(result.stdout)
        assert plan["bytes_needed"] > 0 < plan["bytes_free"]
        assert plan["memory_peak"] > 0
        assert "tensors" in plan["shards"][0]
    assert len(plan["tensors"]["computed"]) == 2
    assert len(plan["tensors"]["copied"]) == 4
    assert len(plan["tensors"]["untouched"]) == 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["lines", "BASE", "BASE", "--alpha", "nan"], 2, "alpha is nan"),
        (["grow", "BASE", "--layers", "1-7"], 2, "1-7 isn't among the 2 layers, which are 0 to 1"),
        (["grow", "BASE", "--factor", "0.5"], 2, "factor is 0.5, and has to be above 1"),
        (["grow", "BASE", "-o", ""], 2, "'--out' / '-o': it is empty"),
        (["grow", "./nowhere"], 3, "'./nowhere': there is no such directory"),
        (["lines", "BASE", "OTHER", "--alpha", "0.5"], 3, "model_type is llama and gpt2"),
        (["grow", "QUANTIZED"], 4, "is quantized: fp8"),
    ],
)
def test_bad_input_ends_with_a_message_and_a_code(
    args: list[str], code: int, message: str, make_model: Make, tmp_path: Path
) -> None:
    quantized = make_model(name="quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (quantized / "config.json").write_text(json.dumps(config))
    given = {"BASE": make_model(), "OTHER": make_model("gpt2", "other"), "QUANTIZED": quantized}
    verb, *rest = (given.get(arg, arg) for arg in args)
    result = surgery(verb, "-o", tmp_path / "out", *rest)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_the_help_names_the_extra_that_signing_needs() -> None:
    assert "'signing'" in surgery("lines", "--help").stdout


def test_a_file_alone_says_what_lies_beside_it(make_model: Make, tmp_path: Path) -> None:
    base = make_model()
    args = "grow", base / "model.safetensors", "-o", tmp_path / "out", "--no-logits", "--json"
    result = surgery(*args)
    assert result.exit_code == 0
    told = f"config.json beside it isn't read: give {base} to have it"
    assert told in result.stderr
    report = json.loads(result.stdout)
    assert any(told in text for text in report["notes"])
    assert report["out"] == str(tmp_path / "out")


def test_an_output_that_exists_is_refused_before_the_proof(
    make_model: Make, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    result = surgery("grow", make_model(), "-o", tmp_path / "out")
    assert result.exit_code == 5
    assert "exists already" in result.stderr
    assert "certificate" not in result.stderr
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_many_problems_are_cut_short(make_model: Make, tmp_path: Path) -> None:
    base = make_model(name="base", num_hidden_layers=4)
    tuned = make_model(name="tuned", num_hidden_layers=4, attention_bias=True)
    result = surgery("lines", base, tuned, "-o", tmp_path / "out", "--alpha", "0.5")
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 13
    assert "and 4 more like these" in result.stderr


LOST = """
import os, sys, time
number = int(sys.argv.pop())
class Deaf:
    def __del__(self):
        os.kill(os.getpid(), number)
        time.sleep(0.1)
def open_model(*args, **how):
    Deaf()
    return opened(*args, **how)
import surgery.commands.lines as verb
opened, verb.open_model = verb.open_model, open_model
"""
LOST_TWICE = """
import surgery.commands.stopping as stopping
def number_of(lost):
    os.kill(os.getpid(), number)
    time.sleep(0.1)
    return numbered(lost)
numbered, stopping.number_of = stopping.number_of, number_of
"""


@pytest.mark.parametrize("lost", [LOST, LOST + LOST_TWICE])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_destructor_is_not_lost(
    number: signal.Signals, lost: str, make_model: Make, tmp_path: Path
) -> None:
    """Python prints what is raised there, and goes on; nor while the first one is answered."""
    base = make_model()
    argv = ("lines", base, base, "-o", tmp_path / "out", "--alpha", "0.5", int(number))
    done = installed(*argv, code=f"{lost}{RUN}")
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        "nothing half-written was left under the final name"
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """A model large enough that it is still being written when the signal comes."""
    from conftest import save_raw

    base = save_raw(tmp_path / "base", {f"t{i}": torch.randn(1024, 4096) for i in range(24)})
    tuned = save_raw(tmp_path / "tuned", {f"t{i}": torch.randn(1024, 4096) for i in range(24)})
    arguments = ("lines", base, tuned, "-o", tmp_path / "out", "--alpha", "0.5")
    running = started(*arguments, stderr=subprocess.PIPE)
    staging = tmp_path / ".out.staging"
    while not staging.exists() and running.poll() is None:
        time.sleep(0.002)
    running.send_signal(number)
    _, said = running.communicate()
    code, word = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}[number]
    assert running.returncode == code, said
    assert f"{word}: nothing half-written" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_a_model_of_the_hub(make_model: Make, hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    """inspect and --dry-run fetch no weights; lines does, and records the commits."""
    base = hub.push("org/base", make_model(name="base"))
    tuned = hub.push("org/tuned", make_model(name="tuned", seed=1))
    assert surgery("inspect", "org/base").exit_code == 0
    options = ["--alpha", "0.5", "--json", "-o", str(tmp_path / "out")]
    plan = surgery("lines", "org/base", "org/tuned", *options, "--dry-run")
    assert plan.exit_code == 0, plan.output
    assert all(request.range is not None for request in hub.fetched())
    result = surgery("lines", "org/base", "org/tuned@main", *options)
    assert result.exit_code == 0, result.output
    inputs = json.loads((tmp_path / "out" / "surgery.json").read_text())["edits"][0]["inputs"]
    assert inputs["base"]["reference"] == "org/base"
    assert (inputs["base"]["revision"], inputs["tuned"]["revision"]) == (base, tuned)
    assert 'base_model: ["org/base", "org/tuned"]' in (tmp_path / "out" / "README.md").read_text()


def test_verify_of_an_unrelated_pair_reports_the_drift(make_model: Make) -> None:
    result = surgery("verify", make_model(name="a"), make_model(name="b", seed=1), "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["passed"] is None
    assert report["certificate"] is None
    assert report["logits"]["max_difference"] > report["logits"]["threshold"]


def test_progress_is_plain_lines_where_there_is_no_terminal(
    make_model: Make, tmp_path: Path
) -> None:
    done = installed("grow", make_model(), "-o", tmp_path / "out", "--no-logits", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verification"]["logits"] is None
    assert "\x1b" not in done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["certificate", "writing"]
    hashed = installed("grow", make_model(), "-o", tmp_path / "h", "--no-verify", "--checksums")
    assert hashed.stderr.startswith(
        "writing and hashing: "
    )  # whose bytes are more than the model's


def test_names_are_text_and_no_markup(tmp_path: Path) -> None:
    """A name in brackets comes from a stranger's file: it is printed, not obeyed."""
    from conftest import save_raw

    base = save_raw(tmp_path / "base", {"[/x]": torch.ones(2), "[red]y": torch.ones(2)})
    tuned = save_raw(tmp_path / "tuned", {"[/x]": torch.zeros(2), "[red]y": torch.zeros(2)})
    for args in (
        ["inspect", base],
        ["diff", base, tuned],
        ["lines", base, tuned, "-o", tmp_path / "out", "--alpha", "0.5"],
        ["lines", base, tuned, "-o", tmp_path / "dry", "--alpha", "0.5", "--dry-run"],
    ):
        result = surgery(*args)
        assert result.exit_code == 0, result.output
        assert ("[/x]" in result.stdout and "[red]y" in result.stdout) or "--dry-run" in args
