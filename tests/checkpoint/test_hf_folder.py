"""What is taken for an IDEFICS folder, and what is refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_atum.checkpoint.hf_config import from_hf, to_hf
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.hf_folder import IdeficsFolder, check_same_model
from megatron_atum.checkpoint.table import hf_shapes, weight_table
from megatron_atum.config.loader import preset
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import CheckpointError
from tests.model.cases import Case, hf_config

MODEL = from_hf({"model_type": "idefics", **hf_config(Case("small", 0, layers=2))})


def weights(model: ModelConfig = MODEL) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in hf_shapes(model).items()}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "whole"
    write_hf_folder(folder, MODEL, weights().items())
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def write_index(folder: Path, parts: int = 3) -> dict[str, str]:
    """Splits model.safetensors into several files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where: dict[str, str] = {}
    for part in range(parts):
        names = sorted(tensors)[part::parts]
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def read_all(folder: Path) -> dict[str, Tensor]:
    with IdeficsFolder(folder) as opened:
        return {
            name: tensor
            for row in weight_table(opened.model)
            for name, tensor in zip(row.hf, opened.read(row), strict=True)
        }


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_all(folder)
    for word in (folder.name, *words):
        assert word in str(error.value), str(error.value)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_whole_folder_is_read(folder: Path) -> None:
    assert same(read_all(folder), weights())
    check_same_model("x", IdeficsFolder(folder).model, MODEL)


def test_a_folder_of_several_files_is_read(folder: Path) -> None:
    write_index(folder)
    assert same(read_all(folder), weights())


def test_the_single_file_counts_where_both_are_there(folder: Path) -> None:
    """As in transformers."""
    single = (folder / "model.safetensors").read_bytes()
    write_index(folder)
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    (folder / "model.safetensors").write_bytes(single)
    assert same(read_all(folder), weights())


def test_left_overs_of_old_files_are_passed_over(folder: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    change_tensors(folder, extra)
    assert same(read_all(folder), weights())


NAME = "model.layers.1.mlp.up_proj.weight"
SHAPE = hf_shapes(MODEL)[NAME]


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "is not a folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is not a folder")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


@pytest.mark.parametrize("text", ['{"model_type": "idefics",', "", "\x00", "[1]"])
def test_broken_config(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "idefics2"}, "model_type='idefics2'"),
        ({"model_type": None}, "model_type"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"dropout": 0.1}, "dropout"),
        ({"use_resampler": False}, "use_resampler"),
        ({"use_resampler": None}, "use_resampler"),
        ({"vision_config": None}, "vision_config"),
        ({"perceiver_config": 3}, "perceiver_config"),
        ({"vision_config": {"attention_dropout": 0.1}}, "attention_dropout"),
        ({"vision_config": {"image_size": [8, 8]}}, "image_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"cross_layer_interval": 3}, "cross_layer_interval"),
        ({"cross_layer_interval": 0}, "cross_layer_interval"),
    ],
    ids=str,
)
def test_configurations_of_other_models(change: dict[str, Any], word: str, folder: Path) -> None:
    change_config(folder, **change)
    refused(folder, "config.json", word)


def test_absent_keys_that_decide_are_not_guessed(folder: Path) -> None:
    for key in ("model_type", "use_resampler", "vision_config", "perceiver_config"):
        config = to_hf(MODEL)
        del config[key]
        with pytest.raises(CheckpointError, match=key):
            from_hf(config)


def test_missing_tensor(folder: Path) -> None:
    change_tensors(folder, {NAME: None})
    refused(folder, f"missing: {NAME}")


def test_unknown_tensor(folder: Path) -> None:
    change_tensors(folder, {"model.layers.2.mlp.up_proj.weight": torch.ones(SHAPE)})
    refused(folder, "unknown: model.layers.2.mlp.up_proj.weight")


def test_wrong_shape(folder: Path) -> None:
    change_tensors(folder, {NAME: torch.ones(SHAPE[1], SHAPE[0])})
    refused(folder, f"shape of {NAME} is {SHAPE[::-1]}, not {SHAPE}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, folder: Path) -> None:
    tensor = torch.ones(SHAPE)
    tensor[1, 2] = value
    change_tensors(folder, {NAME: tensor})
    refused(folder, NAME, "NaN or infinite")


def test_integers(folder: Path) -> None:
    change_tensors(folder, {NAME: torch.ones(SHAPE, dtype=torch.int32)})
    refused(folder, NAME, "torch.int32")


def test_other_numbers_of_layers_or_words(folder: Path) -> None:
    change_config(folder, num_hidden_layers=4)
    refused(folder, "missing: model.gated_cross_attn_layers.1.", "and 21 more")
    change_config(folder, num_hidden_layers=2, additional_vocab_size=3)
    refused(folder, "shape of lm_head.additional_fc.weight")


ELSEWHERE = ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "gone.safetensors", "", 3, None]


@pytest.mark.parametrize("entry", ELSEWHERE)
def test_an_index_that_points_elsewhere(entry: Any, folder: Path) -> None:
    where = write_index(folder)
    shutil.copy(folder / where[NAME], folder.parent / "x.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(folder / where[NAME], folder / "sub" / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where | {NAME: entry}}))
    refused(folder, repr(entry), "not a file of this folder")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_broken_index(text: str, folder: Path) -> None:
    write_index(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "model.safetensors.index.json")


def test_an_index_that_names_the_wrong_file(folder: Path) -> None:
    where = write_index(folder)
    other = next(file for file in where.values() if file != where[NAME])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where | {NAME: other}}))
    refused(folder, other, f"does not hold {NAME}")


def test_no_tensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "no model.safetensors")


@pytest.mark.parametrize("size", [0, 7, 100, -1, -4000])
def test_a_file_that_was_cut(size: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, "cannot read", "model.safetensors")


def test_a_file_of_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>" * 1000)
    refused(folder, "cannot read", "model.safetensors")


def test_another_model_is_told_by_its_keys() -> None:
    other = from_hf({"model_type": "idefics", **hf_config(Case("other", 0, layers=4, eps=1e-5))})
    with pytest.raises(CheckpointError) as error:
        check_same_model("the folder", other, MODEL)
    assert "the folder" in str(error.value)
    assert "model.num_layers is 4 there and 2 here" in str(error.value)
    assert "model.norm_eps is 1e-05 there and 1e-06 here" in str(error.value)
    assert "hidden_size" not in str(error.value)


# The configuration, from and to Hugging Face's form ------------------------------------------------------------------

# What config.json of the two released models says on the hub. Where the larger one leaves a key out, more are left
# out here.
HUB_9B: dict[str, Any] = {
    "additional_vocab_size": 2,
    "alpha_initializer": "zeros",
    "alpha_type": "float",
    "alphas_initializer_range": 0.0,
    "architectures": ["IdeficsForVisionText2Text"],
    "bos_token_id": 1,
    "cross_layer_activation_function": "swiglu",
    "cross_layer_interval": 4,
    "dropout": 0.0,
    "eos_token_id": 2,
    "freeze_lm_head": False,
    "freeze_text_layers": False,
    "freeze_text_module_exceptions": [],
    "freeze_vision_layers": False,
    "freeze_vision_module_exceptions": [],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "max_sequence_length": 2048,
    "model_type": "idefics",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "perceiver_config": {
        "qk_layer_norms_perceiver": True,
        "resampler_depth": 6,
        "resampler_head_dim": 96,
        "resampler_n_heads": 16,
        "resampler_n_latents": 64,
        "use_resampler": False,
    },
    "qk_layer_norms": True,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.0.dev0",
    "use_cache": True,
    "use_resampler": True,
    "vision_config": {
        "embed_dim": 1280,
        "hidden_act": "gelu",
        "image_size": 224,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "patch_size": 14,
    },
    "vocab_size": 32000,
}
HUB_80B = HUB_9B | {
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "rms_norm_eps": 1e-5,
    "vision_config": {key: value for key, value in HUB_9B["vision_config"].items() if key != "hidden_act"},
}
for _key in ("max_position_embeddings", "hidden_act", "dropout", "tie_word_embeddings", "alpha_type", "vocab_size"):
    del HUB_80B[_key]


@pytest.mark.parametrize(("name", "hub"), [("atum-9b", HUB_9B), ("atum-80b", HUB_80B)])
def test_the_hubs_configurations(name: str, hub: dict[str, Any]) -> None:
    from transformers import IdeficsConfig

    model = from_hf(hub)
    check_same_model(name, model, preset(name))
    assert model.max_position_embeddings == 2048
    assert not model.freeze.text and not model.freeze.vision and not model.freeze.lm_head
    assert from_hf(IdeficsConfig(**hub).to_dict()) == model  # transformers fills in what is absent
    assert from_hf(to_hf(model)) == model


def test_an_absent_key_means_hugging_faces_default() -> None:
    """Not ours: an IDEFICS without `qk_layer_norms` has none."""
    from transformers import IdeficsConfig

    bare = {"model_type": "idefics", "use_resampler": True, "vision_config": {}, "perceiver_config": {}}
    model = from_hf(bare)
    assert model == from_hf(IdeficsConfig(**bare).to_dict())
    assert not model.qk_norm and not model.perceiver.qk_norm
    assert (model.additional_vocab_size, model.cross_layer_interval, model.vision.embed_dim) == (0, 1, 768)


def test_null_means_hugging_faces_default() -> None:
    assert from_hf(to_hf(MODEL) | {"pad_token_id": None}) == MODEL


@pytest.mark.parametrize("name", ["tiny", "atum-9b", "atum-80b"])
def test_round_trip(name: str) -> None:
    """Through JSON and through transformers' own configuration."""
    from transformers import IdeficsConfig

    model = preset(name)
    model.alpha_type, model.rope_theta, model.pad_token_id = "vector", 500000.0, 5
    model.vision.norm_eps, model.vision.hidden_act = 1e-6, "quick_gelu"
    model.freeze.text_exceptions, model.freeze.lm_head = ["LayerNorm"], False
    model.preset = ""
    hf = json.loads(json.dumps(to_hf(model, "float16")))
    assert from_hf(hf) == model
    theirs = IdeficsConfig(**hf)
    assert from_hf(theirs.to_dict()) == model
    assert theirs.rope_parameters["rope_theta"] == 500000.0
    assert str(theirs.dtype) == "torch.float16"


def test_older_ways_to_write_rope_theta() -> None:
    hf = to_hf(MODEL)
    del hf["rope_parameters"]
    assert from_hf(hf).rope_theta == 10000.0
    assert from_hf(hf | {"rope_theta": 1000}).rope_theta == 1000.0


# Writing -------------------------------------------------------------------------------------------------------------


def test_several_shards(tmp_path: Path) -> None:
    tensors = weights()
    write_hf_folder(tmp_path / "out", MODEL, tensors.items(), shard_bytes=20_000)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in tensors.values())
    assert set(index["weight_map"].values()) == set(files)
    assert same(read_all(tmp_path / "out"), tensors)


def test_what_cannot_be_written_leaves_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    short, odd = weights(), weights()
    short.pop(NAME)
    odd[NAME] = torch.ones(3)

    def breaks() -> Any:
        yield NAME, torch.ones(SHAPE)
        raise RuntimeError

    for tensors, kind in ((short.items(), CheckpointError), (odd.items(), CheckpointError), (breaks(), RuntimeError)):
        with pytest.raises(kind):
            write_hf_folder(out, MODEL, tensors)
        assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_written_into(folder: Path) -> None:
    before = sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir())
    with pytest.raises(CheckpointError, match="exists already"):
        write_hf_folder(folder, MODEL, weights().items())
    assert sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir()) == before
