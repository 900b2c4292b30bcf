"""Which folders stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_atum.checkpoint.draw import Drawn
from megatron_atum.checkpoint.folder import remove, retire_old, step_folder
from megatron_atum.checkpoint.stored import write_weights
from megatron_atum.config.loader import preset


def test_frozen_weights_stay_while_a_step_cannot_be_asked(tmp_path: Path) -> None:
    """A synchroniser may deliver the state.json of a step last."""
    model = preset("tiny")
    write_weights(tmp_path / "a", model, Drawn(model, 1))
    (frozen,) = (tmp_path / "a").glob("frozen-*")
    step = step_folder(tmp_path / "a", 0)
    state = (step / "state.json").read_text()
    for content in (None, "{", state):
        (step / "state.json").unlink(missing_ok=True)
        if content is not None:
            (step / "state.json").write_text(content)
        assert retire_old(tmp_path / "a", step, keep=1, keep_every=0) == []
        assert frozen.is_dir()
    (step / "state.json").write_text(state.replace(frozen.name, "frozen-0123456789abcdef"))
    retired = retire_old(tmp_path / "a", step, keep=1, keep_every=0)
    assert [path.name.split(".")[0] for path in retired] == [frozen.name]
    remove(retired)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [step.name]


def test_what_cannot_be_removed_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = preset("tiny")
    for step in (1, 2, 3):
        write_weights(step_folder(tmp_path, step), model, Drawn(model, 1), standalone=True)
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name == "step-00000002":
            raise OSError(39, "Directory not empty")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    retired = retire_old(tmp_path, step_folder(tmp_path, 3), keep=1, keep_every=0)
    assert [path.name.split(".")[0] for path in retired] == ["step-00000001"]
    assert "step-00000002 could not be removed" in capsys.readouterr().err
