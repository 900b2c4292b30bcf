"""What a preset is made of: `python -m megatron_atum.model --preset atum-80b --count`.

The whole model is built as one stage without allocating a weight, so any preset can be counted on any machine.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from dataclasses import dataclass

from megatron_atum.config.loader import preset
from megatron_atum.config.presets import PRESETS
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import AtumError
from megatron_atum.parallel.device import hide_accelerators

PARTS = {  # part: how the names of its parameters start
    "vision": r"vision\.",
    "perceiver": r"perceiver\.",
    "cross-attention": r"cross_attention_layers\.",
    "decoder": r"decoder_layers\.",
    "final norm": r"final_norm\.",
    "embedding": r"embedding\.base\.",
    "head": r"head\.base\.",
    "added": r"(embedding|head)\.added\.",
}
# In a checkpoint of bf16 training: weight, fp32 copy, two moments; and weight alone.
BYTES_TRAINABLE, BYTES_FROZEN = 2 + 4 + 2 * 4, 2


@dataclass
class Count:
    """Number of parameters."""

    trainable: int = 0
    frozen: int = 0

    @property
    def total(self) -> int:
        return self.trainable + self.frozen


def count(model: ModelConfig) -> dict[str, Count]:
    """Parameters of each part, in the order of `PARTS`, with the freezing of the configuration."""
    hide_accelerators()  # megatron-core would put the weights on one
    warnings.filterwarnings("ignore", module=r"megatron\.core")  # that optional kernels are not installed
    import torch

    from megatron_atum.model.stage import AtumStage
    from megatron_atum.parallel.groups import build_groups, start_distributed, stop_distributed
    from megatron_atum.parallel.layout import ParallelLayout

    start_distributed()
    units = model.num_layers // model.cross_layer_interval
    groups = build_groups(ParallelLayout(world_size=1, units_per_chunk=(units,)))
    with torch.device("meta"):
        stage = AtumStage(model, groups, groups.chunks[0], torch.bfloat16)
    counts = {part: Count() for part in PARTS}
    for name, parameter in stage.named_parameters():
        part = counts[part_of(name)]
        if parameter.requires_grad:
            part.trainable += parameter.numel()
        else:
            part.frozen += parameter.numel()
    stop_distributed()
    return counts


def part_of(name: str) -> str:
    return next(part for part, pattern in PARTS.items() if re.match(pattern, name))


def table(counts: dict[str, Count]) -> str:
    """One line per part, then the sums, digits grouped by commas."""
    whole = Count(sum(c.trainable for c in counts.values()), sum(c.frozen for c in counts.values()))
    lines = [f"{'part':16}{'total':>17}{'trainable':>17}{'frozen':>17}"]
    lines += [f"{part:16}{c.total:17,}{c.trainable:17,}{c.frozen:17,}" for part, c in counts.items()]
    sums = {"total": whole.total, "trainable": whole.trainable, "frozen": whole.frozen}
    lines += [f"{name:16}{number:17,}" for name, number in sums.items()]
    each, once = whole.trainable * BYTES_TRAINABLE, whole.frozen * BYTES_FROZEN
    return "\n".join([*lines, f"on disk in bf16: {each / 1e9:.1f} GB each checkpoint, {once / 1e9:.1f} GB once"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_atum.model", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", required=True, metavar="NAME", help=", ".join(PRESETS))
    parser.add_argument("--count", action="store_true", required=True, help="print the parameters of each part")
    options = parser.parse_args(arguments)
    try:
        print(table(count(preset(options.preset))))
    except AtumError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
