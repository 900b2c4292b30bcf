"""The main job on real photographs: train, kill and resume, export to Hugging Face format, caption.

    python examples/tiny/demo.py                  every step in order, then runs/demo/summary.json
    python examples/tiny/demo.py --step train     one step; the steps before it must have run

Steps:
    data       photographs, captions and documents as shards, and a tokenizer
    backbones  a small random LLaMA and CLIP, and an ATUM that starts from the two
    train      4 processes: tensor 2 x pipeline 2, with sequence parallelism
    resume     the same run again, killed with SIGKILL midway and started anew; its losses must be the same
    frozen     a short run with frozen backbones, which must not change
    export     the trained model in Hugging Face format
    caption    transformers captions the photographs; each must get its own caption, also when two are exchanged

Exit codes: 0 done, 1 a step failed, 130 interrupted. Needs no network and no GPU. docs/demo.md has more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for the two files beside this one, wherever it is run from

from demo_plots import plot_loss, plot_resume
from demo_processes import ENVIRONMENT, ROOT, StepFailed, execute, kill_all, python, running, say, tail, torchrun

DEMO = Path("runs/demo")  # relative to ROOT, as in the configuration files
MADE = ("data", "backbones", "start", "train", "resume", "frozen", "frozen-hf", "export", "logs", "results")
MADE_FILES = ("loss.png", "resume.png", "summary.json")

RESUME_STEPS = 60  # of the run that is killed
KILL_AFTER = 29  # not a multiple of checkpoint.save_every=20
TRAINABLE = ("gated_cross_attn_layers", "perceiver_resampler", "additional_embedding", "additional_fc")
MIN_EXACT = 2
MAX_NEW_TOKENS = 32


# -- files of the demo -----------------------------------------------------------------------------------------------


def remove(*names: str) -> None:
    """Remove what an earlier demo made; nothing else in the folder is touched."""
    for name in names:
        path = DEMO / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def need(name: str, step: str) -> Path:
    """A path that an earlier step has made. Raises StepFailed naming that step."""
    path = DEMO / name
    if not path.exists():
        raise StepFailed(f"{path} is missing; it comes from: python examples/tiny/demo.py --step {step}")
    return path


def log_path(name: str) -> Path:
    path = DEMO / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_steps(metrics: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl, without events and without a line that is still being written."""
    if not metrics.exists():
        return []
    text = metrics.read_text()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line for line in lines if "event" not in line]


def read_events(metrics: Path) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, metrics.read_text().splitlines()) if "event" in line]


# -- steps: data, backbones, train -----------------------------------------------------------------------------------


def step_data() -> dict[str, Any]:
    remove("data")
    execute(python("examples/tiny/make_data.py", "--out", DEMO / "data"), log_path("data"))
    return {"truths": read_json(DEMO / "data" / "captions.json")}


def step_backbones() -> dict[str, Any]:
    tokenizer = need("data/tokenizer.model", "data")
    remove("backbones", "start")
    folder = DEMO / "backbones"
    execute(python("examples/tiny/make_backbones.py", "--out", folder, "--tokenizer", tokenizer), log_path("backbones"))
    source = ("--llama", folder / "llama", "--clip", folder / "clip")
    kind = ("--preset", "tiny", "--dtype", "float32")
    script = "tools/checkpoint/init_from_backbones.py"
    execute(python(script, *source, "--out", DEMO / "start", *kind), log_path("backbones"))
    return {}


def training(run: str, config: str, *overrides: str) -> list[str]:
    start = need("start", "backbones")
    where = (f"checkpoint.init={start}", f"logging.root={DEMO}", f"logging.run={run}")
    return torchrun("--config", f"examples/tiny/{config}.yaml", *where, *overrides)


def step_train() -> dict[str, Any]:
    remove("train", "loss.png")
    execute(training("train", "pretrain"), log_path("train"))
    steps = read_steps(DEMO / "train" / "metrics.jsonl")
    plot_loss(steps, DEMO / "loss.png")
    say(f"loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f} in {len(steps)} steps; plot: {DEMO / 'loss.png'}")
    return {"loss_first": steps[0]["loss"], "loss_last": steps[-1]["loss"], "steps": len(steps)}


# -- step: resume ----------------------------------------------------------------------------------------------------


def step_resume() -> dict[str, Any]:
    uninterrupted = read_steps(need("train/metrics.jsonl", "train"))
    remove("resume", "resume.png")
    metrics = DEMO / "resume" / "metrics.jsonl"
    command = training("resume", "pretrain", f"training.steps={RESUME_STEPS}")
    kill_midway(command, metrics)
    killed = read_steps(metrics)
    say("the same command again:")
    execute(command, log_path("resume"))
    resumed_from = resume_step(read_events(metrics))
    resumed = read_steps(metrics)
    problems = unequal(uninterrupted, resumed, RESUME_STEPS) + unequal(uninterrupted, killed, len(killed))
    plot_resume(uninterrupted, killed, resumed, resumed_from, DEMO / "resume.png")
    if problems:
        raise StepFailed("the resumed run is not the uninterrupted one:\n  " + "\n  ".join(problems[:10]))
    say(f"killed after step {len(killed)}, resumed from step {resumed_from};")
    say(f"the losses of all {RESUME_STEPS} steps are bit by bit those of the uninterrupted run")
    say(f"plot: {DEMO / 'resume.png'}")
    return {"resumed_equals_uninterrupted": True, "killed_after": len(killed), "resumed_from": resumed_from}


def kill_midway(command: list[str], metrics: Path) -> None:
    """Start a run and kill torchrun and all its workers with SIGKILL. Raises StepFailed if it ends before."""
    log = log_path("resume")
    with running(command, log) as process:
        while len(read_steps(metrics)) < KILL_AFTER or not saved(metrics):
            if process.poll() is not None:
                raise StepFailed(f"the run ended before it could be killed\n{tail(log)}\nlog: {log}")
            time.sleep(0.02)
        killed = kill_all(process, "pretrain_atum.py")
    say(f"sent SIGKILL to torchrun and its {killed} workers")


def saved(metrics: Path) -> bool:
    """Whether a checkpoint is complete; it is written beside the training."""
    return '"event": "save"' in metrics.read_text()


def resume_step(events: list[dict[str, Any]]) -> int:
    """The checkpoint a run went on from. Raises StepFailed if it started anew."""
    steps = [event["step"] for event in events if event["event"] == "resume"]
    if not steps or not steps[-1]:
        raise StepFailed("the run was started anew instead of resumed")
    return int(steps[-1])


def unequal(expected: list[dict[str, Any]], found: list[dict[str, Any]], count: int) -> list[str]:
    """Where two runs differ in their first `count` steps; [] if every number that is not a time is the same float."""
    if len(found) != count or len(expected) < count:
        return [f"{len(found)} and {len(expected)} steps were logged, at least {count} were expected"]
    return [
        f"step {ours['step']}: {key} is {theirs.get(key)!r}, not {ours[key]!r}"
        for ours, theirs in zip(expected, found, strict=False)
        for key in ours
        if is_result(key) and ours[key] != theirs.get(key)
    ]


def is_result(key: str) -> bool:
    """Whether a field of the metrics is computed from data and weights, rather than measured with a clock."""
    return key.startswith("loss") or key in ("step", "z_loss", "grad_norm", "lr", "tokens", "images")


# -- step: frozen ----------------------------------------------------------------------------------------------------


def step_frozen() -> dict[str, Any]:
    remove("frozen", "frozen-hf")
    start = need("start", "backbones")
    execute(training("frozen", "frozen"), log_path("frozen"))
    export("frozen", "frozen-hf")
    before, after = (load_tensors(DEMO / name / "model.safetensors") for name in (start.name, "frozen-hf"))
    report = compare_frozen(before, after)
    steps = read_steps(DEMO / "frozen" / "metrics.jsonl")
    report |= {"loss_first": steps[0]["loss"], "loss_last": steps[-1]["loss"]}
    say(f"{report['trainable']:,} trainable and {report['frozen']:,} frozen parameters")
    say(f"all {report['frozen_tensors']} frozen tensors are bit by bit those of {start};")
    say(f"{report['changed_tensors']} of {report['trainable_tensors']} trainable tensors changed")
    say(f"loss {report['loss_first']:.4f} -> {report['loss_last']:.4f} in {len(steps)} steps")
    return {"frozen_run": report}


def load_tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def compare_frozen(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """Count parameters, and what changed. Raises StepFailed if a frozen tensor changed or a trainable one did not."""
    import torch

    trainable = {name for name in before if any(part in name for part in TRAINABLE)}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if changed - trainable:
        raise StepFailed(f"frozen tensors changed: {', '.join(sorted(changed - trainable)[:5])}")
    if trainable - changed:
        raise StepFailed(f"trainable tensors did not change: {', '.join(sorted(trainable - changed)[:5])}")
    return {
        "trainable": sum(before[name].numel() for name in trainable),
        "frozen": sum(before[name].numel() for name in before.keys() - trainable),
        "trainable_tensors": len(trainable),
        "frozen_tensors": len(before) - len(trainable),
        "changed_tensors": len(changed),
    }


# -- steps: export, caption ------------------------------------------------------------------------------------------


def export(run: str, out: str) -> None:
    remove(out)
    folder = need(f"{run}/checkpoints", run).parent
    execute(python("tools/checkpoint/atum_to_hf.py", "--checkpoint", folder, "--out", DEMO / out), log_path("export"))


def step_export() -> dict[str, Any]:
    export("train", "export")
    return {}


def step_caption() -> dict[str, Any]:
    truths: dict[str, str] = read_json(need("data/captions.json", "data"))
    captioner = Captioner(need("export", "export"))
    photos = {name: load_photo(DEMO / "data" / "photos" / f"{name}.jpg") for name in truths}
    captions = {name: captioner([photo])[0] for name, photo in photos.items()}
    exact = [name for name in truths if captions[name] == truths[name]]
    grey = captioner([grey_photo()])[0]
    swapped: dict[str, str] = {}
    if len(exact) >= MIN_EXACT:
        first, second = exact[:2]
        swapped = dict(zip((first, second), captioner([photos[second], photos[first]]), strict=True))
    problems = caption_problems(truths, captions, swapped, grey)
    if problems:
        say(caption_table(truths, captions))
        raise StepFailed("\n".join(problems))
    say(f"{len(exact)} of {len(truths)} photographs get their own caption, word for word")
    say("; ".join(f"{name} with the other's image: {text!r}" for name, text in swapped.items()))
    say(f"a grey image: {grey!r}")
    return {"captions": captions, "truths": truths, "exact": len(exact), "swapped": swapped, "grey": grey}


class Captioner:
    """The exported folder as transformers loads it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, IdeficsForVisionText2Text, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = IdeficsForVisionText2Text.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def __call__(self, images: list[Any]) -> list[str]:
        """One greedy caption per image, each from `<s>` and the text form of one image."""
        import torch

        inputs = self.processor(text=[[image] for image in images], return_tensors="pt")
        with torch.no_grad():
            output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def load_photo(path: Path) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


def grey_photo() -> Any:
    from PIL import Image

    return Image.new("RGB", (320, 240), (127, 127, 127))


def caption_problems(truths: dict[str, str], captions: dict[str, str], swapped: dict[str, str], grey: str) -> list[str]:
    """What is wrong with the captions; [] if nothing is.

    Args:
        swapped: of two photographs, what each gets when it is given the other's image.
        grey: caption of an image that shows nothing.
    """
    exact = [name for name in truths if captions[name] == truths[name]]
    if len(exact) < MIN_EXACT:
        wrong = ", ".join(name for name in truths if name not in exact)
        return [f"{len(exact)} photographs got their own caption, at least {MIN_EXACT} should; wrong: {wrong}"]
    problems = []
    first, second = exact[:2]
    for name, other in ((first, second), (second, first)):
        if swapped.get(name) != truths[other]:
            problems.append(f"given the image of {other}, {name} got {swapped.get(name)!r}, not {truths[other]!r}")
    if all(caption == grey for caption in captions.values()):
        problems.append(f"the caption does not depend on the image: a grey one gets {grey!r} as well")
    return problems


# -- summary and command line ----------------------------------------------------------------------------------------


STEPS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "data": ("data: shards of real photographs, and a tokenizer", step_data),
    "backbones": ("backbones: a random LLaMA and CLIP, and ATUM from the two", step_backbones),
    "train": ("train: 4 processes, tensor 2 x pipeline 2, sequence parallelism", step_train),
    "resume": ("resume: killed with SIGKILL midway, and started again", step_resume),
    "frozen": ("frozen: only cross-attention, perceiver and added rows train", step_frozen),
    "export": ("export: the model in Hugging Face format", step_export),
    "caption": ("caption: transformers loads it and captions the photographs", step_caption),
}


def run_step(name: str) -> float:
    """Run a step, and note what it found and how long it took. Returns the seconds."""
    title, function = STEPS[name]
    say(f"\n== {title}")
    began = time.perf_counter()
    try:
        result = function()
    except StepFailed as failure:
        raise StepFailed(f"step {name}: {failure}") from None
    seconds = time.perf_counter() - began
    write_json(DEMO / "results" / f"{name}.json", {**result, "seconds": seconds})
    say(f"{name}: {seconds:.1f} s")
    return seconds


def make_summary(results: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What summary.json holds, from the results of all steps."""
    merged = {key: value for result in results.values() for key, value in result.items() if key != "seconds"}
    first = ("loss_first", "loss_last", "resumed_equals_uninterrupted", "captions", "truths")
    return {
        **{key: merged.pop(key) for key in first},
        "seconds": round(seconds, 1),
        "seconds_per_step": {name: round(result["seconds"], 1) for name, result in results.items()},
        **merged,
    }


def caption_table(truths: dict[str, str], captions: dict[str, str]) -> str:
    names, texts = max(map(len, truths)), max(map(len, captions.values()))
    rows = []
    for name, truth in truths.items():
        verdict = "right" if captions[name] == truth else f"wrong, it is: {truth}"
        rows.append(f"  {name:<{names}}  {captions[name]:<{texts}}  {verdict}")
    return "\n".join(rows)


def show_summary(summary: dict[str, Any]) -> None:
    frozen, after, start = summary["frozen_run"], summary["killed_after"], summary["resumed_from"]
    say("\n== summary")
    say(f"loss      {summary['loss_first']:.4f} -> {summary['loss_last']:.4f} in {summary['steps']} steps")
    say(f"resume    killed after step {after}, resumed from step {start}, losses bit by bit equal")
    say(f"frozen    {frozen['trainable']:,} parameters train, {frozen['frozen']:,} are frozen and did not change")
    say(f"captions  {summary['exact']} of {len(summary['truths'])} exact; exchanging two images exchanges the captions")
    say(caption_table(summary["truths"], summary["captions"]))
    times = "  ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds_per_step"].items())
    say(f"seconds   {times}  total {summary['seconds']:.0f}")
    say(f"files     {DEMO}/: summary.json, loss.png, resume.png, export/, logs/")


def run_all() -> None:
    remove(*MADE, *MADE_FILES)
    began = time.perf_counter()
    for name in STEPS:
        run_step(name)
    results = {name: read_json(DEMO / "results" / f"{name}.json") for name in STEPS}
    summary = make_summary(results, time.perf_counter() - began)
    write_json(DEMO / "summary.json", summary)
    show_summary(summary)


def interrupted(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=tuple(STEPS), help="run one step only")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ.update(ENVIRONMENT)
    signal.signal(signal.SIGTERM, interrupted)
    say("export " + " ".join(f"{key}={value}" for key, value in ENVIRONMENT.items()))
    try:
        run_step(options.step) if options.step else run_all()
    except StepFailed as failure:
        print(f"\ndemo: {failure}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
