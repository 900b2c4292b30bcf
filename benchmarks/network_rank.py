"""The ranks of benchmarks/network.py: forked processes on fake nodes that train the model by one scheme, on command.

Every scheme has the same weights (Hugging Face's, from one seed), the same batch of `ROWS` rows in every step, the
pretraining recipe (LLaMA, CLIP and head frozen), clipping and AdamW, in fp32. The sharded ones train transformers'
`IdeficsForVisionText2Text` with ROWS / ranks rows on each rank and no accumulation; `tp...` is this project's engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from benchmarks.namespaces import INTERFACE, STOPPING, FakeNodes, undisturbed
from benchmarks.network_formulas import Microbatches
from benchmarks.step import OPTIMIZER, RECIPE, SEED, SMALL_VISION, Shape, hf_inputs, make_batch
from megatron_atum.batch import Batch, image_slice
from megatron_atum.checkpoint.source import Given
from megatron_atum.checkpoint.weights import fill
from megatron_atum.config.schema import Config, DataConfig, ParallelConfig, SourceConfig, TrainingConfig
from megatron_atum.errors import RankFailure
from megatron_atum.parallel.groups import build_groups, start_distributed
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.training.engine import Engine

MODEL = Shape(
    hf={
        **RECIPE,
        "vocab_size": 500,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "cross_layer_interval": 4,
        **SMALL_VISION,
    },
    length=96,
)
RANKS_PER_NODE = 2
ROWS = 16  # of a step, over all ranks
IMAGES = 1  # of each row
MICROBATCHES = 4  # of a data-parallel rank, where there is a pipeline
GEMM = 512  # rows and columns
PATIENCE_S = 300.0  # with a rank
GRACE_S = 1.0  # in which a rank that fails takes the others along
Step = Callable[[], float]  # does one, and returns the loss of the rows that this rank knows of


# This project ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Degrees:
    """Of parallelism, by a scheme's name."""

    tensor: int
    pipeline: int
    data: int

    @classmethod
    def of(cls, scheme: str) -> Degrees:
        """`tp2pp2`, `tp2dp4`, `tp2pp2dp2`."""
        found = dict(re.findall(r"(tp|pp|dp)(\d+)", scheme))
        return cls(int(found.get("tp", 1)), int(found.get("pp", 1)), int(found.get("dp", 1)))

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def microbatches(self) -> Microbatches:
        rows = ROWS // self.data
        size = rows // MICROBATCHES if self.pipeline > 1 else ROWS // MICROBATCHES
        return Microbatches(rows // size, size, MODEL.length, size * IMAGES)

    def config(self) -> Config:
        return Config(
            model=MODEL.model(),
            parallel=ParallelConfig(tensor=self.tensor, pipeline=self.pipeline),
            data=DataConfig(sources=[SourceConfig(name="random", shards="none")], sequence_length=MODEL.length),
            optimizer=replace(OPTIMIZER, distributed=True),
            training=TrainingConfig(
                z_loss=0.0, micro_batch_size=self.microbatches.rows, global_batch_size=ROWS, precision="fp32"
            ),
        )

    def layout(self) -> ParallelLayout:
        return ParallelLayout.from_config(self.config(), self.ranks)


def atum(degrees: Degrees) -> Step:
    start_distributed()
    groups = build_groups(degrees.layout())
    config = degrees.config()
    engine = Engine(config, groups)
    fill(engine.stages, config.model, groups, Given(hf_model().state_dict()))
    engine.build_optimizer()
    size, share = degrees.microbatches.rows, ROWS // degrees.data
    starts = range(groups.data_rank * share, (groups.data_rank + 1) * share, size)
    tensor_rank = groups.tensor_rank if groups.is_first_stage else None
    batches = [_own_images(rows_of(whole_batch(), start, size), tensor_rank, degrees.tensor) for start in starts]
    return lambda: engine.step(batches).losses["loss"]


def _own_images(batch: Batch, tensor_rank: int | None, tensor: int) -> Batch:
    """tensor_rank: None on ranks that encode no image."""
    own = slice(0, 0) if tensor_rank is None else image_slice(batch.num_images, tensor_rank, tensor)
    return replace(batch, pixels=batch.pixels[own])


# The others -----------------------------------------------------------------------------------------------------------


def fsdp2() -> Step:
    """Everything sharded over all ranks."""
    return _fsdp((("shard", int(os.environ["WORLD_SIZE"])),))


def hsdp() -> Step:
    """Sharded inside a node, replicated across nodes."""
    ranks, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    return _fsdp((("replicate", ranks // local), ("shard", local)))


def _fsdp(axes: tuple[tuple[str, int], ...]) -> Step:
    start_distributed()
    names, sizes = zip(*axes, strict=True)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    model = hf_model()
    for module in gathered_together(model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    trained = _trained(model)
    o = OPTIMIZER
    optimizer = torch.optim.AdamW(trained, o.lr, (o.beta1, o.beta2), o.eps, o.weight_decay)
    loss_of = _loss_of_own_rows()

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        _clip(trained, o.clip_grad, mesh["shard"].get_group())
        optimizer.step()
        return float(loss.detach())

    return step


DEEPSPEED = Path(__file__).resolve().parents[1] / ".venvs" / "deepspeed"  # an environment that network.py makes


def _clip(trained: list[nn.Parameter], most: float, group: dist.ProcessGroup) -> None:
    """As torch's clip_grad_norm_, which would exchange a norm for each tensor, with one all-reduce of a number."""
    gradients = [cast(DTensor, parameter.grad).to_local() for parameter in trained]
    square = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    dist.all_reduce(square, group=group)
    factor = (most / (square.sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)


def zero3() -> Step:
    """DeepSpeed, through which the first IDEFICS was trained."""
    sys.path.insert(0, str(next(DEEPSPEED.glob("lib/python*/site-packages"))))
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Its kernel for ranks that share memory: fake nodes share this machine's, and g++ takes minutes over it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = hf_model()
    # By itself it gathers matrix by matrix, and at this width gloo's handshakes would come to 2 % of the bytes. Not so
    # the perceiver: weights of a leaf whose inputs need no gradient are dropped before its backward.
    leaves = {type(module) for module in gathered_together(model) if module is not model.model.perceiver_resampler}
    deepspeed.utils.set_z3_leaf_modules(model, list(leaves))
    o = OPTIMIZER
    adam = {"lr": o.lr, "betas": (o.beta1, o.beta2), "eps": o.eps, "weight_decay": o.weight_decay, "torch_adam": True}
    stage3 = {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        # Every weight is sharded, gathered where it is used and dropped behind that: as with a model that does not fit.
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
    }
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": o.clip_grad,
        "zero_optimization": stage3,
        "optimizer": {"type": "AdamW", "params": adam},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=_trained(model), config=config)
    loss_of = _loss_of_own_rows()

    def step() -> float:
        loss = loss_of(engine)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


def gathered_together(model: Any) -> list[nn.Module]:
    """The blocks whose weights sharded schemes gather in one piece; what is left is one more piece or several."""
    inner, vision = model.model, model.model.vision_model
    text = (*inner.gated_cross_attn_layers, *inner.layers)
    return [vision.embeddings, *vision.encoder.layers, inner.perceiver_resampler, *text]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _loss_of_own_rows() -> Callable[[Callable[..., Any]], Tensor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch = rows_of(whole_batch(), rank * (ROWS // ranks), ROWS // ranks)
    inputs, labels = hf_inputs(batch), batch.labels.flatten()

    def loss_of(model: Callable[..., Any]) -> Tensor:
        logits = model(**inputs, use_cache=False).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels)

    return loss_of


# What all have in common ----------------------------------------------------------------------------------------------

SHARDED: dict[str, Callable[[], Step]] = {"zero3": zero3, "fsdp2": fsdp2, "hsdp": hsdp}


def hf_model() -> Any:
    """transformers' model, the same on every rank."""
    torch.manual_seed(SEED)
    config = IdeficsConfig(**MODEL.hf)
    config._attn_implementation = "sdpa"
    return IdeficsForVisionText2Text(config).train()


def whole_batch() -> Batch:
    return make_batch(MODEL, (IMAGES,) * ROWS)


def rows_of(batch: Batch, start: int, rows: int) -> Batch:
    """Some rows of a batch, with their images."""
    own = slice(start, start + rows)
    first = int(batch.images_per_row[:start].sum())
    return Batch(
        input_ids=batch.input_ids[own],
        labels=batch.labels[own],
        loss_mask=batch.loss_mask[own],
        z_mask=batch.z_mask[own],
        position_ids=batch.position_ids[own],
        pixels=batch.pixels[first : first + int(batch.images_per_row[own].sum())],
        image_index=batch.image_index[own],
        images_per_row=batch.images_per_row[own],
        source=batch.source[own],
        pack_ids=batch.pack_ids[own],
    )


def gemm_flops(seconds: float) -> float:
    """FLOP/s of this process in matrix products."""
    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    number, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        a @ b
        number += 1
    return 2 * GEMM**3 * number / (time.perf_counter() - began)


def obey(command: dict[str, Any], step: Step) -> dict[str, Any]:
    """`ended` is a time that all processes of the machine share."""
    reply: dict[str, Any] = {}
    if command["do"] == "step":
        reply["losses"] = [step() for _ in range(command["number"])]
    elif command["do"] == "gather":  # so many bytes from each rank
        mine = torch.zeros(command["bytes"], dtype=torch.uint8)
        dist.all_gather_into_tensor(torch.empty(len(mine) * dist.get_world_size(), dtype=torch.uint8), mine)
    elif command["do"] == "gemm":
        reply["flops"] = gemm_flops(command["seconds"])
    else:
        raise ValueError(f"no such command: {command}")
    return {**reply, "ended": time.monotonic()}


# Processes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rank:
    """A process, forked from this one, which has imported everything. No counter sees its pipe."""

    process: BaseProcess
    pipe: Connection
    log: IO[bytes]  # what it and its libraries print; without a name, so that nothing is left of it

    def last_words(self) -> str:
        log = self.log.fileno()
        tail = os.pread(log, 1500, max(0, os.fstat(log).st_size - 1500)).decode(errors="replace").strip()
        return f"{self.process.name} ended with exit code {self.process.exitcode}\n{tail}"


@dataclass(frozen=True)
class Ranks:
    """The processes of one scheme, in order."""

    ranks: list[Rank]

    def ask(self, **command: Any) -> tuple[list[dict[str, Any]], float]:
        """Replies of all ranks, and the seconds until the last one was done.

        Raises:
            RankFailure: a rank died or does not answer.
        """
        began = time.monotonic()
        for rank in self.ranks:
            with contextlib.suppress(BrokenPipeError):  # `replies` says more
                rank.pipe.send(command)
        replies = self.replies()
        return replies, max(reply["ended"] for reply in replies) - began

    def steps(self, number: int) -> tuple[list[float], float]:
        """Losses of all rows, step by step, and seconds per step."""
        replies, seconds = self.ask(do="step", number=number)
        by_step = zip(*(reply["losses"] for reply in replies), strict=True)
        return [statistics.fmean(losses) for losses in by_step], seconds / number

    def replies(self) -> list[dict[str, Any]]:
        """One of each rank."""
        waiting: dict[Any, int] = {rank.pipe: number for number, rank in enumerate(self.ranks)}
        found: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + PATIENCE_S
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                names = ", ".join(self.ranks[number].process.name for number in waiting.values())
                raise RankFailure(f"no answer within {PATIENCE_S:.0f} s from {names}")
            for pipe in ready:
                try:
                    found[waiting[pipe]] = self.ranks[waiting[pipe]].pipe.recv()
                    del waiting[pipe]
                except (EOFError, ConnectionResetError):
                    raise self._failure() from None
        return [found[number] for number in range(len(self.ranks))]

    def _failure(self) -> RankFailure:
        time.sleep(GRACE_S)
        ended = [rank.last_words() for rank in self.ranks if not rank.process.is_alive()]
        return RankFailure("\n".join(ended) or "a rank has closed its pipe")


@contextlib.contextmanager
def started(scheme: str, nodes: FakeNodes, port: int) -> Iterator[Ranks]:
    """The ranks of a scheme, ready. They are killed at the end.

    Raises:
        RankFailure: a rank died or is not ready in time.
    """
    context = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as stack:
        ranks: list[Rank] = []
        for number in range(nodes.count * RANKS_PER_NODE):
            ours, theirs = context.Pipe()
            log = stack.enter_context(tempfile.TemporaryFile())
            arguments = (scheme, nodes, number, port, theirs, log, os.getpid())
            process = context.Process(target=_rank, args=arguments, name=f"{scheme}: rank {number}")
            with undisturbed():  # what a handler raises within a fork would be lost in Python's hooks around it
                process.start()
                stack.callback(_end, process)
            theirs.close()
            ranks.append(Rank(process, ours, log))
        everyone = Ranks(ranks)
        everyone.replies()
        yield everyone


def _rank(scheme: str, nodes: FakeNodes, rank: int, port: int, pipe: Connection, log: IO[bytes], parent: int) -> None:
    """What a forked process does: becomes a rank on its node, with torchrun's environment."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent ends its ranks
    _end_with(parent)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    nodes.move_to(rank // RANKS_PER_NODE)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(nodes.count * RANKS_PER_NODE),
        "LOCAL_RANK": str(rank % RANKS_PER_NODE),
        "LOCAL_WORLD_SIZE": str(RANKS_PER_NODE),
        "MASTER_ADDR": nodes.address(0),
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }
    _serve(scheme, pipe)


def _end_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # gone before that
        os._exit(1)


def _end(process: BaseProcess) -> None:
    process.kill()
    process.join()


def _serve(scheme: str, pipe: Connection) -> None:
    """Build the scheme, say so, and obey commands until there are no more. With torchrun's environment."""
    torch.set_num_threads(1)
    step = SHARDED[scheme]() if scheme in SHARDED else atum(Degrees.of(scheme))
    pipe.send({"ready": scheme})
    while True:
        pipe.send(obey(pipe.recv(), step))
