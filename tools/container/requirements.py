"""Prints what setup.py asks for beside what the image gets otherwise, one requirement a line. From it requirements.txt
is made, by the command at its top.

    python requirements.py SETUP_PY MEGATRON_CORE

Left out are torch, which the base image brings, and megatron-core, of which the Dockerfile installs the version
MEGATRON_CORE. Ends with exit code 1 where setup.py does not allow that version.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from typing import Any

import setuptools  # type: ignore[import-untyped]
from packaging.requirements import Requirement

EXTRAS = ("data", "logging")
OTHERWISE = ("torch", "megatron-core")


def declared(setup_py: str) -> dict[str, Any]:
    """What setup.py passes to setuptools.setup."""
    arguments: dict[str, Any] = {}
    setup = setuptools.setup
    setuptools.setup = arguments.update
    try:
        runpy.run_path(setup_py, run_name="__main__")
    finally:
        setuptools.setup = setup
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setup_py")
    parser.add_argument("megatron_core")
    arguments = parser.parse_args()
    core, setup = arguments.megatron_core, declared(arguments.setup_py)
    wanted = [*setup["install_requires"], *(line for extra in EXTRAS for line in setup["extras_require"][extra])]
    for requirement in map(Requirement, wanted):
        if requirement.name == "megatron-core" and not requirement.specifier.contains(core):
            sys.exit(f"requirements: setup.py asks for {requirement}, and MEGATRON_CORE is {core}; pass one that fits")
    left = [line for line in wanted if Requirement(line).name not in OTHERWISE]
    print(*dict.fromkeys(left), sep="\n")


if __name__ == "__main__":
    main()
