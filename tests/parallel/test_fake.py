"""A rank whose world does not exist."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_atum.config.loader import load_config
from megatron_atum.parallel.device import hide_accelerators
from megatron_atum.parallel.fake import fake_world, is_fake
from megatron_atum.parallel.groups import build_groups
from megatron_atum.parallel.layout import ParallelLayout
from tests.distributed import run_distributed


def played(rank: int, world_size: int) -> dict[str, object]:
    hide_accelerators()
    assert not is_fake()
    dist.destroy_process_group()
    config = load_config(None, ["parallel.tensor=8", "parallel.pipeline=4", "training.global_batch_size=16"])
    found: dict[str, object] = {}
    for number in (37, 511):  # one after the other in one process
        with fake_world(number, 512) as world:
            assert is_fake()
            groups = build_groups(ParallelLayout.from_config(config, 512))
            with world.tensors():
                big = torch.empty(1 << 40)  # 4 TiB
                dist.all_reduce(big, group=groups.data)
                told: list[object] = [None] * 16
                dist.all_gather_object(told, number, group=groups.data)
            found[str(number)] = (groups.pipeline_rank, groups.data_rank, groups.tensor_rank, told == [number] * 16)
            found[f"backends of {number}"] = {dist.get_backend(groups.host), dist.get_backend(groups.control)}
        assert not dist.is_initialized()
    found["gather is torch's again"] = dist.all_gather_object.__module__.startswith("torch")
    return found


def test_any_rank_in_one_process() -> None:
    (found,) = run_distributed(played, 1)
    assert found == {
        "37": (0, 4, 5, True),
        "511": (3, 15, 7, True),
        "backends of 37": {"fake"},
        "backends of 511": {"fake"},
        "gather is torch's again": True,
    }


def mixed(rank: int, world_size: int) -> bool:
    """Tensors of an earlier block are those of a later one: a copy would take their memory twice."""
    hide_accelerators()
    dist.destroy_process_group()
    with fake_world(0, 2) as world:
        with world.tensors():
            before = torch.zeros(8)
        with world.tensors():
            return before.add_(1).untyped_storage()._cdata == before.untyped_storage()._cdata


def test_blocks_share_their_tensors() -> None:
    assert run_distributed(mixed, 1) == [True]
