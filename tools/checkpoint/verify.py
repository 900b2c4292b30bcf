"""Check that a checkpoint and a Hugging Face folder are the same model: weights bit for bit, and logits side by side.

    python tools/checkpoint/verify.py --hf idefics-9b --checkpoint start
    python tools/checkpoint/verify.py --hf exported --checkpoint runs/tiny --step 100 --tensor 2 --pipeline 2
    python tools/checkpoint/verify.py --hf exported --checkpoint runs/tiny --dtype bf16 --tokens 512 --images 8

Weights are compared in pieces. Then transformers' model, and after it this project's, one process per rank, compute
the logits of the same random tokens and images on the CPU; the last row is text only. In fp32, the default, weights of
any dtype are taken as they are; the memory is that of one model at a time. Gates that are zero everywhere, as in a new
model, would hide the images: both models then run with gates of 0.5.

Logits are the same if no difference is larger than the tolerance times the largest logit: 1e-4 in fp32, where sums in
another order make differences of about 1e-6, and 0.05 in bf16, which has 8 bits.

Exit codes: 0 the same, 1 a weight or the logits differ, 2 wrong use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_atum.checkpoint.command import run_command

if TYPE_CHECKING:
    from megatron_atum.checkpoint.hf_folder import IdeficsFolder
    from megatron_atum.checkpoint.stored import StoredCheckpoint
    from megatron_atum.training.verify import Job, LogitReport, WeightReport

MOST = 20  # tensors that are named


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, type=Path, help="model folder in Hugging Face format")
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder or checkpoint folder")
    parser.add_argument("--step", type=int, help="step of a run folder (default: the newest complete one)")
    layout = parser.add_argument_group("layout of this project's model")
    layout.add_argument("--tensor", type=_positive, default=1, help="tensor ranks (default: %(default)s)")
    layout.add_argument("--pipeline", type=_positive, default=1, help="pipeline stages (default: %(default)s)")
    layout.add_argument("--virtual", type=_positive, default=1, help="chunks of a stage (default: %(default)s)")
    sequence = "sequence parallel where tensor > 1 (default: on)"
    layout.add_argument("--sequence", action=argparse.BooleanOptionalAction, default=True, help=sequence)
    inputs = parser.add_argument_group("input and comparison")
    inputs.add_argument("--tokens", type=_positive, default=64, help="of a row (default: %(default)s)")
    inputs.add_argument("--images", type=_positive, default=3, help="of a row with images (default: %(default)s)")
    inputs.add_argument("--rows", type=_positive, default=2, help="the last of several has no image (default: 2)")
    inputs.add_argument("--seed", type=int, default=0, help="of the input (default: %(default)s)")
    inputs.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of both models (default: fp32)")
    inputs.add_argument("--tolerance", type=float, help="relative to the largest logit (default: 1e-4, bf16 0.05)")
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def main() -> None:
    options = parse_arguments()
    from megatron_atum.checkpoint.hf_folder import IdeficsFolder
    from megatron_atum.checkpoint.stored import open_checkpoint
    from megatron_atum.training import verify

    ours = open_checkpoint(options.checkpoint, options.step)
    batch = verify.random_batch(ours.model, options.rows, options.tokens, options.images, options.seed)
    layout = {key: getattr(options, key) for key in ("tensor", "pipeline", "virtual", "sequence")}
    config = verify.run_config(ours.model, batch, precision=options.dtype, **layout)
    with IdeficsFolder(options.hf) as theirs:
        print(f"Hugging Face  {options.hf}\ncheckpoint    {ours.folder}", flush=True)
        check_models(theirs, ours)
        weights = weights_of(theirs, ours)
        gates = verify.closed_gates([theirs, ours])
    logits = logits_of(options.hf, verify.Job(ours.folder, config, batch, gates))
    tolerance = verify.TOLERANCES[options.dtype] if options.tolerance is None else options.tolerance
    print("\n".join(logit_lines(logits, tolerance)))
    finish(not weights.different and logits.within(tolerance))


def finish(same: bool) -> None:
    print("\nTHE SAME" if same else "\nNOT THE SAME")
    sys.exit(0 if same else 1)


def check_models(theirs: IdeficsFolder, ours: StoredCheckpoint) -> None:
    """Tensors of other shapes, or another epsilon, leave nothing to compare."""
    from megatron_atum.checkpoint.hf_folder import check_same_model
    from megatron_atum.errors import CheckpointError

    try:
        check_same_model(str(theirs.path), theirs.model, ours.model)
    except CheckpointError as error:
        print(error)
        finish(False)


def weights_of(theirs: IdeficsFolder, ours: StoredCheckpoint) -> WeightReport:
    from tqdm import tqdm

    from megatron_atum.checkpoint.table import hf_shapes
    from megatron_atum.training.verify import compare_weights

    total = sum(ours.reader.index[name].size for name in hf_shapes(ours.model))
    with tqdm(total=total, desc="comparing weights", unit="B", unit_scale=True) as bar:
        report = compare_weights(theirs, ours, bar.update)
    print("\n".join(weight_lines(report)), flush=True)
    return report


def weight_lines(report: WeightReport) -> Iterator[str]:
    yield f"\nweights: {report.tensors} tensors compared bit for bit, {len(report.different)} differ"
    for name, worst in list(report.different.items())[:MOST]:
        yield f"  {name}: differs by up to {worst:.3g}" if worst else f"  {name}: a zero has another sign"
    if len(report.different) > MOST:
        yield f"  and {len(report.different) - MOST} more"
    if report.converted:
        kinds = ", ".join(sorted(set(report.converted.values())))
        yield (
            f"  {len(report.converted)} have other dtypes in the two ({kinds}) and were compared in the smaller one; "
            "the logits differ by as much as it rounds: --tolerance says how much is allowed"
        )


def logits_of(hf: Path, job: Job) -> LogitReport:
    """Of both models, one after the other."""
    from megatron_atum.training import verify

    if job.open_gates:
        kinds = " and ".join(job.open_gates)
        print(
            f"\nwarning: all gates {kinds} are zero, which hides what they gate; logits are compared with "
            f"{verify.OPEN_GATE} in both models"
        )
    parallel = job.config.parallel
    print(f"\nlogits in {job.config.training.precision}: transformers ...", flush=True)
    theirs = verify.hf_logits(hf, job.batch, verify.DTYPES[job.config.training.precision], job.open_gates)
    print(f"this project, tensor {parallel.tensor}, pipeline {parallel.pipeline} ...", flush=True)
    return verify.compare_logits(theirs, verify.our_logits(job), job.batch)


def logit_lines(report: LogitReport, tolerance: float) -> Iterator[str]:
    yield f"\n{'row':>5}{'images':>8}{'max difference':>17}{'mean difference':>17}{'same top word':>16}"
    for number, row in enumerate(report.rows):
        yield f"{number:5}{row.images:8}{row.largest:17.3g}{row.mean:17.3g}{row.agreement:16.1%}"
    yield f"\n{'row':>5}{'token':>8}{'word':>8}{'Hugging Face':>17}{'this project':>17}"
    for number, row in enumerate(report.rows):
        for token, word, theirs, ours in row.samples:
            yield f"{number:5}{token:8}{word:8}{theirs:17.6f}{ours:17.6f}"
    verdict = "the same" if report.within(tolerance) else "NOT the same"
    yield (
        f"\nlogits are {verdict}: they differ by up to {report.largest:.3g}, and "
        f"{tolerance:g} x {report.scale:.4g} = {tolerance * report.scale:.3g} is allowed"
    )


if __name__ == "__main__":
    run_command("verify", main)
