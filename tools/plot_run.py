"""Draw a run, or several over one another: loss, throughput, gates, norms, faults, restarts.

    python tools/plot_run.py runs/default
    python tools/plot_run.py runs/a runs/b --out comparison
    python tools/plot_run.py runs/demo          # all runs in a folder

Writes index.html, which holds everything and opens without a network, and each figure as a PNG beside it. Works while a
run is going on. Without --out they go to RUN/plots, or RUN/plots-with-OTHER for several runs.

Exit codes: 0 done, 2 runs that cannot be read or wrong use.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder, a folder of them, or a metrics.jsonl"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the page and the figures go")
    return parser.parse_args()


def main() -> None:
    from megatron_atum.training.plotting.plot import plot_runs

    options = parse_arguments()
    print(f"wrote {plot_runs(options.runs, options.out)}")


if __name__ == "__main__":
    from megatron_atum.checkpoint.command import run_command

    run_command("plot_run", main)
