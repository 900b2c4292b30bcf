"""What is kept of a step that was not applied: RUN/bad-steps/step-N.json, which tools/replay_batch.py repeats."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megatron_atum.batch import Batch
from megatron_atum.checkpoint.files import write_text
from megatron_atum.checkpoint.weights import rows_of
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import DataError
from megatron_atum.training.engine import StepResult
from megatron_atum.training.health import Verdict

FOLDER = "bad-steps"
MOST_FILES = 100  # of a run
_SHOWN = 20


def bad_parameters(stages: Iterable[nn.Module], model: ModelConfig) -> list[str]:
    """Hugging Face names of this rank's weights with a gradient that is not finite, in the order of the model."""
    return [
        row.hf[0]
        for row, parameter in rows_of(stages, model)
        if parameter.requires_grad and not bool(_gradient(parameter).isfinite().all())
    ]


def _gradient(parameter: Any) -> Tensor:
    return parameter.main_grad


def part_of(name: str) -> str:
    """The layer or module that a weight belongs to: what stands before the weight's own place in it.

    >>> part_of("model.gated_cross_attn_layers.3.mlp.down_proj.weight")
    'model.gated_cross_attn_layers.3'
    """
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ".".join(parts[:2])


def diagnose(
    stages: Iterable[nn.Module], model: ModelConfig, batches: list[Batch], verdict: Verdict, result: StepResult
) -> dict[str, Any]:
    """Where it went wrong, as far as gradients and losses tell. Collective over all ranks.

    Returns:
        the same on every rank: losses, the first part with a gradient that is not finite, and the step's packs.
    """
    packs = [
        (int(pack), source)
        for batch in batches
        for pack, source in zip(batch.pack_ids.tolist(), batch.source, strict=True)
    ]
    mine = ([] if verdict.finite else bad_parameters(stages, model), packs)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    names = [name for bad, _ in everyone for name in bad]  # ranks of earlier stages come first
    first = names[0] if names else None
    return {
        "reason": "spike" if verdict.finite else "not_finite",
        "losses": {name: repr(value) for name, value in result.losses.items()},  # JSON knows no NaN
        "grad_norm": repr(result.grad_norm),
        "spikes": [str(spike) for spike in verdict.spikes],
        "first_bad_part": part_of(first) if first else None,
        "bad_parameters": list(dict.fromkeys(names))[:_SHOWN],
        "packs": sorted({tuple(pack) for _, packs in everyone for pack in packs}),
    }


def write_bad_step(run_folder: Path, step: int, data_state: dict[str, Any], found: dict[str, Any]) -> Path:
    """Args: data_state: of the loader before the step."""
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.json"
    if len(list(folder.iterdir())) < MOST_FILES:
        write_text(path, json.dumps({"step": step, **found, "data": data_state}, indent=1))
    return path


def read_bad_step(run_folder: Path, step: int) -> dict[str, Any]:
    """Raises DataError: there is none for this step."""
    path = run_folder / FOLDER / f"step-{step:08d}.json"
    try:
        content = json.loads(path.read_text())
        content["data"], content["packs"]
    except FileNotFoundError:
        there = ", ".join(sorted(file.stem for file in path.parent.glob("step-*.json"))) or "none"
        raise DataError(f"{path} does not exist; bad steps kept of this run: {there}") from None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error!r}") from None
    return content


def summary_of(found: dict[str, Any]) -> str:
    """One line for the log."""
    sources = sorted({source for _, source in found["packs"]})
    losses = ", ".join(f"{name} {value}" for name, value in found["losses"].items())
    where = f"; first bad gradient in {found['first_bad_part']}" if found["first_bad_part"] else ""
    spikes = f"; {'; '.join(found['spikes'])}" if found["spikes"] else ""
    return f"{losses}, grad norm {found['grad_norm']}{spikes}{where}; packs of {', '.join(sources)}"
