"""Make a first ATUM from a LLaMA and a CLIP.

    python tools/checkpoint/init_from_backbones.py --llama llama-7b --clip CLIP-ViT-H-14 --out atum-9b-start
    python tools/checkpoint/init_from_backbones.py --llama llama-65b --clip CLIP-ViT-H-14 --out atum-80b-start \\
        --preset atum-80b --format atum

Both folders are in Hugging Face format; the rest of the model is drawn from the seed. `pretrain_atum.py
checkpoint.init=atum-9b-start` starts from the result: an IDEFICS folder in Hugging Face format, or with `--format
atum` a checkpoint of this project. Weights pass piece by piece, so memory does not grow with the model.
"""

import argparse
from pathlib import Path

from megatron_atum.checkpoint.backbones import Backbones
from megatron_atum.checkpoint.command import parse_dtype, run_command
from megatron_atum.checkpoint.files import refuse_existing
from megatron_atum.config.loader import preset


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", required=True, type=Path, help="folder of a LlamaForCausalLM")
    parser.add_argument("--clip", required=True, type=Path, help="folder of a CLIPModel")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--preset", default="atum-9b", help="what the backbones do not say (default: %(default)s)")
    parser.add_argument("--seed", default=0, type=int, help="of the drawn weights (default: %(default)s)")
    parser.add_argument("--dtype", default="bf16", type=parse_dtype, help="bf16, fp16, fp32 (default: %(default)s)")
    parser.add_argument("--format", default="hf", choices=("hf", "atum"), help="of the result (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    refuse_existing(options.out)
    with Backbones(options.llama, options.clip, preset(options.preset), options.seed, options.dtype) as backbones:
        if options.format == "atum":
            from megatron_atum.checkpoint.stored import write_weights

            write_weights(options.out, backbones.model, backbones, assets=backbones.assets(), progress=True)
        else:
            from megatron_atum.checkpoint.hf_export import write_hf_folder

            write_hf_folder(options.out, backbones.model, backbones, assets=backbones.assets(), progress=True)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command("init_from_backbones", main)
