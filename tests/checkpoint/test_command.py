from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
import torch

from megatron_atum.checkpoint.command import parse_dtype, parse_size, run_command
from megatron_atum.errors import CheckpointError


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "500MB", "2GiB", "1.5gb", "1000", "10 KB")] == [
        5 * 10**9,
        5 * 10**8,
        2 << 30,
        15 * 10**8,
        1000,
        10_000,
    ]
    for text in ("", "GB", "0", "-1GB", "5XB", "5I", "1e9"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_size(text)


def test_dtypes() -> None:
    assert parse_dtype("bf16") is parse_dtype("bfloat16") is torch.bfloat16
    assert (parse_dtype("fp16"), parse_dtype("float32")) == (torch.float16, torch.float32)
    with pytest.raises(argparse.ArgumentTypeError, match="bf16, fp16, fp32"):
        parse_dtype("int8")


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (CheckpointError("x is wrong"), 2, "tool: x is wrong\n"),
        (OSError(28, "No space left on device", "x"), 2, "No space left"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_mistakes_are_one_line(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command("tool", raising(error))
    assert stopped.value.code == code
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("tool", raising(ZeroDivisionError()))
