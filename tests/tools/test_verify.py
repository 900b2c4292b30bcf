"""tools/checkpoint/verify.py: what is the same passes at every layout, and what is not is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.checkpoint.hf_folder import IdeficsFolder
from megatron_atum.checkpoint.source import Given
from megatron_atum.checkpoint.stored import write_weights
from megatron_atum.training import verify as core
from tests.checkpoint.folders import all_of, change_config, change_tensors, read_all
from tests.distributed import run_distributed
from tests.model.cases import Case, hf_config, randomise
from tests.tools.calls import Done, call
from tools.checkpoint import verify

ROOT = Path(__file__).parents[2]
NAME = "model.gated_cross_attn_layers.1.cross_attn.v_proj.weight"
GATES = ("alpha_cross_attn", "alpha_dense")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as transformers writes it, and imported; four units."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    root, case = tmp_path_factory.mktemp("verify"), Case("verify", 41, interval=1)
    model = IdeficsForVisionText2Text(IdeficsConfig(**hf_config(case)))
    randomise(model.state_dict(), case.seed, case.small_norm_inputs)
    model.save_pretrained(root / "hf")
    import_folder(root)
    return root


def import_folder(root: Path, **how: Any) -> None:
    shutil.rmtree(root / "atum", ignore_errors=True)
    with IdeficsFolder(root / "hf") as folder:
        write_weights(root / "atum", folder.model, folder, **how)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "both"))


def as_rank(rank: int, world_size: int, fn: Any, args: Any) -> Any:
    return fn(rank, *args)


@pytest.fixture(autouse=True)
def fast_processes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes that have imported the large packages already. Returns how many there were in each launch."""
    launched = []

    def spawn(fn: Any, world_size: int, *args: Any) -> list[Any]:
        launched.append(world_size)
        return run_distributed(as_rank, world_size, fn, args)

    monkeypatch.setattr(core, "spawn", spawn)
    return launched


def run(root: Path, capsys: Capture, *options: str) -> Done:
    return call(verify.main, capsys, "--hf", root / "hf", "--checkpoint", root / "atum", "--tokens", "24", *options)


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        ((), 1),
        (("--tensor", "2", "--pipeline", "2"), 4),
        (("--pipeline", "2", "--virtual", "2", "--rows", "3", "--images", "1"), 2),
        (("--tensor", "2", "--no-sequence", "--rows", "1", "--images", "6", "--tokens", "25"), 2),
    ],
    ids=["one", "tp2pp2sp", "pp2vpp2", "tp2"],
)
def test_the_same_model(
    options: tuple[str, ...], processes: int, made: Path, capsys: Capture, fast_processes: list[int]
) -> None:
    done = run(made, capsys, *options)
    assert done.code == 0, done.out + done.err
    assert done.out.endswith("THE SAME\n") and "NOT" not in done.out and "warning" not in done.out
    assert "0 differ" in done.out and "logits are the same" in done.out
    assert fast_processes == [processes]
    assert max(map(len, done.out.splitlines())) <= 120


def test_one_changed_value_is_named(folder: Path, capsys: Capture) -> None:
    """Too small for the logits to show it, and then large enough."""
    value = read_all(folder / "hf")[NAME]
    for change, logits in ((1e-6, "logits are the same"), (3.0, "logits are NOT the same")):
        changed = value.clone()
        changed[2, 3] += change
        change_tensors(folder / "hf", {NAME: changed})
        done = run(folder, capsys)
        assert done.code == 1 and done.out.endswith("NOT THE SAME\n")
        assert "1 differ\n" in done.out and f"  {NAME}: differs by up to" in done.out
        assert logits in done.out, done.out


def test_a_difference_that_weights_do_not_show(made: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of logits fails on its own: here one of the models sees other images."""
    right = core.hf_logits
    monkeypatch.setattr(core, "hf_logits", lambda hf, batch, *rest: right(hf, swapped(batch), *rest))
    done = run(made, capsys)
    assert done.code == 1 and "0 differ" in done.out and "logits are NOT the same" in done.out
    assert run(made, capsys, "--tolerance", "10").code == 0


def swapped(batch: Any) -> Any:
    from dataclasses import replace

    return replace(batch, pixels=batch.pixels.flip(0))


@pytest.mark.parametrize("kinds", [GATES, GATES[:1]])
def test_gates_of_zero_do_not_hide_the_images(
    kinds: tuple[str, ...], folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = read_all(folder / "hf")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items() if name.endswith(kinds)}
    change_tensors(folder / "hf", dict(zeros))
    import_folder(folder)
    done = run(folder, capsys, "--tensor", "2")
    assert done.code == 0, done.out
    assert f"warning: all gates {' and '.join(kinds)} are zero" in done.out
    right = core.hf_logits
    monkeypatch.setattr(core, "hf_logits", lambda hf, batch, *rest: right(hf, swapped(batch), *rest))
    assert run(folder, capsys).code == 1  # the images count


def test_gates_that_are_zero_on_one_side_only(folder: Path, capsys: Capture) -> None:
    state = read_all(folder / "hf")
    change_tensors(folder / "hf", {name: torch.zeros_like(state[name]) for name in state if name.endswith(GATES)})
    done = run(folder, capsys)
    assert done.code == 1 and "warning" not in done.out and "8 differ" in done.out


def test_other_dtypes(folder: Path, capsys: Capture) -> None:
    """bf16 on both sides is computed in fp32; on one side only, weights are compared as bf16 rounds them."""
    import_folder(folder, dtype=torch.bfloat16)
    done = run(folder, capsys)
    assert done.code == 1 and "0 differ" in done.out and "float32 and bfloat16" in done.out
    assert run(folder, capsys, "--tolerance", "0.05").code == 0
    change_tensors(folder / "hf", {name: tensor.bfloat16() for name, tensor in read_all(folder / "hf").items()})
    done = run(folder, capsys)
    assert done.code == 0 and "other dtypes" not in done.out
    assert run(folder, capsys, "--dtype", "bf16", "--tensor", "2").code == 0


def test_another_epsilon_is_another_model(folder: Path, capsys: Capture, fast_processes: list[int]) -> None:
    change_config(folder / "hf", rms_norm_eps=1e-5)
    done = run(folder, capsys)
    assert done.code == 1 and "model.norm_eps is 1e-05 there and 1e-06 here" in done.out
    assert fast_processes == []


def test_wrong_use(made: Path, tmp_path: Path, capsys: Capture, fast_processes: list[int]) -> None:
    for options, said in (
        (("--tensor", "3"), "parallel.tensor=3 does not divide"),
        (("--pipeline", "5"), "at most 4 chunks"),
        (("--images", "23"), "--tokens 25 would work"),
        (("--step", "7"), "step-00000007"),
        (("--images", "0"), "at least 1"),
        (("--hf", str(tmp_path / "gone")), "is not a folder"),
        (("--checkpoint", str(tmp_path)), "no step folder"),
    ):
        done = run(made, capsys, *options)
        assert done.code == 2 and said in done.err, done.err
    assert fast_processes == []


def test_a_process_that_fails_is_no_mismatch(made: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(*args: Any) -> None:
        raise torch.multiprocessing.ProcessExitedException("killed", error_index=0, error_pid=1, exit_code=-9)

    monkeypatch.setattr(core, "spawn", spawn)
    done = run(made, capsys)
    assert done.code == 2 and "could not be run at this layout: killed" in done.err


# The parts ------------------------------------------------------------------------------------------------------------


def test_weights_are_compared_bit_for_bit(made: Path) -> None:
    with IdeficsFolder(made / "hf") as opened:
        state = all_of(opened)
    other = {name: tensor.clone() for name, tensor in state.items()}
    state["model.norm.weight"][0], other["model.norm.weight"][0] = 0.0, -0.0
    other["lm_head.weight"][-1, -1] += 2.0
    read: list[int] = []
    report = core.compare_weights(Given(state), Given(other), read.append)
    assert report.tensors == len(state) and sum(read) == sum(tensor.nbytes for tensor in state.values())
    assert report.different == {"model.norm.weight": 0.0, "lm_head.weight": pytest.approx(2.0)}


def test_the_input_covers_what_it_claims(made: Path) -> None:
    model = IdeficsFolder(made / "hf").model
    batch = core.random_batch(model, rows=3, tokens=40, images=4, seed=1)
    assert batch.images_per_row.tolist() == [4, 4, 0] and batch.pixels.shape[0] == 8
    for row in batch.image_index[:2]:
        assert row.tolist() == sorted(row.tolist()) and set(row.tolist()) == {-1, 0, 1, 2, 3}
    assert set(batch.image_index[2].tolist()) == {-1}
    many = core.random_batch(model, rows=2, tokens=4000, images=1, seed=1)
    assert set(many.input_ids.flatten().tolist()) == set(range(model.vocab_size + model.additional_vocab_size))
    assert torch.equal(batch.pixels, core.random_batch(model, rows=3, tokens=40, images=4, seed=1).pixels)
    assert not torch.equal(batch.pixels, core.random_batch(model, rows=3, tokens=40, images=4, seed=2).pixels)


def test_logits_that_are_not_numbers_are_not_the_same(made: Path) -> None:
    batch = core.random_batch(IdeficsFolder(made / "hf").model, rows=2, tokens=8, images=1, seed=0)
    logits = torch.randn(2, 8, 99)
    assert core.compare_logits(logits, logits, batch).within(0.0)
    for row in (0, 1):
        broken = logits.clone()
        broken[row, 3, 5] = float("nan")
        for theirs, ours in ((logits, broken), (broken, logits), (broken, broken)):
            assert not core.compare_logits(theirs, ours, batch).within(1e9)


def test_from_the_command_line(made: Path) -> None:
    """With processes that the tool starts itself."""
    options = ["--hf", made / "hf", "--checkpoint", made / "atum", "--tensor", "2", "--tokens", "16"]
    command = [sys.executable, ROOT / "tools/checkpoint/verify.py", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("THE SAME\n") and "Traceback" not in done.stderr


def test_help_has_examples(capsys: Capture) -> None:
    done = call(verify.main, capsys, "--help")
    assert done.code == 0 and "python tools/checkpoint/verify.py --hf" in done.out and "1e-4" in done.out
