"""Looks whether an image has what it should: the last step of the Dockerfile, also for an image that is there.

    python tools/container/self_check.py --efa 1 --megatron-core 0.16.1

Imports what a run imports, compares versions with base-versions.txt and with what the package asks for, and looks which
plug-in NCCL will load. Needs no GPU. Exit code 1 with all that is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

IMPORTS = (
    "torch",
    "transformer_engine",
    "transformer_engine.pytorch",  # the one above does without it
    "apex",
    "megatron.core",
    "transformers",
    "webdataset",
    "megatron_atum",
    "megatron_atum.training.run",
)
EXTRAS = ("", "data", "logging")  # of megatron_atum that the image has
OF_THE_BASE = ("torch", "megatron-core")  # what these ask for is not looked at: the base builds it in another way
HELD = Path(__file__).resolve().parents[2] / "base-versions.txt"  # written before anything was installed
PLUGIN = "libnccl-net.so"


def import_problems() -> Iterator[str]:
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except Exception as error:  # an extension that does not fit torch raises what it likes
            yield f"{name} cannot be imported: {type(error).__name__}: {error}"


def held_problems(held: Path) -> Iterator[str]:
    """What of the base image is not as it was."""
    if not held.exists():
        yield f"{held} is missing: install_requirements.sh writes it"
        return
    for line in held.read_text().split():
        package, before = line.split("==", 1)
        found = installed(package)
        if found != before:
            yield f"{package} was {before} in the base image and is {found or 'gone'}"


def requirement_problems(core: str) -> Iterator[str]:
    """What megatron_atum asks for and the image does not have."""
    if installed("megatron-core") != core:
        yield f"megatron-core is {installed('megatron-core') or 'missing'}, not {core}"
    yield from missing_requirements("megatron_atum", EXTRAS, set())


def missing_requirements(package: str, extras: Iterable[str], seen: set[str]) -> Iterator[str]:
    """What a package asks for and what this asks for in turn, where the image does not have it."""
    for requirement in map(Requirement, requires(package) or ()):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        found = installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            yield f"{package} asks for {requirement}, and the image has {found or 'none'}"
        elif requirement.name not in OF_THE_BASE and str(requirement) not in seen:
            seen.add(str(requirement))
            yield from missing_requirements(requirement.name, ("", *requirement.extras), seen)


def efa_problems(prefix: Path, search: str) -> Iterator[str]:
    """
    Args:
        prefix: where the EFA installer puts its files.
        search: LD_LIBRARY_PATH, in whose order NCCL looks for its plug-in.
    """
    found = [place / PLUGIN for place in map(Path, filter(None, search.split(":"))) if (place / PLUGIN).exists()]
    if not found:
        yield f"no folder of LD_LIBRARY_PATH has {PLUGIN}: NCCL would use TCP. LD_LIBRARY_PATH={search}"
    elif not found[0].resolve().is_relative_to(prefix.resolve()):
        yield f"NCCL would load {found[0]}, which is not EFA's; put EFA's folder first in LD_LIBRARY_PATH"
    fi_info = prefix / "efa" / "bin" / "fi_info"
    try:
        subprocess.run([fi_info, "--version"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        yield f"libfabric's {fi_info} does not run: {error}"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--efa", choices=["0", "1"], required=True, help="whether the image has EFA's software")
    parser.add_argument("--megatron-core", required=True, help="its version")
    parser.add_argument("--held", type=Path, default=HELD, help="versions to keep (default: %(default)s)")
    parser.add_argument("--efa-prefix", type=Path, default=Path("/opt/amazon"), help="default: %(default)s")
    options = parser.parse_args()
    problems = [*import_problems(), *held_problems(options.held), *requirement_problems(options.megatron_core)]
    if options.efa == "1":
        problems += efa_problems(options.efa_prefix, os.environ.get("LD_LIBRARY_PATH", ""))
    for package in ("torch", "transformer_engine", "apex", "megatron-core", "megatron_atum", "transformers"):
        print(f"{package} {installed(package)}")
    if problems:
        sys.exit("\n".join(f"self_check: {problem}" for problem in problems))
    print("self_check: the image is complete")


if __name__ == "__main__":
    main()
