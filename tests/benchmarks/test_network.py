"""The closed forms by hand, and a short run on fake nodes. Its times are not judged here: the machine may be busy."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from benchmarks import network
from benchmarks.namespaces import remove_leftovers, why_not
from benchmarks.network_formulas import (
    Microbatches,
    Shard,
    Traffic,
    all_gather,
    all_reduce,
    buffer_values,
    by_rows,
    by_values,
    full_shard,
    hybrid_shard,
    model_parallel,
    reduce_scatter,
    stage_tensor_bytes,
)
from benchmarks.network_rank import MODEL, Degrees, rows_of, whole_batch
from megatron_atum.errors import ConfigError
from megatron_atum.model.stage_tensor import latent_rows
from tests.distributed import _server

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]


def hf_weights() -> list[tuple[str, torch.nn.Parameter]]:
    """Of transformers' model, without values."""
    with torch.device("meta"):
        return list(IdeficsForVisionText2Text(IdeficsConfig(**MODEL.hf)).named_parameters())


# Closed forms ---------------------------------------------------------------------------------------------------------


def test_rings() -> None:
    assert all_gather(4, 1000) == Traffic(750, 750)
    assert reduce_scatter(4, 1000) == Traffic(1500, 750)  # gloo does an all-reduce
    assert all_reduce(4, 1000) == Traffic(1500, 1500)
    assert all_gather(1, 1000) == Traffic(0, 0)


def test_shards_are_padded_as_each_library_does() -> None:
    assert by_values((2, 128), 4) == 64 and by_rows((2, 128), 4) == 128  # two of four ranks have no row
    assert by_values((1,), 4) == by_rows((1,), 4) == 1
    assert by_values((3, 5), 4) == 4 and by_rows((6, 5), 4) == 10


@pytest.mark.parametrize(("shard", "ranks"), [(by_values, 4), (by_rows, 8)])
def test_full_shard_is_the_sum_over_the_weights_of_hugging_face(shard: Shard, ranks: int) -> None:
    gathered = reduced = 0.0
    for name, weight in hf_weights():
        link = 4 * shard(tuple(weight.shape), ranks) * (ranks - 1)  # bytes over a link when all is gathered
        gathered += link * (1 if name.startswith("model.vision_model.") else 2)
        reduced += link if weight.requires_grad else 0
    traffic = full_shard(MODEL.model(), ranks, shard)
    assert traffic.ring == pytest.approx(gathered + reduced, rel=1e-12)
    assert traffic.moved == pytest.approx(gathered + 2 * reduced, rel=1e-12)


def test_hybrid_shard_reduces_what_trains_between_nodes() -> None:
    trained = [weight for _, weight in hf_weights() if weight.requires_grad]
    values = sum(2 * by_rows(tuple(weight.shape), 2) for weight in trained)
    assert 0 <= values - sum(weight.numel() for weight in trained) < 200  # padding of the gates
    assert hybrid_shard(MODEL.model(), 2, 2) == Traffic(4 * values, 4 * values)  # 2 (2-1)/2
    assert hybrid_shard(MODEL.model(), 4, 2).ring == pytest.approx(1.5 * 4 * values)


def test_stage_tensor() -> None:
    degrees = Degrees.of("tp2pp2")
    model, layout, batches = MODEL.model(), degrees.layout(), degrees.microbatches
    assert (batches.number, batches.rows, batches.length, batches.images) == (4, 4, 96, 4)
    # 96 tokens and 4 images of 8 latents x 64, over 2 tensor ranks; a row of the stage tensor has 4 x 128 values
    assert stage_tensor_bytes(model, layout, batches) == (48 + 2) * 4 * 128 * 4
    assert latent_rows(4, 4, model, layout) == 2
    none = Microbatches(number=1, rows=4, length=96, images=0)
    assert stage_tensor_bytes(model, layout, none) == (48 + 1) * 4 * 128 * 4


def test_pipeline_sends_forward_and_back() -> None:
    degrees = Degrees.of("tp2pp2")
    out = model_parallel(MODEL.model(), degrees.layout(), degrees.microbatches, 2)
    assert out == [Traffic(819_200, 819_200)] * 2  # 2 ranks x 4 microbatches x 102400


def test_replicas_on_two_nodes() -> None:
    degrees = Degrees.of("tp2dp2")
    model, layout = MODEL.model(), degrees.layout()
    out = model_parallel(model, layout, degrees.microbatches, 2)
    values = [buffer_values(model, layout, 0, tensor_rank) for tensor_rank in (0, 1)]
    whole = sum(weight.numel() for _, weight in hf_weights() if weight.requires_grad)
    assert values[0] == values[1] and values[0] % 128 == 0
    assert whole / 2 < values[0] < 0.52 * whole  # norms and added rows are on both; starts are padded
    # reduce-scatter (as an all-reduce) and all-gather over 2 ranks: 1 and 1/2 times the buffer, for 2 tensor ranks
    assert out == [Traffic(2 * 1.5 * 4 * values[0], 2 * 4 * values[0])] * 2


def test_pipelines_and_replicas_on_four_nodes() -> None:
    degrees = Degrees.of("tp2pp2dp2")
    model, layout = MODEL.model(), degrees.layout()
    first, _, last, _ = out = model_parallel(model, layout, degrees.microbatches, 2)
    assert out == [first, first, last, last]
    # Cross-attention's norms, projections, head norms, MLP and gates, each from a multiple of 64 on; 2 added rows.
    second = 2 * 128 + 3 * 8192 + 2 * 64 + 44_032 + 22_016 + 2 * 64 + 2 * 128
    assert buffer_values(model, layout, 1, 0) == second == 714 * 128
    between_stages = 2 * 4 * stage_tensor_bytes(model, layout, degrees.microbatches)
    for traffic, stage in ((first, 0), (last, 1)):
        assert traffic.ring == between_stages + 2 * 4 * buffer_values(model, layout, stage, 0)
    alone = Degrees.of("tp2dp4")
    links = model_parallel(model, alone.layout(), alone.microbatches, 2)
    assert len(set(links)) == 1
    assert links[0].ring == pytest.approx(2 * 2 * 0.75 * 4 * buffer_values(model, alone.layout(), 0, 0))


def test_ranks_share_out_the_rows() -> None:
    batch = whole_batch()
    parts = [rows_of(batch, start, 4) for start in range(0, 16, 4)]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), batch.input_ids)
    assert torch.equal(torch.cat([part.pixels for part in parts]), batch.pixels)
    assert all(part.num_images == len(part.pixels) == 4 for part in parts)


# Figures --------------------------------------------------------------------------------------------------------------


def made_up(scheme: str, flat_s: float, per_x: float, link: network.Link, x_bytes: float) -> network.Measured:
    """A scheme that takes so long without a cap and so much longer per x, and sends what the formula says."""
    out = [traffic.moved * 1.01 for traffic in network.formula(scheme, 2)]
    times = {cap: [flat_s + per_x * (x_bytes / cap if cap else 0.0)] * 3 for cap in link.order}
    return network.Measured([6.0, 5.9], [[*out]], times)


def test_a_block_in_which_much_was_sent_twice_does_not_count() -> None:
    measured = network.Measured([])
    for sent in ([200, 400], [200, 400], [260, 400]):
        measured.add(None, 2, 1.0, sent)
    assert measured.out == [100, 200] and measured.seconds == {None: [1.0] * 3}


def test_slopes_slowdowns_and_ratios() -> None:
    scaled = 60e9 * network.BYTES_PER_FLOP
    link = network.Link(60e9, (scaled, 2 * scaled, 8 * scaled), dict.fromkeys((scaled, 2 * scaled, 8 * scaled), 0.9))
    x_bytes = 1.01 * network.formula("zero3", 2)[0].moved
    shapes = {"zero3": (1.0, 1.0), "hsdp": (0.5, 0.1), "tp2pp2": (2.0, 0.05)}
    found = {name: made_up(name, *shape, link, x_bytes) for name, shape in shapes.items()}
    result = network.report({2: network.judge(2, link, found)})
    x = x_bytes / scaled
    assert result["slope_zero3"] == pytest.approx(1.0, abs=1e-3)
    assert result["slope_atum"] == pytest.approx(0.05, abs=1e-3)
    assert result["slowdown_zero3"] == pytest.approx(1 + x, rel=1e-3)
    assert result["slowdown_atum"] == pytest.approx(1 + 0.05 * x / 2, rel=1e-3)
    assert result["max_formula_error"] == pytest.approx(0.01, abs=1e-4)
    assert result["bytes_zero3_over_atum"] == pytest.approx(15_552_192 / 819_200, abs=0.01)
    assert list(result["nodes"]["2"]["x_s"].values()) == sorted(result["nodes"]["2"]["x_s"].values())
    assert network.complaints(result) == []


def test_worthless_figures_are_called_so() -> None:
    fine = {"max_loss_difference": 1e-6, "max_formula_error": 0.02, "min_link_use": 0.9}
    assert network.complaints(fine) == []
    for bad in ({"max_loss_difference": 1e-3}, {"max_formula_error": 0.04}, {"min_link_use": 0.7}):
        assert len(network.complaints(fine | bad)) == 1


def test_80b_model_needs_thousands_of_tokens_per_gpu() -> None:
    """By hand: all is gathered twice in bf16 and what trains reduced once, over 50 GB/s a node; against 4 FLOPs per
    token and frozen weight and 6 per trained one."""
    figures = network.tokens(2, "zero3")
    frozen, trained = 65.9e9, 14.1e9
    sent_s = (2 * 2 * (frozen + trained) + 2 * trained) / 50e9
    token_s = (4 * frozen + 6 * trained) / (312e12 * 0.45)
    assert figures["break_even_tokens_per_gpu_80b"] == pytest.approx(sent_s / token_s, rel=0.05)
    assert figures["tokens_per_step"] == 4 * figures["tokens_per_rank"] == 1536


@pytest.mark.parametrize(("count", "scheme"), network.ATUM.items())
def test_tokens_with_which_a_pipeline_sends_what_hsdp_does(count: int, scheme: str) -> None:
    degrees, hsdp = Degrees.of(scheme), hybrid_shard(MODEL.model(), count, 2).moved
    numbers = (replace(degrees.microbatches, number=number) for number in (0, 1))
    none, one = (max(t.moved for t in model_parallel(MODEL.model(), degrees.layout(), b, 2)) for b in numbers)
    microbatches = degrees.microbatches.number * network.tokens(count, "zero3")["tokens_per_step_with_bytes_of_hsdp"]
    assert none + (one - none) * microbatches / 1536 == pytest.approx(hsdp, rel=1e-3)


@pytest.mark.parametrize("option", ["--caps=0", "--caps=nan", "--rounds=0", "--steps=-1", "--node-gflops=inf"])
def test_numbers_that_make_no_sense_are_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["network.py", option])
    with pytest.raises(SystemExit, match="2"):
        network.parse_arguments()
    assert f"argument {option.split('=')[0]}: must be" in capsys.readouterr().err


def test_a_plot_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    scaled = 60e9 * network.BYTES_PER_FLOP
    link = network.Link(60e9, (scaled,), {scaled: 0.9})
    judged = {2: network.judge(2, link, {"fsdp2": made_up("fsdp2", 1.0, 1.0, link, 1e7)})}
    network.load_matplotlib()
    (tmp_path / "file").touch()
    for file in (tmp_path / "plot.none", tmp_path / "file" / "plot.png"):
        with pytest.raises(ConfigError, match=f"--plot {file} cannot be written"):
            network.draw(judged, file)


# On fake nodes --------------------------------------------------------------------------------------------------------


def test_it_says_loudly_what_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["network.py", "--short"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert network.main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "network: NOTHING IS MEASURED: needs root, and runs as user 1000\n"


def program(arguments: list[str], folder: Path) -> None:
    """The command, in a process of the server that has imported the heavy packages."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["benchmarks/network.py", *arguments]
    runpy.run_path(str(ROOT / "benchmarks/network.py"), run_name="__main__")


@pytest.fixture
def process(tmp_path: Path) -> Iterator[BaseProcess]:
    """A short form: no DeepSpeed to install, one cap, high enough for a second's steps, and none."""
    reason = why_not()
    if reason:
        pytest.skip(f"root: {reason}")
    small = ["--short", "--without", "deepspeed", "--caps", "1", "--rounds", "2", "--node-gflops", "300"]
    process = _server().Process(target=program, args=([*small, "--plot", str(tmp_path / "plot.png")], tmp_path))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        remove_leftovers()


def left_by(process: BaseProcess) -> list[str]:
    """Names of its namespaces."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return re.findall(rf"\batum-{process.pid}-\S+", names)


@pytest.mark.root
def test_short_run(process: BaseProcess, tmp_path: Path) -> None:
    process.join(400)
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert process.exitcode in (0, 1), err
    report = json.loads(out.splitlines()[-1])
    busy = report["min_link_use"] < network.LINK_USE
    assert process.exitcode == (1 if busy else 0), err
    assert left_by(process) == []
    assert report["max_loss_difference"] <= 1e-5
    assert 0.002 < report["max_formula_error"] <= 0.03  # never exact: headers and handshakes are on top
    assert set(report["bytes_per_step"]) == {"fsdp2", "hsdp", "tp2pp2", "tp2dp2"}
    assert report["stands_for"] == {"zero3": "fsdp2", "hsdp": "hsdp", "atum": "tp2pp2"}
    assert report["bytes_zero3_over_atum"] >= 10 and report["bytes_hsdp_over_atum"] > 1
    for name in ("zero3", "hsdp", "atum"):
        assert math.isfinite(report[f"slope_{name}"]) and report[f"slowdown_{name}"] > 0
    two = report["nodes"]["2"]
    assert two["scaled_cap_bytes_per_s"] == pytest.approx(300e9 * network.BYTES_PER_FLOP, abs=1)
    assert list(two["x_s"]) == ["none", str(two["scaled_cap_bytes_per_s"])]
    for row in two["schemes"].values():
        assert list(row["step_s"]) == list(two["x_s"]) and len(row["losses"]) == network.LOSSES
        assert row["losses"][0] > row["losses"][-1]  # it trains
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.root
@pytest.mark.parametrize("what", ["a rank is killed", "it is terminated", "it is killed"])
def test_nothing_is_left_after_a_bad_end(what: str, process: BaseProcess, tmp_path: Path) -> None:
    assert process.pid is not None
    parent = psutil.Process(process.pid)
    while len(ranks := parent.children()) < 3:  # one may be a command that has just ended
        assert process.is_alive(), (tmp_path / "err").read_text()
        time.sleep(0.01)
    assert len(left_by(process)) == 3
    if what == "a rank is killed":
        max(ranks, key=psutil.Process.create_time).kill()
    else:
        parent.send_signal(signal.SIGTERM if what == "it is terminated" else signal.SIGKILL)
    process.join(100)
    assert psutil.wait_procs(ranks, timeout=20)[1] == []
    if what == "it is killed":
        assert process.exitcode == -signal.SIGKILL
        remove_leftovers()
    elif what == "it is terminated":
        assert process.exitcode == 128 + signal.SIGTERM
    else:
        assert process.exitcode == 1
        assert re.search(r"fsdp2: rank \d ended with exit code -9", (tmp_path / "err").read_text())
    assert left_by(process) == []


# DeepSpeed ------------------------------------------------------------------------------------------------------------


def test_environment_of_deepspeed_is_made_once_and_anew_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a package of our own, so that pip need not fetch anything."""
    (tmp_path / "source").mkdir()
    setup, folder = tmp_path / "source" / "setup.py", tmp_path / "environments" / "deepspeed"
    monkeypatch.setattr(network, "DEEPSPEED", folder)
    monkeypatch.setattr(network, "DEEPSPEED_PACKAGE", str(setup.parent))
    setup.write_text("raise SystemExit('no compiler')")
    with pytest.raises(ConfigError, match=r"(?s)--without deepspeed.*no compiler"):
        network.make_deepspeed()
    (folder / "half").touch()
    setup.write_text("from setuptools import setup; setup(name='deep', version='1', py_modules=['deep'])")
    (setup.parent / "deep.py").touch()
    network.make_deepspeed()
    assert len(list(folder.glob("lib/python*/site-packages/deep.py"))) == 1 and not (folder / "half").exists()
    setup.unlink()
    network.make_deepspeed()
