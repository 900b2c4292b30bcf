"""The command lines of tools/checkpoint: their words, their exit codes, and that they are light."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.source import Given
from megatron_atum.checkpoint.table import hf_shapes
from tests.checkpoint.folders import MODEL, NAME, SHAPE, change_tensors, read_all, same, to_bins, weights

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TOOLS = ("hf_to_atum.py", "atum_to_hf.py", "init_from_backbones.py")
LARGE = replace(MODEL, vocab_size=1 << 20, intermediate_size=1 << 18)  # 500 MB: there is time to stop a conversion


def command(tool: str, *options: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "tools/checkpoint" / tool), *map(str, options)]


def run(tool: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(tool, *options), capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_hf_folder(tmp_path / "hf", MODEL, Given(weights()))
    return tmp_path


@pytest.mark.parametrize("tool", TOOLS)
def test_help_has_examples(tool: str) -> None:
    done = run(tool, "--help")
    assert done.returncode == 0 and f"python tools/checkpoint/{tool} --" in done.stdout


def test_there_and_back_in_another_form(folder: Path) -> None:
    """Old keys are dropped and said; dtype and size of files are as asked for."""
    to_bins(folder / "hf", 2, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    done = run("hf_to_atum.py", "--hf", folder / "hf", "--out", folder / "atum", "--dtype", "bf16", "--standalone")
    assert done.returncode == 0, done.stderr
    assert "dropped 1 old key" in done.stdout and "inv_freq" in done.stdout
    assert "100%" in done.stderr  # the progress bar
    options = ("--dtype", "fp32", "--max-shard-size", "50KB")
    done = run("atum_to_hf.py", "--checkpoint", folder / "atum", "--out", folder / "back", *options)
    assert done.returncode == 0, done.stderr
    assert "no tokenizer found" in done.stdout and "100%" in done.stderr
    assert same(read_all(folder / "back"), {name: t.bfloat16().float() for name, t in weights().items()})
    assert len(list((folder / "back").glob("model-*.safetensors"))) > 2


def test_mistakes_are_one_line_and_leave_nothing(folder: Path) -> None:
    tensor = torch.ones(SHAPE)
    tensor[-1, -1] = float("nan")
    change_tensors(folder / "hf", {NAME: tensor})
    for options, word in (
        (("hf_to_atum.py", "--hf", folder / "hf", "--out", folder / "out"), "NaN"),
        (("hf_to_atum.py", "--hf", folder / "gone", "--out", folder / "out"), "is not a folder"),
        (("hf_to_atum.py", "--hf", folder / "gone", "--out", folder / "hf"), "exists already"),
        (("atum_to_hf.py", "--checkpoint", folder / "gone", "--out", folder / "hf"), "exists already"),
        (("atum_to_hf.py", "--checkpoint", folder / "gone", "--out", folder / "out"), "gone"),
    ):
        done = run(*options)  # type: ignore[arg-type]
        assert done.returncode == 2, done.stderr
        said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line and "B/s" not in line]
        assert len(said) == 1 and word in said[0], done.stderr
        assert [path.name for path in folder.iterdir()] == ["hf"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_conversion_that_is_stopped_leaves_nothing(number: signal.Signals, folder: Path) -> None:
    large = {name: torch.zeros(1).expand(shape) for name, shape in hf_shapes(LARGE).items()}
    (folder / "big").mkdir()
    write_hf_folder(folder / "big" / "hf", LARGE, Given(large))
    options = ("--hf", folder / "big" / "hf", "--out", folder / "out")
    process = subprocess.Popen(command("hf_to_atum.py", *options), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while process.poll() is None and not list(folder.glob("out*/**/*.safetensors")):
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number), errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in folder.iterdir()) == ["big", "hf"]


def test_conversions_do_without_large_packages() -> None:
    """megatron.core and transformers cost seconds and hundreds of megabytes."""
    code = (
        "import sys; import megatron_atum.checkpoint.stored, megatron_atum.checkpoint.hf_export; "
        "import megatron_atum.checkpoint.backbones; print({'megatron', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.stdout == "set()\n", done.stdout + done.stderr
