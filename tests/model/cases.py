"""Random small IDEFICS models and inputs, with Hugging Face's logits and gradients for them.

All of it is computed in the parent process and handed to the ranks in a file: the ranks know nothing of
transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_atum.batch import NO_IMAGE, Batch, position_ids_from_mask, shift_labels

VOCAB = 97  # odd, so that the padded vocabulary differs from it under tensor parallelism


@dataclass(frozen=True)
class Case:
    """One configuration and the shape of its inputs. Three microbatches, the images spread unevenly over them."""

    name: str
    seed: int
    heads: int = 4
    layers: int = 4
    interval: int = 2
    added: int = 2
    eps: float = 1e-6
    alpha_type: str = "float"
    qk_norm: bool = True
    perceiver_qk_norm: bool = True
    latents: int = 3
    image_size: int = 8
    pixels: tuple[int, int] | None = None  # other than image_size: interpolated positions
    rows: int = 2
    length: int = 16
    padding: str = "right"  # none | left | right
    images: tuple[tuple[int, ...], ...] = ((2, 0), (1, 3), (0, 0), (1, 1))  # per microbatch and row
    several_images: bool = False  # tokens that see more than one image
    frozen: bool = False
    small_norm_inputs: bool = True  # makes a wrong epsilon show, and steep gradients


CASES = [
    Case("released_form", 1),
    Case("vector_gates_no_qk_norm", 2, alpha_type="vector", qk_norm=False, perceiver_qk_norm=False, eps=1e-5),
    Case("interval_1_no_added_words", 3, interval=1, added=0, layers=4),
    Case("interval_4_instruct_vocabulary", 4, interval=4, layers=16, added=3, frozen=True),
    Case("left_padding", 5, padding="left", eps=1e-5),
    Case("many_images", 6, images=((5, 7), (0, 9), (4, 0), (6, 6)), length=24, latents=5),
    Case("text_only", 7, images=((0, 0),) * 4, frozen=True),
    Case("one_image_one_row", 8, rows=1, images=((1,), (0,), (1,), (2,)), padding="none", alpha_type="vector"),
    Case("several_images_per_token", 9, several_images=True, padding="left", latents=2),
    Case("other_image_size", 10, image_size=12, latents=4, rows=3, images=((1, 0, 2), (0, 3, 0), (1, 1, 1), (0, 0, 4))),
    Case("interpolated_positions", 11, pixels=(12, 12), frozen=True),
    Case("frozen_pretraining", 12, frozen=True, images=((2, 1), (0, 0), (3, 1), (1, 0))),
    Case(
        "eight_heads_wide_batch", 13, heads=8, rows=4, images=((1, 0, 2, 1), (0, 0, 0, 0), (1, 1, 0, 0), (0, 2, 0, 1))
    ),
]


def hf_config(case: Case) -> dict[str, Any]:
    """Keyword arguments of transformers' IdeficsConfig."""
    return {
        "vocab_size": VOCAB,
        "additional_vocab_size": case.added,
        "hidden_size": 8 * case.heads,
        "intermediate_size": 48,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "rms_norm_eps": case.eps,
        "cross_layer_interval": case.interval,
        "qk_layer_norms": case.qk_norm,
        "alpha_type": case.alpha_type,
        "use_resampler": True,
        "tie_word_embeddings": False,
        "freeze_text_layers": case.frozen,
        "freeze_vision_layers": case.frozen,
        "freeze_lm_head": case.frozen,
        "vision_config": {
            "embed_dim": 16,
            "image_size": case.image_size,
            "patch_size": 4,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
        },
        "perceiver_config": {
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 12,
            "resampler_n_latents": case.latents,
            "qk_layer_norms_perceiver": case.perceiver_qk_norm,
        },
    }


def randomise(state: dict[str, Tensor], seed: int, small_norm_inputs: bool) -> None:
    """Weights with moderate gains, gates and biases that are not zero, and some small norm inputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "alpha" in name:
            tensor.copy_(0.4 + 0.3 * noise)
        elif "norm" in name or ".ln." in name:
            tensor.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * noise)
        elif name.endswith("bias"):
            tensor.copy_(0.1 * noise)
        elif "embed_tokens" in name:
            small = (torch.arange(tensor.shape[0]) % 3 == 0) & small_norm_inputs
            tensor.copy_(noise * torch.where(small, 2e-3, 0.7)[:, None])
        else:
            fan_in = tensor[0].numel() if tensor.dim() > 1 else tensor.numel()
            tensor.copy_(noise * 0.7 / math.sqrt(fan_in))


def make_batches(case: Case) -> list[Batch]:
    generator = torch.Generator().manual_seed(100 + case.seed)
    return [_make_batch(case, images, number, generator) for number, images in enumerate(case.images)]


def _make_batch(case: Case, images: tuple[int, ...], number: int, generator: torch.Generator) -> Batch:
    b, S, I = case.rows, case.length, max(images)
    ids = torch.randint(3, VOCAB + case.added, (b, S), generator=generator)
    mask = torch.ones(b, S, dtype=torch.bool)
    for row in range(b):
        pad = 0 if case.padding == "none" else (3 * row + number) % (S // 3)
        if pad:
            mask[row, :pad] = case.padding != "left"
            mask[row, S - pad :] = case.padding != "right"
    ids[~mask] = 0
    size = case.pixels or (case.image_size, case.image_size)
    index = _image_index(images, mask, generator)
    labels, loss_mask = shift_labels(ids, mask)
    return Batch(
        input_ids=ids,
        labels=labels,
        loss_mask=loss_mask,
        z_mask=(mask & (ids != VOCAB + 1)).float(),
        position_ids=position_ids_from_mask(mask),
        pixels=torch.randn(sum(images), 3, *size, generator=generator),
        image_index=index,
        images_per_row=torch.tensor(images),
        source=("a",) * b,
        pack_ids=torch.arange(b) + number * b,
        attention_mask=mask if case.padding == "left" else None,
        image_attention_mask=torch.rand(b, S, I, generator=generator) > 0.5 if case.several_images else None,
    )


def _image_index(images: tuple[int, ...], mask: Tensor, generator: torch.Generator) -> Tensor:
    """Each image's tokens are contiguous, with a stretch in front that sees none; an image may have no token."""
    b, S = mask.shape
    index = torch.full((b, S), NO_IMAGE)
    for row, count in enumerate(images):
        starts = torch.randint(1, S, (count,), generator=generator).sort().values
        for image, start in enumerate(starts.tolist()):
            index[row, start:] = image
        if count:
            index[row, -2:] = NO_IMAGE  # text behind a document's end
    return torch.where(mask, index, NO_IMAGE)


def image_mask(batch: Batch) -> Tensor:
    """The mask Hugging Face takes, [b,S,max(1,I)]; one empty slot where there is no image."""
    I = max(1, int(batch.images_per_row.max()))
    if batch.image_attention_mask is not None:
        mask = torch.zeros(*batch.input_ids.shape, I, dtype=torch.bool)
        for row, count in enumerate(batch.images_per_row.tolist()):
            mask[row, :, :count] = batch.image_attention_mask[row, :, :count]
        return mask
    return torch.nn.functional.one_hot(batch.image_index + 1, I + 1)[..., 1:].bool()


def _padded_pixels(batch: Batch) -> Tensor:
    I = max(1, int(batch.images_per_row.max()))
    out = torch.zeros(batch.input_ids.shape[0], I, *batch.pixels.shape[1:])
    start = 0
    for row, count in enumerate(batch.images_per_row.tolist()):
        out[row, :count] = batch.pixels[start : start + count]
        start += count
    return out


@dataclass
class Expected:
    """What Hugging Face says of a case, and everything a rank needs to say the same."""

    case: Case
    config: dict[str, Any]  # IdeficsConfig.to_dict()
    state: dict[str, Tensor]
    batches: list[Batch]
    logits: list[Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    loss: float = 0.0


Z_WEIGHT = 0.01


def reference(case: Case) -> Expected:
    """Run transformers' model. The loss is the global token mean of cross entropy plus that of z-loss."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    config = IdeficsConfig(**hf_config(case))
    config._attn_implementation = "eager"
    model = IdeficsForVisionText2Text(config).eval()
    state = model.state_dict()
    randomise(state, case.seed, case.small_norm_inputs)
    batches = make_batches(case)
    logits, gradients, loss = run_hugging_face(model, batches)
    state = {name: tensor.clone() for name, tensor in state.items()}
    return Expected(case, config.to_dict(), state, batches, logits, gradients, loss)


def run_hugging_face(model: Any, batches: list[Batch]) -> tuple[list[Tensor], dict[str, Tensor], float]:
    """Logits of each batch, gradients and loss, on the device and in the precision of the model."""
    tokens = sum(float(batch.loss_mask.sum()) for batch in batches)
    z_tokens = sum(float(batch.z_mask.sum()) for batch in batches)
    all_logits, total = [], torch.zeros((), device=model.device)
    for batch in batches:
        inputs = {name: x if x is None else x.to(model.device) for name, x in hf_inputs(batch).items()}
        interpolates = batch.pixels.shape[-1] != model.config.vision_config.image_size
        logits = model(**inputs, interpolate_pos_encoding=interpolates, use_cache=False).logits
        labels, loss_mask, z_mask = (x.to(model.device) for x in (batch.labels, batch.loss_mask, batch.z_mask))
        lse = logits.float().logsumexp(-1)
        nll = lse - logits.float().gather(-1, labels[..., None]).squeeze(-1)
        total = total + (nll * loss_mask).sum() / tokens + Z_WEIGHT * (lse**2 * z_mask).sum() / z_tokens
        all_logits.append(logits.detach())
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return all_logits, gradients, float(total.detach())


def hf_inputs(batch: Batch) -> dict[str, Tensor | None]:
    # Where there is a mask, positions are its own business; else padding is on the right, where no real token looks.
    mask, positions = batch.attention_mask, None
    if mask is None:
        mask, positions = torch.ones_like(batch.input_ids, dtype=torch.bool), batch.position_ids
    return {
        "input_ids": batch.input_ids,
        "attention_mask": mask,
        "position_ids": positions,
        "pixel_values": _padded_pixels(batch),
        "image_attention_mask": image_mask(batch),
    }


def pixels_of_rank(batch: Batch, tensor_rank: int, tensor_size: int) -> Batch:
    from megatron_atum.batch import image_slice

    return replace(batch, pixels=batch.pixels[image_slice(batch.num_images, tensor_rank, tensor_size)])
