"""A run from its configuration to its exit code, on one rank."""

from __future__ import annotations

from pathlib import Path

from megatron_atum.config.schema import Config
from megatron_atum.errors import AtumError, DataFailure, HealthFailure, RankFailure
from megatron_atum.parallel.determinism import be_deterministic
from megatron_atum.parallel.groups import build_groups, keep_flight_record, start_distributed, stop_distributed
from megatron_atum.parallel.liveness import Liveness
from megatron_atum.training.requests import Requests
from megatron_atum.training.start import confirm_start, prepare_start
from megatron_atum.training.trainer import Trainer


def train(config: Config, world_size: int, rank: int) -> int:
    """
    Returns:
        exit code: 0, or 85 after a signal.

    Raises:
        AtumError: a mistake that the user can mend.
        DataFailure, HealthFailure: on all ranks.
        RankFailure: something failed here, or a collective because another rank died or hangs; it says which.
    """
    run_folder = Path(config.logging.root) / config.logging.run
    with Requests(run_folder, rank) as requests:
        return _train(config, world_size, rank, requests)


def _train(config: Config, world_size: int, rank: int, requests: Requests) -> int:
    start = prepare_start(config, world_size, rank)
    if config.training.deterministic:
        be_deterministic()
    keep_flight_record(start.run_folder / "logs")
    timeout_s = config.health.start_timeout_s
    start_distributed(timeout_s)
    liveness = Liveness(timeout_s, "health.start_timeout_s")
    try:
        groups = build_groups(start.layout, config.training.seed, timeout_s)
        start = confirm_start(start, rank)
        liveness.beat()
        code = Trainer(start, groups, liveness, requests).fit()
        liveness.stop()
        stop_distributed()
    except (AtumError, DataFailure, HealthFailure) as error:  # usually on all ranks; if not, the others learn of it
        liveness.failed(error)
        raise
    except Exception as error:
        raise RankFailure(liveness.last_words(error)) from error
    return code
