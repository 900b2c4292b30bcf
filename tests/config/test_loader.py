"""Where each value of a configuration comes from, and what is refused while reading it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_atum.config.loader import describe_keys, key_names, load_config, preset, to_yaml
from megatron_atum.config.presets import PRESETS
from megatron_atum.config.schema import Config
from megatron_atum.errors import ConfigError

ROOT = Path(__file__).parents[2]
# But for jobs of SageMaker, which are no training configurations (tests/launch/test_sagemaker_job.py).
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if path.parent.name != "sagemaker")


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_precedence(tmp_path: Path) -> None:
    """Each layer sets something that the one above it leaves alone."""
    file = write(tmp_path, "model: {preset: atum-80b, num_layers: 40, num_heads: 32}\ntraining: {seed: 7, steps: 9}\n")
    config = load_config(file, ["training.steps=11", "model.num_heads=16"])
    assert config.optimizer.lr == Config().optimizer.lr
    assert config.model.hidden_size == 8192 != Config().model.hidden_size  # preset over defaults
    assert config.model.num_layers == 40  # file over preset
    assert config.training.seed == 7  # file over defaults
    assert config.training.steps == 11  # override over file
    assert config.model.num_heads == 16  # override over file over preset


def test_the_preset_may_come_from_an_override_and_stays_under_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {preset: atum-9b, num_layers: 8}\n")
    model = load_config(file, ["model.preset=tiny"]).model
    assert (model.preset, model.num_layers, model.hidden_size) == ("tiny", 8, PRESETS["tiny"]["hidden_size"])


def test_the_last_override_counts() -> None:
    assert load_config(None, ["training.seed=3", "training.seed=4"]).training.seed == 4


def test_lists_and_nested_values() -> None:
    config = load_config(
        None,
        [
            "parallel.units_per_chunk=[2,6]",
            "model.vision={image_size: 448, patch_size: 16}",
            "data.sources=[{name: a, shards: 'a-*.tar'}, {name: b, shards: b.json, weight: 3, epochs: 2, filters: []}]",
            "data.validation=[{name: c, shards: c.json, filters: [no_image, few_tokens]}]",
            "checkpoint.load=null",
        ],
    )
    assert config.parallel.units_per_chunk == [2, 6]
    assert (config.model.vision.image_size, config.model.vision.patch_size) == (448, 16)
    assert config.model.vision.embed_dim == 1280
    values = [(source.name, source.weight, source.epochs, source.filters) for source in config.data.sources]
    assert values == [("a", None, None, None), ("b", 3.0, 2.0, [])]
    assert [(source.name, source.filters) for source in config.data.validation] == [("c", ["no_image", "few_tokens"])]
    assert config.checkpoint.load is None


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("paralel", "parallel"),
        ("model.visoin", "model.vision"),
        ("parallel.tensr", "parallel.tensor"),
        ("training.global_batchsize", "training.global_batch_size"),
        ("model.vision.image_sise", "model.vision.image_size"),
        ("optimizer.seed", "training.seed"),  # right name, wrong section
        ("training.sequence_length", "data.sequence_length"),
        ("virtual_pipeline", "parallel.virtual_pipeline"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(key: str, suggestion: str, tmp_path: Path) -> None:
    nested = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(key.split(".")))[:-1] + " 1\n"
    file = write(tmp_path, nested)
    for where, arguments in ((f"{key}=1", (None, [f"{key}=1"])), (str(file), (file, []))):
        with pytest.raises(ConfigError) as error:
            load_config(*arguments)
        assert where in str(error.value)
        assert repr(key) in str(error.value)
        assert f"did you mean {suggestion!r}" in str(error.value)
        assert "\n" not in str(error.value)


def test_an_unknown_preset_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"model\.preset 'atum-9'; did you mean 'atum-9b'"):
        load_config(None, ["model.preset=atum-9"])
    with pytest.raises(ConfigError, match="tiny, atum-9b, atum-80b"):
        preset("x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.steps", "many"),
        ("training.steps", "1.5"),
        ("optimizer.lr", "fast"),
        ("parallel.sequence", "perhaps"),
        ("parallel.units_per_chunk", "[1,x]"),
        ("model.vision", "3"),
        ("model.freeze", "null"),
        ("training.seed", "null"),
    ],
)
def test_values_of_another_type_are_refused(key: str, value: str, tmp_path: Path) -> None:
    section, name = key.split(".")
    file = write(tmp_path, f"{section}:\n  {name}: {value}\n")
    for arguments in ((None, [f"{key}={value}"]), (file, [])):
        with pytest.raises(ConfigError) as error:
            load_config(*arguments)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_mistakes_in_a_source_are_refused() -> None:
    for source, named in (
        ("{name: a, shard: b}", "'shards'"),
        ("{name: a, shards: b, weight: x}", "weight"),
        ("{name: a, shards: b, filters: 3}", "filters"),
        ("{name: a, shards: b, filter: []}", "'filters'"),
        ("3", "0"),
    ):
        with pytest.raises(ConfigError, match=named):
            load_config(None, [f"data.sources=[{source}]"])


@pytest.mark.parametrize("section", ["sources", "validation"])
@pytest.mark.parametrize("name", ["name", "shards"])
def test_what_a_source_must_say(name: str, section: str) -> None:
    given = {"name": "{shards: x}", "shards": "{name: x}"}[name]
    with pytest.raises(ConfigError, match=rf"data\.{section}\[0\]\.{name} is not set"):
        load_config(None, [f"data.{section}=[{given}]"])


@pytest.mark.parametrize("override", ["training.steps", "--training.steps=3", "=3", "training steps=3"])
def test_overrides_of_another_form_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_config(None, [override])


@pytest.mark.parametrize("text", ["training: [1, 2", "a: b: c", "\tx: 1"])
def test_broken_yaml_is_refused(text: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match="cannot read") as error:
        load_config(file, [])
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just words\n", "3\n"])
def test_yaml_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(file, [])
    assert str(file) in str(error.value)


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError) as error:
            load_config(path, [])
        assert str(path) in str(error.value)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), []) == load_config(None, [])


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    overrides = [
        f"model.preset={name}",
        "data.sources=[{name: a, shards: 'x-*.tar', kind: pairs}, {name: b, shards: y.json, weight: 2, filters: []}]",
        "data.validation=[{name: c, shards: z.json, epochs: 3, filters: [few_tokens]}]",
        "data.filters=[]",
        "data.on_change=continue",
        "parallel.units_per_chunk=[3,5]",
        "optimizer.lr=3.3e-4",
        "checkpoint.init=somewhere",
        "model.freeze.text_exceptions=[LayerNorm]",
    ]
    config = load_config(None, overrides)
    assert load_config(write(tmp_path, to_yaml(config)), []) == config


def test_values_of_the_released_models() -> None:
    expected = {
        "atum-9b": (4096, 11008, 32, 32, 1e-6),
        "atum-80b": (8192, 22016, 80, 64, 1e-5),
    }
    for name, values in expected.items():
        m = preset(name)
        assert (m.hidden_size, m.intermediate_size, m.num_layers, m.num_heads, m.norm_eps) == values
        assert (m.vocab_size, m.additional_vocab_size, m.max_position_embeddings) == (32000, 2, 2048)
        assert (m.cross_layer_interval, m.qk_norm, m.alpha_type, m.alpha_init) == (4, True, "float", 0.0)
        assert (m.rope_theta, m.pad_token_id, m.bos_token_id, m.eos_token_id) == (10000.0, 0, 1, 2)
        v, p, f = m.vision, m.perceiver, m.freeze
        assert (v.embed_dim, v.image_size, v.patch_size, v.intermediate_size) == (1280, 224, 14, 5120)
        assert (v.num_heads, v.num_layers, v.num_channels, v.norm_eps, v.hidden_act) == (16, 32, 3, 1e-5, "gelu")
        assert (p.depth, p.num_heads, p.head_dim, p.num_latents, p.qk_norm) == (6, 16, 96, 64, True)
        assert (f.text, f.vision, f.lm_head, f.text_exceptions, f.vision_exceptions) == (True, True, True, [], [])


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: str(file.relative_to(ROOT)))
def test_shipped_configurations_load(file: Path) -> None:
    load_config(file, [])


def test_there_are_shipped_configurations() -> None:
    assert EXAMPLES


def test_every_key_is_described_once() -> None:
    keys = key_names()
    assert len(keys) == len(set(keys))
    sections = {"model", "parallel", "data", "optimizer", "training", "checkpoint", "kernels", "health", "logging"}
    assert {key.split(".")[0] for key in keys} == sections
    text = {key: help_text for key, _, help_text in describe_keys()}
    assert "interleaved" in text["parallel.virtual_pipeline"]


def test_command_line(tmp_path: Path) -> None:
    """--help lists every key; --dry-run prints what loads again; a mistake is one line and exit code 2."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "pretrain_atum.py"), *arguments]
        environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    shown = call("--help")
    assert shown.returncode == 0
    assert [key for key in key_names() if f"  {key}=" not in shown.stdout] == []

    arguments = ["model.preset=tiny", "training.steps=5"]
    dry = call("--config", str(EXAMPLES[0]), *arguments, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert load_config(write(tmp_path, dry.stdout), []) == load_config(EXAMPLES[0], arguments)

    wrong = call("training.stepz=5")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1 and "training.steps" in wrong.stderr
