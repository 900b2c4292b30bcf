"""What kernels.frozen_gemm=fp8 does to the loss of a small model, and on a GPU to the time of the 9B model's products.

The model has the preset `tiny`. Its text is made up: each of 64 tokens has four successors, and which of them is
likely (0.7, against 0.1 for each other) is told by the colour of the image before it. Without the image no loss is
below 1.386, with it none below 0.940, on average. For each seed the model is first trained whole (fp32), so that its
backbones know the successors; then cross-attention, Perceiver and gates are drawn again, and it trains on new text in
the pretraining recipe (LLaMA, CLIP and head frozen), on the same batches in each of these ways:

- fp32;
- bf16, which is off from fp32 by rounding only;
- fp8: bf16, with the frozen matrices of decoder and vision tower in 8 bits;
- fp32 from another draw of cross-attention, Perceiver and gates: what a seed is worth.

Compared are the mean loss of the last quarter of the steps, and the loss of fixed batches before the first step and
after the last. Then the products of the model that bf16 has trained are exchanged: what 8 bits in decoder and vision
tower, and in the head, do to the loss of each token of the fixed batches. On a CPU all products have exact fp32 sums:
what the fewer bits of forward's sums on Hopper do is not in these figures.

    python benchmarks/frozen_gemm.py              # tables; one JSON object on the last line
    python benchmarks/frozen_gemm.py --steps 200  # the figures of docs/performance.md
    python benchmarks/frozen_gemm.py --quick      # one seed and few steps

Two processes of one thread each, or one where there is a GPU. There the products of a decoder layer with 8192 tokens,
and of a vision layer with 44 images, are timed as well: bf16 against fp8, casts of activations and the turning of the
weight included. All shapes run once before any is timed, so that generated kernels are those for any size, as in
training. Runs take turns with several weights, more than an L2 cache holds; activations are the same ones.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import torch
from torch import Tensor, nn

from benchmarks.step import cpu_name
from megatron_atum.batch import Batch
from megatron_atum.checkpoint.draw import Drawn
from megatron_atum.checkpoint.source import Given
from megatron_atum.checkpoint.weights import fill, gather_rows, initialise
from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.model.frozen_gemm import FrozenMatrix, cast_layer
from megatron_atum.parallel.device import device, device_name, has_accelerator, has_fp8_products, wait_for_device
from megatron_atum.parallel.groups import build_groups, start_distributed, stop_distributed
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.training.engine import Engine

WAYS = {  # precision, frozen_gemm, first seed of what is drawn again
    "fp32": ("fp32", "bf16", 100),
    "bf16": ("bf16", "bf16", 100),
    "fp8": ("bf16", "fp8", 100),
    "another seed": ("fp32", "bf16", 200),
}
PAIRS = {
    "bf16 - fp32": ("bf16", "fp32"),
    "fp8 - bf16": ("fp8", "bf16"),
    "another seed - fp32": ("another seed", "fp32"),
}
FROZEN = "model.freeze={text: true, vision: true, lm_head: true}"
FIXED = 16  # batches whose loss is looked at without training on it
REDRAWN = ("gated_cross_attn_layers.", "perceiver_resampler.")  # in Hugging Face names


# The text ------------------------------------------------------------------------------------------------------------

ROWS, LENGTH, IMAGES = 2, 64, 2  # of a batch; images of a row
TOKENS_USED, SUCCESSORS, LIKELY = 64, 4, 0.7
FIRST = 3  # ids below it have a meaning


def successors() -> Tensor:
    """Four of each token, [TOKENS_USED,SUCCESSORS]."""
    return torch.rand(TOKENS_USED, TOKENS_USED, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :SUCCESSORS]


def make_batch(generator: torch.Generator, side: int) -> Batch:
    """Rows of successors; an image begins every LENGTH / IMAGES tokens. Args: side: of an image, in pixels."""
    table = successors()
    colours = torch.randint(SUCCESSORS, (ROWS, IMAGES), generator=generator)
    index = torch.arange(LENGTH).div(LENGTH // IMAGES, rounding_mode="floor").expand(ROWS, LENGTH)
    weights = torch.full((SUCCESSORS, SUCCESSORS), (1 - LIKELY) / (SUCCESSORS - 1)).fill_diagonal_(LIKELY)
    tokens = [torch.randint(TOKENS_USED, (ROWS,), generator=generator)]
    for place in range(LENGTH):
        choice = torch.multinomial(weights[colours[:, index[0, place]]], 1, generator=generator)[:, 0]
        tokens.append(table[tokens[-1], choice])
    ids = torch.stack(tokens, dim=1) + FIRST
    shades = torch.tensor([[2.0, -1.0, -1.0], [-1.0, 2.0, -1.0], [-1.0, -1.0, 2.0], [1.0, 1.0, 1.0]])
    pixels = shades[colours.flatten()][:, :, None, None].expand(-1, 3, side, side)
    return Batch(
        input_ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=torch.ones(ROWS, LENGTH),
        z_mask=torch.ones(ROWS, LENGTH),
        position_ids=torch.arange(LENGTH).expand(ROWS, LENGTH).contiguous(),
        pixels=pixels + 0.5 * torch.randn(pixels.shape, generator=generator),
        image_index=index.contiguous(),
        images_per_row=torch.full((ROWS,), IMAGES),
        source=("made up",) * ROWS,
        pack_ids=torch.arange(ROWS),
    )


# The loss ------------------------------------------------------------------------------------------------------------


def config_of(steps: int, *overrides: str) -> Config:
    rates = ("optimizer.lr=3e-3", "optimizer.min_lr=2e-4", "optimizer.warmup_steps=10", "optimizer.schedule=cosine")
    return load_config(
        None,
        [
            *("model.preset=tiny", "data.sources=[{name: made up, shards: none}]", f"data.sequence_length={LENGTH}"),
            *(*rates, f"optimizer.decay_steps={max(steps, 11)}", "optimizer.beta2=0.95", "optimizer.distributed=false"),
            *(f"training.micro_batch_size={ROWS}", f"training.global_batch_size={ROWS}"),
            *overrides,
        ],
    )


class Study:
    """All runs of one seed: their text and their process groups."""

    def __init__(self, seed: int, steps: int) -> None:
        config = config_of(steps)
        generator = torch.Generator().manual_seed(1 + seed)
        make = partial(make_batch, generator, config.model.vision.image_size)
        self.seed, self.steps = seed, steps
        self.first, self.second, self.fixed = ([make() for _ in range(n)] for n in (2 * steps, steps, FIXED))
        self.groups = build_groups(ParallelLayout.from_config(config, 1))

    def engine(self, state: dict[str, Tensor], *overrides: str) -> Engine:
        config = config_of(self.steps, *overrides)
        engine = Engine(config, self.groups)
        fill(engine.stages, config.model, self.groups, Given(state))
        engine.build_optimizer()
        engine.cast_frozen()
        return engine

    def backbones(self) -> dict[str, Tensor]:
        """Trained whole, in fp32."""
        config = config_of(2 * self.steps, "training.precision=fp32")
        engine = Engine(config, self.groups)
        initialise(engine.stages, config.model, self.groups, self.seed)
        engine.build_optimizer()
        for batch in self.first:
            engine.step([batch])
        return self.weights(engine)

    def train(self, backbones: dict[str, Tensor], way: str) -> tuple[dict[str, Any], Engine]:
        """Losses of a run in the pretraining recipe."""
        precision, frozen_gemm, first_seed = WAYS[way]
        overrides = (FROZEN, f"training.precision={precision}", f"kernels.frozen_gemm={frozen_gemm}")
        drawn = Drawn(config_of(self.steps).model, first_seed + self.seed)
        redrawn = {name: drawn.read(name) for name in backbones if any(part in name for part in REDRAWN)}
        engine = self.engine({**backbones, **redrawn}, *overrides)
        before = float(self.token_losses(engine).mean())
        losses = [engine.step([batch]).losses["loss"] for batch in self.second]
        late, after = losses[-max(1, len(losses) // 4) :], float(self.token_losses(engine).mean())
        return {"before": before, "losses": losses, "late": statistics.fmean(late), "after": after}, engine

    def token_losses(self, engine: Engine) -> Tensor:
        """Of every token of the fixed batches."""
        logits = engine.logits(self.fixed)
        labels = [batch.labels.flatten().to(device()) for batch in self.fixed]
        pairs = zip(logits, labels, strict=True)
        return torch.cat([nn.functional.cross_entropy(x.float().flatten(0, 1), y, reduction="none") for x, y in pairs])

    def exchanged(self, engine: Engine) -> dict[str, dict[str, float]]:
        """A bf16 engine with its products exchanged, one kind at a time, against the same weights in fp32.

        Returns:
            mean of the difference of a token's loss, and the root of its mean square.
        """
        exact = self.engine(self.weights(engine), FROZEN, "training.precision=fp32")
        expected, stage = self.token_losses(exact).double(), engine.stages[0]
        backbones = [layer for part in (stage.decoder_layers, stage.vision) for layer in part.modules()]
        kinds = {"bf16": [], "decoder and vision in fp8": backbones, "head in fp8": [stage.head.base]}
        found = {}
        for name, layers in kinds.items():
            with cast(layers):
                difference = self.token_losses(engine).double() - expected
            found[name] = {"mean": float(difference.mean()), "rms": float(difference.square().mean().sqrt())}
        return found

    def weights(self, engine: Engine) -> dict[str, Tensor]:
        return gather_rows(engine.stages, engine.config.model, self.groups, lambda parameter: parameter.data.clone())


@contextlib.contextmanager
def cast(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, the linear ones of these layers that are frozen are in 8 bits."""
    linear: list[Any] = [layer for layer in layers if hasattr(layer, "_forward_impl")]
    for layer in linear:
        cast_layer(layer)
    yield
    for layer in linear:
        del layer._forward_impl
        layer.weight.data = layer.weight.data.to(device())


def study(steps: int, seed: int) -> dict[str, Any]:
    """One seed, in a process of its own."""
    torch.set_num_threads(1)
    start_distributed()
    here = Study(seed, steps)
    backbones, found = here.backbones(), {}
    for way in WAYS:
        found[way], engine = here.train(backbones, way)
        if way == "bf16":
            found["exchanged"] = here.exchanged(engine)
    stop_distributed()
    return found


def losses(steps: int, seeds: int) -> dict[str, Any]:
    processes = 1 if has_accelerator() else min(2, seeds)
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = list(pool.map(partial(study, steps), range(seeds)))
    exchanged = [run.pop("exchanged") for run in runs]
    return {"runs": runs, "differences": differences(runs), "exchanged": exchanged}


def differences(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Of each pair and each seed; `step` is the mean of the magnitude in single steps."""
    return {
        name: {key: [run[one][key] - run[other][key] for run in runs] for key in ("before", "late", "after")}
        | {"step": [_apart(run[one]["losses"], run[other]["losses"]) for run in runs]}
        for name, (one, other) in PAIRS.items()
    }


def _apart(ours: list[float], theirs: list[float]) -> float:
    return statistics.fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))


# The products --------------------------------------------------------------------------------------------------------

TOKENS, PATCHES = 8192, 44 * 257
SHAPES = {  # rows, inputs, outputs; whether there is a backward
    "qkv": (TOKENS, 4096, 3 * 4096, True),
    "proj": (TOKENS, 4096, 4096, True),
    "fc1": (TOKENS, 4096, 2 * 11008, True),
    "fc2": (TOKENS, 11008, 4096, True),
    "vision qkv": (PATCHES, 1280, 3 * 1280, False),
    "vision proj": (PATCHES, 1280, 1280, False),
    "vision fc1": (PATCHES, 1280, 5120, False),
    "vision fc2": (PATCHES, 5120, 1280, False),
}
BEYOND_CACHE = 2**27  # bytes of 8-bit weights that are multiplied with in turn: an H200's L2 cache has 50 MB


Run = Callable[[], Tensor]


def products() -> dict[str, dict[str, float]]:
    """Milliseconds of each product, forward and backward to its input, and how many TFLOP/s that is."""
    for M, K, N, backward in SHAPES.values():
        for forwards, x, upstream in _ways(M, K, N, 1).values():
            _backward(forwards[0](), x, upstream) if backward else forwards[0]()
    return {name: _timed_product(*shape) for name, shape in SHAPES.items()}


def _ways(M: int, K: int, N: int, weights: int) -> dict[str, tuple[list[Run], Tensor, Tensor]]:
    """Forwards in bf16 and fp8, one for each of so many weights, their input and the gradient of their output."""
    place = {"dtype": torch.bfloat16, "device": device()}
    x, upstream = torch.randn(M, K, **place).requires_grad_(), torch.randn(M, N, **place)
    every, nothing = [torch.randn(N, K, **place) for _ in range(weights)], torch.empty(0)
    options = {"allreduce_dgrad": False, "sequence_parallel": False, "tp_group": None}
    plain: list[Run] = [partial(nn.functional.linear, x, weight) for weight in every]
    fp8: list[Run] = [partial(FrozenMatrix.of(weight, None), x, nothing, None, **options) for weight in every]
    return {"bf16": (plain, x, upstream), "fp8": (fp8, x, upstream)}


def _backward(y: Tensor, x: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, upstream, retain_graph=True)[0]


def _timed_product(M: int, K: int, N: int, backward: bool) -> dict[str, float]:
    found = {}
    for name, (forwards, x, upstream) in _ways(M, K, N, max(2, math.ceil(BEYOND_CACHE / (N * K)))).items():
        with torch.no_grad():
            ms = {"forward": _milliseconds(forwards)}
        if backward:
            ms["backward"] = _milliseconds([partial(_backward, run(), x, upstream) for run in forwards])
        for way, value in ms.items():
            found[f"{name} {way} ms"] = value
            found[f"{name} {way} TFLOP/s"] = 2e-9 * M * K * N / value
    return {key: round(value, 4) for key, value in found.items()}


def _milliseconds(runs: Sequence[Run], times: int = 20, rounds: int = 5) -> float:
    """Of one of these, which take turns. Median over rounds."""
    turns = itertools.cycle(runs)
    for _ in range(3):
        next(turns)()
    found = []
    for _ in range(rounds):
        wait_for_device()
        start = time.perf_counter()
        for _ in range(times):
            next(turns)()
        wait_for_device()
        found.append((time.perf_counter() - start) / times * 1e3)
    return statistics.median(found)


# Report --------------------------------------------------------------------------------------------------------------


def print_losses(found: dict[str, Any]) -> None:
    columns = ("before", "late", "after")
    print(f"{'loss, mean of the seeds':28}{'before':>10}{'late':>10}{'after':>10}")
    for way in WAYS:
        values = [statistics.fmean(run[way][column] for run in found["runs"]) for column in columns]
        print(f"{way:28}" + "".join(f"{value:>10.4f}" for value in values))
    print(f"\n{'difference':28}{'before':>10}{'late':>10}{'after':>10}{'a step':>10}   late, of each seed")
    for name, row in found["differences"].items():
        values = [statistics.fmean(row[column]) for column in columns]
        each = ", ".join(f"{value:+.4f}" for value in row["late"])
        step = statistics.fmean(row["step"])
        print(f"{name:28}" + "".join(f"{value:>+10.4f}" for value in values) + f"{step:>10.4f}   {each}")
    print(f"\n{'loss of a token, to fp32':28}{'mean':>10}{'rms':>10}")
    for name in found["exchanged"][0]:
        values = [statistics.fmean(one[name][key] for one in found["exchanged"]) for key in ("mean", "rms")]
        print(f"{name:28}{values[0]:>+10.5f}{values[1]:>10.5f}")


def print_products(found: dict[str, dict[str, float]]) -> None:
    for name, row in found.items():
        print(f"{name:12}" + "   ".join(f"{key} {value:.3f}" for key, value in row.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one seed and few steps")
    parser.add_argument("--steps", type=int, help="of each run (default 60, quick 4)")
    parser.add_argument("--seeds", type=int, help="default 4, quick 1")
    arguments = parser.parse_args()
    if has_accelerator() and not has_fp8_products():
        print(f"{device_name()} has no 8-bit products: a GPU of compute capability 8.9 or later has", file=sys.stderr)
        return 2
    steps, seeds = (4, 1) if arguments.quick else (60, 4)
    found = losses(arguments.steps or steps, arguments.seeds or seeds)
    print_losses(found)
    rates = products() if has_accelerator() else None
    if rates is not None:
        print_products(rates)
    print(json.dumps({**found, "products": rates, **about()}))
    return 0


def about() -> dict[str, Any]:
    return {
        "device": device_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main())
