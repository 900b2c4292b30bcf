"""Run folders: one run at a time. And what a run starts from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_atum.checkpoint.assets import OF_A_TOKENIZER
from megatron_atum.checkpoint.draw import Drawn
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.stored import write_weights
from megatron_atum.config.loader import load_config, preset
from megatron_atum.errors import CheckpointError, ConfigError, DataError
from megatron_atum.training.start import Start, lock_run_folder, prepare_start

ROOT = Path(__file__).parents[2]

HOLDER = """
import sys
from pathlib import Path
from megatron_atum.training.start import lock_run_folder
lock = lock_run_folder(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_folder_has_one_writer_and_is_free_when_it_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(ConfigError, match="another run is still writing"):
        lock_run_folder(run)
    holder.kill()
    holder.communicate()
    lock_run_folder(run).close()


# What a run starts from ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny_data")
    subprocess.run([sys.executable, "examples/tiny/make_data.py", "--out", str(out)], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as a Hugging Face folder, as a checkpoint, and as a checkpoint in one folder."""
    folder, model = tmp_path_factory.mktemp("weights"), preset("tiny")
    write_hf_folder(folder / "hf", model, Drawn(model, 5))
    write_weights(folder / "atum", model, Drawn(model, 5), assets={"tokenizer_config.json": b"{}"})
    write_weights(folder / "alone", model, Drawn(model, 5), standalone=True)
    return {name: folder / name for name in ("hf", "atum", "alone")}


def start(data: Path, root: Path, *overrides: str) -> Start:
    config = load_config(
        None,
        [
            "model.preset=tiny",
            f"data.tokenizer={data}/tokenizer.model",
            f"data.sources=[{{name: pairs, shards: '{data}/pairs-*.tar', kind: pairs, max_images: 8}}]",
            "data.sequence_length=128",
            "training.global_batch_size=4",
            f"logging.root={root}",
            *overrides,
        ],
    )
    return prepare_start(config, 1, 0)


@pytest.mark.parametrize("key", ["load", "init"])
@pytest.mark.parametrize("kind", ["hf", "atum", "alone"])
def test_weights_come_from_a_folder_of_either_format(
    kind: str, key: str, data: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    begun = start(data, tmp_path, f"checkpoint.{key}={weights[kind]}")
    assert begun.resume is None and begun.weights is not None
    source = Drawn(preset("tiny"), 5)
    for name in ("lm_head.weight", "model.perceiver_resampler.latents"):
        assert torch.equal(begun.weights.read(name), source.read(name))
    assets = begun.assets()
    assert assets["tokenizer.model"] == (data / "tokenizer.model").read_bytes()
    assert ("tokenizer_config.json" in assets) == (kind == "atum")
    assert (begun.checkpoint is None) == (kind == "hf")


@pytest.mark.parametrize("kind", ["hf", "atum", "alone"])
def test_a_base_model_starts_an_instruct_model(
    kind: str, data: Path, weights: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lacks one token, and so do the tokenizer's files that came with it."""
    begun = start(data, tmp_path, f"checkpoint.init={weights[kind]}", "model.additional_vocab_size=3")
    assert "has 2 added tokens, and this model 3: row 3 is drawn" in capsys.readouterr().out
    assert "tokenizer.model" in begun.assets() and not begun.assets().keys() & set(OF_A_TOKENIZER)
    start(data, tmp_path, f"checkpoint.init={weights[kind]}")
    assert "drawn" not in capsys.readouterr().out


def test_nothing_to_start_from(data: Path, tmp_path: Path) -> None:
    begun = start(data, tmp_path)
    assert begun.resume is begun.weights is begun.checkpoint is None
    assert begun.assets().keys() == {"tokenizer.model"}


@pytest.mark.parametrize(
    ("override", "error", "needle"),
    [
        ("checkpoint.load={weights}", CheckpointError, "holds no step folder"),
        ("checkpoint.init={weights}", CheckpointError, "holds no step folder"),
        ("checkpoint.init={weights}/none", CheckpointError, "not a folder"),
        ("checkpoint.load={weights}/none", CheckpointError, "no such folder"),
        ("checkpoint.keep_every=-1", ConfigError, "checkpoint.keep_every=-1"),
        ("kernels.backend=te", ConfigError, r"kernels\.backend=te needs Transformer Engine.*pip install"),
        ("kernels.adam=apex", ConfigError, r"kernels\.adam=apex: .*kernels\.adam=torch would work"),
        ("kernels.adam=te", ConfigError, r"kernels\.adam=te: .*kernels\.adam=torch would work"),
    ],
)
def test_what_cannot_be_started_from(
    override: str, error: type[Exception], needle: str, data: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=needle):
        start(data, tmp_path, override.format(weights=weights["hf"].parent))


def test_weights_of_another_model_are_refused(data: Path, weights: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm_eps is 1e-06 there and 1e-05 here"):
        start(data, tmp_path, f"checkpoint.init={weights['atum']}", "model.norm_eps=1e-5")


def test_a_shard_that_is_trained_on_is_not_held_out(data: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.tar").write_bytes((data / "pairs-00000.tar").read_bytes())
    held_out = f"data.validation=[{{name: held, shards: '{tmp_path}/copy.tar', kind: pairs}}]"
    with pytest.raises(
        DataError, match=r"validation source held: .*copy\.tar is also a shard of training source pairs"
    ):
        start(data, tmp_path / "runs", held_out)
    fine = f"data.validation=[{{name: held, shards: '{data}/documents-*.tar', max_images: 8}}]"
    assert list(start(data, tmp_path / "runs", fine).validation) == ["held"]
