"""The plan as one figure: what the steps of layouts and of other schemes consist of, and the memory of layouts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_atum.errors import ConfigError
from megatron_atum.planning.cluster import Cluster
from megatron_atum.planning.dry_run import DeviceMemory
from megatron_atum.planning.plan import Row
from megatron_atum.planning.rivals import Explained, Rival
from megatron_atum.training.plotting.drawing import DPI, PALETTE, load_matplotlib, save

WIDTH, LINE_HEIGHT, FRAME_HEIGHT = 15.0, 0.27, 1.9  # inches
PARTS = {  # of cost.Prediction: label, colour
    "compute_s": ("products", PALETTE[0]),
    "tensor_s": ("waiting for tensor ranks", PALETTE[1]),
    "bubble_s": ("idle pipeline", PALETTE[4]),
    "exchange_s": ("waiting for other stages", PALETTE[2]),
    "data_s": ("waiting for data-parallel ranks", PALETTE[3]),
    "optimizer_s": ("optimizer", PALETTE[6]),
}
STATIC, MOVING, MOST = PALETTE[0], PALETTE[5], "0.8"
FADED: dict[str, Any] = {"alpha": 0.3, "hatch": "////", "edgecolor": "0.4", "linewidth": 0.0}
BEYOND = 1.6  # steps of other schemes are drawn up to so many times the longest layout
ROOM = 1.3  # of the scale of memory over the device's
GAP = 1.0  # lines between layouts and schemes


def check_plot(path: Path) -> None:
    """Before minutes of work.

    Raises:
        ConfigError: matplotlib is not installed, or does not write such files.
    """
    load_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ConfigError(f"{path}: a plot's name ends in one of .{', .'.join(formats)}")


def draw(
    rows: Sequence[Row], schemes: Sequence[Rival], original: Sequence[Explained], cluster: Cluster, path: Path
) -> None:
    """Write the figure.

    Args:
        rows: from top to bottom.
        original: measured steps are drawn as lines.

    Raises:
        ConfigError: as `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    height = FRAME_HEIGHT + LINE_HEIGHT * (len(rows) + GAP + len(schemes))
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    steps, memory = figure.subplots(1, 2, sharey=True, width_ratios=(1.7, 1.0))
    _draw_steps(steps, rows, schemes, original)
    _draw_memory(memory, rows, cluster)
    figure.legend(handles=_step_handles(schemes, original), loc="outside upper left", ncols=4, frameon=False)
    figure.legend(handles=_memory_handles(cluster), loc="outside upper right", ncols=2, frameon=False)
    save(figure, path)


def _dress(axes: Any, title: str, unit: str, most: float) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(unit)
    axes.set_xlim(0, most)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


# Steps ----------------------------------------------------------------------------------------------------------------


def _draw_steps(axes: Any, rows: Sequence[Row], schemes: Sequence[Rival], original: Sequence[Explained]) -> None:
    most = _longest(rows, schemes, original)
    _dress(axes, "a step: predicted for layouts and other schemes", "seconds", most)
    for place, row in enumerate(rows):
        _step(axes, place, row, most)
    first = len(rows) + GAP
    for place, scheme in enumerate(schemes):
        _scheme(axes, first + place, scheme, most)
    _measured(axes, original)
    labels = [f"{row.name}, rows {row.candidate.rows}" for row in rows] + [scheme.name for scheme in schemes]
    axes.set_yticks([*range(len(rows)), *(first + place for place in range(len(schemes)))], labels)
    axes.set_ylim(first + len(schemes) - 0.4, -0.6)


def _longest(rows: Sequence[Row], schemes: Sequence[Rival], original: Sequence[Explained]) -> float:
    """End of the scale: refused layouts may be beyond it."""
    seen = [row.prediction.step_s for row in rows if not row.refused] or [row.prediction.step_s for row in rows]
    seen += [item.measured_s for item in original]
    schemes_s = [scheme.longest_s for scheme in schemes]
    return 1.12 * max(max(seen), min(max(schemes_s, default=0.0), BEYOND * max(seen)))


def _step(axes: Any, place: float, row: Row, most: float) -> None:
    left = 0.0
    for part, (_, colour) in PARTS.items():
        seconds = getattr(row.prediction.prediction, part)
        axes.barh(place, seconds, left=left, color=colour, height=0.72, **(FADED if row.refused else {}))
        left += seconds
    reasons = "; ".join(_short(reason) for reason in row.refused)
    _value(axes, place, left, most, f"{left:.4g}   {reasons}".rstrip())


def _short(reason: str) -> str:
    """Without what the other panel or the layout's name says."""
    return re.split(r", | \(", reason)[0]


def _scheme(axes: Any, place: float, scheme: Rival, most: float) -> None:
    low, high = scheme.shortest_s, scheme.longest_s
    axes.barh(place, low, color="0.45", height=0.72)
    axes.barh(place, high - low, left=low, color="0.75", height=0.72)
    _value(axes, place, high, most, f"{high:.3g}" if low == high else f"{low:.3g}-{high:.3g}")


def _value(axes: Any, place: float, end: float, most: float, text: str) -> None:
    """Behind the bar, or on it where there is more room."""
    box = {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 1.0}
    look = {"va": "center_baseline", "fontsize": 8, "bbox": box, "clip_on": True}
    if end < 0.5 * most or (end < 0.95 * most and len(text) < 12):
        axes.text(end + 0.008 * most, place, text, **look)
    else:
        axes.text(min(end, most) - 0.008 * most, place, text, ha="right", **look)


def _measured(axes: Any, original: Sequence[Explained]) -> None:
    for number, item in enumerate(_sources(original)):
        axes.axvline(item.measured_s, color="black", linestyle=("--", ":")[number % 2], linewidth=1.2)


def _sources(original: Sequence[Explained]) -> list[Explained]:
    """One of each measurement."""
    return list({item.source: item for item in original}.values())


def _step_handles(schemes: Sequence[Rival], original: Sequence[Explained]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour, label=label) for label, colour in PARTS.values()]
    if schemes:
        handles += [Patch(color="0.45", label="other schemes at their shortest")]
        handles += [Patch(color="0.75", label="other schemes at their longest")]
    for number, item in enumerate(_sources(original)):
        text = f"original, by {item.source}: {item.measured_s:g} s"
        handles.append(Line2D([], [], color="black", linestyle=("--", ":")[number % 2], label=text))
    return handles


# Memory ---------------------------------------------------------------------------------------------------------------


def _draw_memory(axes: Any, rows: Sequence[Row], cluster: Cluster) -> None:
    limit = cluster.device.memory_gib
    _dress(axes, "memory of a device: mean / most", "GiB", ROOM * limit)
    for place, row in enumerate(rows):
        if row.memory:
            _memory(axes, place, row)
    axes.axvspan(limit - cluster.device.reserved_gib, limit, color=PALETTE[1], alpha=0.15, linewidth=0)
    axes.axvline(limit, color=PALETTE[1], linewidth=1.4)
    axes.tick_params(axis="y", labelleft=False)


def _memory(axes: Any, place: float, row: Row) -> None:
    """Of the stage that needs most."""
    fullest: DeviceMemory = max(row.memory, key=lambda stage: stage.total)
    static = (fullest.parameters + fullest.gradients + fullest.optimizer) / 2**30
    for left, end, colour in ((0.0, static, STATIC), (static, row.gib, MOVING), (row.gib, row.gib_most, MOST)):
        axes.barh(place, end - left, left=left, color=colour, height=0.72, **(FADED if row.refused else {}))
    # in a column of its own: on the bars it would hide the device's memory
    text = f"{row.gib:.3g} / {row.gib_most:.3g}"
    axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), va="center_baseline", fontsize=8)


def _memory_handles(cluster: Cluster) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    device = cluster.device
    return [
        Patch(color=STATIC, label="weights, gradients, optimizer"),
        Patch(color=MOVING, label="activations at the mean of images"),
        Patch(color=MOST, label="with the most images in every row"),
        Patch(color=PALETTE[1], alpha=0.15, label="kept in reserve"),
        Line2D([], [], color=PALETTE[1], label=f"{device.name}: {device.memory_gib:g}"),
    ]
