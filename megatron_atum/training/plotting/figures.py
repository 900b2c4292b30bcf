"""The figures of a run, or of several runs over one another."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_atum.training.plotting.drawing import (
    PANEL_HEIGHT,
    STYLES,
    Panel,
    Series,
    colour,
    draw_layers,
    draw_panel,
    dress,
    figure_legend,
    log_scale,
    mark_events,
    panels_figure,
    place_legend,
    series_handle,
)
from megatron_atum.training.plotting.run import STEP_PARTS, Run

Runs = Sequence[Run]


@dataclass(frozen=True)
class Drawn:
    """A figure, or the reason why there is none."""

    name: str  # of its PNG
    title: str
    caption: str
    figure: Any = None
    missing: str = ""


@dataclass(frozen=True)
class Plan:
    """draw: returns None where the runs do not have what it needs, `needs`."""

    name: str
    title: str
    caption: str
    needs: str
    draw: Callable[[Runs], Any]


def draw_all(runs: Runs) -> list[Drawn]:
    drawn = []
    for plan in PLANS:
        figure = plan.draw(runs)
        missing = "" if figure else f"no {plan.needs} in metrics.jsonl"
        drawn.append(Drawn(plan.name, plan.title, plan.caption, figure, missing))
    return drawn


def _panels(*panels: Panel) -> Callable[[Runs], Any]:
    return lambda runs: draw_panels(runs, panels)


def draw_panels(runs: Runs, panels: Sequence[Panel]) -> Any:
    """Those panels of which there is something."""
    present = [panel for panel in panels if panel.present(runs)]
    if not present:
        return None
    figure, all_axes = panels_figure(len(present))
    for axes, panel in zip(all_axes, present, strict=True):
        draw_panel(axes, runs, panel)
    figure_legend(figure, runs)
    return figure


def _family(runs: Runs, prefix: str) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.families(prefix)))


def _loss_by_source(runs: Runs) -> Any:
    """One panel for one run; for several, one for each source."""
    series = [Series(key, key.removeprefix("loss/")) for key in _family(runs, "loss/")]
    unit = "nats per token"
    if len(runs) == 1 and series:
        return draw_panels(runs, [Panel("Loss per source", unit, tuple(series))])
    return draw_panels(runs, [Panel(f"Loss: {one.label}", unit, (one,)) for one in series])


def _rates(runs: Runs) -> Any:
    groups = [Series(key, key.removeprefix("lr/")) for key in _family(runs, "lr/")]
    rates = (*([] if groups else [Series("lr", "lr")]), *groups)
    return draw_panels(
        runs,
        [
            Panel("Gradient norm, before clipping", "norm", (Series("grad_norm", "grad_norm"),), log=True),
            Panel("Learning rate", "learning rate", rates, from_zero=True, exact=True),
        ],
    )


def _validation(runs: Runs) -> Any:
    families = (("loss", "Validation loss", "nats per token", False), ("perplexity", "Perplexity", "perplexity", True))
    keys = {prefix: _validation_keys(runs, prefix) for prefix, *_ in families}
    present = [family for family in families if keys[family[0]]]
    if not present:
        return None
    figure, all_axes = panels_figure(len(present))
    for axes, (prefix, title, unit, log) in zip(all_axes, present, strict=True):
        dress(axes, runs, title, unit)
        for r, run in enumerate(runs):
            for k, key in enumerate(keys[prefix]):
                curve = run.validation(key)
                shade, style = (colour(r), STYLES[k % 4]) if len(runs) > 1 else (colour(k), "-")
                axes.plot(curve.steps, curve.values, color=shade, linestyle=style, marker="o", markersize=3)
        if log:
            _share_log_scale([axes])
        mark_events(axes, runs)
        labels = ["all" if key == prefix else key.removeprefix(f"{prefix}/") for key in keys[prefix]]
        place_legend(axes, [series_handle(k, label, len(runs) > 1) for k, label in enumerate(labels)])
    figure_legend(figure, runs)
    return figure


def _validation_keys(runs: Runs, prefix: str) -> list[str]:
    keys = dict.fromkeys(key for run in runs for key in run.validation_keys(prefix))
    return [key for key in keys if key == prefix or key.startswith(f"{prefix}/")]


# Where the time goes --------------------------------------------------------------------------------------------------

PART_LABELS = {
    "data_s": "data",
    "forward_backward_s": "forward, backward",
    "optimizer_s": "optimizer",
    "checkpoint_s": "checkpoint",
    "rest": "rest",
}
BINS = 200


def _step_time(runs: Runs) -> Any:
    """A panel for each run: stacks of two runs over one another would not be legible."""
    with_time = [run for run in runs if "step_s" in run.keys and set(run.keys) & set(STEP_PARTS)]
    if not with_time:
        return None
    figure, all_axes = panels_figure(len(with_time), columns=1)
    for axes, run in zip(all_axes, with_time, strict=True):
        steps, parts = time_split(run)
        dress(axes, runs, f"Step time: {run.name}" if len(runs) > 1 else "Step time", "seconds per step")
        shades = [colour(number) for number in (4, 0, 2, 1, 6)]
        axes.stackplot(steps, *parts.values(), colors=shades, labels=list(PART_LABELS.values()), linewidth=0)
        axes.set_ylim(0, 1.1 * np.percentile(sum(parts.values()), 99))
        mark_events(axes, [run])
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure_legend(figure, runs, runs_too=False)
    return figure


def time_split(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Mean seconds of each part in up to BINS stretches of equal length, and the middle step of each."""
    whole = run.curve("step_s")
    seconds = {name: np.zeros(len(whole)) for name in STEP_PARTS}
    for name in STEP_PARTS:
        curve = run.curve(name)
        seconds[name][np.searchsorted(whole.steps, curve.steps)] = np.nan_to_num(curve.values)
    inside = sum(seconds[name] for name in STEP_PARTS if name != "checkpoint_s")  # that comes between steps
    seconds["rest"] = np.maximum(0.0, np.nan_to_num(whole.values) - inside)
    bins = np.array_split(np.arange(len(whole)), min(BINS, len(whole)))
    middle = np.array([whole.steps[place].mean() for place in bins])
    return middle, {name: np.array([values[place].mean() for place in bins]) for name, values in seconds.items()}


def _energy(runs: Runs) -> Any:
    """Watts and joules per token follow from what a step used."""
    if not any("joules" in run.keys for run in runs):
        return None
    derived = [_with_power(run) for run in runs]
    return draw_panels(
        derived,
        [
            Panel("Power of all devices", "kW", (Series("kilowatts", "power"),), from_zero=True),
            Panel("Energy per token", "joules", (Series("joules_per_token", "energy"),), from_zero=True),
        ],
    )


def _with_power(run: Run) -> Run:
    def derive(line: dict[str, Any]) -> dict[str, Any]:
        joules, seconds, tokens = line.get("joules"), line.get("step_s"), line.get("tokens")
        watts = {"kilowatts": joules / seconds / 1000} if joules is not None and seconds else {}
        return {"step": line["step"], **watts, **({"joules_per_token": joules / tokens} if watts and tokens else {})}

    abandoned = [[derive(line) for line in part] for part in run.abandoned]
    return Run(run.name, run.folder, [derive(line) for line in run.steps], abandoned, run.events, run.config)


def _slowest(runs: Runs) -> Any:
    if not any("slowest_rank" in run.keys for run in runs):
        return None
    figure, (ratio, rank) = panels_figure(2)
    draw_panel(ratio, runs, Panel("Slowest rank over the median rank", "ratio", (Series("slowest_over_median", ""),)))
    dress(rank, runs, "Which rank was slowest", "rank")
    for r, run in enumerate(runs):
        curve = run.curve("slowest_rank")
        size = 2.5 if len(curve) > 500 else 6
        rank.plot(curve.steps, curve.values, ".", markersize=size, alpha=0.5, color=colour(r))
    rank.yaxis.get_major_locator().set_params(integer=True)
    mark_events(rank, runs)
    figure_legend(figure, runs)
    return figure


# Inside the model -----------------------------------------------------------------------------------------------------


def _layers(kinds: dict[str, str], unit: str, *, log: bool) -> Callable[[Runs], Any]:
    """Args: kinds: a pattern of names with their number in it, and the title of its panel."""

    def draw(runs: Runs) -> Any:
        panels = [
            (run, title, names) for run in runs for pattern, title in kinds.items() if (names := numbered(run, pattern))
        ]
        if not panels:
            return None
        figure, all_axes = panels_figure(len(panels))
        for axes, (run, title, names) in zip(all_axes, panels, strict=True):
            dress(axes, runs, f"{title}: {run.name}" if len(runs) > 1 else title, unit)
            _draw_layer_panel(figure, axes, run, names)
        for kind in kinds.values():  # so that runs can be compared
            share = _share_log_scale if log else _share_scale
            share([axes for axes, (_, title, _) in zip(all_axes, panels, strict=True) if title == kind])
        figure_legend(figure, runs, runs_too=False)
        return figure

    return draw


def _draw_layer_panel(figure: Any, axes: Any, run: Run, names: list[tuple[int, str]]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    first, last = names[0][0], names[-1][0]
    seen_well = ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 256)))  # its yellow end is hard to see
    shades = ScalarMappable(Normalize(first, max(last, first + 1)), seen_well)
    draw_layers(axes, run, names, shades.to_rgba)
    mark_events(axes, [run])
    bar = figure.colorbar(shades, ax=axes, label="layer" if "decoder" in names[0][1] else "unit", pad=0.02, aspect=30)
    bar.ax.yaxis.get_major_locator().set_params(integer=True)


def _share_scale(alike: list[Any]) -> None:
    limits = [axes.get_ylim() for axes in alike]
    for axes in alike:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _share_log_scale(alike: list[Any]) -> None:
    """Of what is positive; without any, the scale stays as it is."""
    drawn = [line.get_ydata() for axes in alike for line in axes.lines if line.get_transform() == axes.transData]
    values = np.concatenate([np.asarray(y, dtype=float) for y in drawn]) if drawn else np.empty(0)
    values = values[np.isfinite(values) & (values > 0)]
    for axes in alike if len(values) else ():
        log_scale(axes, values.min() / 1.25, values.max() * 1.25)


def numbered(run: Run, pattern: str) -> list[tuple[int, str]]:
    """(number, name) of all names that match, by number."""
    found = ((re.fullmatch(pattern, key), key) for key in run.keys)
    return sorted((int(match[1]), key) for match, key in found if match)


def _part_gradients(runs: Runs) -> Any:
    keys = [key for key in _family(runs, "gradient_norm/") if not re.search(r"\.\d+$", key)]
    series = tuple(Series(key, key.removeprefix("gradient_norm/").replace("_", " ")) for key in keys)
    title = "Gradient norms of the other parts"
    if len(runs) == 1:
        return draw_panels(runs, [Panel(title, "norm", series, log=True)] if series else [])
    return draw_panels(runs, [Panel(f"Gradient norm: {one.label}", "norm", (one,), log=True) for one in series])


# What happened --------------------------------------------------------------------------------------------------------

LANES = (
    "start",
    "resume",
    "save",
    "save_failed",
    "validation",
    "spike",
    "bad_step",
    "rollback",
    "faults",
    "signal",
    "stop",
)


def _events(runs: Runs) -> Any:
    names = list(dict.fromkeys(event.name for run in runs for event in run.events))
    if not names:
        return None
    lanes = [name for name in LANES if name in names] + sorted(set(names) - set(LANES))
    figure, (axes,) = panels_figure(1, height=max(0.24 * len(lanes) * len(runs) ** 0.5 + 0.7, 0.6 * PANEL_HEIGHT))
    dress(axes, runs, "Events", "")
    for r, run in enumerate(runs):
        shift = (r - (len(runs) - 1) / 2) * 0.6 / len(runs)
        steps = [event.step for event in run.events]
        rows = [lanes.index(event.name) + shift for event in run.events]
        axes.plot(steps, rows, linestyle="none", marker="|", markersize=9, markeredgewidth=1.6, color=colour(r))
    axes.set_yticks(range(len(lanes)), [name.replace("_", " ") for name in lanes])
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(left=-0.01 * axes.get_xlim()[1])
    if len(runs) > 1:
        figure_legend(figure, [Run(run.name, run.folder, run.steps, [], [], {}) for run in runs])
    return figure


def _one(key: str, label: str = "", factor: float = 1.0) -> tuple[Series, ...]:
    return (Series(key, label or key, factor),)


PLANS = (
    Plan("loss", "Loss", "Cross entropy of each step, and its running mean.", "loss",
         _panels(Panel("Loss", "nats per token", _one("loss")))),
    Plan("loss_per_source", "Loss per source", "A step without tokens of a source has no value for it.",
         "loss/<source>", _loss_by_source),
    Plan("validation", "Validation", "Held-out rows in a fixed order.", "validation events", _validation),
    Plan("optimisation", "Gradient norm and learning rate", "", "grad_norm or lr", _rates),
    Plan("z_loss", "z-loss", "Mean of the squared logsumexp, without its weight.", "z_loss",
         _panels(Panel("z-loss", "nats²", _one("z_loss")))),
    Plan("throughput", "Throughput", "Model FLOPs count frozen weights as what they cost, and no recomputation; "
         "executed FLOPs count recomputation too.", "tokens_per_s_per_device",
         _panels(
             Panel("Tokens per second and device", "tokens/s", _one("tokens_per_s_per_device"), from_zero=True),
             Panel("FLOP/s per device", "TFLOP/s",
                   (Series("model_tflops", "model"), Series("executed_tflops", "executed", dashed=True)),
                   from_zero=True),
             Panel("MFU", "% of peak", _one("mfu", factor=100), from_zero=True),
             Panel("Positions per step", "thousand tokens", _one("tokens", factor=1e-3), from_zero=True, exact=True),
         )),
    Plan("step_time", "Where the time of a step goes", "Means over stretches of steps. Rest is what none of the parts "
         "covers.", "step_s with one of its parts", _step_time),
    Plan("slowest", "Slowest rank", "", "slowest_rank", _slowest),
    Plan("gates", "Gates", "tanh(alpha) of each gated cross-attention layer; 0 is shut. Mean magnitude for vector "
         "gates.", "gate/<unit>",
         _layers({r"gate/(\d+)/attention": "Attention gates", r"gate/(\d+)/mlp": "MLP gates"}, "tanh(alpha)",
                 log=False)),
    Plan("activations", "Activations", "Root mean square of what each layer gives out.", "activation_norm/<layer>",
         _layers({r"activation_norm/cross_attention\.(\d+)": "Cross-attention layers",
                  r"activation_norm/decoder\.(\d+)": "Decoder layers"}, "RMS", log=True)),
    Plan("gradients", "Gradients per layer", "Norm before clipping. Frozen layers have none.",
         "gradient_norm/<layer>",
         _layers({r"gradient_norm/cross_attention\.(\d+)": "Cross-attention layers",
                  r"gradient_norm/decoder\.(\d+)": "Decoder layers"}, "norm", log=True)),
    Plan("gradients_of_parts", "Gradients of the other parts", "Norm before clipping.", "gradient_norm/<part>",
         _part_gradients),
    Plan("data", "Data", "", "padding, image_text_ratio, images or faults",
         _panels(
             Panel("Padding", "% of positions", _one("padding", factor=100), from_zero=True),
             Panel("Images per 1000 text tokens", "images", _one("image_text_ratio", factor=1000), from_zero=True),
             Panel("Images per step", "images", _one("images"), from_zero=True),
             Panel("Samples and images lost to faults, so far", "count", _one("faults"), from_zero=True, exact=True),
         )),
    Plan("memory", "Memory", "Peak of the rank that used most.", "memory_gib",
         _panels(Panel("Memory", "GiB", _one("memory_gib"), from_zero=True, exact=True))),
    Plan("energy", "Energy", "From the devices' own counters.", "joules", _energy),
    Plan("health", "Steps not applied, and rollbacks", "", "bad_steps or rollbacks",
         _panels(
             Panel("Steps not applied, so far", "steps", _one("bad_steps"), from_zero=True, exact=True),
             Panel("Rollbacks, so far", "rollbacks", _one("rollbacks"), from_zero=True, exact=True),
         )),
    Plan("events", "Events", "", "events", _events),
)  # fmt: skip
