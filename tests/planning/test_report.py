"""Tables, words and JSON of a plan say what its objects say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import KernelsConfig
from megatron_atum.planning import report
from megatron_atum.planning.cluster import load_cluster
from megatron_atum.planning.dry_run import DeviceMemory, DryRun, Message
from megatron_atum.planning.plan import Images, Planner, Row
from megatron_atum.planning.published import validation_rows
from megatron_atum.planning.rivals import Explained, explained, rivals
from megatron_atum.planning.wording import number
from tests.planning.plans import GIB, RESERVED, cluster_of, config_of, make_up_memory, planner

RECIPE = Path(__file__).parents[2] / "examples/atum-80b/pretrain.yaml"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[Planner, Row, list[Row]]:
    """The configuration's row is refused, as are others."""
    make_up_memory(monkeypatch)
    plan_of = planner(config_of("parallel.pipeline=2"), cluster_of(1, 2, 20 + RESERVED))
    own = plan_of.chosen()
    return plan_of, own, plan_of.rows("all", own)


def original(monkeypatch: pytest.MonkeyPatch) -> tuple[Planner, Row, list[Row]]:
    """The recipe of 80B on the original's cluster."""
    make_up_memory(monkeypatch)
    plan_of = Planner(load_config(RECIPE, []), load_cluster("p4de-64"), Images(10.95, 70))
    own = plan_of.chosen(measured=False)
    return plan_of, own, [own]


def said(small: tuple[Planner, Row, list[Row]], rows: list[Row], items: list[Explained]) -> list[str]:
    """Lines of words."""
    plan_of, own, _ = small
    schemes = rivals(plan_of.config, plan_of.cluster, 2.5)
    return report.words(own, rows, schemes, items, plan_of).splitlines()


def cells(table: str) -> list[list[str]]:
    """Columns stand two spaces apart; the last one may be empty."""
    return [re.split(r"\s{2,}", line) for line in table.splitlines()]


def test_layouts(small: tuple[Planner, Row, list[Row]]) -> None:
    _, own, rows = small
    head, *lines = cells(report.layout_table(rows, own))
    assert len(lines) == len(rows) > 4 and len(head) == 14
    for line, row in zip(lines, rows, strict=True):
        p = row.prediction
        assert line[:3] == [row.name, str(row.candidate.rows), f"{p.step_s:.2f}"]
        shares = {5: p.mfu, 6: p.bubble_share, 7: p.tensor_share, 11: p.imbalance}
        for place, share in shares.items():
            assert float(line[place]) == pytest.approx(100 * share, abs=0.51 if place == 7 else 0.051)
        rates = {3: p.tokens_per_s_per_device, 4: p.model_tflops, 8: p.exposed_network_s, 9: p.network_gb_per_node}
        for place, value in (rates | {10: p.node_link_gb_per_device, 12: row.gib, 13: row.gib_most}).items():
            assert float(line[place]) == pytest.approx(value, rel=0.06), "however small"
        remarks = "; ".join([*(["the configuration's"] if row is own else []), *row.refused])
        assert line[14:] == ([remarks] if remarks else [])
    assert sum("the configuration's" in line[-1] for line in lines) == 1
    named = {name for name in head[1:]} - {"step s", "MFU %", "GiB most"}
    for name in named:  # the legend explains every column
        assert name.removesuffix(" %") in report.LEGEND


def test_numbers_of_a_column_stand_below_one_another(small: tuple[Planner, Row, list[Row]]) -> None:
    lines = report.layout_table(small[2], small[1]).splitlines()
    end = lines[0].index("step s") + len("step s")
    assert all(re.search(r"\s\d+\.\d\d$", line[:end]) for line in lines[1:])


def test_json_of_layouts(small: tuple[Planner, Row, list[Row]]) -> None:
    plan_of, own, rows = small
    schemes = rivals(plan_of.config, plan_of.cluster, 2.5)
    found = json.loads(json.dumps(report.summary(own, rows, schemes, [], plan_of, 1.5)))
    best = next(row for row in rows if not row.refused)
    assert (found["chosen"], found["best"], found["seconds"]) == (own.name, best.name, 1.5)
    assert (found["images_per_row"], found["most_images_per_row"]) == (2.5, 8)
    assert found["model_tflops"] == best.prediction.model_tflops
    assert len(found["layouts"]) == len(rows)
    for one, row in zip(found["layouts"], rows, strict=True):
        layout = row.candidate.layout
        shape = (one["tensor"], one["pipeline"], one["virtual_pipeline"], one["data"])
        assert shape == (layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.data)
        assert (one["name"], one["micro_batch_size"], one["refused"]) == (row.name, row.candidate.rows, [*row.refused])
        assert one["units_per_chunk"] == [*layout.units_per_chunk]
        assert (one["memory_gib"], one["most_memory_gib"]) == (row.gib, row.gib_most)
        assert sum(one["parts"].values()) == pytest.approx(one["step_s"]) == row.prediction.step_s
        for name in ("mfu", "bubble_share", "tensor_share", "exposed_network_s", "imbalance", "network_gb_per_node"):
            assert one[name] == getattr(row.prediction, name)
    assert [one["name"] for one in found["rivals"]] == [scheme.name for scheme in schemes]
    for one, scheme in zip(found["rivals"], schemes, strict=True):
        assert one["step_s"] == [scheme.shortest_s, scheme.longest_s]
        assert one["network_gb_per_node"] == scheme.network_bytes / 1e9


def test_rates_of_other_schemes_follow_from_the_same_work(small: tuple[Planner, Row, list[Row]]) -> None:
    plan_of, own, rows = small
    schemes = rivals(plan_of.config, plan_of.cluster, 2.5)
    found = report.summary(own, rows, schemes, [], plan_of, 0.0)
    for row in rows:
        work = row.prediction.model_tflops * row.prediction.step_s
        for one, scheme in zip(found["rivals"], schemes, strict=True):
            assert one["model_tflops"] == pytest.approx([work / scheme.longest_s, work / scheme.shortest_s])
    assert found["zero3_is"] == "predicted"
    assert found["zero3_tflops"] == found["zero3_predicted_tflops"] == found["rivals"][0]["model_tflops"][0]


def test_no_layout_that_can_be_used(small: tuple[Planner, Row, list[Row]]) -> None:
    plan_of, own, _ = small
    schemes = rivals(plan_of.config, plan_of.cluster, 2.5)
    found = report.summary(own, [own], schemes, [], plan_of, 0.0)
    assert found["best"] is None and found["model_tflops"] is None and found["layouts"][0]["refused"]
    assert said(small, [own], [])[0] == "none of these layouts can be used"


def test_rows_that_the_model_cannot_tell_apart(small: tuple[Planner, Row, list[Row]]) -> None:
    _, _, rows = small
    usable = [row for row in rows if not row.refused]
    close = [row for row in usable if row.prediction.step_s <= 1.05 * usable[0].prediction.step_s]
    lines = [line for line in said(small, rows, []) if "cannot tell apart" in line]
    assert len(lines) == (len(close) > 1)
    twice = [usable[0], replace(usable[0], memory_most=usable[-1].memory_most)]
    (line,) = (line for line in said(small, twice, []) if "cannot tell apart" in line)
    assert line.startswith("2 layouts lie within 5 %") and f"({number(min(r.gib_most for r in twice), 1)} GiB)" in line


def test_a_configuration_that_is_no_layout_of_the_cluster(small: tuple[Planner, Row, list[Row]]) -> None:
    plan_of, own, rows = small
    others = [row for row in rows if row is not own]
    schemes = rivals(plan_of.config, plan_of.cluster, 2.5)
    found = report.summary(None, others, schemes, [], plan_of, 0.0)
    assert found["chosen"] is None and found["best"] in {row.name for row in others}
    assert found["rivals"] == report.summary(own, rows, schemes, [], plan_of, 0.0)["rivals"]
    assert "the configuration's" not in report.layout_table(others, None)
    lines = report.words(None, others, schemes, [], plan_of).splitlines()
    assert lines[1].startswith(f"{found['best']}: ")


def test_words_name_the_best_and_its_rivals(small: tuple[Planner, Row, list[Row]]) -> None:
    plan_of, _, rows = small
    usable = [row for row in rows if not row.refused]
    assert len(usable) == 1
    lines = said(small, rows, [])
    assert lines[0] == "fastest that can be used:"
    most = f"{number(usable[0].gib_most, 1)} GiB of a device with the most images"
    assert lines[1] == f"{usable[0].name}: {usable[0].prediction.words}, {most}."
    assert lines[2].startswith(f"{usable[0].name}: times as fast") and len(lines) == 5
    slower = plan_of.with_slower_products(usable[0]).model_tflops
    assert 0 < slower < usable[0].prediction.model_tflops
    assert f"{number(slower, 1)} TFLOP/s if matrix products reach a tenth less" in lines[3]
    assert lines[-1].startswith(f"{RESERVED:g} GiB of each device")
    roomy = [replace(row, refused=()) for row in rows]
    last = roomy[-1]
    lines = report.words(last, roomy, [], [], plan_of).splitlines()
    names = [row.name for row in (*roomy[:4], last, roomy[0], roomy[0], last, last)]
    assert all(f", {number(row.gib_most, 1)} GiB" in line for row, line in zip(roomy[:4], lines[1:5], strict=True))
    assert [line.split(":")[0] for line in lines[1:-1]] == names


def test_other_schemes_in_words(small: tuple[Planner, Row, list[Row]]) -> None:
    _, own, rows = small
    best = next(row for row in rows if not row.refused)
    schemes = rivals(small[0].config, small[0].cluster, 2.5)
    (line,) = [line for line in said(small, rows, []) if "times as fast" in line]
    ratios = report.speed_ups(best, schemes, [])
    step_s = best.prediction.step_s
    for scheme in schemes:
        low, high = scheme.shortest_s / step_s, scheme.longest_s / step_s
        assert ratios[scheme.name] == (low, high)
        assert (f"{low:.2f}-{high:.2f} " if low < high else f"{low:.2f} ") + scheme.name in line
    found = report.summary(own, rows, schemes, [], small[0], 0.0)
    assert found["speed_ups"][best.name] == ratios and own.name in found["speed_ups"]


def test_the_original_beside_its_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of, own, rows = original(monkeypatch)
    items = explained(plan_of.config, plan_of.cluster, 10.95)
    schemes = rivals(plan_of.config, plan_of.cluster, 10.95)
    text = report.words(own, rows, schemes, items, plan_of)
    for item in items:
        assert f"{item.predicted_s:.1f} s predicted, {item.measured_s:.1f} s measured ({item.source})" in text
        assert f"{item.rest_s:.1f} s ({100 * item.rest_s / item.measured_s:.0f} %) unexplained" in text
    (line,) = [line for line in text.splitlines() if "times as fast" in line]
    step_s = own.prediction.step_s
    assert f"{49.0 / step_s:.2f} the original by its log, {43.2 / step_s:.2f} the original by its checkpoints" in line
    found = report.summary(own, rows, schemes, items, plan_of, 0.0)
    work = own.prediction.model_tflops * step_s
    assert found["zero3_is"] == "measured" and found["zero3_tflops"] == pytest.approx(work / 49.0)
    assert found["zero3_predicted_tflops"] == pytest.approx(work / items[0].predicted_s)
    assert [one["model_tflops"] for one in found["original"]] == [
        pytest.approx(work / item.measured_s) for item in items
    ]
    assert found["layouts"][0]["memory_gib"] is None  # it was not asked for


def test_other_schemes() -> None:
    schemes = rivals(config_of(), cluster_of(1, 2), 2.5)
    head, *lines = cells(report.rival_table(schemes))
    assert len(lines) == len(schemes) and head[0] == "scheme"
    for line, scheme in zip(lines, schemes, strict=True):
        low, high = f"{scheme.shortest_s:.1f}", f"{scheme.longest_s:.1f}"
        slow, fast = (f"{rate:.0f}" for rate in scheme.tokens_per_s_per_device)
        overlaps = scheme.shortest_s < scheme.longest_s
        steps = f"{low}-{high}" if low != high else low
        assert line[:3] == [scheme.name, steps, f"{slow}-{fast}" if overlaps else slow]
        found = [float(cell) for cell in line[5:8]]
        expected = [scheme.compute_s, scheme.communication_s, scheme.state_bytes / GIB]
        assert found == pytest.approx(expected, rel=0.06, abs=0.051)
        assert line[8:] == ([] if scheme.overlaps else ["at least"])


def test_what_is_left_out_of_8_bits_is_said(small: tuple[Planner, Row, list[Row]]) -> None:
    plan_of, own, rows = small
    for backend, frozen_gemm, words in (
        ("torch", "bf16", None),
        ("te", "bf16", None),
        ("torch", "fp8", "times are those of bf16 products; 8 bits count in memory and bytes only"),
        ("te", "fp8", "Transformer Engine's 8-bit copies of frozen weights are not counted"),
    ):
        plan_of.config = replace(plan_of.config, kernels=KernelsConfig(backend=backend, frozen_gemm=frozen_gemm))
        lines = [line for line in said((plan_of, own, rows), rows, []) if "frozen_gemm" in line]
        assert len(lines) == (words is not None) and all(words in line for line in lines if words)


def test_published_runs() -> None:
    rows = validation_rows()
    _, *lines = cells(report.validation_table(rows))
    for line, row in zip(lines, rows, strict=True):
        assert line[:3] == [row.name, row.layout, row.quantity]
        assert line[3:6] == [f"{row.measured:.2f}", f"{row.predicted:.2f}", f"{row.error:+.1f}"]
        assert line[6:] == ([] if row.binding else ["plausibility only"])


def test_a_dry_run() -> None:
    memory = DeviceMemory(3 * GIB, 4 * GIB, 5 * GIB, GIB // 4, 2 * GIB)
    message = Message("all_reduce", "tensor", 4, "node", 1234, 8_000_000_000)
    run = _run(memory, [message])
    text = report.dry_run_text(run)
    assert "rank 5: stage 1, data 0, tensor 1; 4 of 56 microbatches run, 44 images in each" in text
    assert "parameters: 1,234,567, of which 890 train" in text
    assert "14.25 = parameters 3.00 + gradients 4.00 + optimizer 5.00 + inputs 0.25 + activations 2.00" in text
    assert "gemm 1.50, attention 0.25" in text
    assert cells(text)[-2][1:] == ["all_reduce", "tensor", "4", "node", "1,234", "8.000", "12.000"]
    assert "memory of the host" not in text
    keeps = report.dry_run_text(_run(replace(memory, host=7 * GIB), [message]))
    assert "14.25 = parameters 3.00" in keeps and "activations 2.00\n" in keeps
    assert "GiB in the memory of the host: 7.00, originals of 8-bit weights" in keeps
    found = json.loads(json.dumps(report.dry_run_json(run)))
    assert (found["memory_gib"], found["memory"]["optimizer"], found["unreached"]) == (14.25, 5 * GIB, ["a.weight"])


def _run(memory: DeviceMemory, messages: list[Message]) -> DryRun:
    values: dict[str, Any] = {
        **{"rank": 5, "pipeline_rank": 1, "data_rank": 0, "tensor_rank": 1, "microbatches": 56, "microbatches_run": 4},
        **{"images": 44, "parameters": 1_234_567, "trainable": 890, "kept": 0, "seconds": 1.0, "process_gib": 0.5},
        "flops": {"gemm": 1_500_000_000_000, "attention": 250_000_000_000},
    }
    return DryRun(memory=memory, messages=messages, unreached=["a.weight"], **values)
