"""docs/finetune.md: its commands, run as they stand there, on the tiny model."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.parallel.layout import ParallelLayout

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "finetune.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
(LARGE,) = (block for block in BLOCKS if block.startswith("# 9B"))
COMMANDS = "".join(block for block in BLOCKS if block is not LARGE)
NEEDED = ("tools", "examples", "pretrain_atum.py")  # of the repository, which the commands are relative to

sys.path.insert(0, str(ROOT / "examples" / "finetune"))
make_chats = importlib.import_module("make_chats")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of everything that the page makes, and what its commands said."""
    from examples.tiny.demo_processes import free_port

    folder = tmp_path_factory.mktemp("finetune")
    for name in NEEDED:
        (folder / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PET_MASTER_PORT": str(free_port()),  # of torchrun; other tests may use its default
    }
    script = f"set -eu -o pipefail\n{COMMANDS}"
    ran = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return folder / "runs" / "finetune", ran.stdout


def test_the_tools_say_what_they_did(done: tuple[Path, str]) -> None:
    said = done[1]
    assert "samples  read 5   kept 5   dropped 0" in said and "images   read 3   kept 3   lost 0" in said
    assert "5 samples, 5 of them usable" in said and "no fault" in said
    assert "has 2 added tokens, and this model 3: row 3 is drawn" in said


def step_losses(run: Path, key: str) -> list[float]:
    """Of the steps that had rows of this source."""
    return [line[key] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in line]


def test_the_conversations_are_learnt_by_heart(done: tuple[Path, str]) -> None:
    losses = step_losses(done[0] / "tuned", "loss/mine")
    assert losses[0] > 4 and losses[-1] < 0.03


def test_the_page_ends_with_the_trained_answer(done: tuple[Path, str]) -> None:
    assert done[1].splitlines()[-1] == make_chats.PHOTOS["cat"][2]


def test_every_answer_is_that_of_its_image(done: tuple[Path, str]) -> None:
    from transformers import AutoProcessor, IdeficsForVisionText2Text

    ask: Any = importlib.import_module("ask").ask
    exported = done[0] / "exported"
    model, processor = (
        IdeficsForVisionText2Text.from_pretrained(exported).eval(),
        AutoProcessor.from_pretrained(exported),
    )
    assert model.config.additional_vocab_size == 3
    for name in make_chats.SHOWN:
        image = Image.open(done[0] / "mine" / "photos" / f"{name}.jpg").convert("RGB")
        assert ask(model, processor, make_chats.QUESTION, image, 32) == make_chats.PHOTOS[name][2]
    for question, answer, *_ in make_chats.TALKS:
        assert ask(model, processor, question, None, 32) == answer


class Echo:
    """A model that says nothing."""

    device = "cpu"

    def generate(self, **inputs: Any) -> Any:
        self.prompt = inputs["input_ids"][0].tolist()
        return inputs["input_ids"]


@pytest.mark.parametrize(
    "question", ["http://x.example/a.jpg", " ftp://x.example:80/a", "http:\n//x/a", "a: b://c", "Is it?"]
)
def test_a_question_is_never_fetched(done: tuple[Path, str], question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(done[0] / "exported")
    fetch = processor.image_processor.fetch_images
    monkeypatch.setattr(
        processor.image_processor,
        "fetch_images",
        lambda found: pytest.fail() if isinstance(found, str) else fetch(found),
    )
    model = Echo()
    assert importlib.import_module("ask").ask(model, processor, question, Image.new("RGB", (8, 8)), 1) == ""
    image = "<fake_token_around_image><image><fake_token_around_image>"
    prompt = f"<s>User:{image}{question.strip(' ')}<end_of_utterance>\nAssistant:"
    assert model.prompt == processor.tokenizer(prompt, add_special_tokens=False).input_ids


# The large model cannot run here; its configuration can -----------------------------------------------------------

SMALL = [  # what is changed of examples/atum-9b/instruct.yaml
    "model.preset=tiny",
    "parallel.tensor=1",
    "data.sequence_length=128",
    "data.workers=0",
    "data.augment=false",
    "data.validation=[]",
    "data.loss_on=assistant",
    "optimizer.lr=3e-3",
    "optimizer.beta2=0.95",
    "optimizer.warmup_steps=6",
    "optimizer.decay_steps=60",
    "optimizer.groups=[{match: '*.alpha_*', lr_scale: 10.0}]",
    "training.steps=60",
    "training.micro_batch_size=4",
    "training.global_batch_size=4",
    "training.precision=fp32",
    "training.validate_every=0",
    "checkpoint.save_every=0",
    "logging.run=instruct",
    "logging.tensorboard=false",
]


def test_the_published_configuration_overfits_on_a_small_scale(done: tuple[Path, str]) -> None:
    """Its mixture by name: conversations and, as image-text pairs, those of the tiny data."""
    made, base = done[0] / "made", done[0] / "base"
    pairs = f"{{name: pairs, shards: '{made}/pairs-*.tar', kind: pairs, max_images: 8}}"
    sources = f"[{{name: svit, shards: {done[0]}/shards/manifest.json, kind: conversations}}, {pairs}]"
    where = [f"checkpoint.init={base}", f"data.tokenizer={base}", f"data.sources={sources}", f"logging.root={done[0]}"]
    command = [sys.executable, "pretrain_atum.py", "--config", "examples/atum-9b/instruct.yaml", *where, *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "shares of tokens: svit 69.09%, pairs 30.91%" in ran.stdout
    losses = step_losses(done[0] / "instruct", "loss/svit")
    assert losses[0] > 4 and losses[-1] < 0.1, losses[-5:]


def large_config() -> tuple[Config, int]:
    """The configuration of the page's training command with the first block's values, and the number of processes."""
    show = 'show() { shift 3; printf "%s\\0" "$@"; }; '
    training = COMMANDS[COMMANDS.index("torchrun") :].split("\n\n")[0].split("python tools")[0]
    shown = subprocess.run(
        ["bash", "-c", f"set -eu\n{show}\n{LARGE}\n{training.replace('torchrun', 'show ignored', 1)}\necho $PROCESSES"],
        capture_output=True,
        text=True,
        check=True,
    )
    *arguments, processes = shown.stdout.split("\0")
    at = arguments.index("--config")
    return load_config(str(ROOT / arguments[at + 1]), arguments[at + 2 :]), int(processes)


def test_the_large_configuration_fits_its_processes() -> None:
    config, processes = large_config()
    ParallelLayout.from_config(config, processes)
    assert config.data.loss_on == "assistant" and config.model.additional_vocab_size == 3
    assert config.training.loss_normalization == "tokens"  # of answers, however few are in a row
    assert not (config.model.freeze.text or config.model.freeze.vision or config.model.freeze.lm_head)
    assert [source.name for source in config.data.sources] == ["mine"] and config.data.validation == []


def test_both_blocks_set_the_same_variables() -> None:
    def names(block: str) -> set[str]:
        words = [word for line in re.findall(r"^export (.*)", block, re.MULTILINE) for word in shlex.split(line, True)]
        return {word.split("=")[0] for word in words}

    (small,) = (block for block in BLOCKS if block.startswith("# tiny"))
    assert names(LARGE) == names(small) != set()
