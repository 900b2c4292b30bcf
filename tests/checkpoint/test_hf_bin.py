"""Old `.bin` files: the same weights as in safetensors, and no code is run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_atum.checkpoint.hf_bin import BinFile
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.hf_folder import IdeficsFolder
from megatron_atum.checkpoint.source import Given
from megatron_atum.errors import CheckpointError
from tests.checkpoint.folders import (
    DTYPES,
    MODEL,
    NAME,
    SHAPE,
    read_all,
    refused,
    same,
    same_bits,
    to_bins,
    weights,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_hf_folder(tmp_path / "model", MODEL, Given(weights(MODEL, *DTYPES)))
    return tmp_path / "model"


@pytest.mark.parametrize("parts", [1, 3])
def test_the_same_weights(parts: int, folder: Path) -> None:
    to_bins(folder, parts)
    assert not list(folder.glob("*.safetensors"))
    assert same(read_all(folder), weights(MODEL, *DTYPES))
    with IdeficsFolder(folder) as opened:
        whole = opened.read(NAME)
        for rows in (slice(0, 3), slice(5, 99), slice(7, 7)):
            assert same_bits(opened.read(NAME, rows), whole[rows])


def test_safetensors_count_where_both_are_there(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    assert same(read_all(folder), weights(MODEL, *DTYPES))


def test_keys_of_old_files_are_dropped(folder: Path) -> None:
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    to_bins(folder, 1, **old)
    assert same(read_all(folder), weights(MODEL, *DTYPES))
    with IdeficsFolder(folder) as opened:
        assert opened.dropped == sorted(old)


def test_parameters_and_other_devices_and_files_of_older_versions(tmp_path: Path) -> None:
    """A state_dict may hold parameters, and files of a GPU say so; old ones do not say how they are laid out."""
    torch.save({"a": torch.nn.Parameter(torch.arange(6.0)), "b": torch.ones(3).half()}, tmp_path / "x.bin")

    def change(records: dict[str, bytes]) -> None:
        pickled = records["x/data.pkl"]
        assert pickled.count(b"X\x03\x00\x00\x00cpu") == 1
        records["x/data.pkl"] = pickled.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1")
        del records["x/.format_version"], records["x/.storage_alignment"]

    pack_again(tmp_path / "x.bin", change)
    with BinFile(tmp_path / "x.bin") as file:
        assert same_bits(file.read("a"), torch.arange(6.0))
        assert same_bits(file.read("b"), torch.ones(3).half())


def test_views_are_read_as_they_are(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(5, 4, 3)
    views = {
        "base": base,
        "rows": base[2:4],
        "transposed": base.transpose(0, 2),
        "column": base[:, 1],
        "expanded": torch.arange(3.0)[:, None].expand(3, 4),
        "scalar": base[1, 2, 0],
        "empty": base[:0],
    }
    torch.save(views, tmp_path / "x.bin")
    with BinFile(tmp_path / "x.bin") as file:
        assert file.entries.keys() == views.keys()
        for name, view in views.items():
            assert same_bits(file.read(name), view), name
            for rows in (slice(0, 1), slice(1, 3), slice(2, 99)) if view.dim() else ():
                assert same_bits(file.read(name, rows), view[rows]), (name, rows)


# What is refused -----------------------------------------------------------------------------------------------------


class Attack:
    """Makes a folder when it is unpickled the usual way."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_code_is_not_run(folder: Path) -> None:
    trace = folder / "executed"
    torch.save({"a": Attack(trace)}, folder / "attack.bin")
    torch.load(folder / "attack.bin", weights_only=False)  # the file is a real attack
    trace.rmdir()
    to_bins(folder, 1)
    torch.save(load_of(folder) | {"a": Attack(trace)}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "not loaded", "mkdir")
    assert not trace.exists()


def test_code_in_an_old_file_is_not_run(folder: Path) -> None:
    trace = folder / "executed"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(trace)))
    refused(folder, "pytorch_model.bin", "before torch 1.6")
    assert not trace.exists()


def load_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def test_files_from_before_torch_1_6(folder: Path) -> None:
    to_bins(folder, 1)
    file = folder / "pytorch_model.bin"
    torch.save(load_of(folder), file, _use_new_zipfile_serialization=False)
    refused(folder, "before torch 1.6", "torch.save(torch.load(")


@pytest.mark.parametrize(
    "content", [[torch.ones(3)], torch.ones(3), {"a": 3}, {3: torch.ones(3)}, {"a": {"b": torch.ones(3)}}]
)
def test_something_else_than_tensors(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        BinFile(tmp_path / "x.bin")


def test_values_that_are_not_finite(folder: Path) -> None:
    to_bins(folder, 2, **{NAME: torch.full(SHAPE, float("inf"))})
    refused(folder, NAME, "NaN or infinite", ".bin")


def test_integers(folder: Path) -> None:
    to_bins(folder, 1, **{NAME: torch.ones(SHAPE, dtype=torch.int32)})
    refused(folder, f"dtype of {NAME} is torch.int32")


@pytest.mark.parametrize("size", [0, 3, 1000, -1, -4000])
def test_a_file_that_was_cut(size: int, folder: Path) -> None:
    to_bins(folder, 1)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, "pytorch_model.bin")


def pack_again(file: Path, change: Callable[[dict[str, bytes]], None], how: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file) as source:
        records = {record.filename: source.read(record) for record in source.infolist()}
    change(records)
    with zipfile.ZipFile(file, "w", how) as out:
        for name, content in records.items():
            out.writestr(name, content)


def test_a_pickle_that_promises_more_than_the_file_holds(folder: Path) -> None:
    """Storages are cut to a few bytes; the pickle speaks of whole tensors."""

    def cut(records: dict[str, bytes]) -> None:
        records.update({name: content[:8] for name, content in records.items() if "/data/" in name})
        del records["pytorch_model/.format_version"]

    to_bins(folder, 1)
    pack_again(folder / "pytorch_model.bin", cut)
    refused(folder, "pytorch_model.bin is damaged", "is not in its place")


def test_archives_that_were_packed_again(folder: Path) -> None:
    """torch reckons the places of tensors; in another order others would lie there."""
    to_bins(folder, 1)
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    pack_again(file, lambda records: None)
    refused(folder, "pytorch_model.bin", "packed again", "write it anew")
    file.write_bytes(whole)
    pack_again(file, lambda records: records.update({"pytorch_model/data/0": records.pop("pytorch_model/data/0")}))
    refused(folder, "pytorch_model.bin", "packed again", "write it anew")
    file.write_bytes(whole)
    pack_again(file, lambda records: None, zipfile.ZIP_DEFLATED)
    refused(folder, "pytorch_model.bin", "compressed", "write it anew")


@pytest.mark.parametrize("entry", ["../x.bin", "/etc/passwd", "sub/x.bin", "gone.bin", None])
def test_an_index_that_points_elsewhere(entry: Any, folder: Path) -> None:
    to_bins(folder, 2)
    index = folder / "pytorch_model.bin.index.json"
    (folder / "sub").mkdir()
    for place in (folder.parent, folder / "sub"):
        torch.save({NAME: torch.ones(SHAPE)}, place / "x.bin")
    index.write_text(index.read_text().replace(f'"{NAME}": "pytorch', f'"{NAME}": null, "other": "pytorch'))
    text = index.read_text().replace(f'"{NAME}": null', f'"{NAME}": ' + ("null" if entry is None else f'"{entry}"'))
    index.write_text(text)
    refused(folder, repr(entry), "not a file of this folder")
