import json
from pathlib import Path
from types import ModuleType

import sentencepiece

from megatron_atum.data.shards import read_shard


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_runs_write_the_same(tiny: Path, tmp_path: Path, make_data_script: ModuleType):
    make_data_script.make_data(tmp_path, repeat_documents=3)
    assert contents(tmp_path) == contents(tiny)


def test_what_it_writes(tiny: Path):
    captions = json.loads((tiny / "captions.json").read_text())
    pairs = dict(read_shard(str(tiny / "pairs-00000.tar")))
    assert {key: content["txt"].decode() for key, content in pairs.items()} == captions
    assert {f"photos/{key}.jpg" for key in pairs} < set(contents(tiny))
    assert len(set(captions.values())) == len(captions) == 10
    assert all(5 <= len(caption.split()) <= 9 for caption in captions.values())
    assert len(list(read_shard(str(tiny / "documents-00000.tar")))) == 12


def test_tokenizer_settings(tiny: Path):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tiny / "tokenizer.model"))
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert model.get_piece_size() == 512
    assert model.encode("12", out_type=str) == ["▁", "<0x31>", "<0x32>"]  # digits apart, unknown characters as bytes
    assert str(tiny).encode() not in (tiny / "tokenizer.model").read_bytes()
