"""A first ATUM from a small random LLaMA and CLIP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_atum.checkpoint.backbones import Backbones
from megatron_atum.checkpoint.draw import Drawn
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.hf_folder import IdeficsFolder
from megatron_atum.checkpoint.stored import open_checkpoint
from megatron_atum.config.loader import preset
from megatron_atum.errors import CheckpointError

ROOT = Path(__file__).parents[2]
BASE = replace(preset("tiny"), additional_vocab_size=3, cross_layer_interval=2, qk_norm=False)
LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 300,
    "rope_theta": 5000.0,
}
CLIP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
TEXT |= {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}


def save_backbones(folder: Path, **llama: Any) -> None:
    from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA | llama)).save_pretrained(folder / "llama")
    CLIPModel(CLIPConfig(vision_config=CLIP, text_config=TEXT, projection_dim=16)).save_pretrained(folder / "clip")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    save_backbones(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(file: Path, *keys: str, **changes: Any) -> None:
    content = json.loads(file.read_text())
    section = content
    for key in keys:
        section = section[key]
    section |= changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        Backbones(folder / "llama", folder / "clip", BASE)
    for word in words:
        assert word in str(error.value), str(error.value)


def state_of(folder: Path) -> dict[str, Tensor]:
    from transformers import IdeficsForVisionText2Text

    model, info = IdeficsForVisionText2Text.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.state_dict()


def test_the_result_holds_both_backbones(folder: Path) -> None:
    backbones = Backbones(folder / "llama", folder / "clip", BASE, 3, torch.float32)
    write_hf_folder(folder / "out", backbones.model, backbones)
    state = state_of(folder / "out")
    llama, clip = (load_file(folder / name / "model.safetensors") for name in ("llama", "clip"))
    taken = llama | {f"model.{name}": tensor for name, tensor in clip.items() if name.startswith("vision_model.")}
    taken = {name: tensor for name, tensor in taken.items() if not name.endswith("position_ids")}
    for name, tensor in taken.items():
        assert torch.equal(state[name], tensor), name
    new = Drawn(backbones.model, 3)
    for name in state.keys() - taken.keys():
        assert torch.equal(state[name], new.read(name)), name
    assert any("gated_cross_attn" in name for name in state.keys() - taken.keys())

    m = IdeficsFolder(folder / "out").model
    assert (m.vocab_size, m.hidden_size, m.intermediate_size, m.num_layers, m.num_heads) == (97, 32, 48, 4, 4)
    assert (m.norm_eps, m.rope_theta, m.max_position_embeddings) == (1e-5, 5000.0, 300)
    assert (m.vision.embed_dim, m.vision.image_size, m.vision.patch_size, m.vision.num_layers) == (16, 8, 4, 2)
    assert (m.vision.num_heads, m.vision.norm_eps, m.vision.hidden_act) == (2, 1e-6, "gelu")
    assert (m.additional_vocab_size, m.qk_norm, m.cross_layer_interval) == (3, False, 2)
    assert m.perceiver == BASE.perceiver


def test_the_head_may_be_tied_to_the_embedding(tmp_path: Path) -> None:
    save_backbones(tmp_path, tie_word_embeddings=True)
    backbones = Backbones(tmp_path / "llama", tmp_path / "clip", BASE, dtype=torch.float32)
    write_hf_folder(tmp_path / "out", backbones.model, backbones)
    state = state_of(tmp_path / "out")
    embedding = load_file(tmp_path / "llama" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(state["lm_head.weight"], embedding)
    assert torch.equal(state["model.embed_tokens.weight"], embedding)


def test_clip_values_that_its_file_leaves_out(folder: Path) -> None:
    """They are CLIP's defaults, not ours."""
    config = json.loads((folder / "clip" / "config.json").read_text())
    for key in ("hidden_act", "layer_norm_eps", "num_channels"):
        config["vision_config"].pop(key, None)
    (folder / "clip" / "config.json").write_text(json.dumps(config))
    vision = Backbones(folder / "llama", folder / "clip", BASE).model.vision
    assert (vision.hidden_act, vision.norm_eps, vision.num_channels) == ("quick_gelu", 1e-5, 3)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_key_value_heads": 2}, "grouped-query attention"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "scaled rotary"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rotary"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"num_attention_heads": "absent"}, "num_attention_heads"),
        ({"hidden_size": "32"}, "odd values"),
        ({"vocab_size": "97"}, "vocab_size='97'"),
        ({"num_hidden_layers": 6}, "missing: model.layers.4."),
        ({"vocab_size": 96}, "shape of lm_head.weight is (97, 32), not (96, 32)"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_llamas_that_atum_does_not_build(changes: dict[str, Any], word: str, folder: Path) -> None:
    change(folder / "llama" / "config.json", **changes)
    refused(folder, str(folder / "llama"), word)


def test_biases_without_a_word_in_the_configuration(folder: Path) -> None:
    file = folder / "llama" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, file)
    refused(folder, "unknown: model.layers.0.self_attn.q_proj.bias")


def test_clips_that_atum_does_not_build(folder: Path) -> None:
    file = folder / "clip" / "config.json"
    whole = file.read_text()
    change(file, model_type="siglip")
    refused(folder, str(folder / "clip"), "siglip")
    file.write_text(whole)
    change(file, vision_config="absent")
    refused(folder, str(folder / "clip"), "vision_config")
    file.write_text(whole)
    change(file, "vision_config", num_hidden_layers=3)
    refused(folder, "missing: model.vision_model.encoder.layers.2.")


def test_exchanged_folders(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="model_type is 'clip', not 'llama'"):
        Backbones(folder / "clip", folder / "llama", BASE)


def test_rows_and_dtypes(folder: Path) -> None:
    """A drawn tensor and a read one, in slices as whole; slices do not keep the whole tensor in memory."""
    whole = Backbones(folder / "llama", folder / "clip", BASE, 3, torch.float32)
    for name in ("lm_head.weight", "model.gated_cross_attn_layers.0.cross_attn.q_proj.weight"):
        for dtype in (torch.bfloat16, torch.float32):
            with Backbones(folder / "llama", folder / "clip", BASE, 3, dtype) as backbones:
                rows = [backbones.read(name, slice(first, first + 10)) for first in range(0, 100, 10)]
                assert backbones.dtype(name) == dtype and backbones.shape(name) == whole.shape(name)
                assert torch.equal(torch.cat(rows), whole.read(name).to(dtype))
                assert rows[0].untyped_storage().nbytes() <= rows[0].nbytes


def test_values_that_the_dtype_does_not_have(folder: Path) -> None:
    file = folder / "llama" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.full((97, 32), 1e5)}, file)
    backbones = Backbones(folder / "llama", folder / "clip", BASE, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has values that are too large for float16"):
        backbones.read("lm_head.weight")


def test_integers(folder: Path) -> None:
    file = folder / "llama" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.ones(97, 32, dtype=torch.int8)}, file)
    refused(folder, "dtype of lm_head.weight is torch.int8")


def call(folder: Path, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    tool = [sys.executable, str(ROOT / "tools/checkpoint/init_from_backbones.py"), "--preset", "tiny", "--seed", "3"]
    where = ["--llama", str(folder / "llama"), "--clip", str(folder / "clip"), "--out", str(folder / out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*tool, *where, *more], capture_output=True, text=True, timeout=120, cwd=folder, env=environment
    )


def test_the_tool(folder: Path) -> None:
    done = call(folder, "out")
    assert done.returncode == 0, done.stderr
    with IdeficsFolder(folder / "out") as written:
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(written.read(name), load_file(folder / "llama/model.safetensors")[name].bfloat16())

    again = call(folder, "out")
    assert again.returncode == 2 and "exists already" in again.stderr
    assert "Traceback" not in again.stderr

    done = call(folder, "atum", "--format", "atum")
    assert done.returncode == 0, done.stderr
    stored = open_checkpoint(folder / "atum")
    with IdeficsFolder(folder / "out") as written:
        assert stored.names() == written.names()
        for name in stored.names():
            assert torch.equal(stored.read(name), written.read(name)), name

    file = folder / "llama" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][3, 3] = float("nan")  # the last one to be written
    save_file(tensors, file)
    failed = call(folder, "other")
    assert failed.returncode == 2 and "lm_head.weight holds NaN" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["atum", "clip", "llama", "out"]
