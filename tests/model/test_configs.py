"""megatron-core's configuration objects."""

from __future__ import annotations

from megatron_atum.config.validate import VISION_ACTIVATIONS
from megatron_atum.model.configs import ACTIVATIONS


def test_every_accepted_activation_exists() -> None:
    assert tuple(ACTIVATIONS) == VISION_ACTIVATIONS
