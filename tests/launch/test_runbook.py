"""docs/cluster-runbook.md quotes what the program says, and names keys and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_atum.config.loader import key_names

ROOT = Path(__file__).parents[2]
TEXT = " ".join((ROOT / "docs" / "cluster-runbook.md").read_text().split())

# What the page quotes, by the file that prints it.
QUOTED = [
    ("parallel/liveness.py", "has not got on for"),
    ("parallel/liveness.py", "Look first at"),
    ("parallel/liveness.py", "says nothing: dead, or hanging"),
    ("parallel/liveness.py", "no progress for"),
    ("parallel/liveness.py", "its process or node is gone"),
    ("parallel/liveness.py", "failed after step"),
    ("parallel/groups.py", "nccl-flight-record-rank-"),
    ("parallel/agreement.py", "start differently:"),
    ("training/self_check.py", "the largest microbatch ("),
    ("training/self_check.py", "optimizer states included"),
    ("training/self_check.py", "; GiB:"),
    ("training/trainer.py", "stopped after step"),
    ("training/trainer.py", "training goes on; the checkpoint before it is as it was"),
    ("training/trainer.py", "save_failed"),
    ("checkpoint/run_checkpoint.py", "could not be written: rank"),
    ("training/metrics.py", "grad norm"),
    ("launch/environment.py", "libfabric must not offer NCCL its TCP provider where EFA does not work"),
    ("launch/environment.py", "between nodes NCCL can only use TCP"),
]


@pytest.mark.parametrize(("file", "quote"), QUOTED, ids=[quote for _, quote in QUOTED])
def test_quotes_are_what_the_program_says(file: str, quote: str) -> None:
    assert quote in TEXT, "the page does not quote it; take it off the list"
    assert quote in (ROOT / "megatron_atum" / file).read_text()


def test_keys_and_files_exist() -> None:
    names = re.findall(r"`((?:health|checkpoint|data|training|parallel|logging)\.\w+)", TEXT)
    assert len(names) > 3 and set(names) <= set(key_names())
    files = re.findall(r"(?:tools|examples)/[\w./-]+\.(?:py|yaml)", TEXT)
    files += [f"docs/{name}" for name in re.findall(r"\]\(([\w-]+\.md)\)", TEXT)]
    missing = [name for name in files if not (ROOT / name).exists()]
    assert len(files) > 10 and not missing, missing


def test_the_ten_failures_are_there() -> None:
    assert len(re.findall(r"\*\*[A-Z][\w ]+\.\*\* ", TEXT.partition("## The ten failures")[2])) == 10
