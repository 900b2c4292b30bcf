"""What the toolkit passes becomes what pretrain_atum.py reads; its step lines give the metrics."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_atum.config.cli import parse_arguments
from megatron_atum.launch.sagemaker import METRICS, arguments, kept, with_kept
from megatron_atum.training.metrics import Terminal

ROOT = Path(__file__).parents[2]
SOURCES = '[{"name": "a", "shards": "/data/a b/*.tar", "weight": null}, {"name": "it\'s", "shards": "x--y=z"}]'


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (
            ["--config", "examples/tiny/pretrain.yaml", "--parallel.tensor", "8", "--training.steps", "100"],
            ["--config", "examples/tiny/pretrain.yaml", "parallel.tensor=8", "training.steps=100"],
        ),
        (["--data.sources", SOURCES], [f"data.sources={SOURCES}"]),
        (
            ["--parallel.units_per_chunk", "", "--training.steps", "2"],
            ["parallel.units_per_chunk=", "training.steps=2"],
        ),
        (
            ["--model.alpha_init", "-0.5", "--optimizer.min_lr", "-1e-3"],
            ["model.alpha_init=-0.5", "optimizer.min_lr=-1e-3"],
        ),
        (["--optimizer.distributed", "False"], ["optimizer.distributed=False"]),
        (["--logging.run", "--dry-run"], ["logging.run=--dry-run"]),  # a value is whatever stands in its place
        (["--logging.run", "--training.steps"], ["logging.run=--training.steps"]),
        (["--model.vision.num_layers", "3"], ["model.vision.num_layers=3"]),
        (["--dry-run", "", "--training.steps", "2"], ["--dry-run", "training.steps=2"]),
        (["--dry-run", "True"], ["--dry-run"]),
        (["--dry-run", "false"], []),
        (["--dry-run", "training.steps=2"], ["--dry-run", "training.steps=2"]),
        (["--dry-run"], ["--dry-run"]),
        (["training.steps=2", "model.preset=tiny"], ["training.steps=2", "model.preset=tiny"]),
        (["--parallel.tensor"], ["--parallel.tensor"]),
        (["--parallel.tensor=8"], ["--parallel.tensor=8"]),
        (["--tensor", "8", "-x", "--help"], ["--tensor", "8", "-x", "--help"]),
        ([], []),
    ],
)
def test_arguments(given: list[str], ours: list[str]) -> None:
    assert arguments(given) == ours
    assert arguments(ours) == ours  # a command line of ours stays what it is


def test_values_arrive_as_they_were_meant() -> None:
    pairs = {
        "config": "examples/tiny/pretrain.yaml",
        "data.sources": SOURCES,
        "model.alpha_init": "-0.5",
        "optimizer.distributed": "True",
        "parallel.units_per_chunk": "",
        "training.steps": "7",
    }
    config, dry_run = parse_arguments(
        "", arguments([word for key in sorted(pairs) for word in (f"--{key}", pairs[key])])
    )
    assert [(source.name, source.shards, source.weight) for source in config.data.sources] == [
        ("a", "/data/a b/*.tar", None),
        ("it's", "x--y=z", None),
    ]
    assert (config.model.alpha_init, config.optimizer.distributed, config.training.steps) == (-0.5, True, 7)
    assert config.parallel.units_per_chunk is None and not dry_run


def test_unknown_words_are_the_parsers() -> None:
    for words, said in (
        (["--tensor", "8"], "unrecognized arguments: --tensor"),
        (["--training.steps"], "unrecognized arguments: --training.steps"),
        (["--training.stepz", "8"], "did you mean 'training.steps'?"),
    ):
        command = [sys.executable, "pretrain_atum.py", "--dry-run", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert said in done.stderr


# Metrics --------------------------------------------------------------------------------------------------------------


def found_in(line: str) -> dict[str, float]:
    """As SageMaker takes them from a line."""
    matches = {name: re.search(regex, line) for name, regex in METRICS.items()}
    return {name: float(match[1]) for name, match in matches.items() if match}


@pytest.mark.parametrize("speed", [12.4, 468.0, 12345.6])
def test_metrics_of_an_accelerator(speed: float, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"step": 20, "step_s": 1.0, "loss": 2.5, "z_loss": 40.25, "grad_norm": 0.125, "lr": 3.01e-5}
    terminal = Terminal(shows=True, bar=False, total=200_000, start=0, every=10)
    terminal.step({**values, "tokens_per_s_per_device": speed, "mfu": 0.456, "bad_steps": 1})
    found = found_in(capsys.readouterr().out)
    del values["step_s"]
    assert found == {**values, "tokens_per_s_per_device": round(speed), "mfu_percent": 45.6}


def test_numbers_that_are_not_finite_are_no_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"step": 2, "step_s": 1.0, "loss": float("nan"), "z_loss": float("nan"), "grad_norm": float("inf")}
    Terminal(shows=True, bar=False, total=9, start=0, every=1).step(
        {**values, "lr": 1e-3, "tokens_per_s_per_device": 5.0, "bad_steps": 1}
    )
    assert found_in(capsys.readouterr().out) == {"step": 2, "lr": 1e-3, "tokens_per_s_per_device": 5}


# Environment ----------------------------------------------------------------------------------------------------------


def test_the_environment_of_a_job_outlives_the_toolkit() -> None:
    asked = {"NCCL_DEBUG": "INFO", "FI_PROVIDER": "tcp", "ATUM_DATA": "/data"}
    rank = with_kept(asked) | {
        "NCCL_DEBUG": "WARN",
        "FI_PROVIDER": "efa",
        "NCCL_PROTO": "simple",
        "NCCL_IB_DISABLE": "1",
    }
    assert kept(rank) == {"NCCL_DEBUG": "INFO", "FI_PROVIDER": "tcp"}
    assert kept({}) == {} and with_kept({"A": "b"}) == {"A": "b"}
