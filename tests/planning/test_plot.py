"""The figure of a plan."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from megatron_atum.errors import ConfigError
from megatron_atum.planning.plan import Row
from megatron_atum.planning.plot import check_plot, draw
from megatron_atum.planning.rivals import Explained, Rival, rivals
from tests.planning.plans import RESERVED, cluster_of, config_of, make_up_memory, planner

CLUSTER = cluster_of(1, 2, 20 + RESERVED)
ORIGINAL = [Explained("ZeRO-3", source, 0.3, seconds) for source, seconds in (("its log", 0.5), ("a guess", 0.4))]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Row], list[Rival]]:
    """Some rows are refused, most need more than the scale of memory shows."""
    make_up_memory(monkeypatch)
    config = config_of("parallel.pipeline=2")
    plan_of = planner(config, CLUSTER)
    return plan_of.rows("all", plan_of.chosen()), rivals(config, CLUSTER, 2.5)


def drawn(path: Path) -> tuple[tuple[int, int], int]:
    """Size, and number of colours."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        colours = image.convert("RGB").getcolors(1 << 24)
        assert colours is not None
        return image.size, len(colours)


def test_a_plan(plan: tuple[list[Row], list[Rival]], tmp_path: Path) -> None:
    rows, schemes = plan
    assert any(row.refused for row in rows) and not all(row.refused for row in rows)
    draw(rows, schemes, ORIGINAL, CLUSTER, tmp_path / "new" / "plan.png")
    (width, height), colours = drawn(tmp_path / "new" / "plan.png")
    assert 1200 < width < 2400 and 300 < height < 1200 and colours > 100
    draw(rows * 9, schemes, ORIGINAL, CLUSTER, tmp_path / "many.png")
    (same, higher), _ = drawn(tmp_path / "many.png")
    assert same == width and (higher - height) / (8 * len(rows)) > 20  # pixels for a line


def test_everything_is_named(
    plan: tuple[list[Row], list[Rival]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, schemes = plan
    check_plot(tmp_path / "plan.svg")
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text as text
    draw(rows, schemes, ORIGINAL, CLUSTER, tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    for row in rows:
        assert f"{row.name}, rows {row.candidate.rows}" in text and f"{row.prediction.step_s:.4g}" in text
        assert f"{row.gib:.3g} / {row.gib_most:.3g}" in text
        for reason in row.refused:
            assert reason.partition(",")[0] in text
    for scheme in schemes:
        assert scheme.name in text
    assert text.count("stroke-dasharray") == 2 * len(ORIGINAL)  # in the panel and in the legend
    assert "<pattern" in text  # what is refused is hatched
    usable = [replace(row, refused=()) for row in rows]
    draw(usable, schemes, ORIGINAL, CLUSTER, tmp_path / "usable.svg")
    assert "<pattern" not in (tmp_path / "usable.svg").read_text()
    for words in ("original, by its log: 0.5 s", "by a guess: 0.4 s", f"CPU core: {20 + RESERVED:g}"):
        assert words in text


def test_nothing_but_refused_layouts(plan: tuple[list[Row], list[Rival]], tmp_path: Path) -> None:
    refused = [row for row in plan[0] if row.refused]
    draw(refused, [], [], CLUSTER, tmp_path / "plan.png")
    assert drawn(tmp_path / "plan.png")[1] > 50


def test_a_figure_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plan", "plan.xyz"):
        with pytest.raises(ConfigError, match=rf"{name}: a plot's name ends in one of .*\.pdf, .*\.png"):
            check_plot(Path(name))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron_atum\[logging\]'"):
        draw([], [], [], CLUSTER, Path("plan.png"))
