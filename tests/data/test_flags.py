import numpy as np
import pytest

from megatron_atum.config.schema import FILTERS
from megatron_atum.data.flags import ALWAYS_MASK, EMPTY, FAULT_MASK, FAULTS, FLAGS, mask_of, reason_of


def test_every_flag_has_a_bit_of_its_own() -> None:
    assert len(set(FLAGS)) == len(FLAGS) <= np.iinfo(np.uint16).bits
    assert [mask_of([name]) for name in FLAGS] == [1 << place for place in range(len(FLAGS))]


def test_bits_stay_where_sidecars_have_them() -> None:
    """Another order needs another SIDECAR_VERSION."""
    assert (
        *("bad_name", "cut_off", "missing_part", "absurd_size", "not_utf8", "bad_json", "image_count_mismatch"),
        *("duplicate_key", "no_text", "special_token_in_text", "no_image", "ends_with_two_images"),
        *("three_consecutive_images", "only_image_last", "few_tokens"),
    ) == FLAGS


def test_masks_of_what_is_always_dropped() -> None:
    assert mask_of([]) == 0
    assert mask_of(["no_text", "no_text"]) == mask_of(["no_text"])
    assert FAULT_MASK | mask_of(EMPTY) == ALWAYS_MASK and mask_of(FAULTS) == FAULT_MASK
    assert not ALWAYS_MASK & mask_of(FILTERS)


def test_a_sample_is_counted_under_its_first_flag() -> None:
    assert all(reason_of(mask_of([name])) == name for name in FLAGS)
    assert reason_of(mask_of(["few_tokens", "no_image", "only_image_last"])) == "no_image"


def test_unknown_flag() -> None:
    with pytest.raises(ValueError):
        mask_of(["too_small"])
