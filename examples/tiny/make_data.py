"""Writes a small data set of real photographs: image-text pairs, interleaved documents and a tokenizer.

    python examples/tiny/make_data.py --out DIR [--repeat-documents N]

The photographs lie inside the wheels of scikit-image and scikit-learn, so nothing is downloaded. Captions and
paragraphs were written for this project by looking at the pictures. Two runs write identical bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
from pathlib import Path

import sentencepiece
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from megatron_atum.data.shards import DocumentRecord, PairRecord, write_shard

MAX_SIDE = 320  # pixels
JPEG_QUALITY = 90
VOCAB_SIZE = 512

# photo name -> package, file inside it, caption
PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png", "a smiling astronaut in an orange space suit"),
    "cat": ("skimage", "data/chelsea.png", "the face of a striped cat seen up close"),
    "coffee": ("skimage", "data/coffee.png", "a red cup of coffee on a wooden table"),
    "rocket": ("skimage", "data/rocket.jpg", "a white rocket stands on its launch pad"),
    "coins": ("skimage", "data/coins.png", "four rows of old coins on a dark surface"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg", "many distant galaxies in a black sky"),
    "motorcycle": ("skimage", "data/motorcycle_left.png", "a red motorcycle parked inside a garage"),
    "retina": ("skimage", "data/retina.jpg", "blood vessels at the back of an eye"),
    "temple": ("sklearn", "datasets/images/china.jpg", "a tall temple tower above a wide lake"),
    "flower": ("sklearn", "datasets/images/flower.jpg", "an orange flower in front of dark green leaves"),
}

# key -> places in order: a photo as {name}, anything else is text
DOCUMENTS: dict[str, list[str]] = {
    "space": [
        "Going to space starts on the ground.",
        "{rocket}",
        "The rocket stands upright between tall towers, and bright lights shine around the launch pad.",
        "{astronaut}",
        "An astronaut wears an orange suit. A helmet lies in front of her and a model of the shuttle stands behind.",
        "{galaxies}",
        "A telescope above the air sees much further: nearly every spot of light in this picture is a galaxy.",
    ],
    "kitchen": [
        "The day begins in the kitchen.",
        "{coffee}",
        "A cup of coffee waits on a wooden table. The cup and its saucer are red, and a small spoon lies beside it.",
        "{cat}",
        "The cat does not drink coffee. It has striped fur, large eyes and long white whiskers.",
    ],
    "garden": [
        "Some places are best seen in daylight.",
        "{temple}",
        "This temple tower has several roofs, one above the other. Trees grow around it and a lake lies behind.",
        "{flower}",
        "The flower has many small orange petals in neat rings. A second one can be seen below it.",
    ],
    "collection": [
        "Three pictures that have little in common.",
        "{coins}",
        "Old coins are laid out in four rows. Some are large and some are small.",
        "{motorcycle}",
        "A red motorcycle rests on its stand in a garage full of shelves and boxes.",
        "{retina}",
        "The back of an eye looks orange. Thin vessels spread out from the bright spot where the nerve leaves.",
    ],
}


def photo_path(package: str, file: str) -> Path:
    """Where a file of an installed package lies; the package is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {package} is not installed; run: pip install scikit-image scikit-learn")
    return Path(next(iter(spec.submodule_search_locations))) / file


def load_photo(name: str) -> bytes:
    """A photo as JPEG with its longer side at most MAX_SIDE pixels."""
    package, file, _ = PHOTOS[name]
    image = Image.open(photo_path(package, file)).convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def document_record(key: str, places: list[str], photos: dict[str, bytes]) -> DocumentRecord:
    """A document from its list of places."""
    names = [place[1:-1] if place.startswith("{") else None for place in places]
    return DocumentRecord(
        key=key,
        texts=[place if name is None else None for place, name in zip(places, names, strict=True)],
        images=[None if name is None else photos[name] for name in names],
        source="tiny",
    )


def train_tokenizer(texts: list[str]) -> bytes:
    """A sentencepiece model with LLaMA's settings. Written through a stream, so that no path gets into it."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=stream,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return stream.getvalue()


def make_data(out: Path, repeat_documents: int = 1) -> None:
    """Writes everything into `out`, which is made if need be."""
    (out / "photos").mkdir(parents=True, exist_ok=True)
    photos = {name: load_photo(name) for name in PHOTOS}
    captions = {name: caption for name, (_, _, caption) in PHOTOS.items()}
    for name, data in photos.items():
        (out / "photos" / f"{name}.jpg").write_bytes(data)
    (out / "captions.json").write_text(json.dumps(captions, indent=2) + "\n", encoding="utf-8")
    pairs = [PairRecord(name, photos[name], caption) for name, caption in captions.items()]
    write_shard(out / "pairs-00000.tar", pairs)
    documents = [
        document_record(f"{key}-{repeat:03d}", places, photos)
        for repeat in range(repeat_documents)
        for key, places in DOCUMENTS.items()
    ]
    write_shard(out / "documents-00000.tar", documents)
    texts = [place for places in DOCUMENTS.values() for place in places if not place.startswith("{")]
    (out / "tokenizer.model").write_bytes(train_tokenizer([*captions.values(), *texts]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--repeat-documents", type=int, default=1, help="how often each document is written")
    args = parser.parse_args()
    make_data(args.out, args.repeat_documents)
    print(f"wrote {len(PHOTOS)} pairs and {len(DOCUMENTS) * args.repeat_documents} documents to {args.out}")


if __name__ == "__main__":
    main()
