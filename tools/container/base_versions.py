"""Prints the versions of what the base image brings and must keep, as pip writes them: torch==2.9.0, one a line.

    python base_versions.py

Ends with exit code 1 where one of them is missing. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version

HELD = ("torch", "transformer_engine", "apex", "numpy")  # built against each other, and CUDA and NCCL of the image


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    lines, missing = [], []
    for package in HELD:
        try:
            lines.append(f"{package}=={version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        sys.exit(
            f"base_versions: this Python has no {' and no '.join(missing)}; BASE must be a PyTorch image of the NGC "
            "catalogue that has torch, Transformer Engine, apex and numpy"
        )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
