"""A data set in an object store: indexed there, planned and read from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_atum.config.schema import DataConfig
from megatron_atum.data.indexing import Indexing, find_shards, index_shards, manifest_for
from megatron_atum.data.loader import StepLoader
from megatron_atum.data.storage import Storage
from megatron_atum.errors import DataError
from tests.data.conftest import VOCAB_SIZE
from tests.data.object_store import Proxy, proxy, server
from tests.data.test_loader import assert_equal, steps

__all__ = ["proxy", "server"]  # fixtures

MakeLoader = Callable[..., StepLoader]
MakeConfig = Callable[..., DataConfig]


@pytest.fixture(scope="module")
def uploaded(server: Proxy, tiny: Path) -> dict[str, str]:
    """The tiny data set in a bucket, with sidecars and manifests: manifest by kind."""
    storage, manifests = Storage(), {}
    for kind in ("documents", "pairs"):
        for path in tiny.glob(f"{kind}-*.tar"):
            storage.write(f"s3://shards/{kind}/{path.name}", path.read_bytes())
        shards = find_shards([f"s3://shards/{kind}/"])
        manifests[kind] = manifest_for(shards, None)
        index_shards(Indexing(kind=kind, tokenizer=str(tiny), vocab_size=VOCAB_SIZE), shards, manifests[kind])
    return manifests


@pytest.fixture
def remote(proxy: Proxy, uploaded: dict[str, str], data_config: MakeConfig) -> DataConfig:
    config = data_config()
    return replace(config, sources=[replace(source, shards=uploaded[source.kind]) for source in config.sources])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_local_files(
    remote: DataConfig, proxy: Proxy, make_loader: MakeLoader, data_config: MakeConfig, workers: int
) -> None:
    local = make_loader(data_config())
    loader = make_loader(replace(remote, workers=workers))
    assert loader.state_dict()["hash"] == local.state_dict()["hash"]
    for left, right in zip(steps(loader, 2), steps(local, 2), strict=True):
        assert_equal(left, right)
    of_tars = [path for method, path, _, _ in proxy.requests if method == "GET" and path.endswith(".tar")]
    assert of_tars and all(span for method, path, span, _ in proxy.requests if path in of_tars and method == "GET")


def test_errors_that_pass_leave_no_trace(remote: DataConfig, proxy: Proxy, make_loader: MakeLoader) -> None:
    expected = steps(make_loader(remote), 1)
    loader = make_loader(remote)
    loader._builder.storage.first_wait_s = 0.001
    proxy.failures[:] = ["503", "500", "503"]
    assert loader.next_step().faults == 0
    assert proxy.failures == [] and loader._builder.storage.retries >= 3
    for left, right in zip(expected, steps(make_loader(remote), 1), strict=True):
        assert_equal(left, right)


def test_an_object_that_is_gone_stops_the_run(remote: DataConfig, proxy: Proxy, make_loader: MakeLoader) -> None:
    loader = make_loader(remote)
    proxy.failures[:] = ["404"] * 50
    with pytest.raises(DataError, match=r"s3://shards/.*"):
        loader.next_step()
    proxy.failures.clear()
    assert torch.is_tensor(loader.next_step().microbatches[0].pixels)  # at the same step
    assert loader.state_dict()["packs"] == 8
