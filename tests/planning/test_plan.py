"""Which layouts are refused, which is the fastest that fits, and what single ranks are asked."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_atum.errors import ConfigError
from megatron_atum.model.cross_attention import GatedCrossAttentionLayer
from megatron_atum.planning import memory, plan
from megatron_atum.planning.memory import Parts
from megatron_atum.planning.plan import Images, Planner, Row
from tests.distributed import run_distributed
from tests.planning.plans import GIB, IMAGES, RESERVED, cluster_of, config_of, made_up, make_up_memory, planner

PIPELINE = "parallel.pipeline=2"


@pytest.fixture(autouse=True)
def made_up_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    make_up_memory(monkeypatch)


def rows_of(which: str, *overrides: str, memory_gib: float = 1000.0) -> list[Row]:
    """On one node with two devices."""
    plan_of = planner(config_of(*overrides), cluster_of(1, 2, memory_gib))
    return plan_of.rows(which, plan_of.chosen())


def named(rows: list[Row]) -> dict[str, int]:
    """Rows of a microbatch, by layout, in the order of the table."""
    return {row.name: row.candidate.rows for row in rows}


# Why a layout cannot be used ------------------------------------------------------------------------------------------


def test_tensor_ranks_stay_in_the_node() -> None:
    config = config_of("parallel.tensor=2")
    assert planner(config, cluster_of(2, 2)).chosen().refused == ()
    apart = planner(config, cluster_of(2, 1)).chosen()
    assert apart.refused == ("tensor ranks leave the node (2 of them, 1 devices)",)


def test_stages_take_about_the_same_time() -> None:
    cluster = cluster_of(1, 2)
    even = planner(config_of(PIPELINE), cluster).chosen()
    assert 0.01 < even.prediction.imbalance < plan.MOST_IMBALANCE and not even.refused
    heavy = planner(config_of(PIPELINE, "parallel.units_per_chunk=[3,1]"), cluster).chosen()
    percent = 100 * heavy.prediction.imbalance
    assert percent > 40
    assert heavy.refused == (f"the slowest stage takes {percent:.1f} % more than the mean, and 10 % are the most",)


def test_memory_holds_the_most_images() -> None:
    """Stage 0: two units of 4 GiB; of two microbatches 1 GiB for each unit and row, and for each image."""
    own = planner(config_of(PIPELINE), cluster_of(1, 2, 48 + RESERVED)).chosen()
    assert (own.gib, own.gib_most) == (8 + 2 * (4 + 5), 8 + 2 * (4 + 16))
    assert [stage.total / GIB for stage in own.memory_most] == [48, 8 + 4]
    assert own.refused == ()
    small = planner(config_of(PIPELINE), cluster_of(1, 2, 47.9 + RESERVED)).chosen()
    assert small.refused == ("needs 48.0 GiB, and CPU core has 47.9 besides 6 in reserve",)


def test_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def disconnected(*arguments: Any) -> Parts:
        return replace(made_up(*arguments), unreached=("a.weight", "b.weight"))

    monkeypatch.setattr(memory, "measure_parts", disconnected)
    config = config_of("parallel.tensor=2", PIPELINE, "parallel.units_per_chunk=[3,1]")
    refused = planner(config, cluster_of(4, 1, RESERVED)).chosen().refused
    assert [reason.split()[0] for reason in refused[:-1]] == ["tensor", "the", "needs"]
    assert refused[-1].startswith("backward never reaches 2 trainable tensors") and refused[-1].endswith("b.weight")


def test_a_layout_that_is_none_of_the_cluster() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2 x parallel\.pipeline=2 needs 4"):
        planner(config_of("parallel.tensor=2", PIPELINE), cluster_of(1, 2)).chosen()


# Which is taken -------------------------------------------------------------------------------------------------------

# Of each shape the microbatches, the fastest first, with what they need for the most images (72 GiB of 84 are
# activations of 6 rows with 8 images each: 6 x 4 + 48).
ROWS = {
    "TP1 PP1 DP2": {6: 84, 4: 60, 3: 48, 2: 36, 1: 24},
    "TP1 PP2 DP1": {4: 88, 3: 68, 6: 128, 8: 168, 2: 48, 1: 28},
    "TP1 PP2 VPP2 DP1": {6: 230, 4: 156, 3: 119, 2: 82, 1: 45},
    "TP2 PP1 DP1": {8: 56, 6: 44, 4: 32, 3: 26, 2: 20, 1: 14},
}


@pytest.mark.parametrize("most", [1000, 100, 60, 45, 25])
def test_the_fastest_microbatch_that_fits(most: int) -> None:
    rows = rows_of("usable", PIPELINE, "training.micro_batch_size=1", memory_gib=most + RESERVED)
    expected = {}
    for name, needs in ROWS.items():
        fits = [number for number, gib in needs.items() if gib <= most]
        if fits:
            expected[name] = fits[0]
    own = ("TP1 PP2 DP1", 1)
    others = [row for row in rows if (row.name, row.candidate.rows) != own]
    assert {row.name: row.candidate.rows for row in others} == {
        name: number for name, number in expected.items() if (name, number) != own
    }
    assert not any(row.refused for row in others)
    assert [row.prediction.step_s for row in rows] == sorted(row.prediction.step_s for row in rows)
    assert [row for row in rows if row.refused] == [row for row in rows if row not in others and most < 28]
    for row in others:
        assert row.gib_most == ROWS[row.name][row.candidate.rows]


def test_all_shows_what_nothing_fits() -> None:
    rows = rows_of("all", PIPELINE, memory_gib=20 + RESERVED)
    by_name = {row.name: row for row in rows if row.candidate.rows != 2 or row.name != "TP1 PP2 DP1"}
    assert by_name.keys() == ROWS.keys()
    least = by_name["TP1 PP1 DP2"]
    assert (least.candidate.rows, least.gib_most) == (1, 24)
    assert least.refused == ("needs 24.0 GiB, and CPU core has 20.0 besides 6 in reserve",)
    assert by_name["TP2 PP1 DP1"].refused == ()
    assert [row.prediction.step_s for row in rows] == sorted(row.prediction.step_s for row in rows)


def test_the_configuration_is_always_a_row_and_never_two() -> None:
    fastest = ["training.micro_batch_size=4", PIPELINE]
    plan_of = planner(config_of(*fastest), cluster_of(1, 2))
    own = plan_of.chosen()
    rows = plan_of.rows("all", own)
    assert [row for row in rows if row.name == own.name] == [own]
    assert len(rows) == len(ROWS)
    assert plan_of.rows("chosen", own) == [own]


def test_the_configuration_may_be_none_of_the_cluster() -> None:
    plan_of = planner(config_of("parallel.tensor=2", PIPELINE), cluster_of(1, 2))
    assert {row.name for row in plan_of.rows("usable", None)} == ROWS.keys()
    assert plan_of.rows("chosen", None) == []


def test_usable_ends_after_some_and_passes_over_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SHOWN", 2)
    own = {"TP1 PP2 DP1": 1}
    options = (PIPELINE, "training.micro_batch_size=1")
    rows = rows_of("usable", *options)
    assert len(rows) == 3 and named(rows) == {"TP1 PP1 DP2": 6, "TP1 PP2 VPP2 DP1": 6} | own
    tight = named(rows_of("usable", *options, memory_gib=44 + RESERVED))
    assert tight == {"TP1 PP1 DP2": 2, "TP2 PP1 DP1": 6} | own


def test_layouts_by_name() -> None:
    rows = rows_of("TP2PP1, TP1 PP2 VPP2 DP1", memory_gib=45 + RESERVED)
    assert named(rows) == {"TP1 PP1 DP2": 2, "TP1 PP2 VPP2 DP1": 1, "TP2 PP1 DP1": 6}
    twice = rows_of("tp2pp1,TP2PP1")
    assert len(twice) == 2 and named(twice) == {"TP1 PP1 DP2": 2, "TP2 PP1 DP1": 8}
    with pytest.raises(ConfigError, match=r"TP1PP2VPP3.*TP1PP2VPP2"):
        rows_of("TP2PP1,TP1PP2VPP3")


# Images ---------------------------------------------------------------------------------------------------------------


def test_images_of_a_microbatch() -> None:
    assert Images(2.5, 8).of_microbatch(2) == [3, 2]
    assert Images(10.8, 70).of_microbatch(4) == [11, 11, 11, 11]  # 43.2
    assert Images(0.0, 0).of_microbatch(3) == [0, 0, 0]
    assert sum(Images(0.1, 8).of_microbatch(4)) == 1


def test_images_cost_memory_and_time() -> None:
    few, many = (
        Planner(config_of(PIPELINE), cluster_of(1, 2), images).chosen() for images in (Images(0, 0), Images(4, 9))
    )
    assert (few.gib, few.gib_most) == (16 + 2, 16 + 2)  # each computes one image, which is blank
    assert (many.gib, many.gib_most) == (16 + 2 * 8, 16 + 2 * 18)
    assert many.prediction.step_s > few.prediction.step_s


# Single ranks ---------------------------------------------------------------------------------------------------------


def test_ranks_of_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(config: Any, cluster: Any, rank: int, images: list[int]) -> int:
        asked.append((rank, images))
        return rank

    monkeypatch.setattr(plan, "dry_run", note)
    plan_of = planner(config_of("parallel.tensor=2", PIPELINE), cluster_of(4, 2))
    assert plan_of.dry_runs("stages") == [0, 4]  # of two data-parallel ranks with two tensor ranks each
    assert plan_of.dry_runs("7, 1") == [7, 1]
    assert asked == [(rank, [3, 2]) for rank in (0, 4, 7, 1)]
    for text in ("8", "-1", "one", "", "1,,2", "²"):
        with pytest.raises(ConfigError, match=r"--ranks: .* is no rank of 8; use stages, or numbers from 0 to 7"):
            plan_of.dry_runs(text)


def faults(rank: int, world_size: int) -> list[list[str]]:
    """Of a model whose cross-attention forgets its MLP, with enough memory and with too little."""

    def forward(layer: Any, hidden: Any, latents: Any, plan: Any) -> Any:
        return hidden + torch.tanh(layer.alpha_attention) * layer.attention(layer.input_norm(hidden), latents, plan)

    dist.destroy_process_group()  # a dry run needs it for itself
    GatedCrossAttentionLayer.forward = forward  # type: ignore[method-assign]
    config = config_of("parallel.tensor=2", PIPELINE)
    plans = [Planner(config, cluster_of(2, 2, memory), IMAGES) for memory in (1000.0, RESERVED)]
    (run,) = plans[0].dry_runs("2")
    return [plan_of.faults_of(run) for plan_of in plans]


def test_faults_of_a_rank() -> None:
    ((enough, little),) = run_distributed(faults, 1)
    assert len(enough) == 1 and len(little) == 2
    unreached = "stage 1: backward never reaches 8 trainable tensors, which would not train: cross_attention_layers.2."
    assert enough[0].startswith(unreached) and "cross_attention_layers.3." in enough[0]
    assert re.fullmatch(r"stage 1: needs 0\.0\d+ GiB, and CPU core has 0\.0 besides 6 in reserve", little[0])
    assert little[1] == enough[0]
