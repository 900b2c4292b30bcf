"""Checks of values that do not depend on the number of processes (for those: parallel/layout.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_atum.config.schema import FILTERS, Config, SourceConfig
from megatron_atum.config.suggest import unknown
from megatron_atum.errors import ConfigError

ALPHA_TYPES = ("float", "vector")
VISION_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh")
_CHOICES = {
    "model.alpha_type": ALPHA_TYPES,
    "model.vision.hidden_act": VISION_ACTIVATIONS,
    "training.precision": ("auto", "bf16", "fp32"),
    "training.loss_normalization": ("tokens", "idefics"),
    "training.recompute": ("none", "selective", "full"),
    "training.recompute_method": ("uniform", "block"),
    "optimizer.schedule": ("linear", "cosine", "constant", "wsd"),
    "optimizer.wsd_style": ("linear", "cosine", "exponential", "minus_sqrt"),
    "optimizer.weight_decay_rule": ("idefics", "clean"),
    "kernels.backend": ("torch", "te"),
    "kernels.frozen_gemm": ("bf16", "fp8"),
    "kernels.adam": ("torch", "te", "apex"),
    "data.mixture": ("published", "draft_card", "instruct", "by_tokens"),
    "data.loss_on": ("all", "assistant"),
    "health.spike": ("log", "skip_data", "rollback"),
    "health.dry_step": ("auto", "always", "never"),
    "logging.wandb": ("disabled", "offline", "online"),
    "data.on_missing_shard": ("stop", "skip"),
    "data.on_change": ("error", "restart", "continue"),
}
_POSITIVE = (
    "model.vocab_size",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_layers",
    "model.num_heads",
    "model.max_position_embeddings",
    "model.cross_layer_interval",
    "model.vision.embed_dim",
    "model.vision.image_size",
    "model.vision.patch_size",
    "model.vision.intermediate_size",
    "model.vision.num_heads",
    "model.vision.num_layers",
    "model.vision.num_channels",
    "model.perceiver.depth",
    "model.perceiver.num_heads",
    "model.perceiver.head_dim",
    "model.perceiver.num_latents",
    "data.sequence_length",
    "data.shuffle_samples",
    "data.validation_packs",
    "training.steps",
    "training.recompute_layers",
    "optimizer.decay_steps",
    "health.max_bad_steps",
    "health.spike_window",
    "health.spike_steps",
    "logging.every",
    "logging.profile_steps",
)
_NOT_NEGATIVE = (
    "model.additional_vocab_size",
    "data.workers",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "optimizer.wsd_steps",
    "training.z_loss",
    "training.validate_every",
    "health.max_rollbacks",
    "health.rollback_skip",
    "health.checksum_every",
    "logging.detail_every",
    "logging.profile_start",
    "checkpoint.save_every",
    "checkpoint.keep",
    "checkpoint.keep_every",
)
_RANGES = {  # key: lowest, highest, what is said of them
    "data.p_next": (0.0, 1.0, "from 0 to 1"),
    "data.image_at_end": (0.0, 1.0, "from 0 to 1"),
    "data.max_fault_rate": (0.0, 1.0, "from 0 to 1"),
    "optimizer.beta1": (0.0, 0.9999999, "from 0 to below 1"),
    "optimizer.beta2": (0.0, 0.9999999, "from 0 to below 1"),
    "optimizer.lr": (0.0, float("inf"), "not negative"),
    "optimizer.min_lr": (0.0, float("inf"), "not negative"),
    "optimizer.eps": (1e-30, float("inf"), "above 0"),
    "model.norm_eps": (1e-30, float("inf"), "above 0"),
    "model.vision.norm_eps": (1e-30, float("inf"), "above 0"),
    "model.rope_theta": (1e-30, float("inf"), "above 0"),
    "health.spike_threshold": (1e-30, float("inf"), "above 0"),
    "health.rollback_lr_scale": (1e-30, 1.0, "above 0 and at most 1"),
    "health.start_timeout_s": (1.0, 1e9, "at least 1"),
    "health.step_timeout_s": (1.0, 1e9, "at least 1"),
}
_FREEZE_EXCEPTIONS = ("LayerNorm", "Linear", "Embedding")


def validate(config: Config) -> None:
    """Raises ConfigError naming the first key with a value that cannot work."""
    for key, choices in _CHOICES.items():
        if _get(config, key) not in choices:
            raise ConfigError(unknown(key, str(_get(config, key)), choices))
    for key in _POSITIVE:
        if _get(config, key) <= 0:
            raise ConfigError(f"{key}={_get(config, key)}: must be at least 1")
    for key in _NOT_NEGATIVE:
        if _get(config, key) < 0:
            raise ConfigError(f"{key}={_get(config, key)}: must not be negative")
    for key, (lowest, highest, text) in _RANGES.items():
        if not lowest <= _get(config, key) <= highest:
            raise ConfigError(f"{key}={_get(config, key)}: must be {text}")
    _check_model(config)
    _check_optimizer(config)
    _check_ramp_up(config)
    _check_sources(config)
    _check_health(config)
    _check_frozen_gemm(config)


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _multiple(key: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        fit = max(divisor, value // divisor * divisor)
        raise ConfigError(f"{key}={value} is not a multiple of {of}={divisor}; {key}={fit} would work")


def _check_model(config: Config) -> None:
    m = config.model
    if m.vision.num_channels != 3:
        raise ConfigError(f"model.vision.num_channels={m.vision.num_channels}: images have 3 channels; 3 would work")
    # rotary embeddings need an even head width
    _multiple("model.hidden_size", m.hidden_size, "2 x model.num_heads", 2 * m.num_heads)
    _multiple("model.vision.embed_dim", m.vision.embed_dim, "model.vision.num_heads", m.vision.num_heads)
    for key, names in (("text", m.freeze.text_exceptions), ("vision", m.freeze.vision_exceptions)):
        _known(f"model.freeze.{key}_exceptions", names, _FREEZE_EXCEPTIONS)
    if config.data.sequence_length > m.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} exceeds "
            f"model.max_position_embeddings={m.max_position_embeddings}; "
            f"data.sequence_length={m.max_position_embeddings} would work"
        )


def _known(key: str, names: Iterable[str], choices: tuple[str, ...]) -> None:
    for name in names:
        if name not in choices:
            raise ConfigError(unknown(key, name, choices))


def _check_optimizer(config: Config) -> None:
    o = config.optimizer
    if o.overlap_param_gather and not (o.distributed and o.overlap_grad_reduce):
        raise ConfigError(
            "optimizer.overlap_param_gather=true needs optimizer.distributed=true and "
            "optimizer.overlap_grad_reduce=true"
        )
    if o.min_lr > o.lr:
        raise ConfigError(f"optimizer.min_lr={o.min_lr} is above optimizer.lr={o.lr}; optimizer.min_lr=0.0 would work")
    if o.warmup_steps >= o.decay_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={o.warmup_steps} is not below optimizer.decay_steps={o.decay_steps}; "
            f"optimizer.warmup_steps={o.decay_steps // 10} would work"
        )
    longest = o.decay_steps - o.warmup_steps
    if o.schedule == "wsd" and not 1 <= o.wsd_steps <= longest:
        raise ConfigError(
            f"optimizer.wsd_steps={o.wsd_steps}: the fall of optimizer.schedule=wsd lies between "
            f"optimizer.warmup_steps={o.warmup_steps} and optimizer.decay_steps={o.decay_steps} and takes 1 to "
            f"{longest} steps; "
            f"optimizer.wsd_steps={min(longest, max(1, o.decay_steps // 10))} would work"
        )
    for place, group in enumerate(o.groups):
        for name in ("lr_scale", "weight_decay_scale"):
            value = getattr(group, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"optimizer.groups[{place}].{name}={value}: must not be negative")


def _check_ramp_up(config: Config) -> None:
    """Whether its sizes can be dealt to the ranks is seen by parallel/layout.py."""
    ramp, final = config.training.ramp_up, config.training.global_batch_size
    if not ramp.start:
        return
    for name in ("start", "increment", "rows"):
        if getattr(ramp, name) < 1:
            raise ConfigError(f"training.ramp_up.{name}={getattr(ramp, name)}: must be at least 1")
    if ramp.start >= final:
        raise ConfigError(
            f"training.ramp_up.start={ramp.start} is not below training.global_batch_size={final}; "
            "training.ramp_up.start=0 would work (no ramp-up)"
        )
    if (final - ramp.start) % ramp.increment:
        most = min(ramp.increment, final - ramp.start)
        fit = next(size for size in range(most, 0, -1) if (final - ramp.start) % size == 0)
        raise ConfigError(
            f"training.ramp_up.increment={ramp.increment} does not lead from training.ramp_up.start={ramp.start} to "
            f"training.global_batch_size={final}; training.ramp_up.increment={fit} would work"
        )


def _check_health(config: Config) -> None:
    if config.health.spike == "rollback" and not config.checkpoint.save_every:
        raise ConfigError("health.spike=rollback needs checkpoints to go back to; checkpoint.save_every=250 would work")
    if config.training.validate_every and not config.data.validation:
        raise ConfigError(
            f"training.validate_every={config.training.validate_every} needs data.validation: name a held-out source; "
            "training.validate_every=0 would work"
        )


_FP8_SIDES = 16  # of a matrix: what 8-bit products of GPUs take
_TE_FP8_ROWS = 8  # of each rank's activations


def _check_frozen_gemm(config: Config) -> None:
    """Whether a GPU has such products is seen by model/frozen_gemm.py."""
    m = config.model
    if config.kernels.frozen_gemm != "fp8":
        return
    text = m.freeze.text and "Linear" not in m.freeze.text_exceptions
    if text and config.kernels.backend == "te":
        _check_te_rows(config)
    split = _FP8_SIDES * config.parallel.tensor
    sides = [("model.hidden_size", m.hidden_size, split), ("model.intermediate_size", m.intermediate_size, split)]
    if not text:
        sides = []
    if m.freeze.vision and "Linear" not in m.freeze.vision_exceptions:
        sides.append(("model.vision.embed_dim", m.vision.embed_dim, _FP8_SIDES))
        sides.append(("model.vision.intermediate_size", m.vision.intermediate_size, _FP8_SIDES))
    for key, value, divisor in sides:
        if value % divisor:
            raise ConfigError(
                f"kernels.frozen_gemm=fp8 needs matrices with sides of multiples of {_FP8_SIDES}, and {key}={value} is "
                f"not a multiple of {divisor}; kernels.frozen_gemm=bf16 would work"
            )


def _check_te_rows(config: Config) -> None:
    """Transformer Engine's 8-bit products take rows in multiples of 8. (Torch's take any number.)"""
    sequence, tensor = config.data.sequence_length, config.parallel.tensor
    rows = config.training.micro_batch_size * sequence
    divisor = _TE_FP8_ROWS * (tensor if config.parallel.sequence else 1)
    if rows % divisor:
        raise ConfigError(
            f"kernels.frozen_gemm=fp8 with kernels.backend=te needs training.micro_batch_size x data.sequence_length "
            f"in multiples of {divisor}, and data.sequence_length={sequence} makes it {rows}; "
            "kernels.frozen_gemm=bf16 would work"
        )


def _check_sources(config: Config) -> None:
    data = config.data
    _known("data.filters", data.filters, FILTERS)
    names = [source.name for source in [*data.sources, *data.validation]]
    for section, sources in (("sources", data.sources), ("validation", data.validation)):
        for place, source in enumerate(sources):
            _check_source(f"data.{section}[{place}]", source, config.model.additional_vocab_size)
            if names.count(source.name) > 1:
                raise ConfigError(
                    f"data.{section}[{place}].name={source.name!r} is used twice; sources need names of their own"
                )
    held_out = {source.shards for source in data.validation}
    for place, source in enumerate(data.sources):
        if source.shards in held_out:
            raise ConfigError(
                f"data.sources[{place}].shards={source.shards} is also under data.validation; hold it out"
            )


def _check_source(key: str, source: SourceConfig, added_tokens: int) -> None:
    _known(f"{key}.kind", [source.kind], ("documents", "pairs", "conversations"))
    if source.kind == "conversations" and added_tokens < 3:
        raise ConfigError(
            f"model.additional_vocab_size={added_tokens} has no row for <end_of_utterance>, which {key} "
            f"({source.name}) needs; model.additional_vocab_size=3 would work"
        )
    _known(f"{key}.filters", source.filters or [], FILTERS)
    for name in ("weight", "epochs"):
        value = getattr(source, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{key}.{name}={value}: must be above 0")
    if source.max_images < 1:
        raise ConfigError(f"{key}.max_images={source.max_images}: must be at least 1")
