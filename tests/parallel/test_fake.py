"""A rank whose world does not exist."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_atum.config.loader import load_config
from megatron_atum.parallel.device import hide_accelerators
from megatron_atum.parallel.fake import fake_world, is_fake, lone_rank
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


def alone(rank: int, world_size: int) -> dict[str, object]:
    """On real tensors: what the others would send is never what memory happened to hold."""
    from megatron.core.tensor_parallel import layers, mappings

    dist.destroy_process_group()
    places = [(dist, "reduce_scatter_tensor"), (dist, "batch_isend_irecv"), (dist, "all_gather_object")]
    places += [(module, "dist_reduce_scatter_func") for module in (layers, mappings)]
    before = [getattr(module, name) for module, name in places]
    whole = torch.arange(16.0)
    with lone_rank(5, 8):
        assert is_fake()
        assert all(getattr(module, name) is not old for (module, name), old in zip(places, before, strict=True))
        scattered, handle_of = torch.full((3, 2), torch.nan), []
        for part, (module, name) in zip(scattered, (places[0], *places[3:]), strict=True):
            handle_of.append(getattr(module, name)(part, whole, group=dist.group.WORLD, async_op=True))
        for handle in handle_of:
            handle.wait()
        gathered = torch.full((16,), torch.nan)
        dist.all_gather_into_tensor(gathered, torch.tensor([1.0, 2.0]))
        sent, received = torch.zeros(1000), torch.full((1000,), torch.nan, requires_grad=True)
        operations = [dist.P2POp(dist.isend, sent, 4), dist.P2POp(dist.irecv, received, 6)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    after = [getattr(module, name) for module, name in places]
    return {
        "reduce-scatter": scattered.tolist(),
        "gather": gathered.tolist(),
        "sent": sent.any().item(),
        "received": 0.8 < float(received.detach().std()) < 1.2 and received.requires_grad,
        "as before": [a is b for a, b in zip(before, after, strict=True)],
    }


def test_a_rank_alone_is_answered_with_its_own_values() -> None:
    assert run_distributed(alone, 1) == [
        {
            "reduce-scatter": [[10.0, 11.0]] * 3,
            "gather": [1.0, 2.0] * 8,
            "sent": False,
            "received": True,
            "as before": [True] * 5,
        }
    ]
