"""Small files of a model folder in Hugging Face format that are not weights and that a user wants back."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_atum.errors import CheckpointError

NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# Made for one tokenizer; they must not outlive it.
OF_A_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATE = re.compile(r"chat_template\.[a-z0-9]+")
MOST_BYTES = 64 << 20


def is_asset(name: str) -> bool:
    """Such a name is always a plain one, without a folder in it."""
    return name in NAMES or _TEMPLATE.fullmatch(name) is not None


def read_assets(folder: Path) -> dict[str, bytes]:
    """The content of these files by name.

    Raises:
        CheckpointError: one cannot be read, or is too large to be what its name says.
    """
    files = sorted(file for file in folder.iterdir() if is_asset(file.name) and file.is_file())
    return {file.name: _content(file) for file in files}


def _content(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise CheckpointError(f"{file} is larger than {MOST_BYTES >> 20} MiB; is it what its name says?")
    return content


def write_assets(folder: Path, assets: dict[str, bytes]) -> None:
    """Write them as they were. Raises CheckpointError for a name that is none of these."""
    for name, content in assets.items():
        if not is_asset(name):
            raise CheckpointError(f"{name!r} is not the name of a tokenizer, processor or configuration file")
        (folder / name).write_bytes(content)
