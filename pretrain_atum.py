"""Trains ATUM.

    torchrun --nproc-per-node 4 pretrain_atum.py --config examples/tiny/pretrain.yaml \\
        parallel.tensor=2 parallel.pipeline=2

Exit codes: 0 done, 2 bad configuration, data or checkpoint; anything else is a failure.
"""

import os
import sys
import time

from megatron_atum.config.cli import parse_arguments
from megatron_atum.errors import AtumError


def main() -> None:
    config = parse_arguments(__doc__ or "")
    # Imported only now: --help and --dry-run answer at once.
    from megatron_atum.parallel.groups import build_groups, start_distributed, stop_distributed
    from megatron_atum.training.start import environment, prepare_start
    from megatron_atum.training.trainer import Trainer

    start = prepare_start(config, *environment())
    start_distributed()
    groups = build_groups(start.layout, config.training.seed)
    Trainer(start, groups).fit()
    stop_distributed()


if __name__ == "__main__":
    try:
        main()
    except AtumError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:  # usually all ranks find the same mistake, and rank 0 tells it
            time.sleep(2)
        print(f"pretrain_atum: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # no tear-down: ranks may be in different places
