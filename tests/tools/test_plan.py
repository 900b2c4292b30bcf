"""tools/plan.py on its command line: a few real runs of a small model, the rest with made-up memory.

One run is a process of its own, which starts others to measure; the rest are calls, the real ones in a fork of the test
server (tests/distributed.py): torch is imported there already, and the default group can be made anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_atum.checkpoint.command import run_command
from megatron_atum.model.cross_attention import GatedCrossAttentionLayer
from megatron_atum.planning.cluster import FOLDER
from tests.distributed import run_distributed
from tests.planning.plans import make_up_memory
from tests.tools.calls import Done, call
from tools.plan import main

ROOT = Path(__file__).parents[2]
CONFIG = """
model: {preset: tiny}
data:
  sequence_length: 32
  sources: [{name: laion, shards: /nowhere/manifest.json, max_images: 4}]
training: {micro_batch_size: 2, global_batch_size: 16}
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A configuration, and clusters of two devices: in one node, in two, and with little memory."""
    text = (FOLDER / "laptop.yaml").read_text()
    clusters = {
        "node": (1, 2, 1000.0),
        "two": (2, 1, 1000.0),
        "little": (1, 2, 0.5),
        "device": (1, 1, 0.5),
    }
    (tmp_path / "config.yaml").write_text(CONFIG)
    for name, (nodes, devices, memory) in clusters.items():
        values = {"\nnodes: 2": f"\nnodes: {nodes}", "devices_per_node: 2": f"devices_per_node: {devices}"}
        values["memory_gib: 4.0"] = f"memory_gib: {memory}"
        changed = text
        for before, after in values.items():
            assert before in changed
            changed = changed.replace(before, after)
        (tmp_path / f"{name}.yaml").write_text(changed)
    return {name: tmp_path / f"{name}.yaml" for name in ("config", *clusters)}


# Real runs ------------------------------------------------------------------------------------------------------------


def command(*options: str | Path) -> Done:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "tools/plan.py", *map(str, options)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def called(rank: int, world_size: int, options: tuple[str, ...], hook: Callable[[], None] | None) -> Done:
    """The command in a process that is used for nothing else. `hook` may break what it likes beforehand."""
    dist.destroy_process_group()
    os.sched_getaffinity = lambda process: {0}  # type: ignore[assignment]  # no further processes
    if hook is not None:
        hook()
    sys.argv, code = ["plan", *options], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            run_command("plan", main)
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def forked(*options: str | Path, hook: Callable[[], None] | None = None) -> Done:
    (done,) = run_distributed(called, 1, tuple(map(str, options)), hook, timeout=300)
    return done


def last_line(done: Done) -> dict[str, Any]:
    return json.loads(done.out.splitlines()[-1])


def test_a_table(files: dict[str, Path], tmp_path: Path) -> None:
    """Of one device that is too small, where --layouts all says so and the code is 0."""
    line = tmp_path / "plan.json"
    done = command(
        *("--config", files["config"], "--cluster", files["device"], "--layouts", "all", "--json", line),
        *("--plot", tmp_path / "plan.png"),
    )
    assert done.code == 0, done.err
    found = last_line(done)
    assert json.loads(line.read_text()) == found
    assert (found["chosen"], found["best"]) == ("TP1 PP1 DP1", None)
    assert {row["name"] for row in found["layouts"]} == {"TP1 PP1 DP1"}
    for row in found["layouts"]:
        assert 0 < row["memory_gib"] <= row["most_memory_gib"] < 0.1
        (reason,) = row["refused"]
        assert re.fullmatch(r"needs 0\.0\d+ GiB, and CPU core has 0\.0 besides 0\.5 in reserve", reason)
    assert found["images_per_row"] == pytest.approx(1.120 / 29.9 * 32)
    assert "laptop: 1 x 1 CPU core; 16 rows of 32 tokens, 1.2 images in each" in done.out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_single_ranks(files: dict[str, Path]) -> None:
    done = forked(
        *("--config", files["config"], "--cluster", files["node"], "--dry-run", "--ranks", "stages"),
        "parallel.pipeline=2",
    )
    assert done.code == 0, done.err
    first, second = last_line(done)["dry_runs"]
    assert (first["rank"], first["pipeline_rank"], second["rank"], second["pipeline_rank"]) == (0, 0, 1, 1)
    assert first["images"] == second["images"] == 3  # 2 rows of 1.2
    assert first["parameters"] > second["parameters"]  # the vision tower
    assert first["unreached"] == second["unreached"] == []
    sent, received = (
        {(message["operation"], message["link"]): message["payload"] for message in run["messages"]}
        for run in (first, second)
    )
    assert sent["send", "node"] == received["receive", "node"] > 0
    assert "rank 1: stage 1, data 0, tensor 0" in done.out
    assert "frozen_gemm" not in done.out


def test_single_ranks_say_what_they_leave_out(files: dict[str, Path]) -> None:
    done = forked(
        *("--config", files["config"], "--cluster", files["node"], "--dry-run", "--ranks", "0"),
        *("kernels.backend=te", "kernels.frozen_gemm=fp8", "model.freeze.text=true"),
    )
    assert done.code == 0, done.err
    assert done.out.count("Transformer Engine's 8-bit copies of frozen weights are not counted") == 1
    assert last_line(done)["dry_runs"][0]["memory"]["host"] == 0


def test_the_built_in_laptop_has_room(files: dict[str, Path]) -> None:
    done = forked("--config", files["config"], "--cluster", "laptop", "--layouts", "chosen", "parallel.pipeline=2")
    assert (done.code, done.err) == (0, "")
    assert last_line(done)["best"] == "TP1 PP2 DP2"


def forget_the_mlp() -> None:
    """A model whose cross-attention forgets its MLP."""

    def forward(layer: Any, hidden: Any, latents: Any, plan: Any) -> Any:
        return hidden + torch.tanh(layer.alpha_attention) * layer.attention(layer.input_norm(hidden), latents, plan)

    GatedCrossAttentionLayer.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "0"], "--ranks belongs to --dry-run"),
        (["--dry-run", "--plot", "plan.png"], "--plot draws a table"),
    ],
)
def test_options_without_effect_are_refused(options: list[str], words: str, plan: Any) -> None:
    done = plan("--cluster", "laptop", *options)
    assert done.code == 2 and words in done.err and not done.out


def test_what_cannot_train_is_refused(files: dict[str, Path]) -> None:
    """For the single rank, memory is short as well."""
    start = ("--config", files["config"], "--cluster")
    single = forked(*start, files["device"], "--dry-run", "--ranks", "0", hook=forget_the_mlp)
    assert single.code == 2 and single.err.count("\n") == 1, single.err
    assert "stage 0: needs 0.0" in single.err and "stage 0: backward never reaches 16 trainable tensors" in single.err
    assert len(last_line(single)["dry_runs"][0]["unreached"]) == 16  # gate, norm and two projections of four layers
    every = forked(*start, files["device"], "--dry-run", "--ranks", "0", "--layouts", "all")
    assert every.code == 2 and "stage 0: needs 0.0" in every.err  # there is no table to have a row in
    table = forked(*start, files["node"], "--layouts", "chosen", hook=forget_the_mlp)
    assert table.code == 2 and "backward never reaches" in table.err and last_line(table)["best"] is None


# Made-up memory -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls the command in this process."""
    make_up_memory(monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})  # other processes would measure
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which the command changes
    return lambda *options: call(main, capsys, *options)


@pytest.fixture
def plan(tool: Any, files: dict[str, Path]) -> Any:
    """The same with a configuration."""
    return lambda *options: tool("--config", files["config"], *options)


def test_published_runs(tool: Any) -> None:
    done = tool("--published")
    assert (done.code, done.err) == (0, "")
    rows = last_line(done)["rows"]
    assert len(rows) == len(done.out.splitlines()) - 2 > 10
    binding = [row["error_percent"] for row in rows if row["binding"]]
    assert len(binding) == 12 and all(abs(error) < 10 for error in binding)


def test_a_layout_that_can_be_used(plan: Any, files: dict[str, Path]) -> None:
    done = plan("--cluster", files["node"], "parallel.pipeline=2")
    assert (done.code, done.err) == (0, "")
    found = last_line(done)
    assert (found["cluster"], found["config"]) == (str(files["node"]), str(files["config"]))
    names = [row["name"] for row in found["layouts"]]
    assert found["chosen"] == "TP1 PP2 DP1" and found["best"] == names[0] and len(set(names)) == 4
    assert f"fastest that can be used:\n{names[0]}: " in done.out


def test_images_that_are_given(plan: Any, files: dict[str, Path]) -> None:
    options = ("--cluster", files["node"], "--layouts", "chosen", "--images-per-row", "2.5")
    found = last_line(plan(*options))
    assert (found["images_per_row"], found["most_images_per_row"]) == (2.5, 4)
    # 4 units of 3 GiB (two ranks share the moments), 2 rows of 4 units, 5 or 8 images (tests/planning/plans.py)
    assert found["layouts"][0]["memory_gib"] == 12 + 8 + 5
    assert found["layouts"][0]["most_memory_gib"] == 12 + 8 + 8
    found = last_line(plan(*options, "data.sources=[]"))
    assert (found["images_per_row"], found["most_images_per_row"]) == (2.5, 70)


def test_a_layout_that_is_none_of_the_cluster(plan: Any, files: dict[str, Path]) -> None:
    done = plan("--cluster", files["node"], "parallel.tensor=4")
    why = "parallel.tensor=4 x parallel.pipeline=1 needs 4 processes, but only 2"
    assert done.code == 2 and why in done.err and done.err.count("\n") == 1
    found = last_line(done)
    assert found["chosen"] is None and found["best"] == found["layouts"][0]["name"]
    done = plan("--cluster", files["node"], "--layouts", "all", "parallel.tensor=4")
    assert (done.code, done.err) == (0, "") and why in done.out


def test_one_line_says_why_a_layout_cannot_be_used(plan: Any, files: dict[str, Path]) -> None:
    done = plan("--cluster", files["two"], "parallel.tensor=2")
    leaves = "tensor ranks leave the node (2 of them, 1 devices)"
    assert (done.code, done.err) == (2, f"tool: the configuration's layout: {leaves}\n")
    assert last_line(done)["best"] == "TP1 PP1 DP2"  # others can
    done = plan("--cluster", files["little"], "--layouts", "chosen")
    assert done.code == 2 and done.err.count("\n") == 1
    start = "tool: the configuration's layout: "
    assert done.err.startswith(f"{start}needs ")
    assert last_line(done)["layouts"][0]["refused"] == [done.err.removeprefix(start).strip()]
    done = plan("--cluster", files["little"], "--layouts", "all")
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cluster", "p4dx"], "p4d"),
        (["--cluster", "laptop", "--layouts", "TP1PP7"], "TP1PP"),
        (["--cluster", "laptop", "--dry-run", "--ranks", "4"], "numbers from 0 to 3"),
        (["--cluster", "laptop", "--layouts", "chosen", "parallel.tensor=8"], "parallel.tensor=8"),
        (["--cluster", "laptop", "training.global_batch_size=1"], "no layout of this model and batch"),
        (["--cluster", "laptop", "--json", "/nowhere/plan.json"], "no folder /nowhere"),
        (["--cluster", "laptop", "--json", "/tmp"], "/tmp is a folder"),
        (["--cluster", "laptop", "data.sources=[]"], "--images-per-row"),
        (["--cluster", "laptop", "--images-per-row", "-1"], "from 0 to 4"),
        (["--cluster", "laptop", "--images-per-row", "4.1"], "from 0 to 4"),
        (["--cluster", "laptop", "--images-per-row", "nan"], "from 0 to 4"),
        (["--cluster", "laptop", "--plot", "plan.xyz"], "plan.xyz"),
        (["--cluster", "laptop", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line(options: list[str], words: str, plan: Any) -> None:
    done = plan(*options)
    assert done.code == 2 and done.err.count("\n") == 1 and words in done.err, done.err
    assert "step s" not in done.out  # before minutes of work


def test_what_the_command_needs(tool: Any) -> None:
    for options in ((), ("--cluster", "p4de"), ("--config", "x.yaml")):
        done = tool(*options)
        assert done.code == 2 and "--config and --cluster are needed" in done.err.splitlines()[-1]
    done = tool("--help")
    assert done.code == 0 and "python tools/plan.py --config" in done.out
