"""Say what a checkpoint or a Hugging Face folder holds, and whether it is whole.

    python tools/checkpoint/inspect.py runs/tiny                       # the newest step, and a line for each other
    python tools/checkpoint/inspect.py runs/tiny --step 100 --quick    # look at sizes only
    python tools/checkpoint/inspect.py runs/tiny/checkpoints/step-00000100 --tensors
    python tools/checkpoint/inspect.py idefics-9b --json

All files of the step and of its frozen weights are read once, in pieces: their checksums must be those that were
written, and all values finite. Nothing is executed, unpickled or loaded as a whole, so any checkpoint can be looked at
on any machine.

Exit codes: 0 whole, 1 damaged or incomplete, 2 not a checkpoint or wrong use.
"""

from __future__ import annotations

import os
import sys

# All other imports are made when they are needed; the end of this file says why.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from typing import Any

WIDTH, MOST = 100, 20


def parse_arguments() -> argparse.Namespace:
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="run folder, step folder or Hugging Face folder")
    parser.add_argument("--step", type=int, help="step of a run folder (default: the newest complete one)")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with dtype, shape and chunks")
    parser.add_argument("--quick", action="store_true", help="look at sizes and headers, do not read the tensors")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args()


def main() -> None:
    import json

    options = parse_arguments()
    from megatron_atum.checkpoint.inspection import inspect_folder

    how = {"quick": options.quick, "tensors": options.tensors, "progress": True}
    facts = inspect_folder(options.folder, step=options.step, **how)
    print(json.dumps(facts, indent=1) if options.json else "\n".join(text(facts)))
    if not facts["whole"]:
        sys.exit(1)


# As text --------------------------------------------------------------------------------------------------------------


def text(facts: dict[str, Any]) -> Iterator[str]:
    yield from head(facts)
    yield from model_lines(facts)
    yield from kind_lines(facts)
    yield from file_lines(facts)
    yield from tensor_lines(facts)
    yield from step_lines(facts)
    yield from verdict(facts)


def line(name: str, value: Any) -> str:
    """`name  value`, folded at WIDTH."""
    import textwrap

    return textwrap.fill(f"{name:11}{value}", WIDTH, subsequent_indent=" " * 11, break_on_hyphens=False)


def head(facts: dict[str, Any]) -> Iterator[str]:
    yield line("folder", facts["folder"])
    what = facts["kind"] if facts.get("step") is None else f"{facts['kind']}, step {facts['step']}"
    yield line("is", what + ("" if facts["complete"] else ", INCOMPLETE"))
    if facts.get("frozen"):
        yield line("frozen", f"weights that do not train are in {facts['frozen']}, beside it")
    if facts.get("layout"):
        yield line("saved at", layout(facts["layout"]))
    if facts.get("versions"):
        yield line("written by", ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    if facts.get("optimizer_steps"):
        yield line("optimizer", f"{' to '.join(map(str, ends(facts['optimizer_steps'])))} updates")
    if facts.get("data"):
        yield line("data", ", ".join(data(facts["data"])))
    for note in facts.get("notes", []):
        yield line("note", note)


def layout(record: dict[str, Any]) -> str:
    degrees = {key: value for key, value in record.items() if key not in ("world_size", "sequence")}
    words = [f"{key.replace('_', ' ')} {value}" for key, value in degrees.items() if value != 1]
    ranks = record["world_size"]
    replicas = ranks // (record["tensor"] * record["pipeline"])
    words += [f"data {replicas}"] * (replicas > 1) + ["sequence parallel"] * bool(record["sequence"])
    return f"{ranks} rank{'s' if ranks > 1 else ''}: {', '.join(words)}"


def ends(values: list[int]) -> list[int]:
    return [values[0], values[-1]] if len(values) > 1 else values


def data(state: dict[str, Any]) -> Iterator[str]:
    """Numbers and names; of sources how far the planner has come, and what was lost of them."""
    for key, value in state.items():
        if key == "sources" and isinstance(value, dict):
            for name, entry in value.items():
                try:
                    epoch, group, window, row, tokens, _ = entry[1]
                except (TypeError, ValueError, LookupError):
                    epoch = group = window = row = tokens = "?"
                yield f"{name}: epoch {epoch} group {group} window {window} row {row} ({tokens} tokens)"
        elif key == "faults" and isinstance(value, dict):
            yield from (f"{name}: images {counts}" for name, counts in value.items() if counts)
        elif isinstance(value, int | float | str):
            yield f"{key} {str(value)[:12]}"


def model_lines(facts: dict[str, Any]) -> Iterator[str]:
    model = facts.get("model")
    if not model:
        return
    vision, perceiver = model["vision"], model["perceiver"]
    words = f"{model['vocab_size']} + {model['additional_vocab_size']} words"
    yield line(
        "model",
        f"{model['preset'] or 'ATUM'}: {model['num_layers']} layers of {model['hidden_size']}, {model['num_heads']} "
        f"heads, {words}, a cross-attention layer per {model['cross_layer_interval']}; vision {vision['num_layers']} "
        f"layers of {vision['embed_dim']}, {vision['image_size']} pixels in patches of {vision['patch_size']}; "
        f"perceiver {perceiver['depth']} deep, {perceiver['num_latents']} latents",
    )
    frozen = [part for part in ("text", "vision", "lm_head") if model["freeze"][part]]
    yield line("freezes", ", ".join(frozen) or "nothing")
    yield ""
    yield f"{'part':24}{'parameters':>18}{'trainable':>18}"
    for part, counts in {**facts["parts"], "all": total(facts["parts"])}.items():
        trainable = "-" if counts["trainable"] is None else f"{counts['trainable']:,}"
        yield f"{part:24}{counts['parameters']:18,}{trainable:>18}"


def total(parts: dict[str, Any]) -> dict[str, Any]:
    counted = [part["trainable"] for part in parts.values()]
    trainable = None if None in counted else sum(counted)
    return {"parameters": sum(part["parameters"] for part in parts.values()), "trainable": trainable}


def kind_lines(facts: dict[str, Any]) -> Iterator[str]:
    if not facts["kinds"]:
        return
    yield ""
    yield f"{'kind':24}{'tensors':>9}{'values':>18}{'size':>12}  dtype"
    for kind, counts in facts["kinds"].items():
        amount = f"{counts['tensors']:9,}{counts['values']:18,}{size(counts['bytes']):>12}"
        yield f"{kind:24}{amount}  {', '.join(counts['dtypes'])}"
    assets = [file for file in facts["files"] if file["name"].startswith("assets/")]
    if assets:
        yield f"{'assets (files)':24}{len(assets):9,}{'':18}{size(sum(file['bytes'] for file in assets)):>12}"


def size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    for unit, one in (("KB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if count < 1000 * one:
            return f"{count / one:.1f} {unit}"
    return f"{count / 1e12:.2f} TB"


def file_lines(facts: dict[str, Any]) -> Iterator[str]:
    files = facts["files"]
    yield ""
    yield f"{len(files)} files, {size(sum(file['bytes'] for file in files))}"
    for file in files[:MOST]:
        yield f"  {size(file['bytes']):>10}  {file['folder']}/{file['name']}"
    if len(files) > MOST:
        yield f"  and {len(files) - MOST} more (--json lists all)"


def tensor_lines(facts: dict[str, Any]) -> Iterator[str]:
    if "tensors" not in facts:
        return
    yield ""
    yield "tensors (dtype, shape, chunks)"
    for tensor in facts["tensors"]:
        yield f"  {tensor['name']}"
        yield f"      {tensor['dtype']} {tensor['shape']}"
        for chunk in tensor["chunks"]:
            box = ",".join(f"{o}:{o + s}" for o, s in zip(chunk["offsets"], chunk["sizes"], strict=True))
            yield f"      [{box}] in {chunk['file']} from byte {chunk['start']}"


def step_lines(facts: dict[str, Any]) -> Iterator[str]:
    if not facts["steps"]:
        return
    yield ""
    yield "steps of this run"
    for step in facts["steps"]:
        yield f"  {step['folder']}{size(step['bytes']):>12}  {'complete' if step['complete'] else step['why']}"
    for name in facts.get("unfinished", []):
        yield f"  {name}: unfinished; the run removes it when it goes on"


def verdict(facts: dict[str, Any]) -> Iterator[str]:
    yield ""
    for problem in facts["problems"][:MOST]:
        yield line("problem", problem)
    if len(facts["problems"]) > MOST:
        yield f"and {len(facts['problems']) - MOST} more (--json lists all)"
    how = {"sizes": "sizes only", "headers": "headers only", "contents": "all contents"}[facts["checked"]]
    if facts["problems"]:
        count = len(facts["problems"])
        yield line("NOT WHOLE", f"{count} problem{'s' if count > 1 else ''} ({how} checked)")
    elif not facts["whole"]:
        yield line("NOT WHOLE", f"the step above is whole ({how} checked), but another one is incomplete")
    else:
        yield line("whole", f"{how} checked")


if __name__ == "__main__":
    from megatron_atum.checkpoint.command import run_command

    run_command("inspect", main)
elif __name__ == "inspect":
    # A tool of this folder, or what it imports, wants Python's own module, which this file hides: its folder is first
    # on the path of every tool here. None of them needs it there.
    here = os.path.realpath(os.path.dirname(__file__))
    sys.path[:] = [place for place in sys.path if os.path.realpath(place) != here]
    del sys.modules[__name__]
    __import__(__name__)
