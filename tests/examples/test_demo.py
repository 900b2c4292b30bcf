"""The pieces of the demo. The whole of it is `make demo`."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_atum.checkpoint.backbones import Backbones
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.hf_folder import IdeficsFolder, check_same_model
from megatron_atum.config.loader import load_config, preset

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"
sys.path.insert(0, str(TINY))

demo = importlib.import_module("demo")
demo_plots = importlib.import_module("demo_plots")
demo_processes = importlib.import_module("demo_processes")
make_backbones = importlib.import_module("make_backbones")
make_data = importlib.import_module("make_data")

TRUTHS = {"cat": "a cat", "cup": "a red cup", "rocket": "a rocket"}
RIGHT_SWAP = {"cat": "a red cup", "cup": "a cat"}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    captions = [caption for _, _, caption in make_data.PHOTOS.values()]
    paragraphs = [text for places in make_data.DOCUMENTS.values() for text in places]
    (folder / "tokenizer.model").write_bytes(make_data.train_tokenizer(captions + paragraphs))
    make_backbones.make_backbones(folder, folder / "tokenizer.model", seed=1)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of runs/demo."""
    monkeypatch.setattr(demo, "DEMO", tmp_path / "demo")
    return tmp_path / "demo"


def curve(count: int = 4) -> list[dict[str, Any]]:
    return [
        {"step": n, "loss": 6.0 / n, "loss/pairs": 5.0 / n, "grad_norm": 1.0, "lr": 1e-3, "step_s": 0.1 * n}
        for n in range(1, count + 1)
    ]


# -- backbones -------------------------------------------------------------------------------------------------------


def test_backbones_fit_the_preset(backbones: Path, tmp_path: Path):
    start = Backbones(backbones / "llama", backbones / "clip", preset("tiny"), 0, torch.float32)
    write_hf_folder(tmp_path / "start", start.model, start)
    made = IdeficsFolder(tmp_path / "start").model
    for config in ("pretrain", "frozen"):
        check_same_model("start", made, load_config(TINY / f"{config}.yaml", []).model)
    assert made.max_position_embeddings == preset("tiny").max_position_embeddings


def test_backbones_depend_on_the_seed_only(backbones: Path, tmp_path: Path):
    def weights(folder: Path) -> bytes:
        return b"".join((folder / name / "model.safetensors").read_bytes() for name in ("llama", "clip"))

    for seed, same in ((1, True), (2, False)):
        make_backbones.make_backbones(tmp_path, backbones / "tokenizer.model", seed)
        assert (weights(tmp_path) == weights(backbones)) is same


def test_backbones_refuse_a_tokenizer_that_is_none(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_text("no")
    with pytest.raises(make_backbones.DataError, match="not a sentencepiece model"):
        make_backbones.make_backbones(tmp_path, tmp_path / "tokenizer.model", 1)
    assert not (tmp_path / "llama").exists()


def test_the_preset_can_be_split():
    model = preset("tiny")
    for size in (model.hidden_size, model.intermediate_size, model.num_heads, model.vocab_size):
        assert size % 4 == 0
    assert model.perceiver.num_heads % 4 == 0
    assert model.num_layers // model.cross_layer_interval >= 2
    assert model.alpha_init == 0.0


def test_the_kill_lies_between_two_checkpoints():
    config = load_config(TINY / "pretrain.yaml", [])
    every = config.checkpoint.save_every
    assert every < demo.KILL_AFTER < demo.RESUME_STEPS <= config.training.steps
    assert 5 <= demo.KILL_AFTER % every <= every - 5, "a run goes on for a few steps until the signal arrives"


# -- comparisons -----------------------------------------------------------------------------------------------------


def test_equal_curves():
    later = [{**step, "step_s": 9.9} for step in curve()]
    assert demo.unequal(curve(6), later, 4) == []


@pytest.mark.parametrize("key", ["loss", "loss/pairs", "grad_norm", "lr", "step"])
def test_the_last_bit_of_a_number_counts(key: str):
    found = curve()
    found[2][key] += 1 if key == "step" else 1e-15
    assert [line.split(":")[0] for line in demo.unequal(curve(), found, 4)] == ["step 3"]


def test_a_missing_number_counts():
    found = curve()
    del found[3]["loss"]
    assert demo.unequal(curve(), found, 4) == ["step 4: loss is None, not 1.5"]


def test_missing_steps_count():
    assert demo.unequal(curve(), curve(3), 4) != []
    assert demo.unequal(curve(3), curve(), 4) != []


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert demo.read_steps(path) == []
    path.write_text('{"event": "start", "step": 0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert demo.read_steps(path) == [{"step": 1, "loss": 2.0}]


def test_a_run_that_started_anew_is_not_resumed():
    assert demo.resume_step([{"event": "start", "step": 0}, {"event": "resume", "step": 20}]) == 20
    with pytest.raises(demo.StepFailed, match="anew"):
        demo.resume_step([{"event": "start", "step": 0}, {"event": "start", "step": 0}])


def tensors() -> dict[str, torch.Tensor]:
    names = ("lm_head.weight", "lm_head.additional_fc.weight", "model.gated_cross_attn_layers.0.alpha_dense")
    return {name: torch.zeros(2) for name in names}


def test_frozen_tensors_are_compared():
    trained = {name: value + (name != "lm_head.weight") for name, value in tensors().items()}
    report = demo.compare_frozen(tensors(), trained)
    assert report["trainable"] == 4 and report["frozen"] == 2 and report["changed_tensors"] == 2
    with pytest.raises(demo.StepFailed, match=r"frozen tensors changed: lm_head\.weight"):
        demo.compare_frozen(tensors(), {name: value + 1e-7 for name, value in tensors().items()})
    with pytest.raises(demo.StepFailed, match="trainable tensors did not change"):
        demo.compare_frozen(tensors(), tensors())


# -- captions --------------------------------------------------------------------------------------------------------


def test_right_captions():
    captions = {**TRUTHS, "rocket": "something else"}
    assert demo.caption_problems(TRUTHS, captions, RIGHT_SWAP, "a grey image") == []


def test_one_right_caption_is_not_enough():
    captions = dict.fromkeys(TRUTHS, "a cat")
    assert "wrong: cup, rocket" in demo.caption_problems(TRUTHS, captions, {}, "a cat")[0]


@pytest.mark.parametrize("swapped", [{}, TRUTHS, {**RIGHT_SWAP, "cup": "a rocket"}])
def test_captions_that_do_not_swap(swapped: dict[str, str]):
    problems = demo.caption_problems(TRUTHS, TRUTHS, swapped, "a grey image")
    assert problems and all("given the image of" in problem for problem in problems)


def test_captions_that_do_not_depend_on_the_image():
    same = dict.fromkeys(TRUTHS, "a cat")
    problems = demo.caption_problems(same, same, {"cat": "a cat", "cup": "a cat"}, "a cat")
    assert len(problems) == 1 and "does not depend on the image" in problems[0]


# -- summary and files -----------------------------------------------------------------------------------------------


def results() -> dict[str, dict[str, Any]]:
    return {
        "data": {"seconds": 1.0},
        "train": {"loss_first": 6.0, "loss_last": 0.1, "steps": 150, "seconds": 60.0},
        "resume": {"resumed_equals_uninterrupted": True, "killed_after": 30, "resumed_from": 20, "seconds": 50.0},
        "frozen": {"frozen_run": {"trainable": 10, "frozen": 20, "loss_last": 3.0}, "seconds": 20.0},
        "caption": {"captions": {**TRUTHS, "cup": "a cat"}, "truths": TRUTHS, "exact": 2, "seconds": 10.0},
    }


def test_summary(capsys: pytest.CaptureFixture[str]):
    summary = demo.make_summary(results(), 141.04)
    wanted = ["loss_first", "loss_last", "resumed_equals_uninterrupted", "captions", "truths", "seconds"]
    assert list(summary)[:6] == wanted
    assert summary["seconds"] == 141.0 and summary["seconds_per_step"]["train"] == 60.0
    json.dumps(summary)
    demo.show_summary(summary)
    shown = capsys.readouterr().out
    assert "cup     a cat     wrong, it is: a red cup" in shown and "cat     a cat     right" in shown


def test_only_what_the_demo_made_is_removed(folder: Path):
    for name in ("data", "train", "mine"):
        (folder / name).mkdir(parents=True)
    (folder / "summary.json").touch()
    (folder / "notes.txt").touch()
    demo.remove(*demo.MADE, *demo.MADE_FILES)
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "notes.txt"]


@pytest.mark.parametrize(("step", "before"), [("train", "backbones"), ("resume", "train"), ("caption", "data")])
def test_a_step_names_the_step_that_it_needs(folder: Path, step: str, before: str):
    with pytest.raises(demo.StepFailed, match=f"step {step}: .* --step {before}"):
        demo.run_step(step)


def test_plots_are_drawn(tmp_path: Path):
    demo_plots.plot_loss(curve(9), tmp_path / "loss.png")
    demo_plots.plot_resume(curve(9), curve(6), curve(8), 4, tmp_path / "resume.png")
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("loss.png", "resume.png"))


# -- processes -------------------------------------------------------------------------------------------------------


def test_a_failed_command_shows_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    script = "import sys; print('all is well'); print('no, it is not', file=sys.stderr); sys.exit(3)"
    with pytest.raises(demo.StepFailed, match=r"(?s)exit code 3.*no, it is not.*log: .*x\.log"):
        demo_processes.execute(demo_processes.python("-c", script), tmp_path / "x.log")
    assert "all is well" in capsys.readouterr().out
    assert "all is well" in (tmp_path / "x.log").read_text()


def test_what_is_left_of_a_command_is_stopped(tmp_path: Path):
    """A child in a session of its own, as torchrun's workers are, and a parent that is interrupted."""
    child = "import time; time.sleep(60)"
    script = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True).wait()"
    )
    with (
        pytest.raises(KeyboardInterrupt),
        demo_processes.running(demo_processes.python("-c", script), tmp_path / "x.log") as process,
    ):
        family = wait_for_child(process)
        raise KeyboardInterrupt
    assert process.poll() is not None
    psutil.wait_procs(family, timeout=5)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family)


def test_everything_a_run_started_is_killed(tmp_path: Path):
    child = "import time; time.sleep(60)"
    script = (
        "import subprocess, sys\n"
        f"worker = subprocess.Popen([sys.executable, '-c', {child!r}, 'worker.py'], start_new_session=True)\n"
        "sys.exit(-worker.wait())"
    )
    with demo_processes.running(demo_processes.python("-c", script), tmp_path / "x.log") as process:
        family = wait_for_child(process)
        assert demo_processes.kill_all(process, "worker.py") == 1
        assert process.returncode == -signal.SIGKILL
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family)


def wait_for_child(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Descendants of a process, as soon as one runs its own program."""
    for _ in range(500):
        family = demo_processes.descendants(process.pid)
        if family and "sleep" in " ".join(family[0].cmdline()) and os.getpgid(family[0].pid) == family[0].pid:
            return family
        time.sleep(0.02)
    raise AssertionError("the child did not start")
