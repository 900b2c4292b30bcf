"""ATUM as megatron-core modules."""

import megatron_atum.parallel  # noqa: F401  silences megatron-core's notes; must precede its first import
