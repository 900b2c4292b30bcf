"""What makes runs equal bit for bit is set, and what the user has set stays."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from megatron_atum.parallel.determinism import be_deterministic

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """This process goes on with other tests."""
    before = {name: os.environ.pop(name, None) for name in VARIABLES}
    cudnn = torch.backends.cudnn
    flags = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        os.environ.update({} if value is None else {name: value})
    torch.use_deterministic_algorithms(flags[0])
    cudnn.deterministic, cudnn.benchmark = flags[1:]


def test_flags_and_environment_are_set() -> None:
    torch.backends.cudnn.benchmark = True
    assert not torch.are_deterministic_algorithms_enabled()
    be_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "it must refuse, not warn"
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert [os.environ[name] for name in VARIABLES] == [":4096:8", "Ring"]


def test_what_the_user_has_set_stays() -> None:
    os.environ.update(CUBLAS_WORKSPACE_CONFIG=":16:8", NCCL_ALGO="Tree")
    be_deterministic()
    assert [os.environ[name] for name in VARIABLES] == [":16:8", "Tree"]
