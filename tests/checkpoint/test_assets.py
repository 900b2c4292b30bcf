from __future__ import annotations

from pathlib import Path

import pytest

from megatron_atum.checkpoint import assets
from megatron_atum.checkpoint.assets import is_asset, read_assets, write_assets
from megatron_atum.errors import CheckpointError


def test_small_files_that_are_not_weights(tmp_path: Path) -> None:
    wanted = {
        "config.json": b"{}",
        "tokenizer.model": b"\x00\xff",
        "chat_template.jinja": b"x",
        "chat_template.json": b"",
    }
    others = ("model.safetensors", "model.safetensors.index.json", "training_args.bin", "README.md", "code.py")
    for name, content in (wanted | dict.fromkeys(others, b"x")).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer.json").mkdir()
    assert read_assets(tmp_path) == wanted
    (tmp_path / "out").mkdir()
    write_assets(tmp_path / "out", wanted)
    assert read_assets(tmp_path / "out") == wanted


@pytest.mark.parametrize(
    "name", ["../config.json", "/config.json", "x/config.json", "chat_template./../x", "code.py", ""]
)
def test_other_names_are_not_written(name: str, tmp_path: Path) -> None:
    assert not is_asset(name)
    with pytest.raises(CheckpointError, match="not the name of"):
        write_assets(tmp_path, {name: b"x"})
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "MOST_BYTES", 10)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 10)
    assert read_assets(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 11)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is larger"):
        read_assets(tmp_path)
