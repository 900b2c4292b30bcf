"""Runs a step again that was not applied: which row, and which weight's gradient, is at fault?

    python tools/replay_batch.py runs/NAME --step 120                      # list them: runs/NAME/bad-steps
    torchrun --nproc-per-node 8 tools/replay_batch.py runs/NAME --step 120 parallel.tensor=8

Reads runs/NAME/bad-steps/step-00000120.json, builds the same batch from the data, and the model from the newest
checkpoint before that step (or --checkpoint), at any layout. Nothing is written but
runs/NAME/bad-steps/step-00000120.replay.json. Rows are told by pack, source, loss, and the keys of their samples. Exit
code 0: the step is finite this time; 1: it is not; 2: it cannot be repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_atum.checkpoint.command import run_command
from megatron_atum.config.loader import load_config
from megatron_atum.errors import CheckpointError, ConfigError, listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--checkpoint", type=Path, help="weights; default: the run's newest before the step")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as another parallel.tensor")
    options = parser.parse_intermixed_args()
    found = replay(options.run, options.step, options.checkpoint, options.overrides)
    sys.exit(0 if found["finite"] else 1)


def replay(run: Path, step: int, checkpoint: Path | None, overrides: list[str]) -> dict[str, Any]:
    """Collective over all ranks that torchrun started. Raises AtumError."""
    from megatron_atum.parallel.determinism import be_deterministic
    from megatron_atum.parallel.groups import build_groups, start_distributed, stop_distributed
    from megatron_atum.training.diagnosis import read_bad_step
    from megatron_atum.training.replay import replay_step
    from megatron_atum.training.start import prepare_start

    bad = read_bad_step(run, step)
    config_file = run / "config.yaml"
    if not config_file.exists():
        raise ConfigError(f"{config_file} does not exist; give the run folder of the step")
    weights = checkpoint or _newest_before(run, step)
    fixed = [f"checkpoint.load={weights}", f"logging.root={run.parent}", f"logging.run={run.name}"]
    config = load_config(config_file, [*overrides, *fixed])
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    start = prepare_start(config, world_size, rank, goes_on=False)
    if config.training.deterministic:
        be_deterministic()
    start_distributed()
    found = replay_step(replace(start, rollbacks=()), build_groups(start.layout, config.training.seed), bad)
    if rank == 0:
        _show(found, weights)
        (run / "bad-steps" / f"step-{step:08d}.replay.json").write_text(json.dumps(found, indent=1) + "\n")
    stop_distributed()
    return found


def _newest_before(run: Path, step: int) -> Path:
    from megatron_atum.training.rollback import last_good

    found = last_good(run / "checkpoints", step)
    if found is None:
        raise CheckpointError(f"{run / 'checkpoints'} holds no complete checkpoint before step {step}; name one")
    return found


def _show(found: dict[str, Any], weights: Path) -> None:
    print(f"step {found['step']} with the weights of {weights}: loss {found['loss']}, grad norm {found['grad_norm']}")
    if found["bad_parameters"]:
        bad = found["bad_parameters"]
        print(f"{len(bad)} gradients are not finite, from {bad[-1]} (look there first) back to {bad[0]}")
    print(f"{'pack':>12}  {'source':<16}  {'loss':>10}  samples")
    for row in found["rows"]:
        print(f"{row['pack']:>12}  {row['source']:<16}  {row['loss']:>10}  {listed(row['keys'], 4)}")


if __name__ == "__main__":
    run_command("replay_batch", main)
