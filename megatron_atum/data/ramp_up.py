"""The batch size of a step: a pure function of the rows handed out before it."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_atum.config.schema import RampUpConfig


@dataclass(frozen=True)
class BatchSize:
    """Packed rows of a step: `final`, or on the way there from `ramp_up.start`.

    `ramp_up.rows` rows are divided evenly over the increments, as Megatron-LM does with --rampup-batch-size
    (megatron/core/num_microbatches_calculator.py: RampupBatchsizeNumMicroBatchesCalculator). A step keeps the size it
    begins with.
    """

    final: int
    ramp_up: RampUpConfig = field(default_factory=RampUpConfig)

    def at(self, rows: int) -> int:
        """Rows of the step that begins after so many rows."""
        ramp = self.ramp_up
        if not ramp.start or rows >= ramp.rows:
            return self.final
        increments = (self.final - ramp.start) // ramp.increment
        return ramp.start + rows * increments // ramp.rows * ramp.increment

    def total(self, steps: int) -> int:
        """Rows of so many steps from the first."""
        rows = step = 0
        while step < steps and self.at(rows) != self.final:
            rows, step = rows + self.at(rows), step + 1
        return rows + (steps - step) * self.final

    @property
    def all(self) -> list[int]:
        """Every size, rising."""
        ramp = self.ramp_up
        return [*(range(ramp.start, self.final, ramp.increment) if ramp.start else ()), self.final]
