"""Trains ATUM.

    torchrun --nproc-per-node 4 pretrain_atum.py --config examples/tiny/pretrain.yaml \\
        parallel.tensor=2 parallel.pipeline=2

Exit codes: 0 done, 2 bad configuration, data or checkpoint; anything else is a failure.
"""

import os
import sys
import time

from megatron_atum.config.cli import parse_arguments
from megatron_atum.config.loader import to_yaml
from megatron_atum.data.mixture import check_weights
from megatron_atum.errors import AtumError
from megatron_atum.parallel.layout import ParallelLayout

WORLD_SIZE, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))  # as torchrun sets them


def main() -> None:
    config, dry_run = parse_arguments(__doc__ or "")
    check_weights(config.data.sources, config.data.mixture)
    if dry_run:
        if "WORLD_SIZE" in os.environ:
            ParallelLayout.from_config(config, WORLD_SIZE)
        if RANK == 0:
            print(to_yaml(config), end="")
        return
    # Imported only now: --help and --dry-run answer at once.
    from megatron_atum.parallel.groups import build_groups, start_distributed, stop_distributed
    from megatron_atum.training.start import confirm_start, prepare_start
    from megatron_atum.training.trainer import Trainer

    start = prepare_start(config, WORLD_SIZE, RANK)
    start_distributed()
    groups = build_groups(start.layout, config.training.seed)
    Trainer(confirm_start(start, RANK), groups).fit()
    stop_distributed()


if __name__ == "__main__":
    try:
        main()
    except AtumError as error:
        if RANK:  # usually all ranks find the same mistake, and rank 0 tells it
            time.sleep(2)
        print(f"pretrain_atum: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # no tear-down: ranks may be in different places
