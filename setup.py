"""Packaging of megatron_atum.

The ranges say what the code needs; constraints.txt says what `make setup` installs on a CPU machine and what the
tests ran with. apex is no requirement: the package of that name on the index is another project, and the
real one comes with NVIDIA's container.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_atum" / "__init__.py").read_text(), re.MULTILINE)
if VERSION is None:
    raise SystemExit('setup.py: megatron_atum/__init__.py has no line __version__ = "..."')

setup(
    name="megatron_atum",
    version=VERSION.group(1),
    description="Flamingo-style vision-language training with 3D parallelism on megatron-core",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_atum", "megatron_atum.*"]),
    package_data={"megatron_atum": ["py.typed", "REVISION", "**/*.yaml"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core==0.16.1",
        "fsspec>=2024.2",
        "numpy>=1.26",
        "omegaconf>=2.3,<3",
        "packaging>=24.2",
        "pillow>=10",
        "protobuf>=4.25",  # transformers needs it to read a LLaMA tokenizer.model
        "psutil>=5.9",  # megatron-core's checkpoint writer imports it without asking for it
        "pyyaml>=6",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2",
        "tqdm>=4.66",
        "transformers>=5.20,<6",
        "webdataset>=0.2.100,<2",
        "xxhash>=3.4",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.2"],
        # converters (parquet, images by URL), s3://, plots
        "data": ["matplotlib>=3.8", "pyarrow>=15", "requests>=2.32", "s3fs>=2024.2", "urllib3>=2.2"],
        "logging": ["matplotlib>=3.8", "nvidia-ml-py>=12", "tensorboard>=2.15", "wandb>=0.17"],
        "demo": ["matplotlib>=3.8", "scikit-image>=0.24", "scikit-learn>=1.5"],
        "dev": [
            "flask>=3",  # with flask-cors: moto's server
            "flask-cors>=5",
            "moto[s3]>=5",
            "mypy>=1.11",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "types-PyYAML",
            "types-protobuf",
            "types-psutil",
            "types-requests",
            "types-tqdm",
        ],
    },
)
