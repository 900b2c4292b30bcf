"""The training loop."""

from __future__ import annotations

import time
from typing import Any

import torch

from megatron_atum import __version__
from megatron_atum.batch import Batch, StepData
from megatron_atum.checkpoint.files import write_text
from megatron_atum.checkpoint.run_checkpoint import RunCheckpoint, Saved
from megatron_atum.checkpoint.weights import fill, initialise
from megatron_atum.config.loader import to_yaml
from megatron_atum.errors import AtumError, CheckpointError, ConfigError
from megatron_atum.parallel.agreement import together
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.training.engine import Engine, StepResult
from megatron_atum.training.feed import StepFeed
from megatron_atum.training.metrics import MetricsFile, Terminal
from megatron_atum.training.start import Start, place_of


class Trainer:
    """Trains from a confirmed start to `training.steps`. Its process groups must exist."""

    def __init__(self, start: Start, groups: ProcessGroups) -> None:
        self.start, self.config, self.groups = start, start.config, groups
        self.engine = Engine(self.config, groups)
        self.metrics = MetricsFile(start.run_folder / "metrics.jsonl", writes=groups.rank == 0)
        self.step = start.resume.step if start.resume else 0
        self.data_s = 0.0
        self.save_error = ""  # of the newest save
        self._fill_weights()

    def fit(self) -> None:
        """Train to the last step, saving on the way and at the end. Collective over all ranks."""
        self._begin()
        try:
            self._train()
        except AtumError:
            self._say_faults()  # they may be why
            raise
        self._end()

    def _train(self) -> None:
        saved_at = self.step
        while self.step < self.config.training.steps:
            began = time.perf_counter()
            data = self._next_step()
            result = self.engine.step(data.microbatches)
            self.step += 1
            self._log(result, data, time.perf_counter() - began)
            self._tell(self.checkpoint.poll())
            every = self.config.checkpoint.save_every
            if every and self.step % every == 0:
                self._save()
                saved_at = self.step
        if saved_at != self.step:
            self._save()

    def _fill_weights(self) -> None:
        engine, start, model = self.engine, self.start, self.config.model
        weights, resume = start.weights, start.resume
        if weights is not None:
            together(lambda: fill(engine.stages, model, self.groups, weights))
        elif resume is None:
            initialise(engine.stages, model, self.groups, self.config.training.seed)
        engine.build_optimizer()
        assets = together(lambda: start.assets() if self.groups.rank == 0 else {})
        self.checkpoint = RunCheckpoint(self.config, self.groups, engine, start.checkpoints, assets)
        self.checkpoint.clean()
        if resume is not None:
            self.checkpoint.load(resume)
        if start.checkpoint is not None:
            self.checkpoint.take_frozen(start.checkpoint)

    def _next_step(self) -> StepData:
        """The step's microbatches; if the data of any rank is at fault, all ranks raise."""
        began = time.perf_counter()
        data = self.feed.next()
        self.data_s = time.perf_counter() - began
        for message in data.messages:
            self.terminal.say(f"data: {message}")
        return data

    def _begin(self) -> None:
        rank_0 = self.groups.rank == 0
        logging = self.config.logging
        self.terminal = Terminal(
            shows=rank_0,
            bar=logging.progress,
            total=self.config.training.steps,
            start=self.step,
            every=logging.every,
        )
        together(self._begin_files)
        self.feed = StepFeed(self.start.loader, self.groups, self.config.training.steps - self.step)
        self._say_start()

    def _begin_files(self) -> None:
        """Raises ConfigError where the run folder cannot be written."""
        try:
            self.metrics.resume_after(self.step)
            self.metrics.write(event="resume" if self.start.resume else "start", step=self.step)
            if self.groups.rank == 0:
                write_text(self.start.run_folder / "config.yaml", to_yaml(self.config))
        except OSError as error:
            raise ConfigError(f"the run folder {self.start.run_folder} cannot be written: {error}") from None

    def _say_start(self) -> None:
        trains = sum(p.numel() for s in self.engine.stages for p in s.parameters() if p.requires_grad)
        frozen = sum(p.numel() for s in self.engine.stages for p in s.parameters() if not p.requires_grad)
        source = "drawn from the seed"
        if self.start.resume:
            source = f"step {self.step} of {self.start.resume.folder}"
        elif self.start.weights:
            source = place_of(self.start.weights)
        kernels = type(self.engine.inner_optimizer).__module__.split(".")[0]
        self.terminal.say(
            f"Megatron-ATUM {__version__}, torch {torch.__version__}, {self.engine.device.type}, {self.engine.dtype}\n"
            f"layout: {self.groups.layout.describe()}\n"
            f"this rank: {trains:,} trainable and {frozen:,} frozen parameters; optimizer kernels: {kernels}\n"
            f"weights: {source}"
        )
        shares = ", ".join(f"{name} {share:.2%}" for name, share in self.start.loader.shares.items())
        self.terminal.say(f"data: shares of tokens: {shares}")
        self._say_faults()

    def _say_faults(self) -> None:
        for name, reasons in self.feed.fault_report().items():
            if reasons:
                table = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
                self.terminal.say(f"data: {name}: dropped or lost: {table}")

    def _log(self, result: StepResult, data: StepData, step_s: float) -> None:
        tokens = _positions(data.microbatches) * self.groups.layout.data
        device_s = step_s * self.groups.layout.world_size
        values: dict[str, Any] = {
            "step": self.step,
            **result.losses,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": tokens,
            "images": result.images,
            "tokens_per_s_per_device": tokens / device_s,
            "model_tflops": self.engine.model_flops(tokens, result.images) / device_s / 1e12,
            "step_s": step_s,
            "data_s": self.data_s,
            "faults": data.faults,
        }
        self.metrics.write(**values)
        self.terminal.step(values)

    def _save(self) -> None:
        self._tell(self.checkpoint.save(self.step, self.feed.state_dict()))

    def _tell(self, saves: list[Saved]) -> None:
        """A checkpoint that could not be written does not stop the run: the one before it is still there."""
        for saved in saves:
            self.save_error = saved.error
            times = {"blocked_s": round(saved.blocked_s, 3), "total_s": round(saved.total_s, 3)}
            if saved.error:
                self.metrics.write(event="save_failed", step=saved.step, error=saved.error, **times)
                self.terminal.say(f"{saved.error}\ntraining goes on; the checkpoint before it is as it was")
            else:
                self.metrics.write(event="save", step=saved.step, **times)
                self.terminal.say(f"saved {saved.folder}")

    def _end(self) -> None:
        """Raises CheckpointError if the last step could not be saved."""
        self._tell(self.checkpoint.wait())
        self._say_faults()
        self.feed.close()
        self.terminal.close()
        if self.save_error:
            raise CheckpointError(self.save_error)


def _positions(microbatches: list[Batch]) -> int:
    """Positions the model computes, padding included."""
    return sum(batch.input_ids.numel() for batch in microbatches)
