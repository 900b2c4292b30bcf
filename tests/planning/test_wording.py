"""Numbers in tables and sentences."""

from __future__ import annotations

from megatron_atum.planning.wording import number, span


def test_small_numbers_say_something() -> None:
    assert [number(value, 1) for value in (0.0, 12.34, 0.06, 0.04, 0.0123)] == ["0.0", "12.3", "0.1", "0.04", "0.012"]
    assert number(1234.5, 0) == "1234" and number(-0.001, 1) == "-0.001"


def test_a_span_that_is_none() -> None:
    assert span(1.0, 2.0, 1) == "1.0-2.0"
    assert span(1.01, 1.02, 1) == "1.0"
