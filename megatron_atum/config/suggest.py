"""Messages for names that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """`what` has no `name`; the nearest known one, or all of them if few."""
    known = list(known)
    last = name.rsplit(".", 1)[-1]
    elsewhere = [key for key in known if "." in name and key.rsplit(".", 1)[-1] == last]  # right name, wrong section
    near = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = near or [key for key in known if key.rsplit(".", 1)[-1] == last][:1]
    if near:
        return f"unknown {what} {name!r}; did you mean {near[0]!r}?"
    return f"unknown {what} {name!r}" + (f"; known: {', '.join(known)}" if len(known) <= 12 else "")
