"""Figures hold the curves they should, and the page everything that was drawn."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_atum.training.plotting.drawing import colour, load_matplotlib
from megatron_atum.training.plotting.figures import PLANS, draw_all, time_split
from megatron_atum.training.plotting.plot import plot_runs
from megatron_atum.training.plotting.run import Run, read_run
from tests.training.plotting.synthetic_run import BAD, ROLLED_BACK_FROM, ROLLED_BACK_TO, SOURCES, UNITS, write_run

OLD_KEYS = ("step", "loss", "z_loss", "grad_norm", "lr", "tokens", "images", "tokens_per_s_per_device", "model_tflops")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "long", 3600)


@pytest.fixture(scope="module")
def drawn(long_run: Path) -> dict[str, Any]:
    load_matplotlib()
    return {one.name: one for one in draw_all([read_run(long_run)])}


class Page(HTMLParser):
    """Texts, tags and addresses of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(path.read_text())

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for name, value in attributes if name in ("src", "href")]


def heavy_lines(axes: Any) -> list[Any]:
    """Running means: the only ones of that width."""
    return [line for line in axes.lines if line.get_linewidth() == 1.7]


# What is in a figure -------------------------------------------------------------------------------------------------


def test_everything_is_drawn(drawn: dict[str, Any]) -> None:
    assert [name for name, one in drawn.items() if one.figure is None] == []
    for one in drawn.values():
        for axes in one.figure.axes:
            assert axes.lines or axes.collections, f"{one.name}: {axes.get_title(loc='left')} is empty"


def test_the_loss_counts_what_was_taken_last(drawn: dict[str, Any], long_run: Path) -> None:
    (axes,) = drawn["loss"].figure.axes
    (mean,) = heavy_lines(axes)
    assert mean.get_xdata().tolist() == [step for step in range(1, 3601) if step not in BAD]
    gone = next(line for line in axes.lines if line.get_linewidth() == 0.7 and len(line.get_xdata()) < 200)
    assert gone.get_xdata().tolist() == list(range(ROLLED_BACK_TO + 1, ROLLED_BACK_FROM + 1))
    assert np.nanmax(gone.get_ydata()) > 3 > np.nanmax(mean.get_ydata()[500:])
    low, high = axes.get_ylim()
    assert low < mean.get_ydata().min() and high > 8


def test_marks_say_where_the_run_went_on(drawn: dict[str, Any]) -> None:
    (axes,) = drawn["loss"].figure.axes
    upright = [line for line in axes.lines if len(set(line.get_xdata())) == 1 < len(line.get_xdata())]
    assert {line.get_xdata()[0]: line.get_linestyle() for line in upright} == {1750.5: ":", ROLLED_BACK_TO + 0.5: "--"}
    (crosses,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert tuple(crosses.get_xdata()) == tuple(step for step in BAD if step <= 3600)
    legend = {text.get_text().split(" (")[0] for text in drawn["loss"].figure.legends[0].get_texts()}
    assert legend == {"restart", "rolled back to here", "step not applied"}


def test_sources_and_layers_have_a_line_each(drawn: dict[str, Any]) -> None:
    (axes,) = drawn["loss_per_source"].figure.axes
    assert {text.get_text() for text in axes.get_legend().get_texts()} == set(SOURCES)
    assert len({line.get_color() for line in heavy_lines(axes)}) == len(SOURCES)
    attention, mlp = (axes for axes in drawn["gates"].figure.axes if axes.get_title(loc="left"))
    for axes in (attention, mlp):
        assert sum(line.get_linewidth() == 1.3 for line in axes.lines) == UNITS


def test_parts_of_the_step_time_add_up(long_run: Path) -> None:
    run = read_run(long_run)
    steps, parts = time_split(run)
    assert len(steps) == 200 and (np.diff(steps) > 0).all()
    inside = sum(values for name, values in parts.items() if name != "checkpoint_s")
    assert inside.mean() == pytest.approx(run.curve("step_s").values.mean())
    assert parts["rest"] == pytest.approx(0.15) and parts["checkpoint_s"].mean() == pytest.approx(1.9 / 250, rel=0.05)


def test_several_runs_have_a_colour_each(long_run: Path, tmp_path: Path) -> None:
    load_matplotlib()
    runs = [read_run(long_run), read_run(write_run(tmp_path / "short", 300, 1))]
    figures = {one.name: one.figure for one in draw_all(runs)}
    (axes,) = figures["loss"].axes
    assert [(line.get_color(), len(line.get_xdata())) for line in heavy_lines(axes)] == [
        (colour(0), 3598),
        (colour(1), 300),
    ]
    assert [text.get_text() for text in figures["loss"].legends[0].get_texts()] == ["long", "short"]
    titles = [axes.get_title(loc="left") for axes in figures["loss_per_source"].axes]
    assert titles == [f"Loss: {source}" for source in SOURCES]
    assert [axes.get_title(loc="left") for axes in figures["step_time"].axes] == ["Step time: long", "Step time: short"]


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_holds_every_figure_and_needs_no_network(long_run: Path, tmp_path: Path) -> None:
    file = plot_runs([long_run], tmp_path / "out")
    page = Page(file)
    assert "script" not in page.tags and "link" not in page.tags
    embedded = [source for source in page.sources if not source.startswith("#")]
    assert len(embedded) == len(PLANS) and all(source.startswith("data:image/png;base64,") for source in embedded)
    pictures = [base64.b64decode(source.partition(",")[2]) for source in embedded]
    assert pictures == [(tmp_path / "out" / f"{plan.name}.png").read_bytes() for plan in PLANS]
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in pictures)
    assert "Not drawn" not in page.texts
    facts = dict(zip(page.texts, page.texts[1:], strict=False))
    assert facts["steps"] == "3,600 of 3,600"
    assert (facts["restarts"], facts["rollbacks"], facts["steps not applied"], facts["failed saves"]) == (
        "1",
        "1",
        "2",
        "1",
    )
    assert re.fullmatch(r"2,\d{3} at best, 2,\d{3} in the median", facts["tokens/s/device"])
    assert facts["final loss"].startswith("1.9")
    assert "rank 77 (node-9)" in facts["slowest"]
    assert "TP 8, PP 2" in facts["configuration"]
    assert any("reason loss of laion is 3.4" in text for text in page.texts)


def test_older_files_leave_figures_out_and_say_so(long_run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (long_run / "metrics.jsonl").read_text().splitlines()[:200]]
    old = [
        {key: line[key] for key in line if key in (*OLD_KEYS, "data_s", "step_s", "loss/laion")}
        for line in lines
        if "event" not in line
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    page = Page(plot_runs([tmp_path]))
    missing = {text.partition(": no ")[0] for text in page.texts if text.endswith("in metrics.jsonl")}
    assert missing == {
        "Validation", "Slowest rank", "Gates", "Activations", "Gradients per layer", "Gradients of the other parts",
        "Memory", "Energy", "Steps not applied, and rollbacks", "Events",
    }  # fmt: skip
    assert sum(source.startswith("data:") for source in page.sources) == len(PLANS) - len(missing)
    assert not (tmp_path / "plots" / "gates.png").exists() and (tmp_path / "plots" / "loss.png").exists()


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<b>run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"event": "<script>", "step": 1, "x": "<i>"}\n')
    page = Page(plot_runs([folder]))
    assert not {"script", "b", "i"} & set(page.tags)


def test_one_step_is_enough(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null, "grad_norm": 0.0, "step_s": 1.0, "data_s": 0.1}\n'
    )
    assert "<h1>" in plot_runs([tmp_path]).read_text()


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "default").mkdir(parents=True)
        (tmp_path / place / "default" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    file = plot_runs([tmp_path / place / "default" for place in ("a", "b")])
    assert file == tmp_path / "a" / "default" / "plots-with-default" / "index.html"
    assert {"a/default", "b/default"} <= set(Page(file).texts)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from megatron_atum.errors import ConfigError

    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install"):
        plot_runs([tmp_path])


def test_power_follows_from_joules(tmp_path: Path) -> None:
    load_matplotlib()
    line = {"step": 1, "loss": 1.0, "joules": 6000.0, "step_s": 2.0, "tokens": 1000}
    run = Run("x", tmp_path, [line, {"step": 2, "loss": 1.0}], [], [], {})
    figure = next(one.figure for one in draw_all([run]) if one.name == "energy")
    assert [heavy_lines(axes)[0].get_ydata().tolist() for axes in figure.axes] == [[3.0], [6.0]]
