"""What is taken for an IDEFICS folder, and what is refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_atum.checkpoint.hf_config import from_hf, to_hf
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.hf_folder import IdeficsFolder, check_same_model
from megatron_atum.checkpoint.source import Given
from megatron_atum.config.loader import preset
from megatron_atum.errors import CheckpointError
from tests.checkpoint.folders import (
    DTYPES,
    MODEL,
    NAME,
    SHAPE,
    all_of,
    change_config,
    change_header,
    change_tensors,
    read_all,
    refused,
    same,
    same_bits,
    weights,
)
from tests.model.cases import Case, hf_config


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "whole"
    write_hf_folder(folder, MODEL, Given(weights()))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "model"))


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
    with IdeficsFolder(folder) as opened:
        assert opened.dropped == sorted(extra)


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
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": "10000"}}, "rope_theta"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 3}, "hidden_size=32 is not a multiple of 2 x num_attention_heads=6"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"vision_config": {"embed_dim": 18, "num_attention_heads": 4}}, "embed_dim=18 is not a multiple"),
        ({"vision_config": {"image_size": 4, "patch_size": 8}}, "patch_size is larger"),
        ({"perceiver_config": {"resampler_depth": -1}}, "resampler_depth=-1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
        ({"eos_token_id": 99}, "eos_token_id=99, but the vocabulary has 99"),
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


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float64])
def test_other_dtypes(dtype: torch.dtype, folder: Path) -> None:
    """Known from the header: the values are not read for it."""
    change_tensors(folder, {NAME: torch.ones(SHAPE, dtype=dtype)})
    refused(folder, f"dtype of {NAME} is {dtype}")
    with pytest.raises(CheckpointError, match="dtype of"):
        IdeficsFolder(folder)


@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:2], DTYPES[2:], DTYPES], ids=str)
def test_floating_dtypes(dtypes: tuple[torch.dtype, ...], folder: Path) -> None:
    tensors = weights(MODEL, *dtypes)
    save_file(tensors, folder / "model.safetensors")
    assert same(read_all(folder), tensors)


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


def test_a_file_that_holds_more_than_the_index_says(folder: Path) -> None:
    """transformers would load it."""
    where = write_index(folder)
    file = folder / where[NAME]
    save_file(load_file(file) | {"lm_head.bias": torch.ones(3)}, file)
    refused(folder, where[NAME], "holds lm_head.bias", "index.json does not say")


def test_no_tensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights", "model.safetensors", "pytorch_model.bin.index.json")


def test_some_rows(folder: Path) -> None:
    whole = weights()
    with IdeficsFolder(folder) as opened:
        assert opened.shape(NAME) == SHAPE and opened.dtype(NAME) == torch.float32
        for rows in (slice(0, 3), slice(5, 6), slice(40, 99), slice(7, 7)):
            assert same_bits(opened.read(NAME, rows), whole[NAME][rows])


def test_only_the_rows_that_are_read_are_judged(folder: Path) -> None:
    tensor = torch.ones(SHAPE)
    tensor[1, 2] = float("nan")
    change_tensors(folder, {NAME: tensor})
    with IdeficsFolder(folder) as opened:
        assert same_bits(opened.read(NAME, slice(2, 9)), tensor[2:9])


@pytest.mark.parametrize("size", [0, 7, 100, -1, -4000])
def test_a_file_that_was_cut(size: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, "model.safetensors")


def test_a_file_that_was_cut_after_it_was_opened(folder: Path) -> None:
    with IdeficsFolder(folder) as opened:
        os.truncate(folder / "model.safetensors", 3000)
        with pytest.raises(CheckpointError, match="cut short"):
            all_of(opened)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"data_offsets": [0, 1 << 40]}, "does not lie inside"),
        ({"data_offsets": [-4, 0], "shape": [1]}, "-4"),
        ({"data_offsets": [0, 8]}, "does not lie inside"),
        ({"shape": [1 << 40, 1 << 40]}, "does not lie inside"),
        ({"data_offsets": [0, 4 * SHAPE[0] * SHAPE[1]]}, "lies over another tensor"),
        ({"dtype": "F8_E4M3"}, "F8_E4M3"),
        ({"dtype": None}, "None"),
        ({"data_offsets": None}, "damaged header"),
    ],
    ids=str,
)
def test_a_header_that_lies(changes: dict[str, Any], word: str, folder: Path) -> None:
    change_header(folder / "model.safetensors", NAME, **changes)
    refused(folder, "model.safetensors", word)


def test_a_file_of_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>" * 1000)
    refused(folder, "model.safetensors", "not a safetensors file")


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
