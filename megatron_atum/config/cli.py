"""Command line of programs that take a configuration."""

from __future__ import annotations

import argparse

from megatron_atum.config.loader import describe_keys, load_config
from megatron_atum.config.schema import Config


def parse_arguments(description: str, arguments: list[str] | None = None) -> tuple[Config, bool]:
    """Read `--config FILE section.key=value ... [--dry-run]`. `--help` lists every key and exits.

    Returns:
        The configuration, and whether only a dry run is asked for.

    Raises:
        ConfigError: see `load_config`.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=_keys(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below")
    parser.add_argument("--dry-run", action="store_true", help="check and print the resolved configuration, and exit")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single keys")
    options = parser.parse_intermixed_args(arguments)
    return load_config(options.config, options.overrides), options.dry_run


def _keys() -> str:
    rows = describe_keys()
    width = max(len(f"{key}={default}") for key, default, _ in rows)
    lines = [f"  {f'{key}={default}':<{min(width, 48)}}  {text}".rstrip() for key, default, text in rows]
    return "keys and defaults:\n" + "\n".join(lines)
