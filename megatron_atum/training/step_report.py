"""The numbers of a step, as metrics.jsonl has them (docs/monitoring.md says what they mean)."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_atum.batch import StepData
from megatron_atum.parallel.device import memory_gib, peak_flops
from megatron_atum.parallel.power import EnergyMeter
from megatron_atum.training.engine import Engine, StepResult
from megatron_atum.training.optimizer import learning_rates


@dataclass
class Phases:
    """Seconds that the training thread has spent on the parts of a step since they were last taken."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class StepReport:
    """Puts a step's numbers together. Collective when it is made; after that on each rank by itself."""

    def __init__(self, engine: Engine, host: str) -> None:
        self._engine, self._layout = engine, engine.groups.layout
        self._hosts: list[str] = [""] * self._layout.world_size
        dist.all_gather_object(self._hosts, host)
        self._peak = peak_flops(engine.dtype)
        self._energy = EnergyMeter()

    def own(self, data_s: float) -> tuple[dict[str, float], dict[str, float]]:
        """(to be summed over ranks, to be kept by rank) of this rank, for `Engine.compute`."""
        joules = self._energy.joules()
        return (
            {"joules": joules or 0.0, "energy_counters": float(joules is not None)},
            {"memory_gib": memory_gib(), "data_s": data_s},
        )

    def values(self, step: int, result: StepResult, data: StepData, phases: dict[str, float]) -> dict[str, Any]:
        """Args: phases: seconds of this rank."""
        tokens = sum(batch.input_ids.numel() for batch in data.microbatches) * self._layout.data
        step_s = phases["data"] + phases["forward_backward"] + phases.get("update", 0.0)
        device_s = step_s * self._layout.world_size
        model, executed = self._engine.flops(tokens, result.images)
        values: dict[str, Any] = {
            "step": step,
            **result.losses,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            **{name: rate for name, rate in learning_rates(self._engine.optimizer).items() if name != "lr"},
            "tokens": tokens,
            "images": result.images,
            "image_text_ratio": result.images / max(1, result.text_tokens),
            "padding": 1.0 - result.real_tokens / tokens,
            "tokens_per_s_per_device": tokens / device_s,
            "model_tflops": model / device_s / 1e12,
            "executed_tflops": executed / device_s / 1e12,
            "step_s": step_s,
            "data_s": max(result.per_rank["data_s"]),
            "forward_backward_s": phases["forward_backward"],
            "optimizer_s": self._engine.optimizer_watch.take(),
            "checkpoint_s": phases.get("checkpoint", 0.0),
            "memory_gib": max(result.per_rank["memory_gib"]),
            "faults": data.faults,
            **self._slowest(result.per_rank["forward_s"]),
        }
        if phases.get("validation"):
            values["validation_s"] = phases["validation"]
        if self._peak is not None:
            values["mfu"] = model / device_s / self._peak
        if result.sums["energy_counters"] == self._layout.world_size:
            values["joules"] = result.sums["joules"]
        return values

    def _slowest(self, forward_s: list[float]) -> dict[str, Any]:
        """The rank whose forward takes longest, against the median of its stage: others have other work to do."""
        stages: dict[int, list[float]] = defaultdict(list)
        for rank, seconds in enumerate(forward_s):
            stages[self._layout.coordinates(rank)[0]].append(seconds)
        medians = {stage: statistics.median(seconds) for stage, seconds in stages.items()}
        ratios = [
            seconds / max(medians[self._layout.coordinates(rank)[0]], 1e-9) for rank, seconds in enumerate(forward_s)
        ]
        slowest = max(range(len(ratios)), key=ratios.__getitem__)
        return {
            "slowest_rank": slowest,
            "slowest_host": self._hosts[slowest],
            "slowest_over_median": ratios[slowest],
        }
