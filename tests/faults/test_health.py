"""Steps that go wrong: numbers that are not finite, loss spikes, weights that change. Whole runs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.poison import make_poisoned
from tests.faults.runs import (
    FROZEN,
    RUN,
    SMALL,
    Outcome,
    checkpoints_of,
    data_overrides,
    events_of,
    lines_of,
    numbers_of,
    run,
)

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    "pp2": (2, ["parallel.pipeline=2"]),
    "dp2": (2, ["optimizer.overlap_param_gather=true"]),
    "tp2pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}


def trained(root: Path, data: Path, layout: str, *changes: str, hook: Any = None, **options: Any) -> Outcome:
    world_size, overrides = LAYOUTS[layout]
    every = ["checkpoint.save_every=2", "checkpoint.keep=0"]
    return run(root, [*SMALL, *data_overrides(data), *overrides, *every, *changes], world_size, hook=hook, **options)


# Not finite ----------------------------------------------------------------------------------------------------------


def _break_gradients(rank: int, steps: range) -> None:
    """One gradient of the last rank's first weights is NaN in some steps."""
    import torch.distributed as dist

    from megatron_atum.training.engine import Engine

    forward_backward, done = Engine.forward_backward, []

    def broken(self: Engine, batches: Any) -> Any:
        result = forward_backward(self, batches)
        done.append(1)
        if len(done) in steps and rank == dist.get_world_size() - 1:
            for parameter in self.stages[0].cross_attention_layers.parameters():
                parameter.main_grad.view(-1)[0] = math.nan
        return result

    Engine.forward_backward = broken  # type: ignore[method-assign]


def break_step_3(rank: int) -> None:
    _break_gradients(rank, range(3, 4))


def break_from_step_3(rank: int) -> None:
    _break_gradients(rank, range(3, 100))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_step_is_not_applied_and_told_of(layout: str, data: Path, tmp_path: Path) -> None:
    outcome = trained(tmp_path, data, layout, "training.steps=5", hook=break_step_3)
    assert outcome.codes == [0] * LAYOUTS[layout][0], outcome.logs
    lines = numbers_of(tmp_path)
    assert [line["bad_steps"] for line in lines] == [0, 0, 1, 1, 1]
    assert lines[2]["grad_norm"] is None and math.isfinite(lines[2]["loss"])
    assert lines[3]["lr"] == lines[2]["lr"], "the schedule counts updates"
    assert all(math.isfinite(line["loss"]) for line in lines)
    (event,) = events_of(tmp_path, "bad_step")
    kept = json.loads((tmp_path / RUN / "bad-steps" / "step-00000003.json").read_text())
    unit = 0 if layout == "dp2" else 1  # on the last stage
    assert kept["first_bad_part"] == event["first_bad_part"] == f"model.gated_cross_attn_layers.{unit}"
    assert [number for number, _ in kept["packs"]] == [4, 5]
    assert f"step 3 was not applied: loss {lines[2]['loss']!r}"[:40] in outcome.logs[0]


def tensors_of(root: Path, step: int) -> dict[str, Any]:
    """Weights and moments of a checkpoint, as they are stored."""
    from safetensors.torch import load_file

    folder = checkpoints_of(root) / f"step-{step:08d}"
    found = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    return {f"{file}/{name}": tensor for file, tensors in found.items() for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", ["pp2", "dp2"])
def test_a_bad_step_leaves_weights_and_moments_alone(layout: str, data: Path, tmp_path: Path) -> None:
    changes = ["training.steps=4", "checkpoint.save_every=1", "training.precision=bf16"]
    assert trained(tmp_path, data, layout, *changes, hook=break_step_3).codes == [0, 0]
    before, bad, after = (tensors_of(tmp_path, step) for step in (2, 3, 4))
    trained_ones = [name for name in before if not name.split("/")[1].startswith("random")]
    assert all(torch.equal(before[name], bad[name]) for name in trained_ones)
    assert any(not torch.equal(before[name], after[name]) for name in trained_ones if "exp_avg_sq" in name)


def test_too_many_bad_steps_end_the_run_and_can_be_replayed(data: Path, tmp_path: Path) -> None:
    changes = ["health.max_bad_steps=2", "training.steps=8"]
    outcome = trained(tmp_path, data, "pp2", *changes, hook=break_from_step_3, outlive_s=5.0)
    assert outcome.codes == [3, 3], outcome.logs
    for log in outcome.logs:
        assert "HealthFailure: step 4: 2 steps in a row were not applied" in log and "Traceback" not in log
    assert (checkpoints_of(tmp_path) / "step-00000004" / "complete.json").exists(), "what was good is kept"

    command = [sys.executable, "tools/replay_batch.py", str(tmp_path / RUN), "--step", "4", "parallel.pipeline=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr  # the hook is not there any more
    replayed = json.loads((tmp_path / RUN / "bad-steps" / "step-00000004.replay.json").read_text())
    line = numbers_of(tmp_path)[3]
    assert float(replayed["loss"]) == pytest.approx(line["loss"], rel=1e-5)
    assert [row["pack"] for row in sorted(replayed["rows"], key=lambda row: row["pack"])] == [6, 7]
    assert all(row["keys"] for row in replayed["rows"])

    again = trained(tmp_path, data, "pp2", *changes)
    assert again.codes == [0, 0], again.logs
    assert [line["step"] for line in numbers_of(tmp_path)] == list(range(1, 9))


def test_replay_of_a_step_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "tools/replay_batch.py", str(tmp_path / "gone"), "--step", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "step-00000004.json does not exist" in done.stderr, done.stdout + done.stderr


# Loss spikes: a shard of garbage -------------------------------------------------------------------------------------

FIRST_BAD = 37  # step that reads the first garbage
LAST_BAD = 42
STEPS = 50


@pytest.fixture(scope="module")
def poisoned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("poison") / "data"
    size = ["training.micro_batch_size=2", "training.global_batch_size=4", f"training.steps={STEPS}"]
    return [*SMALL, *make_poisoned(folder, data / "tokenizer.model"), *size, "checkpoint.save_every=10"]


def spike_steps(root: Path) -> list[int]:
    return [event["step"] for event in events_of(root, "spike")]


def test_spikes_are_told_of(poisoned: list[str], tmp_path: Path) -> None:
    outcome = run(tmp_path, poisoned, 1)
    assert outcome.codes == [0], outcome.logs
    assert [step for step in spike_steps(tmp_path) if step <= FIRST_BAD + 2][-3:] == [37, 38, 39]
    losses = {line["step"]: line["loss"] for line in numbers_of(tmp_path)}
    assert losses[FIRST_BAD - 1] < 0.2 and losses[FIRST_BAD + 1] > 2.0, "else this is no spike"
    assert "deviations above its median" in outcome.logs[0]


def test_skip_data_passes_the_shard_over(poisoned: list[str], tmp_path: Path) -> None:
    changes = ["health.spike=skip_data", "health.max_bad_steps=20"]
    outcome = run(tmp_path, [*poisoned, *changes], 1)
    assert outcome.codes == [0], outcome.logs
    lines = {line["step"]: line for line in numbers_of(tmp_path)}
    assert set(range(FIRST_BAD, LAST_BAD + 1)) <= set(spike_steps(tmp_path))
    assert lines[LAST_BAD + 1]["loss"] < 0.2, "the weights have seen nothing of it"
    assert lines[STEPS]["bad_steps"] == len(events_of(tmp_path, "bad_step")) == len(spike_steps(tmp_path))

    limited = run(tmp_path / "limited", [*poisoned, "health.spike=skip_data", "health.max_bad_steps=3"], 1)
    assert limited.codes == [3], limited.logs
    assert "3 steps in a row were not applied, the last one with a loss spike" in limited.logs[0]


ROLLBACK = ["health.spike=rollback", "health.rollback_skip=5", "health.rollback_lr_scale=0.5"]


def die_after_the_rollback(rank: int) -> None:
    """Before the next checkpoint."""
    from megatron_atum.training.run_log import RunLog

    step, rolled = RunLog.step, []

    def logged(self: RunLog, values: dict[str, Any]) -> None:
        step(self, values)
        rolled.append(values["rollbacks"])
        if sum(rolled) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    RunLog.step = logged  # type: ignore[method-assign]


def test_rollback_goes_back_and_jumps_over_the_data(poisoned: list[str], tmp_path: Path) -> None:
    outcome = run(tmp_path / "whole", [*poisoned, *ROLLBACK], 1)
    assert outcome.codes == [0], outcome.logs
    (event,) = events_of(tmp_path / "whole", "rollback")
    assert (event["step"], event["from"]) == (30, FIRST_BAD + 2)
    lines = lines_of(tmp_path / "whole")
    after = [line for line in lines[lines.index(event) :] if "event" not in line]
    assert [line["step"] for line in after] == list(range(31, STEPS + 1))
    before = next(line for line in lines if line["step"] == 31 and "event" not in line)
    assert after[0]["lr"] == pytest.approx(before["lr"] / 2)
    assert all(line["loss"] < 0.2 for line in after), "weights of before, data of behind"
    records = json.loads((tmp_path / "whole" / RUN / "rollbacks.json").read_text())
    assert [(record["step"], record["to"]) for record in records] == [(FIRST_BAD + 2, 30)]

    # Killed before the next checkpoint, it goes on behind the spike as well, bit for bit.
    killed = run(tmp_path / "killed", [*poisoned, *ROLLBACK], 1, hook=die_after_the_rollback)
    assert killed.codes == [-signal.SIGKILL], killed.logs
    again = run(tmp_path / "killed", [*poisoned, *ROLLBACK], 1)
    assert again.codes == [0] and "step 30 of" in again.logs[0], again.logs
    resumed = [line for line in numbers_of(tmp_path / "killed") if line["step"] > 30]
    expected = [line for line in numbers_of(tmp_path / "whole")][-len(resumed) :]
    assert resumed[-(STEPS - 30) :] == expected[-(STEPS - 30) :]


def test_without_a_checkpoint_to_go_back_to_the_spike_is_left_out(poisoned: list[str], tmp_path: Path) -> None:
    changes = [
        "checkpoint.save_every=1000",
        "health.spike=rollback",
        "health.rollback_skip=5",
        "health.max_bad_steps=20",
    ]
    outcome = run(tmp_path, [*poisoned, *changes], 1)
    assert outcome.codes == [0], outcome.logs
    assert not events_of(tmp_path, "rollback")
    assert f"step {FIRST_BAD + 2}: there is no checkpoint from before the spike" in outcome.logs[0]
    bad = [event["step"] for event in events_of(tmp_path, "bad_step")]
    assert bad and bad[0] == FIRST_BAD + 2
    assert [line["step"] for line in numbers_of(tmp_path)] == list(range(1, STEPS + 1))


LAYOUT_OVERRIDES = {
    "pp2": ["parallel.pipeline=2"],
    "dp2": ["optimizer.overlap_param_gather=true", "training.micro_batch_size=1"],
}


@pytest.mark.parametrize("layout", LAYOUT_OVERRIDES)
def test_rollback_at_a_layout(layout: str, poisoned: list[str], tmp_path: Path) -> None:
    outcome = run(tmp_path, [*poisoned, *ROLLBACK, *LAYOUT_OVERRIDES[layout]], 2)
    assert outcome.codes == [0, 0], outcome.logs
    assert [(event["step"], event["from"]) for event in events_of(tmp_path, "rollback")] == [(30, FIRST_BAD + 2)]
    assert numbers_of(tmp_path)[-1]["loss"] < 0.2


def test_too_many_rollbacks_end_the_run(poisoned: list[str], tmp_path: Path) -> None:
    changes = ["health.spike=rollback", "health.max_rollbacks=1"]  # without a skip the spike is found again
    outcome = run(tmp_path, [*poisoned, *changes], 1)
    assert outcome.codes == [3], outcome.logs
    assert len(events_of(tmp_path, "rollback")) == 1
    assert "the run went back 1 times already (health.max_rollbacks=1)" in outcome.logs[0]
    assert "raise it, or health.rollback_skip" in outcome.logs[0]


# Frozen weights that change ------------------------------------------------------------------------------------------


def flip_a_bit(rank: int) -> None:
    """On rank 1, after the second step, in one frozen weight."""
    import torch

    from megatron_atum.training.engine import Engine

    apply, done = Engine.apply, []

    def flipping(self: Engine, result: Any) -> None:
        apply(self, result)
        done.append(1)
        if rank == 1 and len(done) == 2:
            frozen = next(p for p in self.stages[-1].decoder_layers.parameters() if not p.requires_grad)
            frozen.data.view(torch.int32).view(-1)[3] ^= 1

    Engine.apply = flipping  # type: ignore[method-assign]


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_a_flipped_bit_in_a_frozen_weight_is_found(layout: str, data: Path, tmp_path: Path) -> None:
    changes = [FROZEN, "health.checksum_every=2", "training.steps=6"]
    outcome = trained(tmp_path, data, layout, *changes, hook=flip_a_bit, outlive_s=5.0)
    assert outcome.codes == [3, 3], outcome.logs
    for log in outcome.logs:
        assert "HealthFailure: frozen weights have changed: rank 1 on" in log and "decoder_layers." in log
        assert "rank 0 on" not in log.split("HealthFailure")[1].split("rank 1")[0]
    assert [line["step"] for line in numbers_of(tmp_path)] == [1, 2]


FP8 = [FROZEN, "kernels.frozen_gemm=fp8", "model.vision.intermediate_size=32"]


def flip_a_bit_of_8(rank: int) -> None:
    """On rank 1, after the second step, in what the products of one frozen weight use."""
    import torch

    from megatron_atum.model.frozen_gemm import frozen_matrices
    from megatron_atum.training.engine import Engine

    apply, done = Engine.apply, []

    def flipping(self: Engine, result: Any) -> None:
        apply(self, result)
        done.append(1)
        if rank == 1 and len(done) == 2:
            *_, (_, _, matrix) = frozen_matrices(self.stages)
            matrix.values_NK.view(torch.uint8).view(-1)[3] ^= 1

    Engine.apply = flipping  # type: ignore[method-assign]


def test_a_flipped_bit_in_an_8_bit_copy_is_found_and_the_run_goes_on_from_before(data: Path, tmp_path: Path) -> None:
    changes = [*FP8, "health.checksum_every=2", "training.steps=6"]
    outcome = trained(tmp_path / "flipped", data, "pp2", *changes, hook=flip_a_bit_of_8, outlive_s=5.0)
    assert outcome.codes == [3, 3], outcome.logs
    assert "frozen products: 12 matrices in fp8" in outcome.logs[0]
    for log in outcome.logs:
        assert "frozen weights have changed: rank 1 on" in log and "mlp.linear_fc2.weight in 8 bits" in log

    again = trained(tmp_path / "flipped", data, "pp2", *changes)  # from its second step
    whole = trained(tmp_path / "whole", data, "pp2", *changes)
    assert again.codes == whole.codes == [0, 0], again.logs
    assert numbers_of(tmp_path / "flipped") == numbers_of(tmp_path / "whole")


def test_sound_weights_pass(data: Path, tmp_path: Path) -> None:
    outcome = trained(tmp_path, data, "tp2pp2", FROZEN, "health.checksum_every=1", "training.steps=3")
    assert outcome.codes == [0] * 4, outcome.logs


# The trial before the first step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dry_step_leaves_no_trace(layout: str, data: Path, tmp_path: Path) -> None:
    steps = "training.steps=3"
    dry = trained(tmp_path / "dry", data, layout, steps, "health.dry_step=always")
    plain = trained(tmp_path / "plain", data, layout, steps, "health.dry_step=never")
    assert dry.codes == plain.codes == [0] * LAYOUTS[layout][0], dry.logs
    assert "dry step: the largest microbatch (1 rows, 8 images) takes" in dry.logs[0]
    assert "dry step" not in plain.logs[0]
    assert numbers_of(tmp_path / "dry") == numbers_of(tmp_path / "plain")
