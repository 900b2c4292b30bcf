"""The benchmark of one GPU, with tiny models on a CPU: that all its sides run, what is reported of them, that a run
that fails takes no other along, and that the page is drawn from the file."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import gpu_step, gpu_step_docs, gpu_step_measure, gpu_step_results, gpu_step_sides
from benchmarks.gpu_step_cases import FP8, HF, HF_SAVING, OURS, Run, full_plan, quick_plan, sides
from benchmarks.gpu_step_predict import Prediction, Predictions, planned_microbatch_s, predict, stage_flops
from benchmarks.gpu_step_results import About, Results, Row, Target, differences, targets
from megatron_atum.flops import Work, model_flops
from megatron_atum.parallel.device import device, has_accelerator
from megatron_atum.planning.atum import predict_layout
from megatron_atum.planning.cluster import load_cluster
from tests.distributed import run_distributed

ABOUT = About(
    gpu="NVIDIA H200",
    versions={"torch": "2"},
    code="sha256 1",
    tokens_of_microbatch=8192,
    steps=3,
    commit="commit 1",
    command="python benchmarks/gpu_step.py",
    peak_tflops=1000.0,
)


class Known(Predictions):
    """Dry runs that took place before."""

    def __init__(self, known: dict[str, Prediction]) -> None:
        super().__init__((), 0)
        self._known = known

    def of(self, run: Run) -> tuple[Prediction | None, str | None]:
        return self._known.get(run.name), None


# All of it, small -----------------------------------------------------------------------------------------------------


def measured(rank: int, world_size: int, path: str, names: list[str]) -> int:
    """Returns bytes of tensors that are left on the device."""
    dist.destroy_process_group()  # every side has its own, as in one process without torchrun
    del os.environ["RANK"]
    runs = [run for run in quick_plan() if run.name in names]
    known = {} if has_accelerator() else {name: predict(run_of(name)) for name in ("ours-64-2", "shard-middle")}
    gpu_step.measure_all(runs, gpu_step.Bench(1, 1e12, Known(known)), Results(ABOUT, Path(path)))
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.device == device()]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def run_of(name: str) -> Run:
    return next(run for run in (*quick_plan(), *full_plan()) if run.name == name)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("gpu_step") / "results.json"
    (left,) = run_distributed(measured, 1, str(path), [run.name for run in quick_plan()])
    return {**json.loads(path.read_text()), "left": left}


def test_models_are_gone_when_they_were_measured(content: dict[str, Any]) -> None:
    assert content["left"] < 2**20, "one of them has 16 MB"


@pytest.mark.gpu
def test_shards_and_fp8_on_a_gpu(tmp_path: Path) -> None:
    path, names = tmp_path / "results.json", ["shard-middle", "fp8-64-2"]
    (left,) = run_distributed(measured, 1, str(path), names, backend="nccl", timeout=300)
    content = json.loads(path.read_text())
    rows = [Row(**row) for row in content["rows"]]
    assert [(row.name, row.error) for row in rows] == [(name, None) for name in names]
    assert all(row.model_tflops and row.peak_gib for row in rows) and left < 2**26
    profile = content["profiles"]["shard-middle"]
    assert 0 < profile["share_of_products"] < 1 and profile["waiting"]["cudaStreamSynchronize"] >= 1
    waits = content["host_waits"]["shard-middle"]
    assert {wait["function"] for wait in waits if wait["known"]} >= {"loss_settings", "_exchange"}


def test_every_run_has_a_row(content: dict[str, Any]) -> None:
    rows = {row["name"]: Row(**row) for row in content["rows"]}
    assert [(run.name, run.who) for run in quick_plan()] == [(row.name, row.who) for row in rows.values()]
    assert {name: row.error for name, row in rows.items() if row.error} == {}
    for run in quick_plan():
        row = rows[run.name]
        assert row.step_s and row.model_tflops and row.of_ceiling == pytest.approx(row.model_tflops)
        assert row.of_peak is row.peak_gib is None  # of a CPU
        assert (row.tokens_per_s is None) == (run.shard is not None)
        assert run.shard or row.tokens_per_s == pytest.approx(2 * 2 * 64 / row.step_s)
        assert (row.vision_share is None) == (run.who not in (OURS, FP8)) and (row.vision_share or 0.5) < 1
    assert content["over_best_hf"].keys() == {"64 tokens, 2 images", "64 tokens, 1, 3 images"}


def test_a_shard_is_one_rank_in_its_schedule(content: dict[str, Any]) -> None:
    rows = {row["name"]: Row(**row) for row in content["rows"]}
    for name in ("shard-first", "shard-middle", "shard-last"):
        row = rows[name]
        assert row.microbatch_s and row.step_s and row.microbatch_s < row.step_s
        assert row.planned_microbatch_s, "the planner's cluster of a CPU is the laptop"
    run = run_of("shard-middle")
    flops = stage_flops(run.config(), run.layout(), 1, 4)
    assert rows["shard-middle"].model_tflops == pytest.approx(flops / (rows["shard-middle"].microbatch_s or 1) / 1e12)


def test_profiles_are_of_one_step(content: dict[str, Any]) -> None:
    assert content["profiles"].keys() == {"ours-64-2", "shard-middle"} == content["host_waits"].keys()
    rows = {row["name"]: Row(**row) for row in content["rows"]}
    for name, profile in content["profiles"].items():
        assert 0 < profile["share_of_products"] < 1 and 0 < profile["device_s"] < 10
        assert "aten::mm" in [kernel["name"] for kernel in profile["kernels"]]
        assert rows[name].products_tflops, "its products were counted by the dry run"
        assert rows[name].assumed_of_peak == 0.6


# One run that fails ---------------------------------------------------------------------------------------------------


class Stub(gpu_step_sides.Side):
    """Takes no time. Refers to itself, as models do."""

    def __init__(self, broken: tuple[str, ...]) -> None:
        self._broken, self._self = broken, self

    def use(self, run: Run) -> None:
        self.config, self._name = run.config(), run.name

    def step(self) -> None:
        if self._name in self._broken:
            raise RuntimeError(f"no memory for {self._name}\nand more")


def test_a_run_that_fails_takes_no_other_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[str] = []
    models: list[weakref.ref[Stub]] = []

    @contextlib.contextmanager
    def side(run: Run) -> Iterator[Stub]:
        assert not any(model() for model in models), "two models would not fit"
        opened.append(run.name)
        if run.shard:
            raise ValueError("")
        stub = Stub(("ours-64-2", "hf-saving-64-ragged"))
        models.append(weakref.ref(stub))
        yield stub

    monkeypatch.setattr(gpu_step, "opened", side)
    path = tmp_path / "folder" / "results.json"
    gpu_step.measure_all(quick_plan(), gpu_step.Bench(1, None, Predictions((), 0)), Results(ABOUT, path))
    rows = {row["name"]: Row(**row) for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == [run.name for run in quick_plan()]
    assert {name: row.error for name, row in rows.items() if row.error} == {
        "ours-64-2": "RuntimeError: no memory for ours-64-2",
        "hf-saving-64-ragged": "RuntimeError: no memory for hf-saving-64-ragged",
        **dict.fromkeys(("shard-middle", "shard-first", "shard-last"), "ValueError: no message"),
    }
    assert all((row.step_s is None) == (row.error is not None) for row in rows.values())
    assert opened[:2] == ["ours-64-2", "ours-64-ragged"], "what a failure left behind is not gone on with"


def test_a_dry_run_that_fails_is_named() -> None:
    run = replace(full_plan()[0], preset="no-such-model")
    predictions = Predictions((run,), 1)
    try:
        found, why = predictions.of(run)
    finally:
        predictions.close()
    assert found is None and why is not None and why.startswith("dry run: ConfigError: ") and "no-such-model" in why


# The file -------------------------------------------------------------------------------------------------------------


def row(name: str, who: str, **values: Any) -> Row:
    return Row(name=name, who=who, date="2026-01-01", length=2048, images="11", rows=4, **values)


def test_rows_are_added_to_a_file_of_the_same_code_only(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = Results(ABOUT, path)
    first.add(row("a", OURS, step_s=1.0), waits=[])
    first.add(row("b", OURS, step_s=2.0))
    again = replace(ABOUT, command="python benchmarks/gpu_step.py --only b", commit="commit 2")
    content = json.loads(path.read_text())
    assert differences(again, content) == []
    second = Results(again, path, content)
    second.add(replace(row("b", OURS, step_s=3.0), date="2026-02-02"))
    content = json.loads(path.read_text())
    assert [(one["name"], one["step_s"]) for one in content["rows"]] == [("a", 1.0), ("b", 3.0)]
    assert content["date"] == "2026-02-02" and content["host_waits"] == {"a": []}
    assert content["command"] == "python benchmarks/gpu_step.py; python benchmarks/gpu_step.py --only b"
    assert {one["name"]: one["date"] for one in content["rows"]} == {"a": "2026-01-01", "b": "2026-02-02"}
    for key, value in {"code": "x", "gpu": "x", "versions": {}, "steps": 9, "tokens_of_microbatch": 4096}.items():
        assert len(differences(replace(ABOUT, **{key: value}), content)) == 1


def test_the_code_is_what_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = gpu_step_results.code_version()
    assert before == gpu_step_results.code_version()
    (tmp_path / "megatron_atum").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/step.py").touch()
    monkeypatch.setattr(gpu_step_results, "ROOT", tmp_path)
    empty = gpu_step_results.code_version()
    (tmp_path / "megatron_atum/new.py").write_text("x = 1\n")
    assert len({before, empty, gpu_step_results.code_version()}) == 3


def test_the_better_of_two_settings_is_compared() -> None:
    rates = {OURS: 30.0, HF: 20.0, HF_SAVING: 10.0}
    rows = [row(who, who, tokens_per_s=rate) for who, rate in rates.items()]
    assert gpu_step_results.over_best_hf(rows) == {"2048 tokens, 11 images": 1.5}
    assert gpu_step_results.over_best_hf(rows[:1]) == {}
    assert gpu_step_results.over_best_hf([rows[0], replace(rows[2], images="1")]) == {}


def test_ratios_are_of_rows_of_one_process(tmp_path: Path) -> None:
    rates = {OURS: 30.0, HF: 20.0, HF_SAVING: 10.0}
    path = tmp_path / "results.json"
    first = Results(ABOUT, path)
    for who, rate in rates.items():
        first.add(row(who, who, tokens_per_s=rate, model_tflops=rate))
    first.add(row(FP8, FP8, model_tflops=60.0))
    content = json.loads(path.read_text())
    assert len({one["run"] for one in content["rows"]}) == 1 and content["rows"][0]["run"]
    assert content["over_best_hf"] == {"2048 tokens, 11 images": 1.5}
    assert [target.found for target in targets(content)][1:5] == ["2.00", "2.00", "1.50", "1.50"]
    for again, found in ((HF_SAVING, ["2.00", "2.00", None, None]), (OURS, [None] * 4)):
        second = Results(ABOUT, path, json.loads(path.read_text()))
        second.add(row(again, again, tokens_per_s=rates[again], model_tflops=30.0))
        assert [target.found for target in targets(second.content())][1:5] == found, again
        assert bool(second.content()["over_best_hf"]) == (found[2] is not None)


def judged(*rows: Row, waits: list[Any] | None = None, waiting: dict[str, int] | None = None) -> list[Target]:
    results = Results(ABOUT, None, {"rows": [asdict(one) for one in rows]})
    content = results.content()
    if waits is not None:
        content["host_waits"] = {"ours-2048-11": [asdict(wait) for wait in waits]}
        content["profiles"] = {"ours-2048-11": {"waiting": waiting or {}}}
    return targets(content)


def test_targets() -> None:
    ours = row("ours-2048-11", OURS, of_ceiling=0.61, model_tflops=100.0, tokens_per_s=10.0, vision_share=0.15)
    ours = replace(ours, peak_gib=81.0, predicted_gib=80.0)
    fp8 = row("fp8", FP8, model_tflops=125.0, peak_gib=90.0, predicted_gib=80.0)
    hf = row("hf", HF, tokens_per_s=4.9)
    found = judged(ours, fp8, hf, replace(ours, name="other", images="1", of_ceiling=0.1))
    verdicts = [(target.found, target.met, target.stretch) for target in found]
    assert verdicts == [
        ("61.0 %", True, False),
        ("1.25", True, False),
        ("1.25", False, True),
        ("2.04", True, False),
        ("2.04", True, True),
        ("15.0 %", False, False),
        (None, None, False),  # nothing was seen of waiting
        ("12.5 %", False, False),
    ]
    assert all(target.found is target.met is None for target in judged())


def test_the_host_may_wait_in_three_places() -> None:
    ours, loss = row("ours-2048-11", OURS), Path(gpu_step_results.ROOT, "megatron_atum/training/loss.py")
    line = next(n for n, text in enumerate(loss.read_text().splitlines(), 1) if "counts.tolist()" in text)
    known = gpu_step_measure.wait_at(str(loss), line, 1)
    assert (known.file, known.function, known.known) == ("training/loss.py", "loss_settings", True)
    other = gpu_step_measure.wait_at(str(loss), 1, 1)
    assert (other.function, other.known) == ("", False)

    def verdict(*waits: Any, **waiting: int) -> tuple[str | None, bool | None]:
        target = judged(ours, waits=list(waits), waiting=waiting)[6]
        return target.found, target.met

    assert verdict(known, cudaStreamSynchronize=1, cudaDeviceSynchronize=2) == ("none", True)
    whole = gpu_step_measure.wait_at(str(loss), line, 1, gpu_step_measure.DEVICE)
    assert verdict(whole, cudaDeviceSynchronize=2) == ("none", True)
    unseen = ("1 more in the profile of ours-2048-11", False)
    assert verdict(whole, cudaStreamSynchronize=1) == unseen, "a wait of another kind explains nothing"
    assert verdict(known, other) == ("training/loss.py:1", False)
    assert verdict(known, cudaStreamSynchronize=3) == ("2 more in the profile of ours-2048-11", False)
    assert verdict(known, cudaEventSynchronize=1) == ("1 more in the profile of ours-2048-11", False)


def test_waits_of_both_kinds_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step_measure, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)

    def step() -> None:
        torch.cuda.synchronize()
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    found = {wait.call: (wait.times, wait.function) for wait in gpu_step_measure.waits(step)}
    assert found == {"cudaDeviceSynchronize": (1, "step"), "cudaStreamSynchronize": (2, "step")}


def test_a_step_that_training_would_not_apply_is_no_measurement() -> None:
    shard: Any = object.__new__(gpu_step_sides.LoneShard)
    shard.batches = []
    for finite in (True, False):
        shard.engine = SimpleNamespace(
            step=lambda batches, finite=finite: SimpleNamespace(is_finite=finite, losses={}, grad_norm=0.0)
        )
        for step in (shard.step, shard.short_step):
            with contextlib.nullcontext() if finite else pytest.raises(AssertionError, match="would not apply"):
                step()


def test_the_known_places_are_there() -> None:
    """Functions of these names, in our files and in megatron-core's."""
    from megatron.core.optimizer import clip_grads

    files = {"optimizer/clip_grads.py": Path(clip_grads.__file__)}
    for name, function in gpu_step_measure.KNOWN_WAITS:
        text = files.get(name, gpu_step_results.ROOT / "megatron_atum" / name).read_text()
        assert f"def {function}(" in text


# What is predicted ----------------------------------------------------------------------------------------------------


def test_stages_share_the_work_of_a_microbatch() -> None:
    run = next(run for run in full_plan() if run.shard)
    config, layout = run.config(), run.layout()
    total = sum(stage_flops(config, layout, stage, 44) for stage in range(4)) * layout.tensor
    assert total == pytest.approx(model_flops(config.model, Work(4, 1024, 44)).total)


def test_the_planners_time_is_that_of_its_table() -> None:
    cluster = load_cluster("p5en-64")
    for run in full_plan():
        if run.shard:
            assert layout_of(run) == (run.shard.stage, 0, 0)
            stages = predict_layout(run.config(), run.layout(), cluster, 11).prediction.stages
            assert planned_microbatch_s(run, run.shard, cluster) == pytest.approx(stages[run.shard.stage].compute)


def layout_of(run: Run) -> tuple[int, int, int]:
    assert run.shard is not None
    return run.layout().coordinates(run.shard.rank)


def test_plans() -> None:
    for tokens in (8192, 4096):
        runs = full_plan(tokens)
        assert len({run.name for run in runs}) == len(runs)
        for run in runs:
            assert run.shard or run.case.rows * run.case.length == tokens
            assert run.config().kernels.frozen_gemm == ("fp8" if "fp8" in run.name else "bf16")
            counts = [len(group) for group in sides((*runs, run))]
            assert math.fsum(counts) == len(runs) + 1, "nothing is lost in groups"
    assert next(run.case.images for run in full_plan(4096) if "ragged" in run.name) == (4, 18)
    assert all(run.shard is None or run.shard.world_size == 512 for run in full_plan())


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_command_draws() -> None:
    page, content = gpu_step_docs.PAGE.read_text(), json.loads(gpu_step_results.RESULTS.read_text())
    assert page == gpu_step_docs.redrawn(page, content), "python benchmarks/gpu_step.py --docs"


def test_the_results_in_the_repository_have_the_form_of_a_report() -> None:
    content = json.loads(gpu_step_results.RESULTS.read_text())
    assert content.keys() == Results(ABOUT, None).content().keys()
    rows = [Row(**one) for one in content["rows"]]
    assert {one.who for one in rows} >= {OURS, HF} and {one.name for one in rows} <= {one.name for one in full_plan()}
    assert [asdict(target) for target in targets(content)] == content["targets"]
    assert gpu_step_results.over_best_hf(rows) == pytest.approx(content["over_best_hf"])


def test_what_is_not_there_is_drawn_as_such() -> None:
    run = full_plan()[1]
    results = Results(ABOUT, None)
    results.add(replace(gpu_step_results.empty_row(run), step_s=1.25, of_peak=0.5))
    results.add(gpu_step_results.failed(full_plan()[2], RuntimeError("out of memory")))
    lines = gpu_step_docs.drawn(results.content()).splitlines()
    tables = [line for line in lines if line.startswith("| this project | 2048 x 4")]
    assert tables[0] == "| this project | 2048 x 4 | 11 | not measured | | | | | | | |"
    assert tables[1] == "| this project | 2048 x 4 | 1 | 1.250 | | | 50.0 % | | | | |"
    assert tables[2] == "| this project | 2048 x 4 | 38 | failed: RuntimeError: out of memory | | | | | | | |"
    assert sum("not measured" in line for line in lines if line.startswith("| stage")) == 5
    assert all(line.count("|") in (5, 12, 13) for line in lines if line.startswith("|"))
