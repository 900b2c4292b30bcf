"""Trains ATUM.

    torchrun --nproc-per-node 4 pretrain_atum.py --config examples/tiny/pretrain.yaml \\
        parallel.tensor=2 parallel.pipeline=2

Exit codes: 0 done, or stopped by RUN/stop; 2 bad configuration, data or checkpoint; 3 numbers or weights are such that
somebody must look before it goes on; 85 stopped by SIGTERM or SIGUSR1 after a complete checkpoint: start it again to go
on; anything else is a failure.
"""

import os
import sys
import time
import traceback

from megatron_atum.config.cli import parse_arguments
from megatron_atum.config.loader import to_yaml
from megatron_atum.data.mixture import check_weights
from megatron_atum.errors import AtumError, DataFailure, HealthFailure, report_failure
from megatron_atum.launch.environment import prepare
from megatron_atum.launch.sagemaker import arguments, kept
from megatron_atum.launch.slurm import rank_variables
from megatron_atum.parallel.layout import ParallelLayout


def main() -> int:
    config, dry_run = parse_arguments(__doc__ or "", arguments(sys.argv[1:]))
    check_weights(config.data.sources, config.data.mixture)
    os.environ.update(kept(os.environ))
    os.environ.update(rank_variables(os.environ))  # of torchrun's workers there are some already
    notes = prepare(os.environ)  # of this rank
    world_size, rank = number("WORLD_SIZE", 1), number("RANK", 0)
    if dry_run:
        if "WORLD_SIZE" in os.environ:
            ParallelLayout.from_config(config, world_size)
        if rank == 0:
            print(to_yaml(config), end="")
        return 0
    for note in notes:
        print(f"environment: {note}", flush=True)
    # Imported only now: --help and --dry-run answer at once, and torch starts in the environment prepared above.
    from megatron_atum.training.run import train

    return train(config, world_size, rank)


def number(variable: str, default: int) -> int:
    return int(os.environ.get(variable, default))


def leave(error: Exception, code: int) -> None:
    """No tear-down: ranks may be in different places."""
    if number("RANK", 0):  # usually all ranks find the same, and rank 0 tells it
        time.sleep(2)
    print(f"pretrain_atum: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    report_failure(f"{type(error).__name__}: {error}", os.environ)
    os._exit(code)


if __name__ == "__main__":
    try:
        exit_code = main()
    except AtumError as error:
        leave(error, 2)
    except HealthFailure as error:
        leave(error, 3)
    except DataFailure as error:
        leave(error, 1)
    except Exception as error:  # of this rank alone, or of a collective that another rank fell out of
        traceback.print_exc()
        leave(error, 1)
    if exit_code:
        sys.exit(exit_code)
