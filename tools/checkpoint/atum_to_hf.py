"""Export a checkpoint to Hugging Face format, for IdeficsForVisionText2Text.from_pretrained.

    python tools/checkpoint/atum_to_hf.py --checkpoint runs/tiny --out exported
    python tools/checkpoint/atum_to_hf.py --checkpoint runs/tiny/checkpoints/step-00000100 --out exported

Given a run folder it takes the newest complete checkpoint. With the run's tokenizer at hand the processor files are
written too.
"""

import argparse
import sys
from pathlib import Path

from megatron_atum.checkpoint.hf_export import DEFAULT_SHARD_BYTES, checkpoint_tensors, write_hf_folder
from megatron_atum.checkpoint.processor import write_processor
from megatron_atum.checkpoint.run_state import newest_complete, read_state, step_folder
from megatron_atum.errors import AtumError, CheckpointError


def find_checkpoint(path: Path, step: int | None) -> Path:
    """A step folder, from a step folder or a run folder."""
    if not (path / "checkpoints").is_dir():
        return path
    found = newest_complete(path / "checkpoints", print) if step is None else step_folder(path / "checkpoints", step)
    if found is None:
        raise CheckpointError(f"{path}/checkpoints holds no complete checkpoint")
    return found


def find_tokenizer(given: Path | None, recorded: str | None) -> Path | None:
    for path in (given, Path(recorded) if recorded else None):
        if path is not None:
            file = path / "tokenizer.model" if path.is_dir() else path
            if file.exists():
                return file
            if given is not None:
                raise CheckpointError(f"{file} does not exist")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder or step folder")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--step", type=int, help="step to export from a run folder (default: the newest)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model (default: the one the run was trained with)")
    parser.add_argument("--max-shard-gb", type=float, default=DEFAULT_SHARD_BYTES / 1e9, help="default: %(default)s")
    options = parser.parse_args()
    state = read_state(find_checkpoint(options.checkpoint, options.step))
    tokenizer = find_tokenizer(options.tokenizer, state.config["data"]["tokenizer"])
    shard_bytes = int(options.max_shard_gb * 1e9)

    def write_more(folder: Path) -> None:
        if tokenizer is None:
            print("no tokenizer found: processor files are not written (give --tokenizer)")
        else:
            write_processor(folder, tokenizer, state.model)

    write_hf_folder(options.out, state.model, checkpoint_tensors(state), shard_bytes, write_more)
    print(f"wrote {options.out} from {state.folder}")


if __name__ == "__main__":
    try:
        main()
    except AtumError as error:
        sys.exit(f"atum_to_hf: {error}")
