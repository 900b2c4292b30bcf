"""From run folders to a page and its PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_atum.training.plotting.drawing import load_matplotlib, save
from megatron_atum.training.plotting.figures import draw_all
from megatron_atum.training.plotting.page import page
from megatron_atum.training.plotting.run import FILE, Run, read_run


def plot_runs(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Draw everything there is.

    Args:
        paths: run folders, or folders of runs, which stand for all that are in them.
        out: where to; default PATH/plots, or plots-with-OTHER in the first run's folder.

    Returns:
        The page.

    Raises:
        DataError: a run cannot be read.
        ConfigError: matplotlib is missing.
    """
    load_matplotlib()
    runs = _with_names([read_run(run) for path in paths for run in _runs_in(path)])
    folder = out or (paths[0] / "plots" if len(paths) == 1 and paths[0].is_dir() else _folder(runs))
    folder.mkdir(parents=True, exist_ok=True)
    drawn, images = draw_all(runs), {}
    for one in drawn:
        if one.figure is not None:
            images[one.name] = folder / f"{one.name}.png"
            save(one.figure, images[one.name])
    file = folder / "index.html"
    file.write_text(page(runs, drawn, images))
    return file


def _runs_in(path: Path) -> list[Path]:
    """The runs of a folder that is none itself, the oldest first; else the path as it is."""
    if (path / FILE).exists() or not path.is_dir():
        return [path]
    found = sorted(path.glob(f"*/{FILE}"), key=lambda file: file.stat().st_mtime)
    return [file.parent for file in found] or [path]


def _with_names(runs: list[Run]) -> list[Run]:
    """Names that tell the runs apart: the folder's, and as many of those above it as that takes."""
    depth = 1
    names = [run.name for run in runs]
    while len(set(names)) < len({run.folder for run in runs}):
        depth += 1
        names = ["/".join(run.folder.parts[-depth:]) for run in runs]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _folder(runs: Sequence[Run]) -> Path:
    first, *others = runs
    names = "-".join(run.folder.name for run in others)
    return first.folder / (f"plots-with-{names}" if others else "plots")
