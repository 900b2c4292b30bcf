"""Measurements that others published, and what the cost model says to them.

No constant was given its value by these numbers. One term, the addition of each microbatch's gradients to their fp32
sum, was put in after a simpler form was seen to come out too short where microbatches are small; its size is a count of
bytes. Only the rows of `MEGATRON` bind the model (within 10 %): their layouts are published, but all have one
data-parallel rank, so that exchange is not tested. LLaMA-65B's is not, so it is a check of plausibility at several; and
ZeRO-3's step is longer than what is known of it explains (`rivals.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_atum.planning.cluster import Cluster, Link, load_cluster
from megatron_atum.planning.cost import Block, Collective, DataParallel, Group, Job, Prediction, predict
from megatron_atum.planning.wording import shape_name


@dataclass(frozen=True)
class Transformer:
    """A decoder without images; all of it trains in 16 bits with fp32 gradients and sequence parallelism."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    sequence: int
    gated: bool = False  # SwiGLU and RMSNorm as LLaMA; else GELU, LayerNorm and dropout as GPT
    flash: bool = False  # else attention scores are written to memory, and computed again in backward

    @property
    def layer_parameters(self) -> int:
        return 4 * self.hidden**2 + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + (2 if self.gated else 1) * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Run:
    tensor: int
    pipeline: int
    virtual: int
    world_size: int
    rows: int  # of a step
    microbatch: int  # rows

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def name(self) -> str:
        return shape_name(self.tensor, self.pipeline, self.virtual, self.data)


@dataclass(frozen=True)
class Megatron:
    """Seconds of a step with sequence parallelism, and selective or full recomputation."""

    name: str
    model: Transformer
    run: Run
    selective_s: float
    full_s: float
    mfu: float  # with selective recomputation


def _gpt(layers: int, hidden: int, heads: int) -> Transformer:
    return Transformer(layers, hidden, heads, 4 * hidden, vocabulary=51200, sequence=2048)


# Korthikanti et al., arXiv 2205.05198: models and layouts of table 3, seconds and MFU of table 5. A100 80 GB.
MEGATRON = (
    Megatron("Megatron 22B", _gpt(48, 6144, 64), Run(8, 1, 1, 8, 4, 4), 1.10, 1.42, 0.415),
    Megatron("Megatron 175B", _gpt(96, 12288, 96), Run(8, 8, 3, 64, 64, 1), 13.75, 18.13, 0.514),
    Megatron("Megatron 530B", _gpt(105, 20480, 128), Run(8, 35, 3, 280, 280, 1), 37.83, 49.05, 0.560),
    Megatron("Megatron 1T", _gpt(128, 25600, 160), Run(8, 64, 1, 512, 512, 1), 71.49, 94.42, 0.563),
)

# Touvron et al., arXiv 2302.13971, section 2.4: about 380 tokens per second and GPU on 2048 A100 80 GB; batches of 4
# million tokens, rows of 2048. No layout is given, so each of these is a guess.
LLAMA = Transformer(80, 8192, 64, 22016, vocabulary=32000, sequence=2048, gated=True, flash=True)
LLAMA_TOKENS_PER_S = 380.0
LLAMA_RUNS = (
    Run(8, 1, 1, 2048, 2048, 1),
    Run(8, 2, 1, 2048, 2048, 1),
    Run(8, 4, 1, 2048, 2048, 1),
    Run(4, 4, 1, 2048, 2048, 1),
)

# IDEFICS-80B under ZeRO-3 on 512 A100 80 GB with EFA v1, 3584 rows of 1024 tokens: 49 s a step by its log
# (stas00/ml-engineering, training/model-parallelism/README.md), 43.2 s by its checkpoints every 250 steps, about 3
# hours apart (huggingface/m4-logs, memos/README.md).
IDEFICS_DEVICES, IDEFICS_ROWS, IDEFICS_LENGTH = 512, 3584, 1024
IDEFICS_LOG_S, IDEFICS_CHECKPOINTS_S = 49.0, 43.2


def a100_pod(world_size: int) -> Cluster:
    """DGX A100 with eight 200 Gbit/s adapters, as the published runs had.

    Network: NCCL's all-reduce reaches a bus bandwidth of 192 GB/s between two such nodes (NVIDIA/nccl issue 812).
    """
    node = load_cluster("p4de")
    return replace(node, name="DGX A100 pod", nodes=max(1, world_size // 8), network=Link(192e9, 20e-6))


# Values that elementwise work reads and writes for one token and layer, in multiples of hidden and intermediate width.
# GPT: two norms (2 each), two of bias + dropout + residual in one kernel (3.5 each), transposed context (2); GELU with
# its bias (2). LLaMA: two norms (2 each), two residuals (3 each), rotary embedding (4); SiLU (2) and product (3).
_GPT_TRAFFIC, _LLAMA_TRAFFIC = (13.0, 2.0), (14.0, 5.0)
# Bytes for one attention score that is written to memory. Forward: product (2), softmax (4), dropout (5 with its mask),
# second product (2). Backward: five reads or writes more than the two products' operands.
_SCORE_FORWARD, _SCORE_BACKWARD = 13.0, 19.0
_ACCUMULATION = 8.0  # bytes for one weight's gradient, added to its sum in fp32 by the product itself (their fusion)
_LOSS_FORWARD, _LOSS_BACKWARD = 22.0, 14.0  # bytes for one logit: cast to fp32, maximum, exponential, sum; and back
_LAYER_KERNELS = 20.0


def _layers(model: Transformer, tokens: int, number: float, *, full: bool) -> Block:
    weights = number * model.layer_parameters
    gemm = 2.0 * tokens * weights
    of_hidden, of_intermediate = _LLAMA_TRAFFIC if model.gated else _GPT_TRAFFIC
    traffic = 2.0 * number * tokens * (of_hidden * model.hidden + of_intermediate * model.intermediate)
    product = 4.0 * number * tokens * model.sequence * model.hidden
    forward, backward = product, 2 * product
    scores = number * tokens * model.sequence * model.heads
    if model.flash:  # leaves the forbidden half out; five products of backward to two of forward
        forward, backward, scores = product / 2, 2.5 * product / 2, 0.0
    again = 0.0 if model.flash or full else 1.0
    block = Block(
        "layers",
        gemm_forward=gemm,
        gemm_backward=2 * gemm,
        attention_forward=forward,
        attention_backward=backward + again * forward,
        traffic_forward=traffic + _SCORE_FORWARD * scores,
        traffic_backward=2 * traffic + (_SCORE_BACKWARD + again * _SCORE_FORWARD) * scores + _ACCUMULATION * weights,
        kernels_forward=number * _LAYER_KERNELS,
        kernels_backward=2 * number * _LAYER_KERNELS,
        collectives=_layer_collectives(2.0 * tokens * model.hidden, number),
    )
    return _recomputed(block) if full else block


def _recomputed(block: Block) -> Block:
    """The same with its forward once more in backward."""
    again = tuple(replace(c, backward=True) for c in block.collectives if not c.backward)
    return replace(
        block,
        gemm_backward=block.gemm_backward + block.gemm_forward,
        attention_backward=block.attention_backward + block.attention_forward,
        traffic_backward=block.traffic_backward + block.traffic_forward,
        kernels_backward=block.kernels_backward + block.kernels_forward,
        collectives=block.collectives + again,
    )


def _layer_collectives(size: float, number: float) -> tuple[Collective, ...]:
    """Of layers that train, under sequence parallelism (arXiv 2205.05198, section 4.2.2)."""
    each = 2 * number
    return (
        Collective("all_gather", size, each),
        Collective("reduce_scatter", size, each),
        Collective("all_gather", size, each, backward=True),
        Collective("all_gather", size, each, backward=True, hidden=True),  # inputs again, for the weights' gradients
        Collective("reduce_scatter", size, each, backward=True, hidden=True),
    )


def _head(model: Transformer, tokens: int) -> Block:
    weights, logits = model.vocabulary * model.hidden, tokens * model.vocabulary
    size = 2.0 * tokens * model.hidden
    return Block(
        "head",
        gemm_forward=2.0 * tokens * weights,
        gemm_backward=4.0 * tokens * weights,
        traffic_forward=_LOSS_FORWARD * logits,
        traffic_backward=_LOSS_BACKWARD * logits + _ACCUMULATION * weights,
        kernels_forward=10,
        kernels_backward=20,
        collectives=(
            Collective("all_gather", size),
            Collective("all_gather", size, backward=True, hidden=True),
            Collective("reduce_scatter", size, backward=True, hidden=True),
        ),
    )


def transformer_job(model: Transformer, run: Run, cluster: Cluster, *, full: bool = False) -> Job:
    """A step of such a run. Args: full: recompute whole layers, not attention only."""
    tokens = run.microbatch * model.sequence
    layers = _layers(model, tokens, model.layers / run.pipeline, full=full)
    stages = (*[(layers,)] * (run.pipeline - 1), (layers, _head(model, tokens)))
    values = model.parameters / (run.tensor * run.pipeline)
    stage_ranks = run.tensor * run.data
    return Job(
        stages=stages,
        microbatches=run.rows // (run.microbatch * run.data),
        tensor=Group.of(range(run.tensor), cluster),
        data=DataParallel(Group.of(range(0, stage_ranks, run.tensor), cluster), 4 * values, 2 * values),
        optimizer_values=values / run.data,
        virtual=run.virtual,
        exchange_bytes=2.0 * tokens * model.hidden / run.tensor,
        exchange_crosses_nodes=cluster.crosses_nodes((0, stage_ranks)),
    )


@dataclass(frozen=True)
class ValidationRow:
    name: str
    layout: str
    quantity: str  # what is compared
    predicted: float
    measured: float
    binding: bool  # whether the model claims to be within 10 %
    prediction: Prediction

    @property
    def error(self) -> float:
        """In percent of what was measured; negative: too small."""
        return 100 * (self.predicted / self.measured - 1)


def validation_rows() -> list[ValidationRow]:
    """Every published row beside its prediction. ZeRO-3's is in `rivals.explained`."""
    rows = []
    for m in MEGATRON:
        for kind, measured in (("selective", m.selective_s), ("full", m.full_s)):
            prediction = _predict(m.model, m.run, full=kind == "full")
            row = (f"{m.name}, {kind} recomputation", m.run.name, "s per step", prediction.step_s, measured)
            rows.append(ValidationRow(*row, True, prediction))
    for run in LLAMA_RUNS:
        prediction = _predict(LLAMA, run)
        rate = run.rows * LLAMA.sequence / run.world_size / prediction.step_s
        row = ("LLaMA-65B, layout not published", run.name, "tokens/s per device", rate, LLAMA_TOKENS_PER_S)
        rows.append(ValidationRow(*row, False, prediction))
    return rows


def _predict(model: Transformer, run: Run, *, full: bool = False) -> Prediction:
    cluster = a100_pod(run.world_size)
    return predict(transformer_job(model, run, cluster, full=full), cluster)
