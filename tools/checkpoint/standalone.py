"""Copy a checkpoint with the frozen weights that it needs into one folder that needs no other.

    python tools/checkpoint/standalone.py --checkpoint runs/tiny --out moved
    python tools/checkpoint/standalone.py --checkpoint runs/tiny --step 100 --out moved
    python tools/checkpoint/standalone.py --checkpoint runs/tiny/checkpoints/step-00000100 --out weights --weights-only

Given a run folder it takes the newest complete checkpoint. Files are copied byte for byte and compared with their
checksums on the way: a damaged checkpoint is refused. `pretrain_atum.py checkpoint.load=moved` goes on from the copy,
and with `--weights-only`, which leaves optimizer and random state out, `checkpoint.init=weights` starts from it.
"""

import argparse
from pathlib import Path

from megatron_atum.checkpoint.command import run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder or checkpoint folder")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--step", type=int, help="step of a run folder (default: the newest complete one)")
    parser.add_argument("--weights-only", action="store_true", help="without the state of optimizer and random numbers")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    from megatron_atum.checkpoint.standalone import copy_standalone
    from megatron_atum.checkpoint.stored import find_checkpoint

    folder = find_checkpoint(options.checkpoint, options.step, print)
    copy_standalone(folder, options.out, weights_only=options.weights_only, progress=True)
    print(f"copied {folder} to {options.out}")


if __name__ == "__main__":
    run_command("standalone", main)
