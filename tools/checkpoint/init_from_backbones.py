"""Make a first ATUM from a LLaMA and a CLIP.

    python tools/checkpoint/init_from_backbones.py --llama llama-7b --clip CLIP-ViT-H-14 --out atum-9b-start

Both folders are in Hugging Face format with safetensors. The result is an IDEFICS folder in the same format, from
which `pretrain_atum.py checkpoint.init=atum-9b-start` starts.
"""

import argparse
import sys
from pathlib import Path

import torch

from megatron_atum.checkpoint.backbones import Backbones
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.config.loader import preset
from megatron_atum.errors import AtumError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", required=True, type=Path, help="folder of a LlamaForCausalLM")
    parser.add_argument("--clip", required=True, type=Path, help="folder of a CLIPModel")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--preset", default="atum-9b", help="what the backbones do not say (default: %(default)s)")
    parser.add_argument("--seed", default=0, type=int, help="of the drawn weights (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options = parser.parse_args()
    backbones = Backbones(options.llama, options.clip, preset(options.preset))
    tensors = backbones.tensors(options.seed, getattr(torch, options.dtype))
    write_hf_folder(options.out, backbones.model, tensors)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    try:
        main()
    except AtumError as error:
        sys.exit(f"init_from_backbones: {error}")
