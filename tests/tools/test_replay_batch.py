"""tools/replay_batch.py on a step that is bad: weights that a huge learning rate has blown up."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.parallel.groups import stop_distributed
from megatron_atum.training.engine import Engine
from megatron_atum.training.replay import _worst_first
from tests.faults.runs import RUN, SMALL, data_overrides, make_data, run
from tests.tools.calls import call
from tools.replay_batch import main

BAD_STEP = 2  # the first one has turned the weights into numbers whose products overflow
BLOWN_UP = ["optimizer.lr=1e30", "optimizer.warmup_steps=0", "health.max_bad_steps=1", "checkpoint.save_every=1"]


@dataclass(frozen=True)
class Replay:
    code: int
    out: str
    found: dict[str, Any]
    deterministic: bool


@pytest.fixture(scope="module")
def bad_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("blown_up")
    changes = ["training.steps=4", "training.global_batch_size=4", "training.micro_batch_size=2", *BLOWN_UP]
    outcome = run(root, [*SMALL, *data_overrides(make_data(root / "data")), *changes], 1)
    assert outcome.codes == [3] and "tools/replay_batch.py" in outcome.logs[0], outcome.logs
    return root / RUN


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a replay in this process changes is put back."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    yield
    stop_distributed()
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


def replayed(bad_run: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> Replay:
    done = call(main, capsys, bad_run, "--step", str(BAD_STEP), *overrides)
    assert done.err == ""
    found = json.loads((bad_run / "bad-steps" / f"step-{BAD_STEP:08d}.replay.json").read_text())
    return Replay(done.code, done.out, found, torch.are_deterministic_algorithms_enabled())


@pytest.mark.usefixtures("process")
def test_a_step_that_is_bad_again(bad_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = replayed(bad_run, capsys)
    assert done.code == 1 and done.found["finite"] is False
    assert not math.isfinite(float(done.found["loss"]))
    bad = done.found["bad_parameters"]
    assert "model.embed_tokens.weight" in bad[0] and bad[-1].startswith("lm_head")
    assert f"{len(bad)} gradients are not finite, from {bad[-1]} (look there first) back to {bad[0]}" in done.out
    kept = json.loads((bad_run / "bad-steps" / f"step-{BAD_STEP:08d}.json").read_text())
    assert sorted([row["pack"], row["source"]] for row in done.found["rows"]) == kept["packs"]
    assert len(done.found["rows"]) == 4 and all(row["keys"] for row in done.found["rows"])
    assert not done.deterministic


@pytest.mark.usefixtures("process")
def test_the_worst_row_is_the_first(
    bad_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [[1.0, math.nan], [3.0, 2.0]]
    monkeypatch.setattr(Engine, "row_losses", lambda self, batches: losses)
    done = replayed(bad_run, capsys, "training.deterministic=true")
    assert [row["loss"] for row in done.found["rows"]] == ["nan", "3.0", "2.0", "1.0"]
    shown = [line.split()[2] for line in done.out.splitlines()[-4:]]
    assert shown == ["nan", "3.0", "2.0", "1.0"]
    assert done.deterministic, "as the run itself would be"


def test_rows_that_are_not_finite_come_before_all_others() -> None:
    rows = [{"loss": loss} for loss in ("1.0", "inf", "-2.0", "nan", "30.5")]
    assert [row["loss"] for row in sorted(rows, key=_worst_first)] == ["inf", "nan", "30.5", "1.0", "-2.0"]
