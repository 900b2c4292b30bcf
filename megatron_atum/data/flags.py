"""Why a sample is not used, one bit each.

A sidecar holds the flags of every sample, whatever a run does with them: faults always drop it, a filter drops it when
`data.filters` names it.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_atum.config.schema import FILTERS

FAULTS = (  # something is broken; counted against data.max_fault_rate
    "bad_name",  # a member without key and suffix, or whose name would leave the folder
    "cut_off",  # the tar ends inside the sample
    "missing_part",
    "absurd_size",  # an empty image, or a text that no one wrote
    "not_utf8",
    "bad_json",
    "image_count_mismatch",
    "duplicate_key",
)
EMPTY = ("no_text",)  # nothing is broken, but there is nothing to learn
FLAGS = FAULTS + EMPTY + FILTERS
MIN_TEXT_TOKENS = 5  # few_tokens
MAX_CONSECUTIVE_IMAGES = 2  # three_consecutive_images


def mask_of(names: Iterable[str]) -> int:
    """The bits of some flags."""
    return sum(1 << FLAGS.index(name) for name in set(names))


FAULT_MASK = mask_of(FAULTS)
ALWAYS_MASK = mask_of(FAULTS + EMPTY)


def reason_of(flags: int) -> str:
    """The name a dropped sample is counted under: the first of its flags."""
    return FLAGS[(flags & -flags).bit_length() - 1]
