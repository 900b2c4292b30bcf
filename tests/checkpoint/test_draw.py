"""Weights of a base model start an instruct model, which has one added token more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_atum.checkpoint.draw import ADDED_ROWS_SEED, AddedRows, Drawn
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.hf_folder import IdeficsFolder, check_start
from megatron_atum.checkpoint.source import Given, TensorSource
from megatron_atum.checkpoint.stored import StoredCheckpoint, find_checkpoint, write_weights
from megatron_atum.checkpoint.weights import fill, gather_rows
from megatron_atum.errors import CheckpointError
from megatron_atum.model.stage import build_stages
from tests.checkpoint.folders import MODEL, same, weights
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees, groups_of

BASE, INSTRUCT = replace(MODEL, additional_vocab_size=2), replace(MODEL, additional_vocab_size=3)
ADDED = {"model.embed_tokens.additional_embedding.weight", "lm_head.additional_fc.weight"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in both formats."""
    folder = tmp_path_factory.mktemp("base")
    write_hf_folder(folder / "hf", BASE, Given(weights(BASE)))
    write_weights(folder / "atum", BASE, Given(weights(BASE)))
    return folder


def sources(base: Path) -> list[TensorSource]:
    return [IdeficsFolder(base / "hf"), StoredCheckpoint(find_checkpoint(base / "atum"))]


def expected() -> dict[str, Tensor]:
    drawn, tensors = Drawn(INSTRUCT, ADDED_ROWS_SEED), weights(BASE)
    return {name: torch.cat([t, drawn.read(name)[2:]]) if name in ADDED else t for name, t in tensors.items()}


def filled(rank: int, world_size: int, base: str, layouts: list[Degrees]) -> list[dict[str, Tensor]]:
    found = []
    for degrees in layouts:
        groups = groups_of(INSTRUCT, degrees)
        for source in sources(Path(base)):
            stages = build_stages(INSTRUCT, groups, torch.float32)
            fill(stages, INSTRUCT, groups, source)
            found.append(gather_rows(stages, INSTRUCT, groups, lambda parameter: parameter.data))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_missing_rows_are_drawn_and_all_else_is_as_it_was(base: Path, world_size: int) -> None:
    layouts = [degrees for degrees in (ONE, Degrees(tensor=2), Degrees(pipeline=2)) if degrees.world_size == world_size]
    for rank in run_distributed(filled, world_size, str(base), layouts):
        assert len(rank) == 2 * len(layouts)
        assert all(same(tensors, expected()) for tensors in rank)


def test_added_rows(base: Path) -> None:
    for source in sources(base):
        added = AddedRows(INSTRUCT, source)
        assert added.names() == ADDED
        for name in ADDED:
            assert added.shape(name) == (3, MODEL.hidden_size) and added.dtype(name) == source.dtype(name)
            assert torch.equal(added.read(name), expected()[name])
            assert torch.equal(added.read(name, slice(1, 3)), expected()[name][1:3])
            assert torch.equal(AddedRows(BASE, source).read(name), source.read(name))
    for name in ADDED:  # as large as the other rows that are drawn
        row = Drawn(INSTRUCT, ADDED_ROWS_SEED).read(name)[2]
        assert 0.5 < row.std() * MODEL.hidden_size**0.5 < 2


def test_dtype_of_the_source_is_kept() -> None:
    name = "lm_head.additional_fc.weight"
    source = Given({name: torch.zeros(2, MODEL.hidden_size, dtype=torch.bfloat16)})
    assert AddedRows(INSTRUCT, source).read(name).dtype == torch.bfloat16


def test_what_may_start_a_run() -> None:
    assert check_start("base", BASE, BASE) == check_start("instruct", INSTRUCT, INSTRUCT) == ""
    said = "base has 2 added tokens, and this model 3: row 3 is drawn, in added embedding and added head"
    assert check_start("base", BASE, INSTRUCT) == said
    assert "rows 3 to 5 are drawn" in check_start("base", BASE, replace(BASE, additional_vocab_size=5))
    with pytest.raises(CheckpointError, match=r"model\.additional_vocab_size is 3 there and 2 here"):
        check_start("instruct", INSTRUCT, BASE)
    with pytest.raises(CheckpointError, match=r"model\.norm_eps is 1e-06 there and 0\.1 here$"):
        check_start("base", BASE, replace(INSTRUCT, norm_eps=0.1))
    with pytest.raises(CheckpointError, match=r"model\.additional_vocab_size is 0 there and 2 here"):
        check_start("none", replace(BASE, additional_vocab_size=0), BASE)
