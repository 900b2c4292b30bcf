"""What a cluster is made of, as the cost model sees it. The built-in ones are the YAML files in `clusters/`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_atum.config.suggest import unknown
from megatron_atum.errors import ConfigError, first_line

FOLDER = Path(__file__).parent / "clusters"


@dataclass(frozen=True)
class Device:
    name: str
    memory_gib: float  # that a process can use
    reserved_gib: float  # of it, for what is no tensor: context, communication buffers, the allocator's gaps
    peak_flops: float  # of dense bf16 products, per second
    gemm_efficiency: float  # share of the peak that large matrix products reach
    attention_efficiency: float  # the same of attention's products
    memory_bytes_per_s: float  # of its own memory, as elementwise kernels reach it
    kernel_launch_s: float  # what each further kernel costs


@dataclass(frozen=True)
class Link:
    bytes_per_s: float  # one direction
    latency_s: float  # of one collective or exchange


@dataclass(frozen=True)
class Cluster:
    """Ranks are numbered node by node."""

    name: str
    nodes: int
    devices_per_node: int
    device: Device
    node_link: Link  # inside a node: bus bandwidth of each device
    network: Link  # of each whole node

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices_per_node

    def node_of(self, rank: int) -> int:
        return rank // self.devices_per_node

    def crosses_nodes(self, ranks: Iterable[int]) -> bool:
        return len({self.node_of(rank) for rank in ranks}) > 1


def built_in() -> tuple[str, ...]:
    """Names that `load_cluster` knows."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


def load_cluster(text: str) -> Cluster:
    """A cluster by name, by name and number of nodes (p4de-64), or from a YAML file like those in `clusters/`.

    Raises:
        ConfigError: no such cluster; or names the file and the key that is missing, unknown, of the wrong type or not
            positive.
    """
    if "/" in text or text.endswith((".yaml", ".yml")):
        return _read(Path(text))
    if text in built_in():
        return _read(FOLDER / f"{text}.yaml")
    name, _, number = text.rpartition("-")
    if name not in built_in() or not re.fullmatch(r"[1-9]\d*", number):
        example = f"{built_in()[0]}-16 (so many nodes) or the path of a YAML file"
        raise ConfigError(f"{unknown('cluster', text, built_in())}; also possible: {example}")
    return replace(_read(FOLDER / f"{name}.yaml"), nodes=int(number))


def _read(path: Path) -> Cluster:
    try:
        # OmegaConf reads 1e9 as a number, which plain YAML takes for a string.
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read cluster file {path}: {first_line(error)}") from None
    cluster = _build(Cluster, values, str(path), "")
    assert isinstance(cluster, Cluster)
    return cluster


_PARTS = {"device": Device, "node_link": Link, "network": Link}


def _build(kind: type[Any], values: Any, path: str, prefix: str) -> Any:
    """An instance of one of the classes above from a mapping."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys, not {values!r}")
    types = {field.name: str(field.type) for field in fields(kind)}
    for name in values:
        if name not in types:
            raise ConfigError(f"{path}: {unknown('key', f'{prefix}{name}', [f'{prefix}{known}' for known in types])}")
    for name in types:
        if name not in values:
            raise ConfigError(f"{path}: {prefix}{name} is not set")
    return kind(**{name: _value(name, types[name], values[name], path, prefix) for name in types})


def _value(name: str, kind: str, value: Any, path: str, prefix: str) -> Any:
    key = f"{path}: {prefix}{name}={value!r}"
    if name in _PARTS:
        return _build(_PARTS[name], value, path, f"{prefix}{name}.")
    if kind == "str":
        if not isinstance(value, str):
            raise ConfigError(f"{key} must be a text")
        return value
    wanted = (int,) if kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ConfigError(f"{key} must be {'a whole number' if kind == 'int' else 'a number'}")
    if not 0 < value < float("inf"):
        raise ConfigError(f"{key} must be above 0")
    if name.endswith("_efficiency") and value > 1:
        raise ConfigError(f"{key} is a share of peak_flops: at most 1")
    return value if kind == "int" else float(value)
