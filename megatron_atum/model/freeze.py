"""Which parameters train. HF modeling_idefics.py: IdeficsModel.freeze_relevant_params, freeze_model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from megatron_atum.config.schema import FreezeConfig
from megatron_atum.model.layer_classes import TORCH, LayerClasses
from megatron_atum.model.norm import LayerNorm

# The module kinds an exception can name. RMSNorm is not a LayerNorm there either, so "LayerNorm" frees nothing in
# the text model; the class embedding and the patch convolution are of none of these kinds.
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "LayerNorm": (LayerNorm,),
    "Linear": (TORCH.column, TORCH.row),
    "Embedding": (),  # parameters named in _EMBEDDINGS
}
_EMBEDDINGS = ("position_embedding",)


def freeze(stage: nn.Module, config: FreezeConfig, classes: LayerClasses = TORCH) -> None:
    """Set `requires_grad` on every parameter of a stage. Cross-attention, perceiver and added rows always train.

    `vision.post_layernorm` never does: nothing uses its output.

    Args:
        classes: of the decoder layers.
    """
    kinds = {**_KINDS, "Linear": (TORCH.column, TORCH.row, classes.column, classes.row)}
    if config.text:
        for name in ("decoder_layers", "final_norm"):
            _freeze_module(getattr(stage, name, None), config.text_exceptions, kinds)
        _freeze_module(_at(stage, "embedding", "base"), ())
    if config.vision:
        _freeze_module(getattr(stage, "vision", None), config.vision_exceptions)
    if config.lm_head:
        _freeze_module(_at(stage, "head", "base"), ())
    _freeze_module(_at(stage, "vision", "post_layernorm"), ())


def _at(module: nn.Module, *names: str) -> nn.Module | None:
    for name in names:
        if not hasattr(module, name):
            return None
        module = getattr(module, name)
    return module


def _freeze_module(
    module: nn.Module | None, exceptions: Iterable[str], kinds: Mapping[str, tuple[type[nn.Module], ...]] = _KINDS
) -> None:
    if module is None:
        return
    module.requires_grad_(False)
    trained = tuple(kind for name in exceptions for kind in kinds[name])
    for part in module.modules():
        if isinstance(part, trained):
            part.requires_grad_(True)
    if "Embedding" in exceptions:
        for name in _EMBEDDINGS:
            if hasattr(module, name):
                getattr(module, name).requires_grad_(True)
