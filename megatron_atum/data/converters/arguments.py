"""Command-line options that the converters share."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from megatron_atum.data.converters.convert import Conversion, convert
from megatron_atum.data.converters.drafts import Source
from megatron_atum.data.converters.fetch import FetchSpec
from megatron_atum.data.converters.http_fetcher import HttpOptions
from megatron_atum.data.converters.reencode import ImageLimits
from megatron_atum.errors import ConfigError, DataError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def make_parser(description: str | None, what: str, keep_fitting: bool = False) -> argparse.ArgumentParser:
    """Parser with the options of all converters.

    Args:
        description: docstring of the tool.
        what: the files of its input, for the help.
        keep_fitting: default of that option.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", required=True, nargs="+", metavar="PATH", help=f"{what}: files, folders or globs")
    add("--out", required=True, help="folder of the shards; the same one again goes on where it was")
    add("--workers", type=_at_least(0), default=_cores(), help="processes, each with its own input file (%(default)s)")
    add("--threads", type=_at_least(1), default=32, help="images fetched at a time by each process (%(default)s)")
    add("--samples-per-shard", type=_at_least(1), default=10_000, help="most samples of a shard (%(default)s)")
    add("--shard-bytes", type=parse_bytes, default=10**9, help="most bytes of a shard, such as 500M (1G)")
    add("--quiet", action="store_true", help="no progress bar")
    _add_image_options(parser, keep_fitting)
    return parser


def add_local_options(parser: argparse.ArgumentParser, source: str) -> None:
    """Options of sources with images by path (local.py), and by URL. Args: source: default of that option."""
    parser.add_argument("--images", metavar="FOLDER", help="what paths are relative to (the folder of each file)")
    parser.add_argument("--source", default=source, help="name written into each sample (%(default)s)")
    add_fetch_options(parser)


def check_local_options(options: argparse.Namespace) -> None:
    """Raises DataError: there is no such folder of images."""
    if options.images and not os.path.isdir(options.images):
        raise DataError(f"--images {options.images} is no folder")


def add_fetch_options(parser: argparse.ArgumentParser) -> None:
    """Options of sources that have URLs instead of images."""
    http, group = HttpOptions(), parser.add_argument_group("where images come from")
    add = group.add_argument
    add("--fetcher", metavar="WHICH", help="http, or package.module:factory of your own")
    add("--fetcher-option", action="append", default=[], metavar="NAME=VALUE", help="keyword of that factory")
    add("--store", help="folder of images that are here already: aa/bb/SHA256_OF_URL.jpg, or see --store-index")
    add("--store-index", metavar="FILE", help="JSONL or parquet with the columns url and path, for --store")
    add("--timeout", type=_positive, default=http.timeout, help="seconds for an image (%(default)s)")
    add("--connect-timeout", type=_positive, default=http.connect_timeout, help="seconds (%(default)s)")
    add("--retries", type=_at_least(0), default=http.retries, help="after errors that may pass (%(default)s)")
    add("--per-host", type=_at_least(1), default=http.per_host, help="requests to a host per process (%(default)s)")
    help_text = "share of a file's URLs that may fail for want of network (%(default)s)"
    add("--max-unreachable", type=_share, default=Conversion.max_unreachable, help=help_text)
    add("--user-agent", default=http.user_agent, help="how the requests name themselves (%(default)s)")
    add("--allow-private", action="store_true", help="fetch from private addresses too, such as a mirror of your own")


def fetch_spec(options: argparse.Namespace) -> FetchSpec:
    """Raises ConfigError for options that contradict each other."""
    if options.store and options.fetcher:
        raise ConfigError("--store and --fetcher are both given; choose one")
    if options.store_index and not options.store:
        raise ConfigError("--store-index needs --store, the folder that its paths are relative to")
    if any("=" not in option for option in options.fetcher_option):
        raise ConfigError(f"--fetcher-option {options.fetcher_option[0]} is not NAME=VALUE")
    names = ("connect_timeout", "timeout", "retries", "per_host", "user_agent", "allow_private")
    http = HttpOptions(max_bytes=options.max_bytes, **{name: getattr(options, name) for name in names})
    kind = "store" if options.store else options.fetcher or "none"
    factory = dict(option.split("=", 1) for option in options.fetcher_option)
    return FetchSpec(kind, http, options.store or "", options.store_index, factory)


def run(options: argparse.Namespace, source: Source, fetch: FetchSpec | None = None) -> None:
    """The conversion that the options describe."""
    conversion = Conversion(
        source,
        options.out,
        ImageLimits(**{name: getattr(options, name) for name in ImageLimits.__dataclass_fields__}),
        fetch or FetchSpec(),
        options.samples_per_shard,
        options.shard_bytes,
        options.threads,
        decoders=max(2, _cores() // max(1, options.workers)),
        max_unreachable=getattr(options, "max_unreachable", 1.0),  # not among the options of what has no URLs
    )
    try:
        convert(conversion, options.input, options.workers, options.quiet)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


def parse_bytes(text: str) -> int:
    """Bytes of "1G", "500MB" or a plain number; the units are powers of 1000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1G or 500M")
    return size


def _add_image_options(parser: argparse.ArgumentParser, keep_fitting: bool) -> None:
    limits, group = ImageLimits(), parser.add_argument_group("images")
    add, flag = group.add_argument, argparse.BooleanOptionalAction
    add("--max-side", type=_at_least(1), default=limits.max_side, help="longest stored side, pixels (%(default)s)")
    add("--quality", type=_at_least(1), default=limits.quality, help="of the stored JPEG, up to 95 (%(default)s)")
    add("--max-bytes", type=parse_bytes, default=limits.max_bytes, help="largest file accepted (%(default)s)")
    add("--max-pixels", type=_at_least(1), default=limits.max_pixels, help="most pixels accepted (%(default)s)")
    add("--min-side", type=_at_least(1), default=limits.min_side, help="shortest side accepted (%(default)s)")
    add("--max-aspect", type=_positive, default=limits.max_aspect, help="longer over shorter side (%(default)s)")
    add("--keep-png", action="store_true", help="store PNG as PNG, without loss")
    add("--keep-fitting", action=flag, default=keep_fitting, help="store a JPEG that needs no change byte for byte")


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(text)

    return parse


def _positive(text: str) -> float:
    value: Any = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(value)


def _share(text: str) -> float:
    value = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return value


def _cores() -> int:
    return len(os.sched_getaffinity(0))
