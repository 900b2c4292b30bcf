"""Megatron-ATUM: Flamingo-style vision-language training with 3D parallelism on megatron-core."""

__version__ = "0.1.0"
