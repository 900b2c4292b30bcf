"""A made-up run of thousands of steps: two restarts, a rollback, bad steps, spikes, saves, validations."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCES = ("obelics", "wikipedia", "laion", "pmd")
UNITS, LAYERS = 8, 32
BAD = (1203, 1204, 3890)
ROLLED_BACK_FROM, ROLLED_BACK_TO = 3120, 3000
RESTARTS = (1750, 4250)


def write_run(folder: Path, steps: int = 5000, seed: int = 0, **config: Any) -> Path:
    """The folder with metrics.jsonl and config.yaml. Restarts and the rollback are in there if the run is so long."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = list(run_lines(steps, random.Random(seed)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sections = {
        "model": {"preset": "atum-9b", "num_layers": LAYERS, "hidden_size": 4096},
        "parallel": {"tensor": 8, "pipeline": 2, "virtual_pipeline": 1},
        "training": {
            "steps": steps,
            "global_batch_size": 3584,
            "micro_batch_size": 1,
            "precision": "bf16",
            "seed": seed,
        },
        "optimizer": {"lr": 5e-5, "schedule": "linear", **config},
        "data": {"sequence_length": 1024},
    }
    (folder / "config.yaml").write_text(json.dumps(sections))  # JSON is YAML
    return folder


def run_lines(steps: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    yield {"event": "start", "step": 0}
    state: dict[str, Any] = {"faults": 0, "bad_steps": 0, "rollbacks": 0}
    step = 0
    while step < steps:
        step += 1
        yield from step_lines(step, state, draw)
        if step in RESTARTS:
            yield {"event": "signal", "step": step, "name": "SIGTERM"}
            yield {"event": "resume", "step": step}
        if step == ROLLED_BACK_FROM and not state["rollbacks"]:
            state["rollbacks"] = 1
            yield {"event": "rollback", "step": ROLLED_BACK_TO, "from": step, "reason": "loss of laion is 3.4"}
            step = ROLLED_BACK_TO
    yield {"event": "stop", "step": step, "reason": "training.steps"}


def step_lines(step: int, state: dict[str, Any], draw: random.Random) -> Iterator[dict[str, Any]]:
    bad = step in BAD
    state["bad_steps"] += bad
    state["faults"] += draw.random() < 0.02
    spikes = step > ROLLED_BACK_TO + 60 and not state["rollbacks"] and step <= ROLLED_BACK_FROM
    yield values(step, state, draw, bad, 1.4 * spikes) | (details(step, draw) if step % 100 == 0 else {})
    if bad:
        yield {"event": "bad_step", "step": step, "reason": "gradient norm is inf"}
    if spikes and step % 20 == 0:
        yield {"event": "spike", "step": step, "source": "laion", "z": 9.0 + 8 * draw.random()}
    if step % 250 == 0:
        yield {"event": "save", "step": step, "blocked_s": 1.9, "total_s": 30.0 + draw.random()}
        yield validation(step, draw)
    if step == 2500:
        yield {"event": "save_failed", "step": step, "error": "[Errno 28] No space left on device"}


def level(step: int) -> float:
    return 1.9 + 7.5 * math.exp(-step / 90) + 1.1 * math.exp(-step / 1500)


def values(step: int, state: dict[str, Any], draw: random.Random, bad: bool, spike: float) -> dict[str, Any]:
    images, slow = draw.randint(9000, 13000), 1 + abs(draw.gauss(0, 0.02)) + 0.3 * (2200 < step < 2350)
    parts = {"data_s": 0.05 * slow, "forward_backward_s": 9.0 * slow, "optimizer_s": 0.4 + 0.02 * draw.random()}
    parts["checkpoint_s"] = 1.9 if step % 250 == 0 else 0.0
    step_s = sum(parts.values()) - parts["checkpoint_s"] + 0.15
    loss = {
        name: level(step) * (0.85 + 0.1 * n) + spike + draw.gauss(0, 0.05 + 0.03 * n) for n, name in enumerate(SOURCES)
    }
    seen = [name for name in SOURCES if name != "pmd" or draw.random() < 0.4]
    tokens = 3584 * 1024
    return {
        "step": step,
        "loss": None if bad else sum(loss[name] for name in seen) / len(seen),
        **{f"loss/{name}": None if bad else loss[name] for name in seen},
        "z_loss": 120 * math.exp(-step / 400) + 28 + draw.gauss(0, 1),
        "grad_norm": None if bad else (0.4 + 6 * math.exp(-step / 100) + 3 * spike) * math.exp(draw.gauss(0, 0.2)),
        "lr": 5e-5 * min(step / 500, 1 - step / 10000),
        "tokens": tokens,
        "images": images,
        "image_text_ratio": images / (0.97 * tokens),
        "padding": 0.02 + 0.004 * draw.random(),
        "tokens_per_s_per_device": tokens / step_s / 128,
        "model_tflops": 4.45 * tokens / step_s / 128 / 100,
        "executed_tflops": 5.5 * tokens / step_s / 128 / 100,
        "mfu": 4.45 * tokens / step_s / 128 / 100 / 312,
        "step_s": step_s,
        **parts,
        "slowest_rank": 77 if slow > 1.2 or draw.random() < 0.3 else draw.randrange(128),
        "slowest_host": "node-9",
        "slowest_over_median": slow,
        "memory_gib": 61.0 + 3 * (step > RESTARTS[0]),
        "joules": 128 * 380.0 * step_s * (1 + draw.gauss(0, 0.02)),
        **state,
    }


def details(step: int, draw: random.Random) -> dict[str, float]:
    found: dict[str, float] = {}
    for unit in range(UNITS):
        grown = 1 - math.exp(-step / (900 + 500 * unit))
        found[f"gate/{unit}/attention"] = 0.6 * grown * (-1) ** unit + draw.gauss(0, 0.004)
        found[f"gate/{unit}/mlp"] = 0.35 * grown + draw.gauss(0, 0.004)
        found[f"activation_norm/cross_attention.{unit}"] = (0.3 + 0.4 * unit) * math.exp(draw.gauss(0, 0.03))
        found[f"gradient_norm/cross_attention.{unit}"] = 0.3 / (1 + unit) * math.exp(draw.gauss(0, 0.15))
    for layer in range(LAYERS):
        found[f"activation_norm/decoder.{layer}"] = 0.2 * 1.12**layer * math.exp(draw.gauss(0, 0.02))
    for number, part in enumerate(("embedding", "perceiver", "head")):
        found[f"gradient_norm/{part}"] = 0.05 * 4**number * math.exp(draw.gauss(0, 0.15))
    return found


def validation(step: int, draw: random.Random) -> dict[str, Any]:
    losses = {name: level(step) * factor + draw.gauss(0, 0.01) for name, factor in (("web", 1.02), ("pairs", 1.15))}
    perplexities = {f"perplexity/{name}": math.exp(loss) for name, loss in losses.items()}
    losses = {f"loss/{name}": loss for name, loss in losses.items()}
    return {"event": "validation", "step": step, **losses, **perplexities, "loss": sum(losses.values()) / 2}
