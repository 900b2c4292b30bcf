"""Processor files that come with a model are given back; where there are none they are made. No torchvision."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.processor import ADDED_TOKENS, has_processor, write_processor
from megatron_atum.checkpoint.source import Given
from megatron_atum.errors import DataError
from tests.checkpoint.folders import MODEL, read_all, same, weights

ROOT = Path(__file__).parents[2]
BASE = replace(MODEL, additional_vocab_size=2)
INSTRUCT = replace(MODEL, additional_vocab_size=3)
TEXT = "hello <fake_token_around_image><image><fake_token_around_image> world 35"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text").write_text("\n".join(f"w{number} hello world {number * 7}" for number in range(500)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=MODEL.vocab_size,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def processor_of(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def run(tool: str, *options: str | Path) -> None:
    """A tool in this process; test_checkpoint_tools.py starts them as a user does."""
    spec = importlib.util.spec_from_file_location(tool, ROOT / "tools/checkpoint" / f"{tool}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [tool, *map(str, options)])
        module.main()


def there_and_back(hf: Path, folder: Path, *options: str | Path) -> Path:
    run("hf_to_atum", "--hf", hf, "--out", folder / "atum")
    run("atum_to_hf", "--checkpoint", folder / "atum", "--out", folder / "back", *options)
    return folder / "back"


@pytest.mark.parametrize("model", [BASE, INSTRUCT], ids=["base", "instruct"])
def test_made_from_a_tokenizer_model(model: Any, tokenizer: Path, tmp_path: Path) -> None:
    assert importlib.util.find_spec("torchvision") is None  # the point of this file
    write_hf_folder(tmp_path / "hf", model, Given(weights(model)), assets={"tokenizer.model": tokenizer.read_bytes()})
    assert not has_processor(tmp_path / "hf")
    out = there_and_back(tmp_path / "hf", tmp_path)
    assert has_processor(out)
    assert same(read_all(out), weights(model))
    processor = processor_of(out)
    words = model.vocab_size
    added = list(ADDED_TOKENS[: model.additional_vocab_size])
    assert processor.tokenizer.convert_tokens_to_ids(added) == list(range(words, words + len(added)))
    ids = processor.tokenizer(TEXT)["input_ids"]
    assert [token for token in ids if token >= words] == [words, words + 1, words]
    assert processor.image_processor.image_size == model.vision.image_size
    assert (out / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_given_back_as_they_came(tokenizer: Path, tmp_path: Path) -> None:
    """As transformers' save_pretrained writes a whole model, with changes that only its owner knows."""
    from transformers import IdeficsForVisionText2Text

    write_hf_folder(tmp_path / "made", INSTRUCT, Given(weights(INSTRUCT)))
    write_processor(tmp_path / "made", tokenizer, INSTRUCT)
    (tmp_path / "made" / "tokenizer.model").unlink()
    hf = tmp_path / "hf"
    IdeficsForVisionText2Text.from_pretrained(tmp_path / "made").save_pretrained(hf)
    processor = processor_of(tmp_path / "made")
    processor.tokenizer.model_max_length = 321
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.chat_template = "{{ messages }}"
    processor.save_pretrained(hf)
    out = there_and_back(hf, tmp_path)
    small = {file.name for file in hf.iterdir()} - {"model.safetensors"}
    assert {file.name for file in out.iterdir()} - {"model.safetensors"} == small
    for name in small - {"config.json"}:
        assert (out / name).read_bytes() == (hf / name).read_bytes(), name
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (hf, out))
    assert {key for key in theirs if ours.get(key) != theirs[key]} <= {"transformers_version", "vision_config"} | set(
        key for key in theirs if key.startswith("alpha") or key == "perceiver_config"
    )
    assert same(read_all(out), read_all(hf))
    back = processor_of(out)
    assert back.tokenizer.model_max_length == 321
    assert tuple(back.image_processor.image_mean) == (0.1, 0.2, 0.3)
    assert back.tokenizer(TEXT)["input_ids"] == processor.tokenizer(TEXT)["input_ids"]


def test_files_as_the_hub_has_them(tokenizer: Path, tmp_path: Path) -> None:
    """Files of 2023: preprocessor_config.json, and the added tokens in files of their own."""
    write_hf_folder(tmp_path / "hf", BASE, Given(weights(BASE)))
    shutil.copy(tokenizer, tmp_path / "hf" / "tokenizer.model")
    added = {token: MODEL.vocab_size + place for place, token in enumerate(ADDED_TOKENS[:2])}
    files: dict[str, Any] = {
        "preprocessor_config.json": {"image_processor_type": "IdeficsImageProcessor", "image_size": 8}
        | {"processor_class": "IdeficsProcessor", "image_num_channels": 3, "image_mean": [0.5, 0.4, 0.3]},
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "processor_class": "IdeficsProcessor"}
        | {"legacy": False, "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        "special_tokens_map.json": {"additional_special_tokens": list(added), "pad_token": "<unk>"},
        "added_tokens.json": added,
    }
    for name, content in files.items():
        (tmp_path / "hf" / name).write_text(json.dumps(content))
    out = there_and_back(tmp_path / "hf", tmp_path)
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    processor = processor_of(out)
    assert tuple(processor.image_processor.image_mean) == (0.5, 0.4, 0.3)
    assert processor.tokenizer.convert_tokens_to_ids(list(added)) == list(added.values())


def test_another_tokenizer_takes_the_place_of_all_files(tokenizer: Path, tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf", BASE, Given(weights(BASE)))
    write_processor(tmp_path / "hf", tokenizer, BASE)
    (tmp_path / "hf" / "added_tokens.json").write_text('{"<other>": 5000}')
    out = there_and_back(tmp_path / "hf", tmp_path, "--tokenizer", tokenizer.parent)
    assert not (out / "added_tokens.json").exists()
    assert processor_of(out).tokenizer.convert_tokens_to_ids("<image>") == BASE.vocab_size + 1


def test_a_tokenizer_that_lies_among_others(tokenizer: Path, tmp_path: Path) -> None:
    """transformers would read the tokenizer.json next to the file that it is given."""
    shutil.copy(tokenizer, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "out").mkdir()
    write_processor(tmp_path / "out", tmp_path / "tokenizer.model", BASE)
    assert has_processor(tmp_path / "out")


def test_a_tokenizer_of_another_model(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="97 pieces"):
        write_processor(tmp_path, tokenizer, replace(BASE, vocab_size=96))
    assert list(tmp_path.iterdir()) == []
