"""The training loop."""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import dataclass
from typing import Any

from megatron_atum.batch import StepData
from megatron_atum.checkpoint.files import write_text
from megatron_atum.checkpoint.run_checkpoint import RunCheckpoint, Saved
from megatron_atum.checkpoint.weights import fill, initialise
from megatron_atum.config.loader import to_yaml
from megatron_atum.errors import AtumError, CheckpointError, ConfigError, HealthFailure
from megatron_atum.parallel.agreement import together
from megatron_atum.parallel.groups import ProcessGroups, set_timeout
from megatron_atum.parallel.liveness import Liveness
from megatron_atum.training.corruption import FrozenWeights
from megatron_atum.training.details import LayerWatch
from megatron_atum.training.diagnosis import diagnose, summary_of, write_bad_step
from megatron_atum.training.engine import Engine, StepResult
from megatron_atum.training.feed import StepFeed
from megatron_atum.training.health import Health, Verdict
from megatron_atum.training.optimizer import scale_learning_rates
from megatron_atum.training.profiling import ProfileWindow
from megatron_atum.training.requests import Asked, Requests
from megatron_atum.training.rollback import Rollback, roll_back
from megatron_atum.training.run_log import RunLog
from megatron_atum.training.self_check import describe, dry_step, wants_dry_step
from megatron_atum.training.start import Start, place_of
from megatron_atum.training.step_report import Phases, StepReport
from megatron_atum.training.validation import validate

DONE, REQUEUE = 0, 85  # exit codes


@dataclass(frozen=True)
class TakenStep:
    """A step that is over, applied or not."""

    data: StepData
    data_before: dict[str, Any]  # position of the data before it
    result: StepResult
    verdict: Verdict
    asked: Asked


class Trainer:
    """Trains from a confirmed start to `training.steps`. Its process groups must exist."""

    def __init__(self, start: Start, groups: ProcessGroups, liveness: Liveness) -> None:
        self.start, self.config, self.groups, self.liveness = start, start.config, groups, liveness
        self.step = start.resume.step if start.resume else 0
        self.saved_at = self.step
        self.save_error = ""  # of the newest save
        self.rollbacks = list(start.rollbacks)
        self.engine = Engine(self.config, groups)
        self.health = Health(self.config.health)
        self.log = RunLog(self.config, start.run_folder, groups.rank, self.step)
        self.requests = Requests(start.run_folder, groups.rank)
        self.profile = ProfileWindow(self.config.logging, start.run_folder, groups.rank, self.log.say)
        self.phases = Phases()
        self._fill_weights()
        self.frozen = FrozenWeights(self.engine.stages, groups)
        self.layers = LayerWatch(self.engine.stages, groups)

    def fit(self) -> int:
        """Train to the last step or until asked to stop, saving on the way and at the end. Collective over all ranks.

        Returns:
            DONE, or REQUEUE after a signal and a complete checkpoint.

        Raises:
            HealthFailure: the run cannot go on by itself; what can be saved has been saved.
        """
        with self.requests:
            self._begin()
            try:
                asked = self._train()
            except (AtumError, HealthFailure):
                self._say_faults()  # they may be why
                self.profile.close()
                self.log.close()
                raise
            return self._end(asked)

    def _train(self) -> Asked:
        asked = Asked()
        while self.step < self.config.training.steps and not asked.ends:
            taken = self._take_step()
            asked = taken.asked
            if not taken.verdict.applies or taken.verdict.spikes:
                self._treat(taken)
            self._look_after(asked)
        return asked

    def _take_step(self) -> TakenStep:
        """One step on all ranks, from its data to its line in the log."""
        self.profile.before_step(self.step + 1)
        before = self.feed.state_dict()
        with self.phases.of("data"):
            data = self._next_data()
        self.liveness.beat()
        with self.phases.of("forward_backward"):
            result = self._compute(data)
        verdict = self.health.judge(self.step + 1, result)
        details = self.layers.end(self.engine.optimizer) if self._wants_details() else {}
        with self.phases.of("update"):
            if verdict.applies:
                self.engine.apply(result)
        self.step += 1
        self.profile.after_step(self.step)
        values = self.report.values(self.step, result, data, self.phases.take())
        health = {"bad_steps": self.health.bad_steps, "rollbacks": len(self.rollbacks)}
        self.log.step({**values, **health, **details})
        self.liveness.at(self.step)
        return TakenStep(data, before, result, verdict, Requests.asked(result.sums))

    def _look_after(self, asked: Asked) -> None:
        """Between two steps: validation, checksums, checkpoints."""
        config, step = self.config, self.step
        if step == self.first_step:
            set_timeout(config.health.step_timeout_s)
            self.liveness.set_timeout(config.health.step_timeout_s)
        if _due(step, config.training.validate_every) and self.start.validation:
            values = validate(self.engine, self.start.validation, self.liveness.beat)
            self.log.event("validation", step, **values)
            self.log.say(f"validation after step {step}: loss {values['loss']:.4f}")
        if _due(step, config.health.checksum_every):
            self.frozen.check()
        with self.phases.of("checkpoint"):
            self._tell(self.checkpoint.poll())
            if _due(step, config.checkpoint.save_every) or asked.save:
                self._save()
        self.requests.fulfilled(Asked(save=asked.save))

    def _compute(self, data: StepData) -> StepResult:
        if self._wants_details():
            self.layers.begin()
        return self.engine.compute(data.microbatches, self._told)

    def _told(self) -> tuple[dict[str, float], dict[str, float]]:
        sums, per_rank = self.report.own(self.phases.seconds["data"])
        return {**sums, **self.requests.seen()}, per_rank

    def _wants_details(self) -> bool:
        return _due(self.step + 1, self.config.logging.detail_every)

    def _next_data(self) -> StepData:
        """The step's microbatches; if the data of any rank is at fault, all ranks raise."""
        data = self.feed.next()
        for message in data.messages:
            self.log.say(f"data: {message}")
        return data

    # What goes wrong -------------------------------------------------------------------------------------------------

    def _treat(self, taken: TakenStep) -> None:
        """A step that was not applied, or that stands out."""
        step, verdict = self.step, taken.verdict
        for spike in verdict.spikes:
            self.log.event("spike", step, source=spike.source, loss=spike.loss, median=spike.median, z=spike.z)
            self.log.say(f"step {step}: {spike}")
        if verdict.back_before is not None:
            self._roll_back(verdict, verdict.back_before)
        elif not verdict.applies:
            self._keep_bad_step(taken)
        if verdict.stop:
            self._save()
            self._tell(self.checkpoint.wait())
            raise HealthFailure(
                f"step {step}: {verdict.stop}. {self.start.run_folder}/bad-steps has the last ones; "
                f"tools/replay_batch.py {self.start.run_folder} --step {step} repeats them. Weights are those of before"
            )

    def _keep_bad_step(self, taken: TakenStep) -> None:
        found = diagnose(self.engine.stages, self.config.model, taken.data.microbatches, taken.verdict, taken.result)
        self.log.event("bad_step", self.step, reason=found["reason"], first_bad_part=found["first_bad_part"])
        self.log.say(f"step {self.step} was not applied: {summary_of(found)}")
        if self.groups.rank == 0:
            try:
                write_bad_step(self.start.run_folder, self.step, taken.data_before, found)
            except OSError as error:  # a full disk: the log has the essentials
                self.log.say(f"the bad step could not be kept for replay: {error}")

    def _roll_back(self, verdict: Verdict, before: int) -> None:
        """Weights and optimizer of the last good checkpoint; the data goes on behind the spike."""
        if len(self.rollbacks) >= self.config.health.max_rollbacks:
            raise HealthFailure(
                f"step {self.step}: {verdict.spikes[0]}, after health.max_rollbacks={len(self.rollbacks)} rollbacks"
            )
        self._tell(self.checkpoint.wait())
        left_out = min(self.config.health.rollback_skip, self.config.training.steps - self.step)
        for _ in range(left_out):
            self._next_data()
            self.liveness.beat()
        wanted = Rollback(self.step, -1, self.feed.state_dict(), str(verdict.spikes[0]))
        done = roll_back(self.checkpoint, self.start.run_folder, before, wanted, self.rollbacks)
        if done is None:
            self.log.say(f"step {self.step}: no checkpoint before step {before} to go back to; training goes on")
            self.health.begin_again()
            return
        rollback, state = done
        self.rollbacks.append(rollback)
        self.feed.more(self.step + left_out - rollback.to)
        self.step = self.saved_at = rollback.to
        self.health.load_state_dict(state.health)
        self._lower_learning_rates()
        self.log.event("rollback", rollback.to, **{"from": rollback.step, "reason": rollback.reason})
        self.log.say(
            f"step {rollback.step}: {rollback.reason}; back to the weights of step {rollback.to}, data goes on"
        )

    def _lower_learning_rates(self) -> None:
        """Once for each rollback, one by one also at a restart: the last bit depends on it."""
        scale_learning_rates(self.engine.optimizer, self.config.health.rollback_lr_scale)
        self.engine.scheduler.step(0)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _fill_weights(self) -> None:
        engine, start, model = self.engine, self.start, self.config.model
        weights, resume = start.weights, start.resume
        if weights is not None:
            together(lambda: fill(engine.stages, model, self.groups, weights))
        elif resume is None:
            initialise(engine.stages, model, self.groups, self.config.training.seed)
        engine.build_optimizer()
        assets = together(lambda: start.assets() if self.groups.rank == 0 else {})
        beat = self.liveness.beat
        self.checkpoint = RunCheckpoint(self.config, self.groups, engine, start.checkpoints, assets, beat)
        self.checkpoint.clean()
        if resume is not None:
            self.checkpoint.load(resume)
            self.health.load_state_dict(resume.health)
        for _ in self.rollbacks:
            self._lower_learning_rates()
        if start.checkpoint is not None:
            self.checkpoint.take_frozen(start.checkpoint)

    def _save(self) -> None:
        if self.saved_at == self.step:
            return
        self._tell(self.checkpoint.save(self.step, self.feed.state_dict(), self.health.state_dict()))
        self.saved_at = self.step

    def _tell(self, saves: list[Saved]) -> None:
        """A checkpoint that could not be written does not stop the run: the one before it is still there."""
        for saved in saves:
            self.save_error = saved.error
            times = {"blocked_s": round(saved.blocked_s, 3), "total_s": round(saved.total_s, 3)}
            if saved.error:
                self.log.event("save_failed", saved.step, error=saved.error, **times)
                self.log.say(f"{saved.error}\ntraining goes on; the checkpoint before it is as it was")
            else:
                self.log.event("save", saved.step, **times)
                self.log.say(f"saved {saved.folder}")

    # Begin and end ---------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.first_step = self.step + 1
        together(self._begin_files)
        self.feed = StepFeed(self.start.loader, self.groups, self.config.training.steps - self.step)
        self.report = StepReport(self.engine, socket.gethostname())
        self.log.say(describe(self.engine, self.start.loader.shares, self._weights_from()))
        self._say_faults()
        if self.start.validation and not self.config.training.validate_every:
            self.log.say("data.validation is never evaluated: training.validate_every=0")
        if wants_dry_step(self.config):
            most = max(index.max_images for index in self.start.loader.indexes)
            self.log.say(f"dry step: {dry_step(self.engine, most)}")

    def _begin_files(self) -> None:
        """Raises ConfigError where the run folder cannot be written."""
        try:
            self.log.open(self.step)
            self.log.event("resume" if self.start.resume else "start", self.step)
            if self.groups.rank == 0:
                write_text(self.start.run_folder / "config.yaml", to_yaml(self.config))
        except OSError as error:
            raise ConfigError(f"the run folder {self.start.run_folder} cannot be written: {error}") from None

    def _weights_from(self) -> str:
        if self.start.resume:
            return f"step {self.step} of {self.start.resume.folder}"
        return place_of(self.start.weights) if self.start.weights else "drawn from the seed"

    def _say_faults(self) -> None:
        for name, reasons in self.feed.fault_report().items():
            if reasons:
                table = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
                self.log.say(f"data: {name}: dropped or lost: {table}")

    def _end(self, asked: Asked) -> int:
        """Raises CheckpointError if the last step could not be saved."""
        self._save()
        self._tell(self.checkpoint.wait())
        self._say_faults()
        self.feed.close()
        self.profile.close()
        over = self.step >= self.config.training.steps
        code = REQUEUE if asked.signal and not over else DONE
        if asked.ends and not over:
            self.log.event("signal" if asked.signal else "stop", self.step)
            self.log.say(f"stopped after step {self.step} {'by a signal' if asked.signal else 'as RUN/stop asks'}")
        self._write_summary("done" if over else "stopped", code)
        self.log.close()
        if self.save_error:
            raise CheckpointError(self.save_error)
        self.requests.fulfilled(asked)
        return code

    def _write_summary(self, ended: str, code: int) -> None:
        if self.groups.rank == 0:
            summary = {
                "ended": ended,
                "exit_code": code,
                "step": self.step,
                "steps": self.config.training.steps,
                "bad_steps": self.health.bad_steps,
                "rollbacks": len(self.rollbacks),
                "faults": self.feed.fault_report(),
                "layout": self.groups.layout.describe(),
            }
            with contextlib.suppress(OSError):  # the run is over, and its checkpoint is there
                write_text(self.start.run_folder / "summary.json", json.dumps(summary, indent=1) + "\n")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
