"""The released sizes: parameter counts, and the keys and shapes of their Hugging Face checkpoints."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_atum.checkpoint.hf_config import to_hf
from megatron_atum.checkpoint.table import hf_shapes
from megatron_atum.config.loader import preset
from megatron_atum.model.__main__ import main
from tests.distributed import run_distributed

ROOT = Path(__file__).parents[2]

TABLES = {
    "atum-80b": """\
part                        total        trainable           frozen
vision                630,766,080                0      630,766,080
perceiver             125,961,984      125,961,984                0
cross-attention    13,925,422,120   13,925,422,120                0
decoder            64,761,364,480                0   64,761,364,480
final norm                  8,192                0            8,192
embedding             262,144,000                0      262,144,000
head                  262,144,000                0      262,144,000
added                      32,768           32,768                0
total              79,967,843,624
trainable          14,051,416,872
frozen             65,916,426,752
on disk in bf16: 196.7 GB each checkpoint, 131.8 GB once
""",
    "atum-9b": """\
part                        total        trainable           frozen
vision                630,766,080                0      630,766,080
perceiver             125,961,984      125,961,984                0
cross-attention     1,434,519,568    1,434,519,568                0
decoder             6,476,267,520                0    6,476,267,520
final norm                  4,096                0            4,096
embedding             131,072,000                0      131,072,000
head                  131,072,000                0      131,072,000
added                      16,384           16,384                0
total               8,929,679,632
trainable           1,560,497,936
frozen              7,369,181,696
on disk in bf16: 21.8 GB each checkpoint, 14.7 GB once
""",
}


def count(rank: int, world_size: int, name: str) -> tuple[int, str]:
    """Exit code and output of the command, in a process of its own: it makes process groups."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = main(["--preset", name, "--count"])
    return code, output.getvalue()


@pytest.mark.parametrize("name", TABLES)
def test_a_preset_has_exactly_the_released_number_of_parameters(name: str) -> None:
    assert run_distributed(count, 1, name) == [(0, TABLES[name])]


def test_an_unknown_preset_is_one_line_and_exit_code_2() -> None:
    command = [sys.executable, "-m", "megatron_atum.model", "--preset", "atum-80", "--count"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: unknown model.preset 'atum-80'; did you mean 'atum-80b'?\n"


@pytest.mark.parametrize(("name", "keys"), [("atum-9b", 1015), ("atum-80b", 1603)])
def test_the_weight_table_has_the_keys_and_shapes_of_hugging_face(name: str, keys: int) -> None:
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    model = preset(name)
    with torch.device("meta"):
        state = IdeficsForVisionText2Text(IdeficsConfig(**to_hf(model))).state_dict()
    ours = hf_shapes(model)
    assert len(ours) == keys
    assert ours == {key: tuple(tensor.shape) for key, tensor in state.items()}
