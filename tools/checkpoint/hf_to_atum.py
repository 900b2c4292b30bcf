"""Import an IDEFICS folder in Hugging Face format as a checkpoint of this project, without training state.

    python tools/checkpoint/hf_to_atum.py --hf idefics-9b-instruct --out start
    python tools/checkpoint/hf_to_atum.py --hf idefics-80b --out start --dtype bf16

Safetensors and .bin files are read piece by piece, so memory does not grow with the model. `pretrain_atum.py
checkpoint.init=start` starts from the result at any layout; tokenizer and processor files come along, and
atum_to_hf.py gives them back.
"""

import argparse
from pathlib import Path

from megatron_atum.checkpoint.command import parse_dtype, run_command
from megatron_atum.checkpoint.files import refuse_existing
from megatron_atum.checkpoint.hf_folder import IdeficsFolder


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, type=Path, help="folder with config.json and weights")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--dtype", type=parse_dtype, help="bf16, fp16 or fp32 (default: each tensor as it is)")
    parser.add_argument("--standalone", action="store_true", help="frozen weights in the same folder as the others")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    from megatron_atum.checkpoint.assets import read_assets
    from megatron_atum.checkpoint.stored import write_weights

    refuse_existing(options.out)
    assets = read_assets(options.hf) if options.hf.is_dir() else {}
    with IdeficsFolder(options.hf, once=True) as folder:
        if folder.dropped:
            print(f"dropped {len(folder.dropped)} old keys that are computed today, such as {folder.dropped[0]}")
        how = {"dtype": options.dtype, "standalone": options.standalone, "assets": assets, "progress": True}
        write_weights(options.out, folder.model, folder, **how)
    print(f"wrote {options.out} from {options.hf}")


if __name__ == "__main__":
    run_command("hf_to_atum", main)
