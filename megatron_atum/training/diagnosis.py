"""What is kept of a step that was not applied: RUN/bad-steps/step-N.json, which tools/replay_batch.py repeats."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megatron_atum.batch import Batch
from megatron_atum.checkpoint.files import write_text
from megatron_atum.checkpoint.table import weight_table
from megatron_atum.checkpoint.weights import rows_of
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import DataError
from megatron_atum.training.engine import StepResult
from megatron_atum.training.health import Verdict

FOLDER = "bad-steps"
MOST_FILES = 100  # of a run: the last ones
_SHOWN = 10  # names at each end


def bad_parameters(stages: Iterable[nn.Module], model: ModelConfig) -> list[str]:
    """Hugging Face names of this rank's weights with a gradient that is not finite."""
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


def in_forward_order(names: Iterable[str], model: ModelConfig) -> list[str]:
    """Hugging Face names, each once, in the order in which a forward pass meets the weights.

    The order of ranks is another where pipeline stages are virtual, and so is that of the weight table, which has all
    gated cross-attention layers before all decoder layers.
    """
    wanted = set(names)
    rows = sorted(weight_table(model), key=lambda row: _depth(row.name, model))  # stable
    return [row.hf[0] for row in rows if row.hf[0] in wanted]


def _depth(name: str, model: ModelConfig) -> float:
    """Before, in, or behind the layers; a gated layer stands before the decoder layers of its unit."""
    kind, _, rest = name.partition(".")
    if kind == "decoder_layers":
        return int(rest.partition(".")[0])
    if kind == "cross_attention_layers":
        return int(rest.partition(".")[0]) * model.cross_layer_interval - 0.5
    return model.num_layers if kind in ("final_norm", "head") else -1.0


def diagnose(
    stages: Iterable[nn.Module], model: ModelConfig, batches: list[Batch], verdict: Verdict, result: StepResult
) -> dict[str, Any]:
    """Where it went wrong, as far as gradients and losses tell. Collective over all ranks.

    Backward carries what is not finite from where it arises to the input, through every part on the way. So
    `first_bad_part`, in the order of a forward pass, is mostly the model's first one that trains, and `last_bad_part`
    is where to look first: nothing behind it has seen it. What arises in the forward pass shows in the losses instead,
    and then all gradients from the head on are bad.

    Returns:
        the same on every rank: losses, the parts and weights with a gradient that is not finite, and the step's packs.
    """
    packs = [
        (int(pack), source)
        for batch in batches
        for pack, source in zip(batch.pack_ids.tolist(), batch.source, strict=True)
    ]
    mine = ([] if verdict.finite else bad_parameters(stages, model), packs)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    names = in_forward_order((name for bad, _ in everyone for name in bad), model)
    return {
        "reason": "spike" if verdict.finite else "not_finite",
        "losses": {name: repr(value) for name, value in result.losses.items()},  # JSON knows no NaN
        "grad_norm": repr(result.grad_norm),
        "spikes": [str(spike) for spike in verdict.spikes],
        "first_bad_part": part_of(names[0]) if names else None,
        "last_bad_part": part_of(names[-1]) if names else None,
        "bad_parameters": names if len(names) <= 2 * _SHOWN else [*names[:_SHOWN], *names[-_SHOWN:]],
        "packs": sorted({tuple(pack) for _, packs in everyone for pack in packs}),
    }


def write_bad_step(run_folder: Path, step: int, data_state: dict[str, Any], found: dict[str, Any]) -> Path:
    """The oldest make room, by their age: after a rollback steps are counted from a lower number.

    Args:
        data_state: of the loader before the step.
    """
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.json"
    write_text(path, json.dumps({"step": step, **found, "data": data_state}, indent=1))
    by_age = sorted(_kept(folder), key=lambda file: (file.stat().st_mtime_ns, file.name))
    for file in by_age[:-MOST_FILES]:
        file.unlink()
    return path


def _kept(folder: Path) -> list[Path]:
    """The bad steps there, without what replays of them have written."""
    return sorted(file for file in folder.glob("step-*.json") if not file.name.endswith(".replay.json"))


def read_bad_step(run_folder: Path, step: int) -> dict[str, Any]:
    """Raises DataError: there is none for this step."""
    path = run_folder / FOLDER / f"step-{step:08d}.json"
    try:
        content = json.loads(path.read_text())
        content["data"], content["packs"]
    except FileNotFoundError:
        there = ", ".join(file.stem for file in _kept(path.parent)) or "none"
        raise DataError(f"{path} does not exist; bad steps kept of this run: {there}") from None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error!r}") from None
    return content


def summary_of(found: dict[str, Any]) -> str:
    """One line for the log."""
    sources = sorted({source for _, source in found["packs"]})
    losses = ", ".join(f"{name} {value}" for name, value in found["losses"].items())
    spikes = f"; {'; '.join(found['spikes'])}" if found["spikes"] else ""
    return f"{losses}, grad norm {found['grad_norm']}{spikes}{_origin(found)}; packs of {', '.join(sources)}"


def _origin(found: dict[str, Any]) -> str:
    """Where the numbers stopped being finite, as far as it can be told."""
    first, last = found["first_bad_part"], found["last_bad_part"]
    if first is None:
        return ""
    if not all(math.isfinite(float(loss)) for loss in found["losses"].values()):
        return f"; arose in the forward pass, so gradients do not tell where (bad from {last} back to {first})"
    return f"; gradients bad from {last} back to {first}: look at {last} first"
