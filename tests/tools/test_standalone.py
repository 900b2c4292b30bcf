"""The command line of tools/checkpoint/standalone.py; tests/checkpoint/test_standalone.py tests what it copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_atum.checkpoint.source import Given
from megatron_atum.checkpoint.stored import open_checkpoint, write_weights
from tests.checkpoint.folders import MODEL, all_of, same, weights
from tests.tools.calls import call, flip
from tools.checkpoint import standalone


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_weights(tmp_path / "atum", MODEL, Given(weights()))
    return tmp_path / "atum"


def test_copies_the_newest_step_or_the_one_that_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = call(standalone.main, capsys, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert (done.code, done.out) == (0, f"copied {checkpoint}/step-00000000 to {tmp_path}/out\n")
    assert "100%" in done.err  # the progress bar
    assert same(all_of(open_checkpoint(tmp_path / "out")), weights())
    done = call(
        standalone.main, capsys, "--checkpoint", checkpoint, "--step", "0", "--out", tmp_path / "2", "--weights-only"
    )
    assert done.code == 0 and (tmp_path / "2/state.json").exists()
    done = call(standalone.main, capsys, "--checkpoint", checkpoint, "--step", "7", "--out", tmp_path / "3")
    assert done.code == 2 and "step-00000007" in done.err


def test_mistakes_are_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(next(checkpoint.glob("frozen-*/weights-0.safetensors")))
    done = call(standalone.main, capsys, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert done.code == 2 and not (tmp_path / "out").exists()
    assert "is damaged" in done.err.splitlines()[-1]
    for options in (("--checkpoint", checkpoint, "--out", checkpoint), ("--checkpoint", tmp_path, "--out", "x")):
        done = call(standalone.main, capsys, *options)
        assert done.code == 2 and done.err.count("\n") == 1


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(standalone.main, capsys, "--help")
    assert done.code == 0 and "python tools/checkpoint/standalone.py --checkpoint" in done.out
