"""One training step against Hugging Face's IdeficsForVisionText2Text with torch's AdamW, in the same process.

Both start from the same weights, take the same batches in the pretraining recipe (LLaMA, CLIP and head frozen;
cross-attention, perceiver and added words train), and do all of a step: forward, cross entropy, backward, clipping,
AdamW. Their losses must stay equal from step to step. They take turns within each round; a ratio is our tokens per
second over Hugging Face's in the same round, and the median over the rounds counts.

`thin` has the proportions of the 9B model at an eighth of its width, with fewer layers, so that arithmetic dominates as
it does at full width. `tiny` is the model of the examples: there the time goes into Python. Rows have 512 tokens and 1,
8 or 32 images; `ragged` is four rows of 1, 4, 9 and 32 images, on average as many as the mixture of the first IDEFICS
runs has. Hugging Face pads every row to the images of the fullest. It runs with scaled dot product attention and the
fused AdamW, and gets its padded tensors ready made.

Then the vision tower's share of our step with 32 images: in one process, and in two tensor ranks that share the images.

    python benchmarks/step.py            # table; one JSON object on the last line
    python benchmarks/step.py --quick    # the tiny model and one round

fp32 and one thread per process on a CPU; bf16 where there is a CUDA device. Exit code 1 if the losses differ.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_atum.batch import Batch, image_slice
from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.checkpoint.source import Given
from megatron_atum.checkpoint.weights import fill, initialise
from megatron_atum.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SourceConfig,
    TrainingConfig,
)
from megatron_atum.parallel.device import device, has_accelerator, wait_for_device
from megatron_atum.parallel.groups import build_groups, start_distributed, stop_distributed
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.parallel.spawn import spawn
from megatron_atum.training.engine import Engine

SEED = 5
OPTIMIZER = OptimizerConfig(lr=1e-4, warmup_steps=0, schedule="constant", weight_decay=0.0, distributed=False)
AGREE = 1e-4  # largest relative difference of the losses in fp32
AGREE_BF16 = 2e-2


@dataclass(frozen=True)
class Shape:
    """A model, by the keywords of transformers' IdeficsConfig, and the length of its rows."""

    hf: dict[str, Any]
    length: int

    def model(self) -> ModelConfig:
        from transformers import IdeficsConfig

        return from_hf(IdeficsConfig(**self.hf).to_dict())


RECIPE = {
    "additional_vocab_size": 2,
    "qk_layer_norms": True,
    "use_resampler": True,
    "tie_word_embeddings": False,
    "alpha_initializer": "ones",
    "freeze_text_layers": True,
    "freeze_vision_layers": True,
    "freeze_lm_head": True,
}
SMALL_VISION = {
    "vision_config": {
        "embed_dim": 64,
        "image_size": 56,
        "patch_size": 14,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    },
    "perceiver_config": {
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 16,
        "resampler_n_latents": 8,
        "qk_layer_norms_perceiver": True,
    },
}
THIN = Shape(
    hf={
        **RECIPE,
        "vocab_size": 4000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "cross_layer_interval": 4,
        "vision_config": {
            "embed_dim": 160,
            "image_size": 224,
            "patch_size": 14,
            "intermediate_size": 640,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
        },
        "perceiver_config": {
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 48,
            "resampler_n_latents": 64,
            "qk_layer_norms_perceiver": True,
        },
    },
    length=512,
)
TINY = Shape(
    hf={
        **RECIPE,
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_layer_interval": 1,
        **SMALL_VISION,
    },
    length=128,
)
SCENES = {"1": (1,), "8": (8,), "32": (32,), "ragged": (1, 4, 9, 32)}  # images of each row


def make_batch(shape: Shape, images: tuple[int, ...]) -> Batch:
    """Rows of random tokens, in which images begin at random places. A token sees the last image that began."""
    generator = torch.Generator().manual_seed(SEED)
    b, S = len(images), shape.length
    vocabulary, side = shape.hf["vocab_size"], shape.hf["vision_config"]["image_size"]
    ids = torch.randint(3, vocabulary + shape.hf["additional_vocab_size"], (b, S + 1), generator=generator)
    begins = torch.zeros(b, S, dtype=torch.int64)
    for row, count in zip(begins, images, strict=True):
        row[1 + torch.randperm(S - 1, generator=generator)[:count]] = 1
    return Batch(
        input_ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=torch.ones(b, S),
        z_mask=torch.ones(b, S),
        position_ids=torch.arange(S).expand(b, S).contiguous(),
        pixels=torch.randn(sum(images), 3, side, side, generator=generator),
        image_index=begins.cumsum(1) - 1,  # NO_IMAGE before the first
        images_per_row=torch.tensor(images),
        source=("random",) * b,
        pack_ids=torch.arange(b),
    )


class Ours:
    """This project's engine in one process."""

    def __init__(self, shape: Shape, state: dict[str, Tensor]) -> None:
        config = config_of(shape, tensor=1)
        groups = build_groups(ParallelLayout.from_config(config, 1))
        self.engine = Engine(config, groups)
        fill(self.engine.stages, config.model, groups, Given(state))
        self.engine.build_optimizer()

    def stepper(self, batch: Batch) -> Callable[[], float]:
        return lambda: self.engine.step([batch]).losses["loss"]


class HuggingFace:
    """transformers' model and torch's AdamW."""

    def __init__(self, shape: Shape) -> None:
        from transformers import IdeficsConfig, IdeficsForVisionText2Text

        torch.manual_seed(SEED)
        config = IdeficsConfig(**shape.hf)
        config._attn_implementation = "sdpa"
        self.model = IdeficsForVisionText2Text(config).train()
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.to(device(), torch.bfloat16 if has_accelerator() else torch.float32)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        o = OPTIMIZER
        betas = (o.beta1, o.beta2)
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, o.lr, betas, o.eps, o.weight_decay, fused=True)

    def stepper(self, batch: Batch) -> Callable[[], float]:
        inputs = {name: tensor.to(device()) for name, tensor in hf_inputs(batch).items()}
        labels = batch.labels.to(device())

        def step() -> float:
            self.optimizer.zero_grad()
            logits = self.model(**inputs, use_cache=False).logits
            # its own loss takes the added words for mistakes
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, OPTIMIZER.clip_grad)
            self.optimizer.step()
            return float(loss.detach())

        return step


def config_of(shape: Shape, tensor: int) -> Config:
    return Config(
        model=shape.model(),
        parallel=ParallelConfig(tensor=tensor),
        data=DataConfig(sources=[SourceConfig(name="random", shards="none")], sequence_length=shape.length),
        optimizer=replace(OPTIMIZER),
        training=TrainingConfig(z_loss=0.0, global_batch_size=1),
    )


def hf_inputs(batch: Batch) -> dict[str, Tensor]:
    """Every row with as many images as the fullest."""
    counts = batch.images_per_row.tolist()
    pixels = torch.zeros(len(counts), max(counts), *batch.pixels.shape[1:])
    for row, own in enumerate(batch.pixels.split(counts)):
        pixels[row, : len(own)] = own
    mask = torch.nn.functional.one_hot(batch.image_index + 1, max(counts) + 1)[..., 1:].bool()
    return {
        "input_ids": batch.input_ids,
        "attention_mask": torch.ones_like(batch.input_ids, dtype=torch.bool),
        "position_ids": batch.position_ids,
        "pixel_values": pixels,
        "image_attention_mask": mask,
    }


# Against Hugging Face -------------------------------------------------------------------------------------------------


def compare(shape: Shape, scenes: dict[str, tuple[int, ...]], rounds: int) -> dict[str, dict[str, Any]]:
    """Times, ratios and losses of each scene. The models go on training from scene to scene."""
    theirs = HuggingFace(shape)
    ours = Ours(shape, theirs.state)
    return {name: _compare(ours, theirs, make_batch(shape, images), rounds) for name, images in scenes.items()}


def _compare(ours: Ours, theirs: HuggingFace, batch: Batch, rounds: int) -> dict[str, Any]:
    steps = {"ours": ours.stepper(batch), "hf": theirs.stepper(batch)}
    losses: dict[str, list[float]] = {name: [step()] for name, step in steps.items()}  # warms up
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in sorted(steps, reverse=turn % 2 == 1):
            seconds, loss = timed(steps[name])
            times[name].append(seconds)
            losses[name].append(loss)
    ratios = [hf / own for own, hf in zip(times["ours"], times["hf"], strict=True)]
    tokens = batch.input_ids.numel()
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "tokens_per_s": round(tokens / statistics.median(times["ours"]), 1),
        "hf_tokens_per_s": round(tokens / statistics.median(times["hf"]), 1),
        "loss": losses["ours"][-1],
        "hf_loss": losses["hf"][-1],
        "loss_difference": max(abs(a / b - 1) for a, b in zip(losses["ours"], losses["hf"], strict=True)),
    }


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """Seconds, and what the step gives."""
    wait_for_device()
    start = time.perf_counter()
    result = step()
    wait_for_device()
    return time.perf_counter() - start, result


# The share of vision --------------------------------------------------------------------------------------------------


def vision_share(rank: int, shape: Shape, tensor: int, images: int, rounds: int) -> dict[str, float]:
    """Median seconds of our step and of the vision tower in it, on this rank."""
    torch.set_num_threads(1)
    start_distributed()
    config = config_of(shape, tensor)
    groups = build_groups(ParallelLayout.from_config(config, tensor))
    engine = Engine(config, groups)
    initialise(engine.stages, config.model, groups, SEED)
    engine.build_optimizer()
    batch = make_batch(shape, (images,))
    batch = replace(batch, pixels=batch.pixels[image_slice(images, groups.tensor_rank, tensor)])
    watch = _watch_vision(engine)
    steps = []
    for _ in range(1 + rounds):
        dist.barrier()
        steps.append(timed(lambda: engine.step([batch]).grad_norm)[0])
    stop_distributed()
    step, vision = statistics.median(steps[1:]), statistics.median(watch[1:])
    return {"step_s": round(step, 4), "vision_s": round(vision, 4), "share": round(vision / step, 3)}


def _watch_vision(engine: Engine) -> list[float]:
    """Seconds of each call of the tower, the exchange of features included."""
    vision, seconds = engine.stages[0].vision, []
    encode = vision.encode_shared

    def watched(*arguments: Any) -> Tensor:
        elapsed, features = timed(lambda: encode(*arguments))
        seconds.append(elapsed)
        return features

    vision.encode_shared = watched
    return seconds


# Report ---------------------------------------------------------------------------------------------------------------


def print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"{title:10}{'ours tok/s':>12}{'HF tok/s':>12}{'ratio':>8}   range           loss      difference")
    for name, row in rows.items():
        low, high = row["ratios"][0], row["ratios"][-1]
        print(
            f"{name:10}{row['tokens_per_s']:>12.1f}{row['hf_tokens_per_s']:>12.1f}{row['ratio']:>8.3f}   "
            f"{low:.3f} - {high:.3f}   {row['loss']:.4f}    {row['loss_difference']:.1e}"
        )


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model only, one round")
    parser.add_argument("--rounds", type=int, help="rounds of everything (default 5, quick 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    start_distributed()
    tiny = compare(TINY, {"1": (1,), "ragged": (1, 3)}, rounds if arguments.quick else 5 * rounds)
    main_shape = TINY if arguments.quick else THIN
    thin = tiny if arguments.quick else compare(THIN, SCENES, rounds)
    stop_distributed()
    vision = {
        str(tensor): spawn(vision_share, tensor, main_shape, tensor, 32, rounds)
        for tensor in ((1,) if has_accelerator() else (1, 2))
    }
    print_table("tiny", tiny)
    if not arguments.quick:
        print_table("thin", thin)
    for tensor, ranks in vision.items():
        for rank, found in enumerate(ranks):
            print(f"tensor {tensor}, rank {rank}: vision {found['vision_s']} s of {found['step_s']} s")
    print(json.dumps(report(tiny, thin, vision)))
    differences = [row["loss_difference"] for row in [*tiny.values(), *thin.values()]]
    if max(differences) > (AGREE_BF16 if has_accelerator() else AGREE):
        print(f"the losses differ by {max(differences):.1e}", file=sys.stderr)
        return 1
    return 0


def report(
    tiny: dict[str, dict[str, Any]], thin: dict[str, dict[str, Any]], vision: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    return {
        "tokens_per_s_over_hf": {name: row["ratio"] for name, row in thin.items()},
        "tokens_per_s_over_hf_tiny": {name: row["ratio"] for name, row in tiny.items()},
        "vision_share_at_32_images": {f"tensor_{n}": max(r["share"] for r in ranks) for n, ranks in vision.items()},
        "vision_s_at_32_images": {f"tensor_{n}": max(r["vision_s"] for r in ranks) for n, ranks in vision.items()},
        "largest_loss_difference": max(row["loss_difference"] for row in [*tiny.values(), *thin.values()]),
        "thin": thin,
        "tiny": tiny,
        "vision": vision,
        "device": str(device()),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main())
