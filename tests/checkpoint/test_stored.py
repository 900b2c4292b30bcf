"""Checkpoints of weights only: written from any source, found, opened, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_atum.checkpoint.draw import Drawn
from megatron_atum.checkpoint.folder import damaged, missing, read_record, step_folder
from megatron_atum.checkpoint.index import read_index
from megatron_atum.checkpoint.source import Given
from megatron_atum.checkpoint.stored import StoredCheckpoint, find_checkpoint, open_checkpoint, write_weights
from megatron_atum.checkpoint.table import hf_shapes, weight_table
from megatron_atum.checkpoint.tensor_file import checksum_of
from megatron_atum.config.loader import preset
from megatron_atum.errors import CheckpointError

ROOT = Path(__file__).parents[2]
MODEL = preset("tiny")
ASSETS = {"tokenizer.model": b"pieces", "tokenizer_config.json": b"{}"}


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    source = Drawn(MODEL, 3)
    return {name: source.read(name).to(dtype) for name in source.names()}


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_written_is_read(dtype: torch.dtype, standalone: bool, tmp_path: Path) -> None:
    expected = tensors(dtype)
    write_weights(tmp_path / "out", MODEL, Given(expected), standalone=standalone, assets=ASSETS)
    stored = open_checkpoint(tmp_path / "out")
    assert stored.names() == expected.keys()
    for name, tensor in expected.items():
        assert stored.dtype(name) == dtype and stored.shape(name) == tuple(tensor.shape)
        assert torch.equal(stored.read(name), tensor)
    assert torch.equal(stored.read("lm_head.weight", slice(100, 107)), expected["lm_head.weight"][100:107])
    assert stored.assets == ASSETS
    assert stored.model == MODEL and stored.state.step == 0 and not stored.state.is_training
    assert missing(stored.folder) == damaged(stored.folder) == []


def test_backbones_and_the_rest_lie_apart(tmp_path: Path) -> None:
    write_weights(tmp_path / "out", MODEL, Drawn(MODEL, 3))
    (frozen,) = (tmp_path / "out").glob("frozen-*")
    theirs, ours = read_index(frozen), read_index(step_folder(tmp_path / "out", 0))
    assert theirs.keys() | ours.keys() == hf_shapes(MODEL).keys()
    assert not theirs.keys() & ours.keys()
    marks = ("gated_cross_attn_layers", "perceiver_resampler", "additional_embedding", "additional_fc")
    assert all(any(mark in name for mark in marks) for name in ours)
    assert not any(mark in name for name in theirs for mark in marks)
    assert {name for row in weight_table(MODEL) if row.backbone for name in row.hf} == theirs.keys()


def test_frozen_folders_are_named_by_their_content(tmp_path: Path) -> None:
    names = []
    for number, seed in enumerate((3, 3, 4)):
        write_weights(tmp_path / str(number), MODEL, Drawn(MODEL, seed))
        names += [path.name for path in (tmp_path / str(number)).glob("frozen-*")]
    assert names[0] == names[1] != names[2]


def test_every_file_has_its_size_and_checksum(tmp_path: Path) -> None:
    write_weights(tmp_path / "out", MODEL, Drawn(MODEL, 3), assets=ASSETS)
    for folder in (tmp_path / "out").iterdir():
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert {record.name for record in read_record(folder)} == files - {"complete.json"}


def test_another_dtype(tmp_path: Path) -> None:
    expected = tensors(torch.float32)
    write_weights(tmp_path / "out", MODEL, Given(expected), dtype=torch.bfloat16)
    stored = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(stored.read(name), tensor.bfloat16()) for name, tensor in expected.items())


@pytest.mark.parametrize(("value", "dtype"), [(1e5, torch.float16), (float("nan"), None), (float("inf"), None)])
def test_what_is_not_finite_is_refused(value: float, dtype: torch.dtype | None, tmp_path: Path) -> None:
    changed = tensors(torch.float32)
    changed["model.norm.weight"][5] = value

    class Checked(Given):
        def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
            from megatron_atum.checkpoint.tensor_file import check_finite

            tensor = super().read(name, rows)
            check_finite(tensor, lambda: name)
            return tensor

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        write_weights(tmp_path / "out", MODEL, Checked(changed), dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_it_does_not_write_over_anything(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        write_weights(tmp_path / "out", MODEL, Drawn(MODEL, 3))


def test_a_source_of_another_model_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    write_weights(tmp_path / "out", MODEL, Drawn(MODEL, 3), standalone=True)
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    state["config"]["model"]["num_layers"] = 5
    _rewrite(tmp_path / "out", state)
    with pytest.raises(CheckpointError, match=r"does not hold model\.gated_cross_attn_layers\.4"):
        StoredCheckpoint(tmp_path / "out")
    state["config"]["model"] |= {"num_layers": 4, "hidden_size": 64}
    _rewrite(tmp_path / "out", state)
    with pytest.raises(CheckpointError, match=r"and its model needs"):
        StoredCheckpoint(tmp_path / "out")
    state["config"]["model"] |= {"hidden_size": 128, "num_heads": 3}
    _rewrite(tmp_path / "out", state)
    with pytest.raises(CheckpointError, match=r"state\.json"):  # a configuration that contradicts itself
        StoredCheckpoint(tmp_path / "out")


def _rewrite(folder: Path, state: dict) -> None:
    """Change state.json so that only its meaning is wrong."""
    (folder / "state.json").write_text(json.dumps(state))
    record = json.loads((folder / "complete.json").read_text())
    record["files"]["state.json"] = [(folder / "state.json").stat().st_size, checksum_of(folder / "state.json")]
    (folder / "complete.json").write_text(json.dumps(record))


# Finding -------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_found_from_run_steps_or_its_own_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_weights(run / "checkpoints", MODEL, Drawn(MODEL, 3))
    step = step_folder(run / "checkpoints", 0)
    for path in (run, run / "checkpoints", step):
        assert find_checkpoint(path) == step
        assert find_checkpoint(path, 0) == step
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(run, 7)
    with pytest.raises(CheckpointError, match="is step 0, not 7"):
        open_checkpoint(step, 7)
    with pytest.raises(CheckpointError, match="holds no step folder"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    (step / "complete.json").unlink()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        open_checkpoint(run)


# Killed midway -------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from megatron_atum.checkpoint.draw import Drawn
from megatron_atum.checkpoint.stored import write_weights
from megatron_atum.config.loader import load_config
model = load_config(None, ["model.preset=tiny", "model.hidden_size=512", "model.num_layers=8"]).model
print("started", flush=True)
write_weights(Path(sys.argv[1]), model, Drawn(model, 1))
"""


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.4])
def test_a_killed_conversion_leaves_nothing_that_looks_complete(delay: float, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(out)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"started\n"
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    if out.exists():  # it was done already
        assert open_checkpoint(out).names()
    else:
        with pytest.raises(CheckpointError):
            open_checkpoint(out)
    write_weights(tmp_path / "out2", replace(MODEL, preset=""), Drawn(MODEL, 1))  # what is left is in nobody's way


def test_tools_do_not_touch_what_others_have_put_there(tmp_path: Path) -> None:
    """Neither a folder that is named like one of ours, nor one that appears while a conversion runs."""
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine").write_text("x")
    write_weights(tmp_path / "out", MODEL, Drawn(MODEL, 3))
    assert (tmp_path / "out.tmp" / "mine").read_text() == "x"

    class Slow(Given):
        def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
            (tmp_path / "late").mkdir(exist_ok=True)
            (tmp_path / "late" / "precious").write_text("x")
            return super().read(name, rows)

    with pytest.raises(CheckpointError, match="late exists already"):
        write_weights(tmp_path / "late", MODEL, Slow(tensors(torch.float32)))
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["precious"]
    assert not list(tmp_path.glob("late.*"))


def test_a_checkpoint_of_very_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run of many ranks writes it: more files than may be open at once."""
    from megatron_atum.checkpoint import reader, writer

    monkeypatch.setattr(writer, "FILE_BYTES", 1)
    monkeypatch.setattr(reader, "MOST_OPEN", 5)
    expected = tensors(torch.float32)
    write_weights(tmp_path / "out", MODEL, Given(expected))
    before = len(os.listdir("/proc/self/fd"))
    stored = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in expected.items())
    assert len(os.listdir("/proc/self/fd")) <= before + 5
    stored.close()
    assert len(os.listdir("/proc/self/fd")) == before
