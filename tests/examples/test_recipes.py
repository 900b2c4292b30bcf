"""The example configurations are the published recipe, fit the GPUs they name, and train."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_atum.checkpoint.table import weight_table
from megatron_atum.config.loader import load_config, to_yaml
from megatron_atum.config.schema import Config
from megatron_atum.data.mixture import MIXTURES, shares
from megatron_atum.data.shards import PairRecord, write_shard
from megatron_atum.flops import Work, model_flops
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.training.optimizer import build_scheduler
from megatron_atum.training.parameter_groups import check_groups, decays, trains
from tests.faults.conftest import data as data  # a fixture
from tests.faults.runs import RUN, SMALL, data_overrides, events_of, lines_of, run

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs/recipe.md").read_text()


@dataclass(frozen=True)
class Published:
    """Sources: docs/recipe.md."""

    gpus: int
    sequence: int
    tokens: float  # of a batch
    steps: int
    warmup: int
    lr: float
    last_lr: float  # at `steps`
    z_loss: float
    mixture: str
    decaying: int  # values with weight decay
    others: int  # and without
    added: int = 2


RECIPES = {
    "atum-9b/pretrain": Published(
        128, 1024, 1.31e6, 200_000, 2000, 1e-5, 6.02e-6, 1e-3, "published", 1_434_468_352, 126_029_584
    ),
    "atum-80b/pretrain": Published(
        512, 1024, 3.67e6, 200_000, 2000, 5e-5, 3.01e-5, 1e-3, "published", 13_925_122_048, 126_294_824
    ),
    "atum-9b/instruct": Published(
        128, 2048, 205e3, 22_000, 1000, 1e-5, 1.2e-6, 0.0, "instruct", 8_802_859_776, 126_825_488, added=3
    ),
    "atum-80b/instruct": Published(
        384, 2048, 613e3, 22_000, 1000, 3e-6, 3.6e-7, 0.0, "instruct", 79_839_718_144, 128_139_304, added=3
    ),
}


def path_of(name: str) -> Path:
    return ROOT / "examples" / f"{name}.yaml"


def recipe(name: str, *overrides: str) -> Config:
    return load_config(path_of(name), list(overrides))


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_are_the_published_ones(name: str) -> None:
    config, published = recipe(name), RECIPES[name]
    o, training, data = config.optimizer, config.training, config.data
    assert (config.model.preset, config.model.additional_vocab_size) == (name.split("/")[0], published.added)
    assert (o.beta1, o.beta2, o.eps, o.weight_decay, o.clip_grad) == (0.9, 0.999, 1e-8, 0.1, 1.0)
    assert (o.lr, o.warmup_steps, o.schedule, o.weight_decay_rule) == (
        published.lr,
        published.warmup,
        "linear",
        "idefics",
    )
    assert (training.steps, training.z_loss, training.precision) == (published.steps, published.z_loss, "bf16")
    assert (training.loss_normalization, data.loss_on) == ("idefics", "all")
    assert (data.sequence_length, data.mixture) == (published.sequence, published.mixture)
    tokens = training.global_batch_size * data.sequence_length
    assert tokens == pytest.approx(published.tokens, rel=0.042 if name == "atum-9b/instruct" else 0.003)
    frozen = not name.endswith("instruct")
    freeze = config.model.freeze
    assert (freeze.text, freeze.vision, freeze.lm_head) == (frozen,) * 3
    assert freeze.text_exceptions == freeze.vision_exceptions == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_rate_at_the_planned_end(name: str) -> None:
    config, published = recipe(name), RECIPES[name]
    optimizer: Any = SimpleNamespace(param_groups=[{}])
    build_scheduler(optimizer, config.optimizer).step(published.steps)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(published.last_lr, rel=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_weight_decay_groups(name: str) -> None:
    config, published = recipe(name), RECIPES[name]
    rows = [row for row in weight_table(config.model) if trains(row, config.model.freeze)]
    values = {row.name: sum(map(math.prod, row.shapes)) for row in rows}
    found = {rule: sum(values[row.name] for row in rows if decays(row, rule)) for rule in ("idefics", "clean")}
    total = sum(values.values())
    assert (found["idefics"], total - found["idefics"]) == (published.decaying, published.others)
    for decaying in found.values():
        assert f"| {decaying:,} | {total - decaying:,} |" in TABLE
    check_groups(config)


def job_of(text: str) -> tuple[str, int, int]:
    """Configuration, nodes and ranks of a node that the command at the top of a recipe asks for."""
    command = re.search(r"^#   ((?:.*\\\n#)?.*sbatch.*)$", text, re.MULTILINE)
    assert command is not None
    script = re.search(r"examples/slurm/\S+", command[1])
    assert script is not None
    asked = command[1] + (ROOT / script[0]).read_text()  # what comes first counts

    def value(pattern: str) -> str:
        found = re.search(pattern, asked)
        assert found is not None
        return found[1]

    ranks = int(value(r"--ntasks-per-node=(\d+)"))
    return value(r"ATUM_CONFIG=(?:\$\{ATUM_CONFIG:-)?([^\s}]+)"), int(value(r"--nodes=(\d+)")), ranks


@pytest.mark.parametrize("name", RECIPES)
def test_it_fits_the_gpus_it_names(name: str) -> None:
    config, published = recipe(name), RECIPES[name]
    text = path_of(name).read_text()
    assert f"on {published.gpus} GPUs" in text
    assert job_of(text) == (path_of(name).relative_to(ROOT).as_posix(), published.gpus // 8, 8)
    layout = ParallelLayout.from_config(config, published.gpus)
    assert 8 % layout.tensor == 0  # inside a node
    assert f"data parallel {layout.data}" in text
    microbatches = config.training.global_batch_size // layout.data // config.training.micro_batch_size
    if layout.pipeline > 1:
        assert microbatches >= 6 * layout.pipeline  # the bubble is (pipeline - 1) / microbatches
    # The ramp-up that a comment proposes can be dealt to these ranks.
    for ramp in re.findall(r"#.*?(\{start: .*?\})", text):
        grown = recipe(name, f"training.ramp_up={ramp}")
        ParallelLayout.from_config(grown, published.gpus)
    assert not config.training.ramp_up.start


def test_even_stages_are_the_fastest_at_80b() -> None:
    """As the comment on units_per_chunk says: work of the slowest stage, in units, for a row with 11 images."""
    config = recipe("atum-80b/pretrain")
    flops = model_flops(config.model, Work(1, 1024, 11))
    unit = (flops.cross_attention + flops.decoder) / 20
    first, last = (flops.vision + flops.perceiver) / unit, flops.head / unit
    assert first == pytest.approx(0.26, abs=0.02) and last == pytest.approx(1 / 16, abs=0.01)

    def slowest(units: list[int]) -> float:
        return max(units[0] + first, *units[1:-1], units[-1] + last)

    assert config.parallel.units_per_chunk == [5, 5, 5, 5]
    assert slowest([5, 5, 5, 5]) < min(slowest([4, 5, 6, 5]), slowest([4, 6, 6, 4]))


@pytest.mark.parametrize("name", RECIPES)
def test_the_sources_are_those_of_the_mixture(name: str) -> None:
    data = recipe(name).data
    known = MIXTURES[data.mixture]
    assert {source.name for source in data.sources} == set(known)
    found = shares(data.sources, data.mixture, dict.fromkeys(known, 1))
    assert {source: share * 100 for source, share in found.items()} == pytest.approx(
        {source: share.tokens for source, share in known.items()}
    )
    assert data.validation


@pytest.mark.parametrize("name", RECIPES)
def test_one_place_decides_where_everything_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def places() -> list[str]:
        config = recipe(name)
        sources = [source.shards for source in [*config.data.sources, *config.data.validation]]
        return [*sources, str(config.data.tokenizer), str(config.checkpoint.init), config.logging.root]

    monkeypatch.delenv("ATUM_DATA", raising=False)
    assert all(place.startswith("/data/") for place in places())
    monkeypatch.setenv("ATUM_DATA", "/mnt/shared")
    assert all(place.startswith("/mnt/shared/") for place in places())
    assert "oc.env" not in to_yaml(recipe(name))  # the run folder keeps what was used


@pytest.mark.parametrize("name", RECIPES)
def test_a_key_that_is_its_default_is_not_hidden(name: str) -> None:
    """The files are complete: what the recipe consists of is written down, whatever the defaults become."""
    written = yaml.safe_load(path_of(name).read_text())
    for section, keys in {
        "model": "preset freeze",
        "data": "tokenizer sequence_length mixture sources validation",
        "optimizer": "lr min_lr schedule warmup_steps decay_steps beta1 beta2 eps weight_decay weight_decay_rule "
        "clip_grad distributed overlap_grad_reduce overlap_param_gather",
        "training": "steps micro_batch_size global_batch_size precision loss_normalization z_loss recompute",
        "checkpoint": "init save_every keep keep_every",
        "health": "spike",
        "logging": "root run tensorboard",
    }.items():
        assert set(keys.split()) <= set(written[section]), section


SHRUNK = [
    *(override for override in SMALL if not override.startswith(("optimizer.", "training.precision"))),
    "parallel={tensor: 1, pipeline: 1, units_per_chunk: null}",
    "data.validation_packs=2",
    "training.validate_every=2",
    "training.steps=3",
    "training.micro_batch_size=1",
    "checkpoint.init=null",
    "logging.every=1",
]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("pretrain")])
def test_the_same_file_trains_here(name: str, data: Path, tmp_path: Path) -> None:
    """Smaller by overrides, in one process: nothing else is another."""
    (tmp_path / "held").mkdir()
    photo = (data / "photos" / "cat.jpg").read_bytes()
    write_shard(tmp_path / "held" / "pairs-00000.tar", [PairRecord("held", photo, "the cat again, and held out")])
    held_out = f"data.validation=[{{name: held, shards: '{tmp_path}/held/*.tar', kind: pairs}}]"
    changes = [*SHRUNK, *data_overrides(data), held_out]
    outcome = run(tmp_path, ["--config", str(path_of(name)), *changes], 1)
    assert outcome.codes == [0], outcome.logs
    steps = [line for line in lines_of(tmp_path) if "event" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and line["z_loss"] > 0 for line in steps)
    assert [line["lr"] for line in steps] == pytest.approx([k * RECIPES[name].lr / 2000 for k in range(3)])
    assert "bfloat16" in outcome.logs[0]
    assert list((tmp_path / RUN / "tensorboard").iterdir())
    assert [event["step"] for event in events_of(tmp_path, "validation")] == [2]
