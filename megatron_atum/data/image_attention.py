"""Which image each token of a packed row sees.

Legend: S tokens of a row; any leading dimensions are allowed before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_atum.batch import NO_IMAGE


def previous_image_index(ids_S: Tensor, image_id: int, eos_id: int) -> Tensor:
    """Index within the row of the last image at or before each token, within its own document.

    After a `</s>` and until the next `<image>` no image is seen; the `</s>` itself still sees its image.

    Args:
        ids_S: [...,S] int64.

    Returns:
        [...,S] int64, NO_IMAGE where a token sees none.
    """
    is_image_S = ids_S == image_id
    is_eos_S = ids_S == eos_id
    last_image_S = _last_position(is_image_S)
    last_eos_S = _last_position(is_eos_S)
    # An end of document closes off the positions after it, not its own. (The roll brings the end of the row to
    # position 0, which does no harm: a </s> there has no image before it anyway.)
    last_eos_before_S = torch.where(is_eos_S, torch.roll(last_eos_S, 1, dims=-1), last_eos_S)
    index_S = is_image_S.long().cumsum(-1) - 1
    return index_S.masked_fill((index_S < 0) | (last_eos_before_S > last_image_S), NO_IMAGE)


def next_image_index(ids_S: Tensor, image_id: int, eos_id: int) -> Tensor:
    """Index within the row of the first image at or after each token, within its own document.

    A `</s>` and whatever stands between the last image of a document and its `</s>` see none.

    Args and returns: as for `previous_image_index`.
    """
    is_image_S = ids_S == image_id
    # Positions counted from the right: the larger, the nearer to the token.
    next_image_S = _last_position(is_image_S.flip(-1)).flip(-1)
    next_eos_S = _last_position((ids_S == eos_id).flip(-1)).flip(-1)
    images_before_S = is_image_S.long().cumsum(-1) - is_image_S.long()
    return images_before_S.masked_fill((next_image_S < 0) | (next_eos_S > next_image_S), NO_IMAGE)


def _last_position(flags_S: Tensor) -> Tensor:
    """[...,S]: the last position at or before each one where the flag is set, -1 if there is none."""
    positions_S = torch.arange(flags_S.shape[-1], device=flags_S.device).expand_as(flags_S)
    return positions_S.masked_fill(~flags_S, -1).cummax(-1).values
