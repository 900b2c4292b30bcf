"""How numbers are written in tables and sentences."""

from __future__ import annotations


def number(value: float, digits: int) -> str:
    """With so many digits behind the point; a small one as far as it says something."""
    text = f"{value:.{digits}f}"
    return f"{value:.2g}" if value and not float(text) else text


def span(low: float, high: float, digits: int) -> str:
    first, last = number(low, digits), number(high, digits)
    return first if first == last else f"{first}-{last}"


def shape_name(tensor: int, pipeline: int, virtual: int, data: int) -> str:
    """TP8 PP4 VPP5 DP16"""
    chunks = f" VPP{virtual}" if virtual > 1 else ""
    return f"TP{tensor} PP{pipeline}{chunks} DP{data}"
