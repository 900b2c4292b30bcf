"""tools/plot_run.py on its command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.calls import call
from tools.plot_run import main


def test_a_run_and_two_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    done = call(main, capsys, runs[0])
    assert done.code == 0 and done.out == f"wrote {runs[0]}/plots/index.html\n"
    done = call(main, capsys, *runs, "--out", tmp_path / "both")
    assert done.code == 0 and (tmp_path / "both" / "loss.png").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "no such run"),
        ("", "holds no step"),
        ('{"step": 1, "lo', "damaged"),
        ('{"step": 1}\nx\n{"step": 2}', "line 2"),
    ],
)
def test_a_run_that_cannot_be_read(
    content: str | None, what: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    if content is not None:
        run.mkdir()
        (run / "metrics.jsonl").write_text(content)
    done = call(main, capsys, run)
    assert done.code == 2 and what in done.err and len(done.err.splitlines()) == 1
    assert not (run / "plots").exists()


def test_a_place_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "file").touch()
    done = call(main, capsys, tmp_path, "--out", tmp_path / "file")
    assert done.code == 2 and len(done.err.splitlines()) == 1


def test_a_folder_of_runs_stands_for_all_of_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    done = call(main, capsys, tmp_path)
    assert done.code == 0 and done.out == f"wrote {tmp_path}/plots/index.html\n"
    text = (tmp_path / "plots" / "index.html").read_text()
    assert "first" in text and "second" in text
