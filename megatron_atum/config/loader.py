"""Configuration = dataclass defaults <- model preset <- YAML file <- `section.key=value`.

OmegaConf does the parsing, merging and type checks: its dot list is the grammar we want (`parallel.tensor=2`, lists
and nested values included), it merges typed dataclasses, and it refuses unknown keys. jsonargparse and tyro want
`--section.key value` and have no notion of a preset between defaults and file.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from megatron_atum.config.presets import preset_values
from megatron_atum.config.schema import Config, ModelConfig, SourceConfig
from megatron_atum.config.suggest import unknown
from megatron_atum.config.validate import validate
from megatron_atum.errors import ConfigError, first_line


def load_config(path: str | Path | None, overrides: list[str]) -> Config:
    """Read, merge and check a configuration.

    Args:
        path: YAML file, or None for defaults only.
        overrides: `section.key=value`, each.

    Raises:
        ConfigError: names the file or override, the key, and what would work.
    """
    layers = []
    if path is not None:
        layers.append((str(path), _read_yaml(Path(path))))
    layers += [(override, _parse_override(override)) for override in overrides]
    merged: Any = OmegaConf.structured(Config)
    name = merged.model.preset
    for _, layer in layers:
        name = OmegaConf.select(layer, "model.preset", default=name)
    merged = _merge("preset", merged, OmegaConf.create({"model": preset_values(str(name))}))
    for where, layer in layers:
        merged = _merge(where, merged, layer)
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as missing:
        raise ConfigError(f"{missing.full_key} is not set") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"configuration: {first_line(error)}") from None
    assert isinstance(config, Config)
    validate(config)
    return config


def preset(name: str) -> ModelConfig:
    """The model configuration of a preset.

    Raises:
        ConfigError: no such preset.
    """
    preset_values(name)
    return load_config(None, [f"model.preset={name}"]).model


def to_yaml(config: Config) -> str:
    """The resolved configuration, in the form `load_config` reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: Path) -> Any:
    try:
        layer = OmegaConf.load(path)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read configuration file {path}: {error}") from None
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"{path} is not a YAML mapping of sections (model, parallel, data, ...)")
    return layer


def _parse_override(override: str) -> Any:
    if not re.match(r"[\w.\[\]]+=", override):
        raise ConfigError(f"cannot read {override!r}: overrides have the form section.key=value")
    try:
        return OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read {override!r}: {first_line(error)}") from None


def _merge(where: str, base: Any, layer: Any) -> Any:
    for section in section_names():
        value = OmegaConf.select(layer, section, default={})
        if not isinstance(value, dict) and not OmegaConf.is_dict(value):
            raise ConfigError(f"{where}: {section} must be a mapping of keys, not {value!r}")
    try:
        return OmegaConf.unsafe_merge(base, layer)  # neither is used again, and merge would copy both
    except ConfigKeyError as error:
        known = [*section_names(), *key_names(), *(field.name for field in fields(SourceConfig))]
        raise ConfigError(f"{where}: {unknown('key', str(error.full_key), known)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {error.full_key or 'value'}: {first_line(error)}") from None
    except TypeError:  # an element of a list, by its number
        raise ConfigError(f"{where}: lists are set as a whole, e.g. 'data.sources=[{{name: a, shards: b}}]'") from None


def key_names() -> list[str]:
    return [key for key, _, _ in describe_keys()]


@cache
def section_names() -> list[str]:
    """Sections and sections of sections; outer ones come first."""
    parts = [key.split(".")[:-1] for key in key_names()]
    return list(dict.fromkeys(".".join(p[:depth]) for p in parts for depth in range(1, len(p) + 1)))


@cache
def describe_keys() -> list[tuple[str, str, str]]:
    """(key, default, help) of every key, in order; the help is the comment behind the field in schema.py."""
    return list(_describe("", Config()))


def _describe(prefix: str, section: Any) -> Iterator[tuple[str, str, str]]:
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(type(section)), re.MULTILINE))
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _describe(f"{prefix}{field.name}.", value)
        else:
            yield f"{prefix}{field.name}", str(value), comments.get(field.name, "")
