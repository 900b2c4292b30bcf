"""kill -9 of any rank at any point, resume: the run is, bit for bit, the one that was never killed.

Each seed chooses a layout, a rank and a point, kills there, goes on, and now and then is killed again. SEEDS=n says how
many seeds; the first 24 cover every layout and every group of points.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.checkpoint.folder import damaged, folders_of, missing, step_folders
from megatron_atum.checkpoint.reader import CheckpointReader
from tests.faults.points import GROUPS, Kill, hold_up_saves
from tests.faults.runs import (
    FROZEN,
    SMALL,
    Clock,
    Outcome,
    checkpoints_of,
    data_overrides,
    events_of,
    lines_of,
    numbers_of,
    run,
)

SEEDS = int(os.environ.get("SEEDS", "24"))
STEPS = 6
OUTSIDE = "clock"  # the group of kills at any time, from outside
SECOND_KILL = 0.3  # share of the seeds


@dataclass(frozen=True)
class Setting:
    world_size: int
    overrides: list[str]
    every: int = 2  # checkpoint.save_every
    keep: int = 2
    held_up: bool = False  # saves take longer than a step


SETTINGS = {
    "pp2": Setting(2, ["parallel.pipeline=2"]),
    "dp2": Setting(2, ["data.workers=1"], held_up=True),
    "dp2 bf16, overlapped gather": Setting(2, ["optimizer.overlap_param_gather=true", "training.precision=bf16"], 1),
    "dp2 frozen": Setting(2, [FROZEN], every=1, keep=1),
    "pp2 synchronous": Setting(2, ["parallel.pipeline=2", "checkpoint.asynchronous=false"]),
    "tp2pp2 frozen": Setting(4, ["parallel.tensor=2", "parallel.pipeline=2", FROZEN], held_up=True),
}


@dataclass
class Story:
    """What became of one seed."""

    setting: str
    root: Path
    deaths: list[dict[str, Any]] = field(default_factory=list)
    kills: list[Kill | Clock] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)  # step of the newest checkpoint reported before each death
    began: list[int] = field(default_factory=list)  # step at which the run after each death went on
    codes: list[int | None] = field(default_factory=list)  # of the last run
    log: str = ""

    def __str__(self) -> str:
        return f"{self.setting}: killed {self.kills}, {[d['point'] for d in self.deaths]}, went on at {self.began}"


class Runs:
    """Runs of the settings, killed and not, each once."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.reference = cache(self._reference)
        self.story = cache(self._story)

    def overrides(self, setting: Setting) -> list[str]:
        saving = [
            f"training.steps={STEPS}",
            f"checkpoint.save_every={setting.every}",
            f"checkpoint.keep={setting.keep}",
        ]
        return [*SMALL, *data_overrides(self.data), *saving, *setting.overrides]

    def _run(self, root: Path, setting: Setting, kill: Kill | Clock | None = None, outlive_s: float = 0.0) -> Outcome:
        hook = hold_up_saves if setting.held_up else None
        return run(root, self.overrides(setting), setting.world_size, kill, outlive_s=outlive_s, hook=hook)

    def _reference(self, name: str) -> Path:
        root, setting = self.folder / name.replace(" ", "_"), SETTINGS[name]
        outcome = self._run(root, setting)
        assert outcome.codes == [0] * setting.world_size, outcome.logs
        return root

    def points(self, name: str) -> list[dict[str, int]]:
        """By rank, how often an uninterrupted run passes each point."""
        root = self.reference(name)
        return [Counter(order_of(root, rank)) for rank in range(SETTINGS[name].world_size)]

    def _story(self, seed: int) -> Story:
        chance = random.Random(seed)
        groups, names = [*GROUPS, OUTSIDE], list(SETTINGS)
        name = names[(seed + seed // len(groups)) % len(names)]
        setting, story = SETTINGS[name], Story(name, self.folder / f"seed-{seed}")
        kills = [choose(self.points(name), groups[seed % len(groups)], chance)]
        if chance.random() < SECOND_KILL:
            kills.append(choose(self.points(name), chance.choice(["start", *groups]), chance))
        for kill in kills:
            self._kill(story, setting, kill, chance.uniform(0, 0.3))
        last = self._run(story.root, setting)
        story.codes, story.log = last.codes, "\n".join(last.logs)
        if story.deaths:
            story.began.append(start_of(story.root))
        return story

    def _kill(self, story: Story, setting: Setting, kill: Kill | Clock, outlive_s: float) -> None:
        outcome = self._run(story.root, setting, kill, outlive_s)
        if story.deaths:
            story.began.append(start_of(story.root))
        if outcome.death is None:  # a resumed run may not come to the point, and a run may end before the time
            assert outcome.codes == [0] * setting.world_size, (str(story), kill, outcome.logs)
            return
        assert outcome.codes[kill.rank] == -9, (str(story), kill, outcome.logs)
        story.kills.append(kill)
        story.deaths.append(outcome.death)
        story.saved.append(max((event["step"] for event in events_of(story.root, "save")), default=0))


def order_of(root: Path, rank: int) -> list[str]:
    """The points that a rank of an uninterrupted run passed, in order."""
    return json.loads((root / f"points-{rank}.json").read_text())


def choose(points: list[dict[str, int]], group: str, chance: random.Random) -> Kill | Clock:
    if group == OUTSIDE:
        return Clock(chance.randrange(len(points)), chance.uniform(0, 1.2))
    point = chance.choice(sorted({point for counts in points for point in counts if point.startswith(group + ":")}))
    rank = chance.choice([rank for rank, counts in enumerate(points) if point in counts])
    # How many ranks try to make the folder depends on who comes first.
    most = 1 if "mkdir" in point else points[rank][point]
    return Kill(rank, point, chance.randint(1, most))


def start_of(root: Path) -> int:
    """Step at which the newest run began, or -1 if it did not come as far as to say so."""
    steps = [line["step"] for line in lines_of(root) if line.get("event") in ("start", "resume")]
    return steps[-1] if steps else -1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("kills"), data)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_killed_run_is_the_uninterrupted_one(seed: int, runs: Runs) -> None:
    story = runs.story(seed)
    reference, setting = runs.reference(story.setting), SETTINGS[story.setting]
    about = f"{story}\n{story.log}"
    assert story.codes == [0] * setting.world_size, about
    assert numbers_of(story.root) == numbers_of(reference), about
    assert [line["step"] for line in numbers_of(reference)] == list(range(1, STEPS + 1))
    for saved, began in zip(story.saved[-1:], story.began[-1:], strict=True):
        assert began >= saved, about  # no more is lost than the steps since the last checkpoint
    assert list((story.root / "run").rglob("*.tmp")) == [], about
    assert list((story.root / "run").rglob("*.old")) == [], about
    # Killed when the last checkpoint counted and old ones were still there, it has nothing more to save.
    nothing_saved = story.began[-1:] == [STEPS]
    check_kept(story.root, reference, setting, nothing_saved, about)


def check_kept(root: Path, reference: Path, setting: Setting, may_be_more: bool, about: str) -> None:
    """The checkpoints that should be there, each whole, with the same values."""
    steps = [step for step in range(1, STEPS + 1) if step % setting.every == 0]
    kept = step_folders(checkpoints_of(root))
    newest = [f"step-{step:08d}" for step in steps[::-1][: setting.keep]]
    assert [folder.name for folder in kept][: setting.keep if may_be_more else None] == newest, about
    used = {place.name for folder in kept for place in folders_of(folder)}
    assert {path.name for path in checkpoints_of(root).iterdir()} == used, about
    for folder in kept:
        assert missing(folder) == [], about
        assert damaged(folder) == [], about
        if folder.name not in newest:
            continue
        ours, theirs = tensors_of(folder), tensors_of(checkpoints_of(reference) / folder.name)
        assert ours.keys() == theirs.keys(), about
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], about


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and the random state of each rank."""
    with CheckpointReader(*folders_of(folder)) as reader:
        shapes = {key: stored.shape for key, stored in reader.index.items()}
        return {key: reader.read(key, (0,) * len(shape), shape) for key, shape in shapes.items()}


def test_the_seeds_cover_what_they_should(runs: Runs) -> None:
    """Without this the kills might all have come at harmless moments."""
    assert SEEDS >= 20
    deaths = [death for seed in range(SEEDS) for death in runs.story(seed).deaths]
    points = [death["point"] for death in deaths]
    for group in GROUPS:
        assert sum(point.startswith(f"{group}:") for point in points) >= 3, (group, points)
    assert OUTSIDE in points
    in_a_save = [death for death in deaths if any(name.endswith(".tmp") for name in death["there"])]
    assert len(in_a_save) >= 8, points
    resumed = [runs.story(seed).began[-1] for seed in range(SEEDS) if runs.story(seed).began]
    assert sum(step > 0 for step in resumed) >= 8, resumed  # not all of them began anew
    settings = {runs.story(seed).setting for seed in range(SEEDS) if runs.story(seed).deaths}
    assert settings == set(SETTINGS)
    assert {kill.rank for seed in range(SEEDS) for kill in runs.story(seed).kills} >= {0, 1}


@pytest.mark.parametrize("name", ["pp2 synchronous", "dp2"])
def test_everything_is_on_disk_before_it_counts(name: str, runs: Runs) -> None:
    """A kill does not empty the page cache; a power cut does. So here is the order of the calls for each save."""
    root = runs.reference(name)
    orders = [[point.split(": ", 1)[1] for point in order_of(root, rank)] for rank in (0, 1)]
    files = [
        path.relative_to(folder) for folder in step_folders(checkpoints_of(root))[:1] for path in folder.rglob("*")
    ]
    saves = STEPS // SETTINGS[name].every
    for file in files:
        writer = 1 if "-00001-" in file.name else 0
        check_synced([point.replace(".tmp", "") for point in orders[writer]], f"step-N/{file}", saves)
    renames = [place for place, point in enumerate(orders[0]) if point == "rename step-N"]
    assert len(renames) == saves
    for begin, end in zip([0, *renames], renames, strict=False):
        save, after = orders[0][begin:end], orders[0][end:]
        opened = [place for place, point in enumerate(save) if point.startswith(("open step-N", "middle of step-N"))]
        assert save[opened[-1]] == "open step-N.tmp/complete.json.tmp"  # the record is the last file
        assert "fsync step-N.tmp" in save[opened[-1] :]  # and its name in the folder
        assert after.index("fsync .") < after.index("retiring begins")  # old ones go when the new name is on disk


def check_synced(order: list[str], path: str, saves: int) -> None:
    """In each save a file, or a folder of assets, goes to disk after its last change, and before it counts."""
    whats = {"open": "c", "middle of": "c", "mkdir": "c", "fsync": "s"}
    letters = {f"{what} {path}": letter for what, letter in whats.items()} | {"rename step-N": "|"}
    story = "".join(letters.get(point, "") for point in order)
    assert len(re.findall(r"c+s+", story)) == saves, (path, story)  # a change that is not synced makes them fewer
    assert re.fullmatch(r"(\|?c+s+)+\|?", story), (path, story)


def test_a_run_without_kills_draws_and_saves(runs: Runs) -> None:
    """The reference is what it should be: numbers that differ from step to step, and a checkpoint reported for each."""
    lines = numbers_of(runs.reference("pp2"))
    assert len({line["loss"] for line in lines}) == len({str(line["drawn/1/0"]) for line in lines}) == STEPS
    assert [event["step"] for event in events_of(runs.reference("pp2"), "save")] == [2, 4, 6]
