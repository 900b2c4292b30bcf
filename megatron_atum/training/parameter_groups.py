"""Which weights train, which of them decay, and which have a learning rate of their own.

All of it is decided by the weight table, before any process group or model exists, and by Hugging Face names: the
original decided by them as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_atum.checkpoint.table import Weight, weight_table
from megatron_atum.config.schema import Config, FreezeConfig, OptimizerConfig, ParameterGroupConfig
from megatron_atum.config.suggest import unknown
from megatron_atum.errors import ConfigError

# m4 trainer.py: _configure_optimizer_and_scheduler. No decay where the Hugging Face name contains one of these. So the
# whole perceiver has none, and `model.norm.weight` and `pre_layrnorm.weight` (spelt so) have some.
NO_DECAY = ("bias", "alpha", "layernorm", "ln", "perceiver_resampler", "layer_norm")


@dataclass(frozen=True)
class Settings:
    """What the optimizer does with a weight: factors on optimizer.lr (and min_lr) and on optimizer.weight_decay."""

    lr_scale: float
    decay_scale: float


def trains(row: Weight, freeze: FreezeConfig) -> bool:
    """Whether a weight trains; says of the weight table what model/freeze.py does to modules."""
    part = row.name.split(".")[0]
    if not row.backbone:
        return True
    if row.name.startswith("vision.post_layernorm."):
        return False
    if part == "vision":
        return not freeze.vision or _kind(row) in freeze.vision_exceptions
    if part == "decoder_layers":
        return not freeze.text or (_kind(row) == "Linear" and "Linear" in freeze.text_exceptions)
    return not (freeze.lm_head if part == "head" else freeze.text)


def decays(row: Weight, rule: str) -> bool:
    """Whether weight decay applies to a weight.

    Args:
        rule: `idefics`: the original's list of name parts | `clean`: matrices of projections and embeddings; no
            biases, norms, gates, latents, class or position embeddings.
    """
    if rule == "clean":
        return row.name.endswith(".weight") and len(row.shapes[0]) > 1
    parts = {not any(word in name for word in NO_DECAY) for name in row.hf}
    assert len(parts) == 1, f"the rule divides {row.name}, which is one tensor here: {row.hf}"
    return parts.pop()


def settings(row: Weight, config: OptimizerConfig) -> Settings:
    """The first of optimizer.groups that matches counts. All parts of the row match the same one (`check_groups`)."""
    number = _group_of(row.hf[0], config.groups)
    decay = float(decays(row, config.weight_decay_rule))
    if number is None:
        return Settings(1.0, decay)
    group = config.groups[number]
    return Settings(group.lr_scale, decay if group.weight_decay_scale is None else group.weight_decay_scale)


def matches_of(lr_scale: float, config: OptimizerConfig) -> tuple[str, ...]:
    """The patterns of optimizer.groups with a learning rate of their own that is this multiple of optimizer.lr."""
    return tuple(group.match for group in config.groups if group.lr_scale == lr_scale != 1.0)


def check_groups(config: Config) -> None:
    """Every pattern of optimizer.groups has weights, and none divides a matrix that is stored as one.

    Raises:
        ConfigError: naming the pattern, and the weights it leaves out or a name near to it.
    """
    groups, freeze = config.optimizer.groups, config.model.freeze
    table = weight_table(config.model)
    used = {_whole_group_of(row, groups) for row in table if trains(row, freeze)}
    for number in range(len(groups)):
        if number not in used:
            raise ConfigError(_why_unused(number, groups, table, freeze))


def _group_of(name: str, groups: Iterable[ParameterGroupConfig]) -> int | None:
    return next((number for number, group in enumerate(groups) if fnmatchcase(name, group.match)), None)


def _whole_group_of(row: Weight, groups: list[ParameterGroupConfig]) -> int | None:
    found = [_group_of(name, groups) for name in row.hf]
    if len(set(found)) == 1:
        return found[0]
    number = min(n for n in found if n is not None)
    theirs = [name for name, n in zip(row.hf, found, strict=True) if n == number]
    others = [name for name, n in zip(row.hf, found, strict=True) if n != number]
    raise ConfigError(
        f"{_key(number)}={groups[number].match!r} takes {', '.join(theirs)} without {', '.join(others)}; these are "
        "one matrix here and share a group, so match all of them or none"
    )


def _why_unused(number: int, groups: list[ParameterGroupConfig], table: list[Weight], freeze: FreezeConfig) -> str:
    match = groups[number].match
    training = [name for row in table if trains(row, freeze) for name in row.hf]
    taken = {_group_of(name, groups) for name in training if fnmatchcase(name, match)}
    if taken:
        first = min(n for n in taken if n is not None)
        return f"{_key(number)}={match!r}: optimizer.groups[{first}] stands before it and takes all of its weights"
    if any(fnmatchcase(name, match) for row in table for name in row.hf):
        return f"{_key(number)}={match!r} matches frozen weights only; see model.freeze"
    return f"{unknown(_key(number), match, _patterns(training))} (no weight that trains has such a name)"


def _patterns(names: list[str]) -> list[str]:
    """What someone may have meant: the names, and everything below each module."""
    modules = {name[:end] for name in names for end, letter in enumerate(name) if letter == "."}
    return [*names, *(f"{module}.*" for module in sorted(modules))]


def _key(number: int) -> str:
    return f"optimizer.groups[{number}].match"


def _kind(row: Weight) -> str:
    """The name that an exception of model.freeze has for the module of a backbone's weight."""
    if ".linear_" in row.name:
        return "Linear"
    if row.name.split(".")[-2].endswith("norm"):
        return "LayerNorm"
    return "Embedding" if row.name.endswith("position_embedding") else ""
