"""pretrain_atum.py as a user runs it: once through torchrun, and with every mistake it refuses."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megatron_atum.checkpoint.folder import newest_complete
from megatron_atum.config.loader import load_config
from megatron_atum.errors import AtumError
from megatron_atum.training.metrics import read_metrics
from megatron_atum.training.start import prepare_start
from tests.faults.runs import OF_THE_CLOCK

ROOT = Path(__file__).parents[1]
STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny_data")
    subprocess.run([sys.executable, "examples/tiny/make_data.py", "--out", str(out)], cwd=ROOT, check=True)
    return out


def arguments(data: Path, root: Path, *overrides: str) -> list[str]:
    sources = (
        f"[{{name: pairs, shards: '{data}/pairs-*.tar', kind: pairs, weight: 0.7, max_images: 8}},"
        f"{{name: documents, shards: '{data}/documents-*.tar', kind: documents, weight: 0.3, max_images: 8}}]"
    )
    return [
        "model.preset=tiny",
        f"data.tokenizer={data}/tokenizer.model",
        f"data.sources={sources}",
        "data.sequence_length=128",
        "data.workers=0",
        f"training.steps={STEPS}",
        "training.global_batch_size=4",
        "optimizer.warmup_steps=1",
        "optimizer.lr=1e-3",
        f"logging.root={root}",
        "logging.run=test",
        "checkpoint.save_every=2",
        *overrides,
    ]


def torchrun(processes: int, arguments: list[str]) -> subprocess.Popen[str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return started([*command, "pretrain_atum.py", *arguments])


def started(command: list[str]) -> subprocess.Popen[str]:
    """A command of Python."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def losses(root: Path) -> list[dict[str, float]]:
    """Everything of a step but times."""
    return [
        {key: value for key, value in line.items() if not OF_THE_CLOCK.search(key)}
        for line in read_metrics(root / "test" / "metrics.jsonl")
    ]


def test_killed_and_resumed_run_is_the_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    layout = ["parallel.tensor=2", "data.workers=1"]
    whole = torchrun(2, arguments(data, tmp_path / "whole", *layout))
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    assert "layout: tensor 2 + sequence, pipeline 1" in output

    # synchronously, so that the checkpoint of step 2 is complete at step 3
    killed = torchrun(2, arguments(data, tmp_path / "killed", *layout, "checkpoint.asynchronous=false"))
    metrics = tmp_path / "killed" / "test" / "metrics.jsonl"
    wait_for_step(metrics, 3, killed)
    kill_all(killed)
    steps_before = metrics.read_text().count('"loss"')
    assert 3 <= steps_before < STEPS
    again = torchrun(2, arguments(data, tmp_path / "killed", *layout))
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    events = [line for line in map(json.loads, metrics.read_text().splitlines()) if line.get("event") == "resume"]
    assert len(events) == 1
    assert events[0]["step"] in (2, 4, 6)

    expected = losses(tmp_path / "whole")
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
    assert losses(tmp_path / "killed") == expected
    assert expected[-1]["loss"] < expected[0]["loss"]
    keys = {"loss/pairs", "loss/documents", "grad_norm", "lr", "tokens", "images", "faults"}
    assert keys <= expected[-1].keys() | expected[0].keys()
    newest = newest_complete(tmp_path / "killed" / "test" / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{STEPS:08d}"
    assert load_config(tmp_path / "whole" / "test" / "config.yaml", []).parallel.tensor == 2

    elsewhere = started(["pretrain_atum.py", *arguments(data, tmp_path / "killed", f"training.steps={STEPS + 2}")])
    output, _ = elsewhere.communicate(timeout=300)
    assert elsewhere.returncode == 0, output
    assert f"weights: step {STEPS} of" in output and "layout: tensor 1, pipeline 1" in output
    assert [line["step"] for line in losses(tmp_path / "killed")] == list(range(1, STEPS + 3))


def kill_all(run: subprocess.Popen[str]) -> None:
    """SIGKILL to torchrun and its workers, which have sessions of their own."""
    family = psutil.Process(run.pid).children(recursive=True)
    for process in [psutil.Process(run.pid), *family]:
        process.send_signal(signal.SIGKILL)
    run.communicate()
    psutil.wait_procs(family, timeout=30)


def wait_for_step(metrics: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and any(f'"step": {step},' in line for line in metrics.read_text().splitlines()):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def compressed(data: Path, tmp_path: Path) -> Path:
    shard = tmp_path / "packed.tar"
    shard.write_bytes(gzip.compress((data / "pairs-00000.tar").read_bytes()))
    return shard


def other_model(data: Path, tmp_path: Path) -> Path:
    """A finished run of one step with another width."""
    run = started(
        ["pretrain_atum.py", *arguments(data, tmp_path / "other", "model.hidden_size=64", "training.steps=1")]
    )
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    return tmp_path / "other" / "test" / "checkpoints" / "step-00000001"


# overrides with {data}, {tmp}, {packed}, {other} filled in; processes; what the message must say
MISTAKES = {
    "unknown_key": (["parallel.tensr=2"], 1, ["parallel.tensr", "parallel.tensor"]),
    "impossible_layout": (
        ["parallel.tensor=3"],
        3,
        ["model.num_heads=4", "parallel.tensor=1 would work"],
    ),
    "too_many_stages": (["parallel.pipeline=8"], 8, ["parallel.pipeline=8", "units"]),
    "indivisible_batch": (["training.global_batch_size=5"], 2, ["training.global_batch_size=5", "4 would work"]),
    "too_few_processes": (["parallel.tensor=2", "parallel.pipeline=2"], 2, ["needs 4 processes", "--nproc-per-node 4"]),
    "missing_shard": (["data.sources=[{{name: a, shards: '{tmp}/no-*.tar'}}]"], 1, ["no-*.tar"]),
    "compressed_shard": (["data.sources=[{{name: a, shards: '{packed}', kind: pairs}}]"], 1, ["packed.tar"]),
    "no_sources": (["data.sources=[]"], 1, ["data.sources"]),
    "wrong_tokenizer": (["model.vocab_size=500"], 1, ["tokenizer.model", "512", "500"]),
    "no_tokenizer": (["data.tokenizer={tmp}/none.model"], 1, ["none.model"]),
    "other_model": (["checkpoint.load={other}"], 1, ["model.hidden_size is 64 there and 128 here"]),
    "no_checkpoint": (["checkpoint.load={tmp}/step-00000009"], 1, ["step-00000009", "no such folder"]),
    "no_rows_for_images": (["model.additional_vocab_size=1"], 1, ["model.additional_vocab_size=1", "2 would work"]),
    "starts_below_its_checkpoints": (
        ["logging.root={other_root}", "model.hidden_size=64", "checkpoint.load=none"],
        1,
        ["checkpoint.load=none starts at step 0", "step-00000001"],
    ),
    "other_freezing": (
        ["logging.root={other_root}", "model.hidden_size=64", "model.freeze.vision=true"],
        1,
        ["freeze", "checkpoint.init"],
    ),
    "no_hf_folder": (["checkpoint.init={tmp}/hf"], 1, ["hf", "not a folder"]),
}


@pytest.fixture(scope="module")
def filled(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("mistakes")
    return {
        "data": data,
        "tmp": tmp,
        "packed": compressed(data, tmp),
        "other": other_model(data, tmp),
        "other_root": tmp / "other",
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_before_any_process_group(name: str, filled: dict[str, Path]) -> None:
    overrides, world_size, needles = MISTAKES[name]
    overrides = [override.format(**filled) for override in overrides]
    before = sorted(filled["tmp"].rglob("*"))
    with pytest.raises(AtumError) as refusal:
        config = load_config(None, arguments(filled["data"], filled["tmp"], *overrides))
        prepare_start(config, world_size, rank=0)
    for needle in needles:
        assert needle in str(refusal.value)
    assert sorted(filled["tmp"].rglob("*")) == before  # nothing half-written


@pytest.mark.parametrize("name", ["unknown_key", "compressed_shard"])
def test_a_mistake_is_one_line_and_exit_code_2(name: str, filled: dict[str, Path]) -> None:
    overrides = [override.format(**filled) for override in MISTAKES[name][0]]
    command = [sys.executable, "pretrain_atum.py", *arguments(filled["data"], filled["tmp"], *overrides)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pretrain_atum: ")


def test_a_mistake_under_torchrun_ends_at_once(filled: dict[str, Path]) -> None:
    overrides, processes, needles = MISTAKES["too_few_processes"]
    run = torchrun(processes, arguments(filled["data"], filled["tmp"], *overrides))
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "pretrain_atum: " in output
    for needle in needles:
        assert needle in output
    assert "/megatron_atum/" not in output


def test_shipped_tools_are_executable_by_path(tmp_path: Path) -> None:
    tools = sorted((ROOT / "tools").rglob("*.py"))
    assert tools

    def help_of(tool: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(tool), "--help"], cwd=tmp_path, capture_output=True, text=True)

    with ThreadPoolExecutor(4) as pool:
        for done in pool.map(help_of, tools):
            assert done.returncode == 0, done.stderr
            assert "usage:" in done.stdout


def test_metrics_are_json(data: Path, tmp_path: Path) -> None:
    run = started(["pretrain_atum.py", *arguments(data, tmp_path, "training.steps=2", "training.precision=bf16")])
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    lines = [json.loads(line) for line in (tmp_path / "test" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("event") for line in lines] == ["start", None, None, "save"]
    assert all(line["model_tflops"] > 0 for line in lines if "event" not in line)
