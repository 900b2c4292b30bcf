"""The training loop."""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import dataclass, replace
from typing import Any

from megatron_atum.batch import StepData
from megatron_atum.checkpoint.files import write_text
from megatron_atum.checkpoint.run_checkpoint import RunCheckpoint, Saved
from megatron_atum.checkpoint.weights import fill, initialise
from megatron_atum.config.loader import to_yaml
from megatron_atum.errors import AtumError, CheckpointError, ConfigError, DataFailure, HealthFailure
from megatron_atum.parallel.agreement import all_true, together
from megatron_atum.parallel.groups import ProcessGroups, set_timeout
from megatron_atum.parallel.liveness import Liveness
from megatron_atum.training.corruption import FrozenWeights
from megatron_atum.training.details import LayerWatch
from megatron_atum.training.diagnosis import diagnose, summary_of, write_bad_step
from megatron_atum.training.engine import Engine, StepResult
from megatron_atum.training.feed import StepFeed
from megatron_atum.training.health import Health, Verdict
from megatron_atum.training.metrics import print_line
from megatron_atum.training.optimizer import scale_learning_rates
from megatron_atum.training.profiling import ProfileWindow
from megatron_atum.training.requests import Asked, Requests
from megatron_atum.training.rollback import Rollback, find_good, roll_back
from megatron_atum.training.run_log import RunLog
from megatron_atum.training.self_check import describe, dry_step, wants_dry_step
from megatron_atum.training.start import Start, place_of
from megatron_atum.training.step_report import Phases, StepReport
from megatron_atum.training.validation import validate

DONE, REQUEUE = 0, 85  # exit codes
SUMMARY = "summary.json"


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

    def __init__(self, start: Start, groups: ProcessGroups, liveness: Liveness, requests: Requests) -> None:
        """Args: requests: in use as a context manager."""
        self.start, self.config, self.groups, self.liveness = start, start.config, groups, liveness
        self.step = start.resume.step if start.resume else 0
        self.saved_at = self.step
        self.save_error = ""  # of the newest save
        self.rollbacks = list(start.rollbacks)
        self.engine = Engine(self.config, groups)
        self.health = Health(self.config.health)
        self.log = RunLog(self.config, start.run_folder, groups.rank, self.step)
        self.requests = requests
        self.begun = False  # whether a step is done
        self.save_asked: int | None = None  # step of the save that RUN/save asked for
        say = print_line if groups.rank else self.log.say
        self.profile = ProfileWindow(self.config.logging, start.run_folder, groups.rank, say)
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
        self._begin()
        try:
            return self._end(self._train())
        except (AtumError, DataFailure, HealthFailure) as error:  # on all ranks
            self._say_faults()  # they may be why
            self._write_summary("failed", 2 if isinstance(error, AtumError) else 1, str(error))
            self.profile.close()
            self.log.close()
            raise

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
        if not self.begun:
            self.begun = True
            self._set_timeout("step_timeout_s")
        if _due(step, config.training.validate_every) and not asked.ends:
            with self.phases.of("validation"):
                values = validate(self.engine, self.start.validation, self.liveness.beat)
            self.log.event("validation", step, **values)
            losses = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if "perplexity" not in name)
            self.log.say(f"validation after step {step}: {losses or 'no source has a token that counts'}")
        if _due(step, config.health.checksum_every):
            self.frozen.check()
        with self.phases.of("checkpoint"):
            save_asked = asked.save and self.save_asked is None  # else its save is under way
            self._tell(self.checkpoint.poll())
            if _due(step, config.checkpoint.save_every) or save_asked:
                self._save()
        if save_asked:
            self.save_asked = self.saved_at
            self.log.say(f"RUN/save asks for a checkpoint of step {self.saved_at}")
            self._save_is_there()

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
            if self._roll_back(verdict, verdict.back_before):
                return
            verdict = self.health.cannot_roll_back(verdict)
            self.log.say(f"step {step}: there is no checkpoint from before the spike to go back to")
        if not verdict.applies:
            self._keep_bad_step(replace(taken, verdict=verdict))
        if verdict.stop:
            self.health.stopped()
            self._save()
            self._tell(self.checkpoint.wait())
            raise HealthFailure(
                f"step {step}: {verdict.stop}. {self.start.run_folder}/bad-steps has the last ones; "
                f"tools/replay_batch.py {self.start.run_folder} --step {step} repeats them. Weights are those of before"
            )

    def _keep_bad_step(self, taken: TakenStep) -> None:
        found = diagnose(self.engine.stages, self.config.model, taken.data.microbatches, taken.verdict, taken.result)
        parts = {name: found[name] for name in ("first_bad_part", "last_bad_part")}
        self.log.event("bad_step", self.step, reason=found["reason"], **parts)
        self.log.say(f"step {self.step} was not applied: {summary_of(found)}")
        if self.groups.rank == 0:
            try:
                write_bad_step(self.start.run_folder, self.step, taken.data_before, found)
            except OSError as error:  # a full disk: the log has the essentials
                self.log.say(f"the bad step could not be kept for replay: {error}")

    def _roll_back(self, verdict: Verdict, before: int) -> bool:
        """Weights and optimizer of the last good checkpoint; the data goes on behind the spike.

        Returns:
            False: there is no such checkpoint.
        """
        health = self.config.health
        if len(self.rollbacks) >= health.max_rollbacks:
            raise HealthFailure(
                f"step {self.step}: {verdict.spikes[0]}, and the run went back {len(self.rollbacks)} times already "
                f"(health.max_rollbacks={health.max_rollbacks}). Look at the data of the spike (tools/data/stats.py, "
                f"docs/health.md), then raise it, or health.rollback_skip; checkpoints from step {before} on have seen "
                "the spike: remove them to start from before it"
            )
        self._tell(self.checkpoint.wait())
        folder = find_good(self.checkpoint, before)
        if folder is None:
            return False
        self._set_timeout("start_timeout_s")  # as much is read as at a start
        left_out = min(health.rollback_skip, self.config.training.steps - self.step)
        for _ in range(left_out):
            self._next_data()
            self.liveness.beat()
        to = int(folder.name.removeprefix("step-"))
        rollback = Rollback(self.step, to, self.feed.state_dict(), str(verdict.spikes[0]))
        state = roll_back(self.checkpoint, self.start.run_folder, folder, rollback, self.rollbacks)
        self.rollbacks.append(rollback)
        self.feed.more(self.step + left_out - to)
        self.step = self.saved_at = to
        self.health.load_state_dict(state.health)
        self._lower_learning_rates()
        self.log.event("rollback", to, **{"from": rollback.step, "left_out": left_out, "reason": rollback.reason})
        self.log.say(f"step {rollback.step}: {rollback.reason}; back to the weights of step {to}, the data goes on")
        self._set_timeout("step_timeout_s")
        return True

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
        self.liveness.beat()
        engine.build_optimizer()
        assets = together(lambda: start.assets() if self.groups.rank == 0 else {})
        beat = self.liveness.beat
        self.checkpoint = RunCheckpoint(self.config, self.groups, engine, start.checkpoints, assets, beat)
        self.checkpoint.clean()
        if resume is not None:
            self.checkpoint.load(resume)
            self.health.load_state_dict(resume.health)
        engine.cast_frozen()
        for _ in self.rollbacks:
            self._lower_learning_rates()
        if start.checkpoint is not None:
            self.checkpoint.take_frozen(start.checkpoint)
        self.liveness.beat()

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
                self.save_asked = None  # the file is still there, and asks again
                self.log.event("save_failed", saved.step, error=saved.error, **times)
                self.log.say(f"{saved.error}\ntraining goes on; the checkpoint before it is as it was")
            else:
                self.log.event("save", saved.step, **times)
                self.log.say(f"saved {saved.folder}")
        self._save_is_there()

    def _save_is_there(self) -> None:
        """What RUN/save asked for."""
        if self.save_asked is not None and not self.checkpoint.is_saving:
            self.requests.fulfilled(Asked(save=True))
            self.save_asked = None

    # Begin and end ---------------------------------------------------------------------------------------------------

    def _set_timeout(self, key: str) -> None:
        seconds = getattr(self.config.health, key)
        set_timeout(seconds)
        self.liveness.set_timeout(seconds, f"health.{key}")

    def _begin(self) -> None:
        together(self._begin_files)
        self.feed = StepFeed(self.start.loader, self.groups, self.config.training.steps - self.step)
        self.log.say(describe(self.engine, self.start.loader.shares, self._weights_from()))
        self._say_faults()
        if self.start.validation and not self.config.training.validate_every:
            self.log.say("data.validation is never evaluated: training.validate_every=0")
        if self.config.health.checksum_every and not self.frozen.exist:
            self.log.say("health.checksum_every has nothing to check: no weight is frozen")
        if wants_dry_step(self.config):
            most = max(index.max_images for index in self.start.loader.indexes)
            self.log.say(f"dry step: {dry_step(self.engine, most)}")
        self.report = StepReport(self.engine, socket.gethostname())  # counts energy from here on

    def _begin_files(self) -> None:
        """Raises ConfigError where the run folder cannot be written."""
        try:
            self.log.open(self.step)
            self.log.event("resume" if self.start.resume else "start", self.step)
            if self.groups.rank == 0:
                (self.start.run_folder / SUMMARY).unlink(missing_ok=True)  # of an earlier end
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
        if self.save_error:
            raise CheckpointError(self.save_error)
        self.requests.ignore_more()
        self._say_faults()
        self.feed.close()
        self.profile.close()
        over = self.step >= self.config.training.steps
        code = REQUEUE if asked.is_continued and not over else DONE
        if asked.ends and not over:
            self.log.event("signal" if asked.is_continued else "stop", self.step)
            who = "a signal" if asked.is_continued else "RUN/stop"
            self.log.say(f"stopped after step {self.step}, as {who} asked")
        self._write_summary("done" if over else "stopped", code)
        self.log.close()
        self.requests.fulfilled(asked)
        all_true(True)  # a launcher may end the others when the first is through, and rank 0 has most to do
        return code

    def _write_summary(self, ended: str, code: int, why: str = "") -> None:
        """How the run ended, for who looks at it, and for launchers that hide exit codes (torchrun)."""
        if self.groups.rank:
            return
        summary = {
            "ended": ended,
            "exit_code": code,
            "why": why,
            "step": self.step,
            "steps": self.config.training.steps,
            "bad_steps": self.health.bad_steps,
            "rollbacks": len(self.rollbacks),
            "faults": self.feed.fault_report(),
            "layout": self.groups.layout.describe(),
        }
        with contextlib.suppress(OSError):  # the run is over, and its checkpoint is there
            write_text(self.start.run_folder / SUMMARY, json.dumps(summary, indent=1) + "\n")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
