"""Messages for names that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """`what` has no `name`; the nearest known one, or all of them if few."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # right name, wrong section?
        last = name.rsplit(".", 1)[-1]
        near = [key for key in known if key.rsplit(".", 1)[-1] == last][:1]
    if near:
        return f"unknown {what} {name!r}; did you mean {near[0]!r}?"
    return f"unknown {what} {name!r}" + (f"; known: {', '.join(known)}" if len(known) <= 12 else "")
