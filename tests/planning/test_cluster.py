"""Cluster descriptions: the built-in ones, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_atum.errors import ConfigError
from megatron_atum.planning.cluster import FOLDER, built_in, load_cluster

NAMES = ("dgx-h100", "laptop", "p4d", "p4de", "p5", "p5en")
P4DE = (FOLDER / "p4de.yaml").read_text()


def test_the_built_in_clusters() -> None:
    assert built_in() == NAMES
    for name in NAMES:
        cluster = load_cluster(name)
        assert cluster.name == name
        assert cluster.world_size == cluster.nodes * cluster.devices_per_node
        assert cluster.device.peak_flops * cluster.device.gemm_efficiency < cluster.device.peak_flops


def test_published_figures() -> None:
    p4de, p4d, p5 = load_cluster("p4de"), load_cluster("p4d"), load_cluster("p5")
    assert p4de.network.bytes_per_s == p4d.network.bytes_per_s == 340e9 / 8
    assert (p4de.device.peak_flops, p5.device.peak_flops) == (312e12, 989e12)
    assert p4d.device.memory_gib < 40 < p4de.device.memory_gib < 80


def test_a_number_of_nodes() -> None:
    assert load_cluster("p4de-64").world_size == 512
    assert load_cluster("p4de-3").world_size == 24
    assert load_cluster("dgx-h100-2").nodes == 2
    assert load_cluster("laptop").world_size == 4


def test_places() -> None:
    cluster = load_cluster("p4de-2")
    assert [cluster.node_of(rank) for rank in (0, 7, 8, 15)] == [0, 0, 1, 1]
    assert not cluster.crosses_nodes(range(8))
    assert cluster.crosses_nodes((7, 8))
    assert not cluster.crosses_nodes(())


def test_every_number_says_where_it_comes_from() -> None:
    plain = ("name:", "nodes:", "devices_per_node:")
    for name in NAMES:
        for line in (FOLDER / f"{name}.yaml").read_text().splitlines():
            key, _, value = line.strip().partition(" ")
            if value and not line.startswith("#") and key.endswith(":") and key not in plain:
                assert "#" in line, f"{name}: {line}"


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(P4DE.replace("nodes: 64", "nodes: 5").replace("42.5e9", "100000000000"))
    cluster = load_cluster(str(path))
    assert (cluster.nodes, cluster.network.bytes_per_s) == (5, 100e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p6", "unknown cluster 'p6'"),
        ("nothing-like-it", "known: dgx-h100, laptop, p4d, p4de, p5"),
        ("p4de-0", "unknown cluster 'p4de-0'; did you mean 'p4de'?"),
        ("p4de-many", "p4de-many"),
        ("missing.yaml", "cannot read cluster file missing.yaml"),
    ],
)
def test_an_unknown_cluster(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_cluster(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nodes: 64", "nodes: 64\nracks: 2", "unknown key 'racks'"),
        ("  latency_s: 30e-6", "  latency: 30e-6", "unknown key 'network.latency'; did you mean 'network.latency_s'?"),
        ("nodes: 64", "", "nodes is not set"),
        ("  peak_flops: 312e12", "", "device.peak_flops is not set"),
        ("nodes: 64", "nodes: 0", "nodes=0 must be above 0"),
        ("nodes: 64", "nodes: 6.5", "nodes=6.5 must be a whole number"),
        ("nodes: 64", "nodes: yes", "nodes=True must be a whole number"),
        ("peak_flops: 312e12", "peak_flops: fast", "device.peak_flops='fast' must be a number"),
        ("bytes_per_s: 42.5e9", "bytes_per_s: -1", "network.bytes_per_s=-1 must be above 0"),
        ("bytes_per_s: 42.5e9", "bytes_per_s: .nan", "network.bytes_per_s=nan must be above 0"),
        ("gemm_efficiency: 0.80", "gemm_efficiency: 80", "device.gemm_efficiency=80 is a share of peak_flops"),
        ("name: p4de", "name: 4", "name=4 must be a text"),
        (P4DE, "- a list", "must be a mapping of keys"),
        (P4DE, "device: {", "cannot read cluster file"),
        ("\nnetwork:\n", "\nnetwork: fast\nnothing:\n", "unknown key 'nothing'"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    assert old in P4DE
    path.write_text(P4DE.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        load_cluster(str(path))
    assert str(path) in str(error.value)
    assert message in str(error.value)
