"""The plots of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new_plot(title: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_plot(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path)
    pyplot.close(figure)


def plot_loss(steps: list[dict[str, Any]], path: Path) -> None:
    """Loss of a run, and of its two sources."""
    figure, axes = new_plot("Training loss, TP2 x PP2 with sequence parallelism")
    for key, label, style in (
        ("loss/documents", "documents", {"color": "tab:orange", "linewidth": 1}),
        ("loss/pairs", "image-text pairs", {"color": "tab:green", "linewidth": 1}),
        ("loss", "all tokens", {"color": "tab:blue", "linewidth": 2}),
    ):
        there = [step for step in steps if key in step]  # not every step has tokens of every source
        axes.plot([step["step"] for step in there], [step[key] for step in there], label=label, **style)
    axes.set_xlim(0, steps[-1]["step"])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save_plot(figure, path)


def plot_resume(
    uninterrupted: list[dict[str, Any]],
    killed: list[dict[str, Any]],
    resumed: list[dict[str, Any]],
    checkpoint: int,
    path: Path,
) -> None:
    """Both curves, with the kill and the checkpoint that the run went on from."""
    figure, axes = new_plot("A run killed with SIGKILL and resumed, and the same run uninterrupted")
    after = [step for step in resumed if step["step"] > checkpoint]
    whole = uninterrupted[: len(resumed)]
    for steps, label, style in (
        (whole, "uninterrupted", {"color": "0.75", "linewidth": 7, "solid_capstyle": "round"}),
        (killed, "until the kill", {"color": "tab:blue", "linewidth": 2}),
        (after, "resumed", {"color": "tab:red", "linewidth": 2, "linestyle": (0, (4, 2))}),
    ):
        axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], label=label, **style)
    top = max(step["loss"] for step in whole)
    for x, text, side in ((checkpoint, f"checkpoint, step {checkpoint} ", "right"), (len(killed), " SIGKILL", "left")):
        axes.axvline(x, color="0.3", linewidth=1, linestyle=":")
        axes.text(x, top, text, ha=side, va="top", color="0.3")
    axes.set_xlim(0, len(resumed))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save_plot(figure, path)
