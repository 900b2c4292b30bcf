"""How all figures look: one palette, one legend above the panels, the same marks for what happened to the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_atum.errors import ConfigError
from megatron_atum.training.plotting.run import Run, smooth, window_of

# Okabe and Ito's colours (jfly.uni-koeln.de/color), which stay apart for colour-blind eyes; without their yellow,
# which is hard to see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
STYLES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
DPI, WIDTH, PANEL_HEIGHT = 110, 11.0, 3.1
FEW = 15  # points that are drawn as points
TAILS = 0.2  # per cent of the points at either end that the scale need not show


@dataclass(frozen=True)
class Series:
    """One name of metrics.jsonl in a panel."""

    key: str
    label: str
    factor: float = 1.0  # from its unit to that of the panel
    dashed: bool = False  # may lie on the one before it


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    series: tuple[Series, ...]
    log: bool = False
    from_zero: bool = False
    exact: bool = False  # counts and settings: no mean over steps

    def present(self, runs: Iterable[Run]) -> bool:
        return any(one.key in run.keys for run in runs for one in self.series)


def load_matplotlib() -> None:
    """Raises ConfigError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'megatron_atum[logging]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8.5, "path.simplify": True})


def panels_figure(count: int, columns: int = 2, height: float = PANEL_HEIGHT) -> tuple[Any, list[Any]]:
    """A figure with so many panels; one alone takes the whole width."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.5), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def dress(axes: Any, runs: Sequence[Run], title: str, unit: str) -> None:
    axes.set_title(title, loc="left")
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.01 * max(_last_step(run) for run in runs))


def _last_step(run: Run) -> int:
    return max(line[-1]["step"] for line in (run.steps, *run.abandoned))


def draw_panel(axes: Any, runs: Sequence[Run], panel: Panel) -> None:
    """Names by colour for one run; for several, runs by colour and names by line style."""
    dress(axes, runs, panel.title, panel.unit)
    shown: list[np.ndarray] = []
    for r, run in enumerate(runs):
        for s, series in enumerate(panel.series):
            style = STYLES[s % 4] if len(runs) > 1 else STYLES[series.dashed]
            look = {"color": colour(r if len(runs) > 1 else s), "linestyle": style}
            shown += draw_series(axes, run, series, look, exact=panel.exact)
    set_scale(axes, shown, panel)
    mark_events(axes, runs)
    labelled = [one for one in panel.series if any(one.key in run.keys for run in runs)]
    if len(panel.series) > 1:
        place_legend(axes, [series_handle(panel.series.index(one), one.label, len(runs) > 1) for one in labelled])


def draw_series(axes: Any, run: Run, series: Series, look: dict[str, Any], *, exact: bool) -> list[np.ndarray]:
    """Raw values faintly, their running mean on top, abandoned parts thin. Returns what was drawn."""
    curve = run.curve(series.key)
    if not len(curve):
        return []
    values = series.factor * curve.values
    window = 1 if exact else window_of(len(curve))
    raw = {**look, "linestyle": "-", "linewidth": 0.7, "alpha": 0.28}
    if window > 1:
        axes.plot(curve.steps, values, **raw)
    marker = {"marker": "o", "markersize": 3} if len(curve) <= FEW else {}
    axes.plot(curve.steps, smooth(values, window), linewidth=1.7, **marker, **look)
    for gone in run.abandoned_curves(series.key):
        axes.plot(gone.steps, series.factor * gone.values, **{**look, "linewidth": 0.7, "alpha": 0.5, "linestyle": "-"})
    return [values]


def set_scale(axes: Any, shown: list[np.ndarray], panel: Panel) -> None:
    """A range that a few outliers do not blow up."""
    values = np.concatenate(shown) if shown else np.empty(0)
    values = values[np.isfinite(values) & ((values > 0) | (not panel.log))]
    if not len(values):
        return
    low, high = np.percentile(values, [TAILS, 100 - TAILS])
    if panel.log:
        log_scale(axes, low / 1.25, high * 1.25)
        return
    if panel.from_zero and low >= 0:
        low, high = 0.0, high or 1.0
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    on_axis = panel.from_zero and low >= 0 and not panel.exact  # a count that stays 0 would be hidden by the axis
    axes.set_ylim(0.0 if on_axis else low - margin, high + margin)
    if panel.exact and np.array_equal(values, values.round()):
        axes.yaxis.get_major_locator().set_params(integer=True)


def log_scale(axes: Any, low: float, high: float) -> None:
    """Numbers instead of powers of ten, and enough of them in less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(low, high)
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if high < 8 * low else (1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def draw_layers(axes: Any, run: Run, names: Sequence[tuple[int, str]], scale: Any) -> None:
    """One line for each (number, name), coloured from the first layer to the last."""
    for number, name in names:
        curve = run.curve(name)
        marker = {"marker": "o", "markersize": 2.5} if len(curve) <= FEW else {}
        axes.plot(curve.steps, curve.values, color=scale(number), linewidth=1.3, **marker)
        for gone in run.abandoned_curves(name):
            axes.plot(gone.steps, gone.values, color=scale(number), linewidth=0.7, alpha=0.75)


# Marks and legends ----------------------------------------------------------------------------------------------------

RESTART: dict[str, Any] = {"color": "0.35", "linestyle": ":", "linewidth": 1.1}
ROLLBACK: dict[str, Any] = {"color": "0.1", "linestyle": (0, (5, 2)), "linewidth": 1.0}
BAD_STEP: dict[str, Any] = {"color": "0.1", "linestyle": "none", "marker": "x", "markersize": 4.5}


def mark_events(axes: Any, runs: Sequence[Run]) -> None:
    """Restarts and rollbacks as lines where the run went on from, bad steps as crosses at the bottom."""
    for r, run in enumerate(runs):
        own = {"color": colour(r)} if len(runs) > 1 else {}
        for event in run.events_named("resume"):
            axes.axvline(event.step + 0.5, **(RESTART | own))
        for event in run.events_named("rollback"):
            axes.axvline(event.step + 0.5, **(ROLLBACK | own))
        bad = [event.step for event in run.events_named("bad_step")]
        axes.plot(bad, [0.025 + 0.03 * r] * len(bad), transform=axes.get_xaxis_transform(), **(BAD_STEP | own))


def figure_legend(figure: Any, runs: Sequence[Run], *, runs_too: bool = True) -> None:
    """Above all panels: the runs on the left, the marks that occur on the right."""
    from matplotlib.lines import Line2D

    if len(runs) > 1 and runs_too:
        names = [Line2D([], [], color=colour(r), linewidth=2.2, label=run.name) for r, run in enumerate(runs)]
        columns = max(1, min(4, 60 // max(8 + len(run.name) for run in runs)))
        figure.legend(handles=names, loc="outside upper left", ncols=columns, frameon=False)
    marks = {
        "resume": (RESTART, "restart"),
        "rollback": (ROLLBACK, "rolled back to here (thin: what was undone)"),
        "bad_step": (BAD_STEP, "step not applied"),
    }
    handles = [
        Line2D([], [], label=label, **style)
        for name, (style, label) in marks.items()
        if any(run.events_named(name) for run in runs)
    ]
    if handles:
        figure.legend(handles=handles, loc="outside upper right", ncols=min(4, len(handles)), frameon=False)


def series_handle(number: int, label: str, several_runs: bool) -> Any:
    from matplotlib.lines import Line2D

    if several_runs:
        return Line2D([], [], color="0.2", linestyle=STYLES[number % 4], linewidth=1.5, label=label)
    return Line2D([], [], color=colour(number), linewidth=2.0, label=label)


def place_legend(axes: Any, handles: list[Any]) -> None:
    """Right of the panel, where nothing is drawn."""
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def colour(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
