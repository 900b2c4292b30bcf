"""Export a checkpoint to Hugging Face format, for IdeficsForVisionText2Text and AutoProcessor.

    python tools/checkpoint/atum_to_hf.py --checkpoint runs/tiny --out exported
    python tools/checkpoint/atum_to_hf.py --checkpoint runs/tiny --step 100 --out exported --max-shard-size 2GB
    python tools/checkpoint/atum_to_hf.py --checkpoint runs/tiny/checkpoints/step-00000100 --out exported --dtype bf16

Given a run folder it takes the newest complete checkpoint. Weights pass piece by piece, so memory does not grow with
the model. Tokenizer and processor files are those the model came with; where it came without, they are made from the
tokenizer.model it was trained with, or the one that is given.
"""

import argparse
from pathlib import Path

from megatron_atum.checkpoint.command import parse_dtype, parse_size, run_command
from megatron_atum.checkpoint.files import refuse_existing
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.config.schema import ModelConfig
from megatron_atum.data.tokenizer import FILE_NAME
from megatron_atum.errors import CheckpointError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder, checkpoint folder or imported one")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--step", type=int, help="step to export from a run folder (default: the newest)")
    parser.add_argument("--max-shard-size", type=parse_size, default="5GB", help="of a file (default: %(default)s)")
    parser.add_argument("--dtype", type=parse_dtype, help="bf16, fp16 or fp32 (default: each tensor as it is)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model (default: that of the model)")
    return parser.parse_args()


def find_tokenizer(given: Path | None, assets: dict[str, bytes], recorded: str | None) -> Path | bytes | None:
    """The file that is given, what came with the weights, or the file that the run was trained with."""
    if given is None and FILE_NAME in assets:
        return assets[FILE_NAME]
    path = given or (Path(recorded) if recorded else None)
    file = path / FILE_NAME if path is not None and path.is_dir() else path
    if given is not None and file is not None and not file.is_file():
        raise CheckpointError(f"--tokenizer: {file} does not exist")
    return file if file is not None and file.is_file() else None


def add_processor(folder: Path, tokenizer: Path | bytes | None, given: bool, model: ModelConfig) -> None:
    """Processor files, unless the model came with them and no other tokenizer is given."""
    from megatron_atum.checkpoint.processor import has_processor, write_processor

    if has_processor(folder) and not given:
        return
    if tokenizer is None:
        print("no tokenizer found: processor files are not written (give --tokenizer)")
    else:
        write_processor(folder, tokenizer, model)


def main() -> None:
    options = parse_arguments()
    from megatron_atum.checkpoint.stored import open_checkpoint

    refuse_existing(options.out)
    checkpoint = open_checkpoint(options.checkpoint, options.step, once=True)
    state = checkpoint.state
    recorded = state.config.get("data", {}).get("tokenizer")
    tokenizer = find_tokenizer(options.tokenizer, checkpoint.assets, recorded)
    write_hf_folder(
        options.out,
        state.model,
        checkpoint,
        dtype=options.dtype,
        shard_bytes=options.max_shard_size,
        assets=checkpoint.assets,
        write_more=lambda folder: add_processor(folder, tokenizer, options.tokenizer is not None, state.model),
        progress=True,
    )
    print(f"wrote {options.out} from {checkpoint.folder}")


if __name__ == "__main__":
    run_command("atum_to_hf", main)
