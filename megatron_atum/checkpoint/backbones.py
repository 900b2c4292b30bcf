"""A first ATUM from a LLaMA and a CLIP in Hugging Face format: their weights, and drawn ones for the rest."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_atum.checkpoint.assets import read_assets
from megatron_atum.checkpoint.draw import Drawn
from megatron_atum.checkpoint.hf_config import from_hf, rope_theta, to_hf
from megatron_atum.checkpoint.hf_folder import HfFolder, check_dtypes, check_names
from megatron_atum.checkpoint.table import hf_shapes
from megatron_atum.checkpoint.tensor_file import converted
from megatron_atum.config.schema import ModelConfig, VisionConfig
from megatron_atum.errors import CheckpointError

_LLAMA_PREFIXES = ("model.embed_tokens.weight", "model.layers.", "model.norm.", "lm_head.weight")
_CLIP_PREFIX, _OUR_PREFIX = "vision_model.", "model.vision_model."


class Backbones:
    """The two folders and the rest of the model: a TensorSource, checked against what ATUM builds from them.

    Raises:
        CheckpointError: another kind of model, a part that ATUM does not build, or tensors that do not fit.
    """

    def __init__(
        self, llama: Path, clip: Path, base: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """Args:
        base: what the backbones do not say (added vocabulary, interval, perceiver, gates).
        seed, dtype: of the drawn weights; dtype of all of them.
        """
        with ExitStack() as opened:
            self.llama, self.clip = (opened.enter_context(HfFolder(folder, once=True)) for folder in (llama, clip))
            self.model = self._model(base)
            self._shapes = hf_shapes(self.model)
            self._check_tensors()
            self._opened = opened.pop_all()
        self._dtype, self._drawn = dtype, Drawn(self.model, seed)

    def __enter__(self) -> Backbones:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        holder = self._holder(name)
        if holder is None:
            # a copy, which does not keep the rest of the tensor
            return self._drawn.read(name, rows).to(self._dtype, copy=True)
        folder, key = holder
        return converted(folder.read(key, rows), self._dtype, f"{folder.path}: {key}")

    def assets(self) -> dict[str, bytes]:
        """LLaMA's tokenizer.model. Its other files do not know of images."""
        return {name: content for name, content in read_assets(self.llama.path).items() if name == "tokenizer.model"}

    def _model(self, base: ModelConfig) -> ModelConfig:
        _expect(self.llama, "model_type", "llama")
        _expect(self.clip, "model_type", "clip")
        try:
            model = replace(_with_llama(base, self.llama), vision=_vision(self.clip))
        except (KeyError, TypeError, ZeroDivisionError) as error:
            what = f"does not have the key {error}" if isinstance(error, KeyError) else f"has odd values: {error}"
            raise CheckpointError(f"config.json of {self.llama.path} or of {self.clip.path} {what}") from None
        from_hf(to_hf(model), f"{self.llama.path} and {self.clip.path}")  # refuses what does not go together
        return model

    def _check_tensors(self) -> None:
        where = f"{self.llama.path} and {self.clip.path}"
        held = {name: holder for name in self._shapes if (holder := self._holder(name)) is not None}
        check_names(where, self._found(), {name: self._shapes[name] for name in held})
        check_dtypes(where, {name: folder.dtype(key) for name, (folder, key) in held.items()})

    def _holder(self, name: str) -> tuple[HfFolder, str] | None:
        """Folder and key that hold one of our Hugging Face names; None: it is drawn."""
        if name.startswith(_OUR_PREFIX):
            return self.clip, name.removeprefix("model.")
        if name.startswith(_LLAMA_PREFIXES):
            tied = name == "lm_head.weight" and self.llama.config.get("tie_word_embeddings", False)
            return self.llama, "model.embed_tokens.weight" if tied else name
        return None

    def _found(self) -> dict[str, tuple[int, ...]]:
        """What the folders hold, by our names. CLIP's text tower and projections are left out knowingly."""
        shapes = {name: self.llama.shape(name) for name in self.llama.names()}
        if self.llama.config.get("tie_word_embeddings", False) and "model.embed_tokens.weight" in shapes:
            shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
        vision = {name for name in self.clip.names() if name.startswith(_CLIP_PREFIX)}
        return shapes | {f"model.{name}": self.clip.shape(name) for name in vision}


def _expect(folder: HfFolder, key: str, value: Any) -> None:
    if folder.config.get(key) != value:
        raise CheckpointError(f"{folder.path}/config.json: {key} is {folder.config.get(key)!r}, not {value!r}")


def _with_llama(base: ModelConfig, llama: HfFolder) -> ModelConfig:
    c = llama.config
    _expect(llama, "hidden_act", "silu")
    if c.get("num_key_value_heads", c["num_attention_heads"]) != c["num_attention_heads"]:
        raise CheckpointError(
            f"{llama.path}/config.json: num_key_value_heads={c['num_key_value_heads']}: grouped-query attention is "
            "not part of ATUM, every query head needs its own key head"
        )
    for key in ("attention_bias", "mlp_bias"):
        if c.get(key):
            raise CheckpointError(f"{llama.path}/config.json: {key} is set; ATUM's decoder has no biases")
    if c.get("head_dim") not in (None, c["hidden_size"] // c["num_attention_heads"]):
        raise CheckpointError(f"{llama.path}/config.json: head_dim={c['head_dim']} is not hidden_size / heads")
    return replace(
        base,
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        norm_eps=c["rms_norm_eps"],
        rope_theta=rope_theta(c, f"{llama.path}/config.json"),
        max_position_embeddings=c["max_position_embeddings"],
    )


def _vision(clip: HfFolder) -> VisionConfig:
    c = clip.config["vision_config"]
    return VisionConfig(
        embed_dim=c["hidden_size"],
        image_size=c.get("image_size", 224),
        patch_size=c.get("patch_size", 32),
        intermediate_size=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        num_layers=c["num_hidden_layers"],
        num_channels=c.get("num_channels", 3),
        norm_eps=c.get("layer_norm_eps", 1e-5),
        hidden_act=c.get("hidden_act", "quick_gelu"),
    )
