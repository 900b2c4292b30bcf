"""Say what is in the sources, and in which proportions a run would read them.

    python tools/data/stats.py --config pretrain.yaml --plot mixture.png
    python tools/data/stats.py --config pretrain.yaml data.mixture=by_tokens --json mixture.json
    python tools/data/stats.py shards/obelics/manifest.json shards/laion/manifest.json

With a configuration, its own filters count, and rows are planned as the run would plan them: realised shares of
tokens, how full the rows are, and how often training.steps would read each source. With manifests only, all filters
count, and there is no mixture.

Fill is the share of a row that holds tokens: of the rows planned (fill), at best (bound: no packing exceeds it), and
with first-fit on the same samples.

Exit codes: 0 done, 2 sources that cannot be used or wrong use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import FILTERS, Config
from megatron_atum.data.index import SourceIndex, open_source
from megatron_atum.data.loader import load_tokenizer
from megatron_atum.data.mixture import shares
from megatron_atum.data.order import SHORTENED
from megatron_atum.data.ramp_up import BatchSize
from megatron_atum.data.statistics import (
    MixtureFacts,
    SourceFacts,
    StreamSettings,
    mixture_facts,
    open_manifest,
    source_facts,
)
from megatron_atum.data.storage import Storage
from megatron_atum.errors import ConfigError

PERCENT = 100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("arguments", nargs="*", metavar="MANIFEST | section.key=value", help="manifests, or overrides of --config")
    add("--config", metavar="FILE", help="configuration of a run")
    add("--packs", type=int, default=20_000, metavar="N", help="rows to plan; 0 plans none (%(default)s)")
    add("--json", metavar="FILE", help="write everything there as well")
    add("--plot", metavar="FILE", help="draw shares, fill and images (.png, .pdf, .svg; needs matplotlib)")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    config = load_config(options.config, options.arguments) if options.config else None
    indexes = open_sources(config) if config else open_manifests(options.arguments)
    sources = [source_facts(index) for index in indexes]
    mixture = plan(config, indexes, options.packs) if config and options.packs > 0 else []
    print("\n".join(source_lines(sources)))
    if config and mixture:
        print("\n".join(mixture_lines(config, mixture)))
    if options.json:
        Path(options.json).write_text(json.dumps(record(sources, mixture), indent=1) + "\n")
    if options.plot:
        draw(sources, mixture, options.plot)


def open_sources(config: Config) -> list[SourceIndex]:
    data = config.data
    if not data.sources:
        raise ConfigError("data.sources is empty; give the configuration of a run with sources, or manifests")
    tokenizer, storage = load_tokenizer(data, config.model.vocab_size), Storage()
    return [open_source(source, data.filters, tokenizer, storage) for source in data.sources]


def open_manifests(paths: Sequence[str]) -> list[SourceIndex]:
    if not paths:
        raise ConfigError("nothing to look at; give --config FILE or manifests of tools/data/index.py")
    return [open_manifest(path, name_of(path), list(FILTERS), Storage()) for path in paths]


def name_of(path: str) -> str:
    """The folder of a manifest.json, or the name of the file."""
    *folders, file = path.split("/")
    stem = file.removesuffix(".json")
    return folders[-1] if stem == "manifest" and folders else stem


def plan(config: Config, indexes: Sequence[SourceIndex], packs: int) -> list[MixtureFacts]:
    data, training = config.data, config.training
    asked = shares(data.sources, data.mixture, {index.name: index.tokens for index in indexes})
    settings = StreamSettings(asked, data.sequence_length, training.seed, data.shuffle_samples)
    run_rows = BatchSize(training.global_batch_size, training.ramp_up).total(training.steps)
    return mixture_facts(data.sources, data.mixture, indexes, settings, packs, run_rows)


def record(sources: Sequence[SourceFacts], mixture: Sequence[MixtureFacts]) -> dict[str, Any]:
    derived = ("tokens_per_sample", "images_per_1000_tokens")
    facts = [asdict(source) | {name: getattr(source, name) for name in derived} for source in sources]
    return {"sources": facts, "mixture": [asdict(part) for part in mixture]}


# As text --------------------------------------------------------------------------------------------------------------


def source_lines(sources: Sequence[SourceFacts]) -> Iterator[str]:
    head = ("source", "kind", "shards", "samples", "usable", "tokens", "images", "tokens/", "images per")
    rows: list[tuple[str, ...]] = [head, ("", "", "", "", "", "", "", "sample", "1000 tokens")]
    for one in sources:
        counts = [f"{count:,}" for count in (one.shards, one.samples, one.usable, one.tokens, one.images)]
        rows.append((one.name, one.kind, *counts, f"{one.tokens_per_sample:,.1f}", f"{one.images_per_1000_tokens:.2f}"))
    yield from aligned(rows, left=2)
    for one in sources:
        reasons = [f"{reason} {count:,}" for reason, count in one.dropped.items()]
        reasons += [f"images lost before {one.lost_images:,}"] * bool(one.lost_images)
        if reasons:
            yield f"{one.name}: dropped or lost: {', '.join(reasons)}"


def mixture_lines(config: Config, mixture: Sequence[MixtureFacts]) -> Iterator[str]:
    data, training = config.data, config.training
    *parts, whole = mixture
    yield ""
    yield f"mixture: {data.mixture}, {whole.rows:,} rows of {data.sequence_length} tokens planned"
    head = ("source", "epochs", "% of tokens", "", "rows", "fill", "", "", "images per row", "", "", "epochs")
    below = ("", "set", "asked", "realised", "", "", "bound", "first-fit", "mean", "min", "max", "of the run")
    rows: list[tuple[str, ...]] = [head, below]
    for part in mixture:
        is_whole = part is whole
        rows.append(
            (
                part.name,
                "" if is_whole else f"{part.epochs:g}",
                *(f"{PERCENT * share:.3f}" for share in (part.asked, part.realised)),
                f"{part.rows:,}",
                *(f"{value:.4f}" for value in (part.fill, part.fill_bound, part.fill_first_fit)),
                f"{part.images_per_row:.2f}",
                str(part.fewest_images),
                str(part.most_images),
                "" if is_whole else f"{part.run_epochs:.3g}",
            )
        )
    yield from aligned(rows, left=1)
    ramp_up = f", from {training.ramp_up.start:,} on" if training.ramp_up.start else ""
    yield f"the run: {training.steps:,} steps of {training.global_batch_size:,} rows{ramp_up}"
    by_samples = ", ".join(f"{part.name} {PERCENT * part.by_samples:.1f}" for part in parts)
    if len(parts) > 1:
        yield f"taken as shares of samples, the asked ones would give these % of tokens: {by_samples}"
    for part in parts:
        for reason, count in part.too_long.items():
            what = "their last turns do not fit a row" if reason == SHORTENED else "no row of this length holds them"
            yield f"{part.name}: {reason} {count:,}: {what}"


def aligned(rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Columns as wide as they need; the first `left` of them are flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


# As a picture ---------------------------------------------------------------------------------------------------------

BLUE, GREY, LIGHT = "#2a6f97", "#b0b7bf", "#89c2d9"


def draw(sources: Sequence[SourceFacts], mixture: Sequence[MixtureFacts], path: str) -> None:
    """Images per 1000 tokens and, where rows were planned, shares and fill; one panel each.

    Raises:
        ConfigError: matplotlib is not installed, or does not write such files.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib; pip install matplotlib, or leave it out") from error
    names = [source.name for source in sources]
    density = {"images": [source.images_per_1000_tokens for source in sources]}
    panels = [("images per 1000 tokens", density, [BLUE], "{:.1f}")]
    if mixture:
        parts = mixture[:-1]
        asked = {name: [PERCENT * getattr(part, name) for part in parts] for name in ("asked", "realised")}
        fills = {"fill": "fill", "first-fit": "fill_first_fit", "bound": "fill_bound"}
        filled = {title: [PERCENT * getattr(part, name) for part in parts] for title, name in fills.items()}
        panels.insert(0, ("% of tokens", asked, [GREY, BLUE], "{:.2f}"))
        panels.append(("fill of rows, %", filled, [BLUE, LIGHT, GREY], "{:.1f}"))
    height = 1.0 + len(names) * (0.3 + 0.22 * max(len(values) for _, values, _, _ in panels))
    figure = Figure(figsize=(1 + 4 * len(panels), height), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        draw_panel(axes, names, *panel)
    figure.axes[0].invert_yaxis()  # the first source on top
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ConfigError(f"--plot {path}: {error}") from error


def draw_panel(
    axes: Any, names: Sequence[str], title: str, values: dict[str, list[float]], colours: Sequence[str], form: str
) -> None:
    """Horizontal bars, one group for each name, the number behind each bar."""
    thickness = 0.8 / len(values)
    for number, (label, row) in enumerate(values.items()):
        places = [place - 0.4 + (number + 0.5) * thickness for place in range(len(names))]
        bars = axes.barh(places, row, 0.92 * thickness, color=colours[number], label=label)
        axes.bar_label(bars, [form.format(value) for value in row], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.18 * max(max(row) for row in values.values()) or 1)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, length=0)
    if len(values) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=len(values), loc="lower right", bbox_to_anchor=(1.02, 0.98))


if __name__ == "__main__":
    from megatron_atum.checkpoint.command import run_command

    run_command("stats", main)
