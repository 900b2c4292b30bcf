"""Command line of programs that take a configuration."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_atum.config.loader import describe_keys, load_config, to_yaml
from megatron_atum.config.schema import Config


def parse_arguments(description: str, arguments: list[str] | None = None) -> Config:
    """Read `--config FILE section.key=value ...`. `--help` lists every key; `--dry-run` prints the result and exits.

    Raises:
        ConfigError: see `load_config`, and parallel/layout.py for `--dry-run` inside torchrun.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=_keys(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single keys")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    if options.dry_run:
        _dry_run(config)
    return config


def _dry_run(config: Config) -> None:
    from megatron_atum.parallel.layout import ParallelLayout

    if "WORLD_SIZE" in os.environ:
        ParallelLayout.from_config(config, int(os.environ["WORLD_SIZE"]))
    if os.environ.get("RANK", "0") == "0":
        print(to_yaml(config), end="")
    sys.exit(0)


def _keys() -> str:
    rows = describe_keys()
    width = max(len(f"{key}={default}") for key, default, _ in rows)
    lines = [f"  {f'{key}={default}':<{min(width, 48)}}  {text}".rstrip() for key, default, text in rows]
    return "keys and defaults:\n" + "\n".join(lines)
