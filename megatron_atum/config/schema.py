"""Every key a user can set, with its default. `loader.py` fills these, `validate.py` checks them.

Comments after a field are its help text: `pretrain_atum.py --help` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _list(*items: Any) -> Any:
    return field(default_factory=lambda: list(items))


@dataclass
class VisionConfig:
    """CLIP vision transformer (HF: vision_config)."""

    embed_dim: int = 1280
    image_size: int = 224
    patch_size: int = 14
    intermediate_size: int = 5120
    num_heads: int = 16
    num_layers: int = 32
    num_channels: int = 3
    norm_eps: float = 1e-5
    hidden_act: str = "gelu"  # gelu (exact erf) | quick_gelu | gelu_pytorch_tanh
    interpolate_positions: bool = False  # take other image sizes (inference; training resizes)


@dataclass
class PerceiverConfig:
    """Perceiver resampler (HF: perceiver_config)."""

    depth: int = 6
    num_heads: int = 16
    head_dim: int = 96
    num_latents: int = 64
    qk_norm: bool = True


@dataclass
class FreezeConfig:
    """What does not train. Cross-attention, perceiver and added vocabulary always do."""

    text: bool = True  # decoder layers, final norm and the base embedding
    vision: bool = True
    lm_head: bool = True
    text_exceptions: list[str] = _list()  # module kinds that stay trainable: LayerNorm | Linear | Embedding
    vision_exceptions: list[str] = _list()


@dataclass
class ModelConfig:
    preset: str = "atum-9b"  # tiny | atum-9b | atum-80b: the values every other key starts from
    vocab_size: int = 32000
    additional_vocab_size: int = 2  # rows of the decoupled embedding and head
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    cross_layer_interval: int = 4  # a gated cross-attention layer stands before every n-th decoder layer
    qk_norm: bool = True  # RMS norm of queries and keys in cross-attention
    alpha_type: str = "float"  # float: one gate per layer | vector: one per channel
    alpha_init: float = 0.0  # value every gate starts from
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    vision: VisionConfig = field(default_factory=VisionConfig)
    perceiver: PerceiverConfig = field(default_factory=PerceiverConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)


@dataclass
class ParallelConfig:
    tensor: int = 1  # ranks that share each layer's matrices; keep them inside a node
    pipeline: int = 1  # stages the decoder is cut into
    virtual_pipeline: int = 1  # chunks per stage (interleaved schedule)
    sequence: bool = True  # split norms and residuals over the sequence where tensor > 1
    units_per_chunk: list[int] | None = None  # units (cross-attention + its decoder layers) of each chunk, in order


FILTERS = (  # m4 training/packing.py: split_pack_and_pad_webdocs
    "special_token_in_text",  # spelt out as ordinary text where it is not filtered
    "no_image",
    "ends_with_two_images",
    "three_consecutive_images",
    "only_image_last",  # no text can see it
    "few_tokens",
)


@dataclass
class SourceConfig:
    name: str = "???"
    shards: str = "???"  # manifest.json of tools/data/index.py, or a glob of WebDataset shards; local or s3://
    weight: float | None = None  # share of tokens, relative to the other sources; default: that of data.mixture
    epochs: float | None = None  # how often data.mixture=by_tokens counts the source's tokens (default 1)
    kind: str = "documents"  # documents | pairs | conversations
    max_images: int = 70  # most images in one packed row
    filters: list[str] | None = None  # instead of data.filters


@dataclass
class DataConfig:
    sources: list[SourceConfig] = _list()
    validation: list[SourceConfig] = _list()  # held out: read in one fixed order, without augmentation
    validation_packs: int = 256  # rows of each validation source
    tokenizer: str | None = None  # sentencepiece tokenizer.model, or the folder it lies in
    sequence_length: int = 1024
    mixture: str = "published"  # published | draft_card | instruct | by_tokens: weights of sources that set none
    loss_on: str = "all"  # all | assistant: the turns of conversations that count in the loss
    filters: list[str] = _list(*FILTERS)  # samples that are dropped, and counted; faulty ones always are
    shuffle_samples: int = 131072  # samples of a source that are shuffled together (whole shards)
    p_next: float = 0.0  # probability that the tokens of a row of documents see the next image, not the previous one
    image_at_end: float = 0.0  # probability that the caption of a pair stands before its image
    augment: bool = True  # random resized crop of training images (scale 0.9-1.0)
    draft: bool = False  # decode large JPEGs at a lower resolution, still at least twice the model's
    workers: int = 2  # decoding processes per rank; 0 decodes in the training process
    max_fault_rate: float = 0.01  # the run stops when more samples or images of a source than this are broken
    on_missing_shard: str = "stop"  # stop | skip: images of a shard that is gone are treated as broken ones
    on_change: str = "error"  # error | restart | continue: when the data of a resumed run are not the checkpoint's


@dataclass
class ParameterGroupConfig:
    """Weights with a learning rate or weight decay of their own."""

    match: str = "???"  # Hugging Face names, with * and ?, e.g. model.perceiver_resampler.*
    lr_scale: float = 1.0  # factor on optimizer.lr and optimizer.min_lr
    weight_decay_scale: float | None = None  # factor on optimizer.weight_decay; default: by optimizer.weight_decay_rule


@dataclass
class OptimizerConfig:
    lr: float = 5e-5
    min_lr: float = 0.0  # learning rate at the end of decay_steps
    warmup_steps: int = 2000
    decay_steps: int = 500_000
    schedule: str = "linear"  # linear | cosine | constant | wsd (constant, then a fall)
    wsd_steps: int = 0  # length of the fall of schedule=wsd; it ends at decay_steps
    wsd_style: str = "linear"  # linear | cosine | exponential | minus_sqrt: form of that fall
    weight_decay: float = 0.1
    weight_decay_rule: str = "idefics"  # idefics: by the original's list of name parts | clean: matrices only
    groups: list[ParameterGroupConfig] = _list()  # the first that matches a weight counts
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0  # global gradient norm; 0 turns clipping off
    distributed: bool = True  # shard optimizer state over data-parallel ranks
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool | None = None  # gather updated weights in the next forward; default: with an accelerator
    bucket_size: int | None = None  # values per gradient bucket that is reduced on its own; default megatron-core's


@dataclass
class RampUpConfig:
    """Global batch size in steps of equal length, from `start` to training.global_batch_size."""

    start: int = 0  # packed rows of the first steps; 0: no ramp-up
    increment: int = 0  # packed rows added each time
    rows: int = 0  # packed rows after which training.global_batch_size is reached


@dataclass
class TrainingConfig:
    steps: int = 200_000
    micro_batch_size: int = 1  # packed rows per microbatch
    global_batch_size: int = 3584  # packed rows per step, over all data-parallel ranks
    seed: int = 42
    precision: str = "auto"  # auto (bf16 with CUDA, fp32 without) | bf16 | fp32
    loss_normalization: str = "tokens"  # tokens: global token mean | idefics: mean of microbatch means
    z_loss: float = 1e-3  # weight of mean(logsumexp^2); 0 turns it off
    ramp_up: RampUpConfig = field(default_factory=RampUpConfig)
    recompute: str = "none"  # none | selective (attention and MLP products) | full (whole layers)
    recompute_method: str = (
        "uniform"  # uniform: all, in groups of recompute_layers | block: only the first ones of a chunk
    )
    recompute_layers: int = 1  # decoder layers, each with the cross-attention in front of it
    deterministic: bool = False  # two runs give the same bits, also with an accelerator
    validate_every: int = 0  # steps between losses of data.validation; 0 never


@dataclass
class CheckpointConfig:
    save_every: int = 250  # steps between checkpoints; 0 saves only at the end
    load: str | None = "latest"  # latest (of this run) | a checkpoint or an IDEFICS folder in HF format | none
    init: str | None = None  # weights to start from when there is nothing to load: a checkpoint or an IDEFICS folder
    keep: int = 2  # newest checkpoints kept; 0 keeps all
    keep_every: int = 0  # checkpoints whose step is a multiple of it are kept for ever; 0 keeps none of them
    asynchronous: bool = True  # training waits for the copy into host memory only, and files are written beside it
    verify: bool = True  # compare all files with their checksums before going on from a checkpoint


@dataclass
class KernelsConfig:
    backend: str = "torch"  # torch | te: Transformer Engine's layers, experimental
    frozen_gemm: str = "bf16"  # bf16: as training.precision | fp8: products of frozen weights in 8 bits, cast once
    adam: str = "torch"  # torch | te | apex: whose AdamW steps


@dataclass
class HealthConfig:
    max_bad_steps: int = 5  # steps in a row with a non-finite loss or gradient (never applied) until the run stops
    spike: str = "log"  # log | skip_data (the step is not applied) | rollback: what a loss spike leads to
    spike_threshold: float = 8.0  # deviations above the median of a source's last losses (robust z-score)
    spike_window: int = 128  # losses of each source that the median is taken of; half of them before any judgement
    spike_steps: int = 3  # spikes in a row until spike=rollback acts
    max_rollbacks: int = 3  # the next spike stops the run
    rollback_skip: int = 0  # steps of data left out beyond the spike
    rollback_lr_scale: float = 1.0  # factor on all learning rates from a rollback on
    checksum_every: int = 500  # steps between comparisons of the frozen weights over data-parallel ranks; 0 never
    start_timeout_s: float = 1800.0  # of a collective until the first step is done
    step_timeout_s: float = 600.0  # and after it
    dry_step: str = "auto"  # auto (with an accelerator) | always | never: try the largest batch before the first step


@dataclass
class LoggingConfig:
    root: str = "runs"
    run: str = "default"  # the run folder is root/run
    every: int = 1  # steps between printed lines
    progress: bool = True  # progress bar on a terminal
    detail_every: int = 100  # steps between gates and norms of every layer in the metrics; 0 never
    tensorboard: bool = False  # write RUN/tensorboard
    wandb: str = "disabled"  # disabled | offline | online: Weights & Biases
    wandb_project: str = "atum"
    wandb_entity: str | None = None  # team; default: the user's own
    profile_start: int = 0  # first step of a torch profiler trace (RUN/profile); 0 none
    profile_steps: int = 2  # steps of it
    profile_ranks: list[int] = _list(0)


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
