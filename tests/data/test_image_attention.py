import pytest
import torch
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)

from megatron_atum.batch import NO_IMAGE
from megatron_atum.data.image_attention import next_image_index, previous_image_index

TEXT, EOS, FAKE, IMAGE, PAD = 5, 2, 10, 11, 0


class HFTokenizer:
    eos_token_id = EOS

    def convert_tokens_to_ids(self, token: str) -> int:
        assert token == "<image>"
        return IMAGE


def one_hot(index_bS: torch.Tensor, num_images: int) -> torch.Tensor:
    return index_bS[..., None] == torch.arange(num_images)


def hf_masks(ids_bS: torch.Tensor, num_images: int) -> list[torch.Tensor]:
    pair = image_attention_mask_for_packed_input_ids(ids_bS, HFTokenizer(), "pt")
    return [incremental_to_binary_attention_mask(mask.clone(), "pt", num_images).bool() for mask in pair]


def test_by_hand():
    #         <s>  t  F  I      F  t  </s> <s>  t  F  I      F  I      F  t  </s>  pad
    ids = [1, TEXT, FAKE, IMAGE, FAKE, TEXT, EOS, 1, TEXT, FAKE, IMAGE, FAKE, IMAGE, FAKE, TEXT, EOS, PAD]
    ids_S = torch.tensor(ids)
    n = NO_IMAGE
    assert previous_image_index(ids_S, IMAGE, EOS).tolist() == [n, n, n, 0, 0, 0, 0, n, n, n, 1, 1, 2, 2, 2, 2, n]
    assert next_image_index(ids_S, IMAGE, EOS).tolist() == [0, 0, 0, 0, n, n, n, 1, 1, 1, 1, 2, 2, n, n, n, n]


@pytest.mark.parametrize("seed", range(8))
def test_equals_hugging_face_on_random_rows(seed: int):
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.tensor([TEXT, TEXT, TEXT, EOS, 1, FAKE, IMAGE, IMAGE, PAD])
    ids_bS = kinds[torch.randint(len(kinds), (6, 60), generator=generator)]
    ids_bS[0] = TEXT  # a row without images
    ids_bS[1, 0], ids_bS[2, -1], ids_bS[3, 0], ids_bS[3, -1] = EOS, EOS, IMAGE, IMAGE
    num_images = max(1, int((ids_bS == IMAGE).sum(-1).max()))
    previous, following = hf_masks(ids_bS, num_images)
    assert torch.equal(one_hot(previous_image_index(ids_bS, IMAGE, EOS), num_images), previous)
    assert torch.equal(one_hot(next_image_index(ids_bS, IMAGE, EOS), num_images), following)
