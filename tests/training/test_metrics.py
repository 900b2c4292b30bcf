"""The metrics file across a resume, and what is printed where there is no terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.training.metrics import MetricsFile, Terminal, read_metrics


def values(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 1.25,
        "z_loss": 40.0,
        "grad_norm": 0.5,
        "lr": 1e-4,
        "tokens_per_s_per_device": 1234.5,
        "step_s": 60.0,
    }


def test_lines_are_appended_and_read_without_events(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl", writes=True)
    file.write(event="start", step=0)
    file.write(step=1, loss=2.0)
    MetricsFile(file.path, writes=True).write(step=2, loss=1.0)
    assert read_metrics(file.path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_a_resume_cuts_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", writes=True)
    file.write(event="start", step=0)
    for step in range(1, 8):
        file.write(step=step, loss=float(step))
        if step % 2 == 0:
            file.write(event="save", step=step)
    file.resume_after(4)
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    file.write(step=5, loss=0.0)
    assert read_metrics(file.path)[-1] == {"step": 5, "loss": 0.0}
    assert list(tmp_path.iterdir()) == [file.path]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "{", '{"step": 3', "nul", "[1]", '"x"', '{"loss": 1.0}', ""])
def test_a_resume_cuts_a_line_that_a_crash_left_half_written(rest: str, tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", writes=True)
    for step in (1, 2):
        file.write(step=step, loss=0.0)
    with file.path.open("a") as raw:
        raw.write(rest)
    file.resume_after(3)
    file.write(step=4, loss=0.0)
    assert [line["step"] for line in read_metrics(file.path)] == [1, 2, 4]


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (2, [1, 2]),
        (3, [1, 2, 3, 4, 5, 6, "rollback"]),  # the checkpoint that the first rollback went to
        (4, [1, 2, 3, 4, 5, 6, "rollback", 4, 5, "rollback"]),
        (5, [1, 2, 3, 4, 5, 6, "rollback", 4, 5, "rollback", 5]),
        (6, [1, 2, 3, 4, 5, 6, "rollback", 4, 5, "rollback", 5, 6]),
    ],
)
def test_a_resume_keeps_what_rollbacks_before_it_have_undone(step: int, kept: list[Any], tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", writes=True)
    for line in (1, 2, 3, 4, 5, 6, (6, 3), 4, 5, (5, 4), 5, 6, 7):
        if isinstance(line, tuple):
            file.write(event="rollback", step=line[1], **{"from": line[0]})
        else:
            file.write(step=line, loss=0.0)
    with file.path.open("a") as raw:
        raw.write('{"event": "rollback", "st')
    file.resume_after(step)
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [line.get("event", line["step"]) for line in lines] == kept


def test_a_resume_without_a_file_is_nothing(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl", writes=True).resume_after(3)
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path / "metrics.jsonl", writes=True)
    first.write(step=1)
    other = MetricsFile(first.path, writes=False)
    other.write(step=2)
    other.resume_after(0)
    assert read_metrics(first.path) == [{"step": 1}]
    MetricsFile(tmp_path / "none" / "metrics.jsonl", writes=False).write(step=1)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("bar", [True, False])
def test_plain_lines_off_a_terminal(bar: bool, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(shows=True, bar=bar, total=10, start=4, every=2)
    terminal.say("hello")
    for step in range(5, 11):
        terminal.step(values(step))
    terminal.close()
    out, err = capsys.readouterr()
    assert err == "" and "\r" not in out and "\x1b" not in out
    lines = out.splitlines()
    assert lines[0] == "hello"
    assert [line.split()[1] for line in lines[1:]] == ["6/10", "8/10", "10/10"]
    for part in ("loss 1.2500", "grad norm 0.500", "lr 1.00e-04", "1234 tokens/s/device", "ETA 0:04:00"):
        assert part in lines[1]
    assert "ETA 0:00:00" in lines[-1]


def test_what_is_there_is_printed_too(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(shows=True, bar=False, total=3, start=0, every=1)
    terminal.step(values(1))
    terminal.step(values(2) | {"mfu": 0.4567, "bad_steps": 0})
    terminal.step(values(3) | {"mfu": 0.4567, "bad_steps": 1})
    plain, fast, bad = capsys.readouterr().out.splitlines()
    assert "MFU" not in plain and "bad" not in plain
    assert "1234 tokens/s/device  MFU 45.7%  ETA" in fast and "bad" not in fast
    assert bad.endswith("  1 bad step")


def test_the_time_left_counts_steps_that_are_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(shows=True, bar=False, total=10, start=0, every=1)
    for step in (1, 2, 3, 2, 3):
        terminal.step(values(step))
    assert "ETA 0:07:00" in capsys.readouterr().out.splitlines()[-1]


def test_the_time_left_counts_saves_and_validation(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(shows=True, bar=False, total=3, start=0, every=1)
    terminal.step(values(1) | {"checkpoint_s": 20.0, "validation_s": 40.0})
    assert "ETA 0:04:00" in capsys.readouterr().out


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = FakeTerminal()
    monkeypatch.setattr("sys.stdout", out)
    terminal = Terminal(shows=True, bar=True, total=10, start=4, every=1)
    for step in (5, 6, 7, 6):
        terminal.step(values(step) | {"mfu": 0.4567, "bad_steps": 2})
    terminal.say("saved")
    terminal.close()
    assert "saved\n" in out.getvalue()
    last = out.getvalue().split("\r")[-1]
    assert " 6/10 " in last and "loss 1.2500  1234 tokens/s/device  MFU 45.7%  2 bad steps" in last


def test_the_last_step_is_always_printed(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(shows=True, bar=True, total=5, start=0, every=3)
    for step in range(1, 6):
        terminal.step(values(step))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["3/5", "5/5"]


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(shows=False, bar=True, total=5, start=0, every=1)
    terminal.say("hello")
    terminal.step(values(1))
    terminal.close()
    assert capsys.readouterr() == ("", "")
