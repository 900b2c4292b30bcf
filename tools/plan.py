"""Plan a run before renting a cluster: every layout with its time, traffic and memory, and which one to take.

    python tools/plan.py --config examples/atum-80b/pretrain.yaml --cluster p4de-64
    python tools/plan.py --config examples/atum-80b/pretrain.yaml --cluster p5-16 --layouts all --plot plan.png
    python tools/plan.py --config examples/atum-80b/pretrain.yaml --cluster p4de-64 --dry-run --ranks stages
    python tools/plan.py --published            # the cost model beside measurements

Needs no accelerator. Times are predictions of a cost model; memory, bytes and FLOPs are those of the code itself, which
--dry-run runs as single ranks on tensors without memory. docs/planning.md says how to read it and how to describe a
cluster. The last line is one JSON object.

Exit codes: 0 done; 2 the configuration's layout cannot be used on this cluster (with --layouts all it is a row with its
reason, and the code is 0), or wrong use.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_atum.checkpoint.command import run_command
from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config, SourceConfig
from megatron_atum.errors import ConfigError
from megatron_atum.parallel.device import hide_accelerators

if TYPE_CHECKING:
    from megatron_atum.planning.plan import Images, Planner

MOST_PROCESSES = 8  # each takes half a GiB


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file of the run")
    parser.add_argument(
        "--cluster", metavar="NAME", help="p4d, p4de, p5, p5en, dgx-h100, laptop, each with -NODES, or a YAML file"
    )
    parser.add_argument(
        "--layouts", default="usable", metavar="WHICH", help="usable, all, chosen, or names such as TP8PP4,TP8PP4VPP5"
    )
    parser.add_argument("--images-per-row", type=float, metavar="X", help="mean of a row (that of the mixture)")
    parser.add_argument("--dry-run", action="store_true", help="run single ranks of the configuration's layout")
    parser.add_argument("--ranks", metavar="WHICH", help="of --dry-run: stages (one of each), or numbers such as 0,37")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw step times and memory")
    parser.add_argument("--published", action="store_true", help="show what is predicted for measured runs, and exit")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single keys")
    options = parser.parse_intermixed_args()
    if not options.published and not (options.config and options.cluster):
        parser.error("--config and --cluster are needed")
    if options.plot and (options.published or options.dry_run):
        parser.error("--plot draws a table of layouts: leave --published and --dry-run out")
    if options.ranks and not options.dry_run:
        parser.error("--ranks belongs to --dry-run")
    return options


def main() -> None:
    options = parse_arguments()
    hide_accelerators()  # ranks are played on the CPU, also where there is something else
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.published:
        published(options)
    else:
        plan(options, load_config(options.config, options.overrides))


def published(options: argparse.Namespace) -> None:
    from megatron_atum.planning.measured import measured_rows
    from megatron_atum.planning.published import validation_rows
    from megatron_atum.planning.report import validation_table

    check_json(options.json)
    rows = [*validation_rows(), *measured_rows()]
    print(validation_table(rows))
    found = [{"name": row.name, "error_percent": row.error, "binding": row.binding} for row in rows]
    finish({"rows": found}, options.json)


def plan(options: argparse.Namespace, config: Config) -> None:
    from megatron_atum.planning.cluster import load_cluster
    from megatron_atum.planning.plan import Planner
    from megatron_atum.planning.plot import check_plot

    cluster = load_cluster(options.cluster)
    images = images_of(config, options.images_per_row)
    if options.plot:
        check_plot(options.plot)
    check_json(options.json)
    planner = Planner(config, cluster, images, min(len(os.sched_getaffinity(0)), MOST_PROCESSES))
    rows = f"{config.training.global_batch_size} rows of {config.data.sequence_length} tokens"
    print(
        f"{cluster.name}: {cluster.nodes} x {cluster.devices_per_node} {cluster.device.name}; "
        f"{rows}, {images.mean:.1f} images in each"
    )
    found, refused = (dry_runs if options.dry_run else table)(options, planner)
    finish({"cluster": options.cluster, "config": options.config, **found}, options.json)
    if refused and (options.dry_run or options.layouts != "all"):
        raise ConfigError(f"the configuration's layout: {'; '.join(refused)}")


def check_json(file: Path | None) -> None:
    if file is not None and not file.parent.is_dir():
        raise ConfigError(f"--json {file}: there is no folder {file.parent}")
    if file is not None and file.is_dir():
        raise ConfigError(f"--json {file} is a folder; name a file in it")


def finish(found: dict[str, Any], file: Path | None) -> None:
    """The last line, and the same as a file."""
    line = json.dumps(found)
    print(line, flush=True)
    if file is not None:
        file.write_text(line + "\n")


def images_of(config: Config, mean: float | None) -> Images:
    """Args: mean: as it was given."""
    from megatron_atum.planning.mixture import OPTION, images_per_row
    from megatron_atum.planning.plan import Images

    most = max((source.max_images for source in config.data.sources), default=SourceConfig.max_images)
    if mean is None:
        mean = images_per_row(config)
    elif not 0 <= mean <= most:
        raise ConfigError(f"{OPTION} {mean:g} must be from 0 to {most}, the largest max_images of data.sources")
    return Images(mean, most)


def table(options: argparse.Namespace, planner: Planner) -> tuple[dict[str, Any], Sequence[str]]:
    """Prints the plan. Returns its JSON object, and why the configuration's layout cannot be used."""
    from megatron_atum.planning import report
    from megatron_atum.planning.rivals import explained, rivals

    began = time.perf_counter()
    chosen, refused = None, ""
    try:
        chosen = planner.chosen()
    except ConfigError as error:
        if options.layouts == "chosen":
            raise
        refused = str(error)
        print(f"the configuration's own layout is none of this cluster: {error}\n")
    rows = planner.rows(options.layouts, chosen)
    if not rows:
        raise ConfigError("no layout of this model and batch divides this cluster")
    schemes = rivals(planner.config, planner.cluster, planner.images.mean)
    original = explained(planner.config, planner.cluster, planner.images.mean)
    sections = [
        report.layout_table(rows, chosen),
        report.LEGEND,
        report.rival_table(schemes),
        report.words(chosen, rows, schemes, original, planner),
    ]
    print("\n\n".join(sections) + "\n")
    if options.plot:
        from megatron_atum.planning.plot import draw

        draw(rows, schemes, original, planner.cluster, options.plot)
    seconds = time.perf_counter() - began
    found = report.summary(chosen, rows, schemes, original, planner, seconds)
    return found, chosen.refused if chosen else [refused]


def dry_runs(options: argparse.Namespace, planner: Planner) -> tuple[dict[str, Any], Sequence[str]]:
    """The same for single ranks of the configuration's layout."""
    from megatron_atum.planning.report import dry_run_json, dry_run_text, kernel_remarks

    refused = [*planner.chosen(measured=False).refused]
    runs = planner.dry_runs(options.ranks or "stages")
    for run in runs:
        print(dry_run_text(run) + "\n")
        refused += planner.faults_of(run)
    for line in kernel_remarks(planner.config.kernels):
        print(f"{line}\n")
    return {"dry_runs": [dry_run_json(run) for run in runs]}, refused


if __name__ == "__main__":
    run_command("plan", main)
