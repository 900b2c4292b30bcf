"""One HTML page of a run or several: a table, the figures, and what happened. It needs nothing but itself."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_atum.training.plotting.drawing import colour
from megatron_atum.training.plotting.figures import Drawn, time_split
from megatron_atum.training.plotting.run import Event, Run, differences, smooth, window_of

Cell = Callable[[Run], str]
_ROUTINE = ("save", "validation")
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 1240px; margin: 24px auto; padding: 0 20px; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 34px 0 4px; }
p { margin: 2px 0 8px; color: #555; } img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; margin: 10px 0; } td, th { padding: 3px 14px 3px 0; text-align: left;
vertical-align: top; border-bottom: 1px solid #e6e6e6; } th { font-weight: 600; color: #444; }
td { font-variant-numeric: tabular-nums; } .run { display: inline-block; width: 10px; height: 10px;
border-radius: 5px; margin-right: 6px; } nav a { margin-right: 14px; } summary { cursor: pointer; color: #333; }
a { color: #0072B2; text-decoration: none; }
"""


def page(runs: Sequence[Run], drawn: Sequence[Drawn], images: dict[str, Path]) -> str:
    """Args: images: the PNG of each figure that there is, by its name."""
    shown = [figure for figure in drawn if figure.name in images]
    title = ", ".join(run.name for run in runs)
    links = "".join(f'<a href="#{one.name}">{escape(one.title)}</a>' for one in shown)
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p>Bold lines are running means over one point in fifty; raw values are faint behind them. A scale may leave "
        "out the outermost 0.2 % of the points.</p>",
        f"<nav>{links}</nav>",
        facts_table(runs),
        differences_table(runs),
        *(figure_part(one, images[one.name]) for one in shown),
        left_out(drawn),
        *(events_part(run, len(runs) > 1) for run in runs),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def figure_part(drawn: Drawn, image: Path) -> str:
    data = base64.b64encode(image.read_bytes()).decode()
    caption = f"<p>{escape(drawn.caption)}</p>" if drawn.caption else ""
    source = f"data:image/png;base64,{data}"
    return f'<h2 id="{drawn.name}">{escape(drawn.title)}</h2>{caption}<img alt="{escape(drawn.title)}" src="{source}">'


def left_out(drawn: Sequence[Drawn]) -> str:
    items = "".join(f"<li>{escape(one.title)}: {escape(one.missing)}</li>" for one in drawn if one.missing)
    return f"<h2>Not drawn</h2><ul>{items}</ul>" if items else ""


# Tables ---------------------------------------------------------------------------------------------------------------


def facts_table(runs: Sequence[Run]) -> str:
    head = "".join(
        f'<th><span class="run" style="background:{colour(r)}"></span>{escape(run.name)}</th>'
        for r, run in enumerate(runs)
    )
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell(run))}</td>' for run in runs)}</tr>"
        for name, cell in FACTS.items()
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def differences_table(runs: Sequence[Run]) -> str:
    found = differences(list(runs)) if len(runs) > 1 else {}
    rows = "".join(
        f"<tr><th>{escape(key)}</th>{''.join(f'<td>{escape(str(value))}</td>' for value in values)}</tr>"
        for key, values in found.items()
    )
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    table = f"<table><tr><th></th>{head}</tr>{rows}</table>"
    return f"<details><summary>{len(found)} configuration keys differ</summary>{table}</details>" if found else ""


def events_part(run: Run, several: bool) -> str:
    """What is worth a look first; saves and validations, of which there are many, behind a click."""
    title = f"Events: {run.name}" if several else "Events"
    seldom = [event for event in run.events if event.name not in _ROUTINE]
    routine = [event for event in run.events if event.name in _ROUTINE]
    more = f"<details><summary>{len(routine)} saves and validations</summary>{_event_table(routine)}</details>"
    return f"<h2>{escape(title)}</h2>{_event_table(seldom)}{more if routine else ''}"


def _event_table(events: Sequence[Event]) -> str:
    rows = "".join(
        f"<tr><td>{event.step:,}</td><td>{escape(event.name)}</td><td>{escape(_say(event.values))}</td></tr>"
        for event in events
    )
    return f"<table><tr><th>step</th><th>event</th><th></th></tr>{rows}</table>" if rows else "<p>none</p>"


def _say(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Facts of a run -------------------------------------------------------------------------------------------------------


def _steps(run: Run) -> str:
    last = run.steps[-1]["step"]
    total = run.config.get("training", {}).get("steps")
    return f"{last:,} of {total:,}" if isinstance(total, int) else f"{last:,}"


def _tokens(run: Run) -> str:
    tokens, images = (np.nansum(run.curve(key).values) for key in ("tokens", "images"))
    return f"{tokens:,.0f} positions, {images:,.0f} images"


def _final(run: Run) -> str:
    curve = run.curve("loss")
    window = min(window_of(len(curve)), 100)
    last = curve.values[-window:]
    if not np.isfinite(last).any():
        return "none"
    return f"{np.nanmean(last):.4f}" + (f" (mean of the last {window} steps)" if window > 1 else "")


def _validation(run: Run) -> str:
    curve = run.validation("loss")
    return f"{curve.values[-1]:.4f} at step {curve.steps[-1]:,}" if len(curve) else "none"


def _best(key: str, form: str) -> Cell:
    def cell(run: Run) -> str:
        curve = run.curve(key)
        known = smooth(curve.values, window_of(len(curve)))
        known = known[np.isfinite(known)]
        return form.format(best=known.max(), median=np.median(known)) if len(known) else "unknown"

    return cell


def _split(run: Run) -> str:
    if "step_s" not in run.keys:
        return "unknown"
    means = {name: float(values.mean()) for name, values in time_split(run)[1].items()}
    whole = sum(means.values()) or 1.0
    shares = [
        f"{name.removesuffix('_s').replace('_', '-')} {value / whole:.1%}" for name, value in means.items() if value
    ]
    return f"{whole:.3g} s: {', '.join(shares)}"


def _slowest(run: Run) -> str:
    ranks = Counter(
        (line["slowest_rank"], line.get("slowest_host", "")) for line in run.steps if "slowest_rank" in line
    )
    if not ranks:
        return "unknown"
    (rank, host), count = ranks.most_common(1)[0]
    return f"rank {rank} {f'({host}) ' if host else ''}in {count / ranks.total():.0%} of the steps"


def _last(key: str) -> Cell:
    def cell(run: Run) -> str:
        curve = run.curve(key)
        return f"{curve.values[-1]:,.0f}" if len(curve) else "unknown"

    return cell


def _count(name: str) -> Cell:
    return lambda run: str(len(run.events_named(name)))


def _bad_steps(run: Run) -> str:
    """From the counter, or from the events where there is none."""
    return _last("bad_steps")(run) if "bad_steps" in run.keys else _count("bad_step")(run)


def _configuration(run: Run) -> str:
    if not run.config:
        return "no config.yaml"
    get = lambda section, key: run.config.get(section, {}).get(key, "?")  # noqa: E731
    degrees = [get("parallel", key) for key in ("tensor", "pipeline", "virtual_pipeline")]
    return (
        f"{get('model', 'preset')}, {get('model', 'num_layers')} layers of width {get('model', 'hidden_size')}; "
        f"TP {degrees[0]}, PP {degrees[1]}, VPP {degrees[2]}; batch {get('training', 'global_batch_size')} x "
        f"{get('data', 'sequence_length')}, micro-batch {get('training', 'micro_batch_size')}; "
        f"lr {get('optimizer', 'lr')} {get('optimizer', 'schedule')}; {get('training', 'precision')}; "
        f"seed {get('training', 'seed')}"
    )


FACTS: dict[str, Cell] = {
    "steps": _steps,
    "seen": _tokens,
    "final loss": _final,
    "validation loss": _validation,
    "tokens/s/device": _best("tokens_per_s_per_device", "{best:,.0f} at best, {median:,.0f} in the median"),
    "model TFLOP/s/device": _best("model_tflops", "{best:.4g} at best, {median:.4g} in the median"),
    "MFU": _best("mfu", "{best:.1%} at best, {median:.1%} in the median"),
    "step time": _split,
    "slowest": _slowest,
    "memory": _best("memory_gib", "{best:.4g} GiB"),
    "restarts": _count("resume"),
    "rollbacks": _count("rollback"),
    "steps not applied": _bad_steps,
    "loss spikes": _count("spike"),
    "failed saves": _count("save_failed"),
    "lost to faults": _last("faults"),
    "configuration": _configuration,
    "folder": lambda run: str(run.folder),
    "notes": lambda run: "; ".join(run.notes) or "none",
}
