"""What was measured, what was chosen, and why? The result of ``auto_onecycle``."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

import numpy as np
import optax

from optax_superconv.finders import _runs
from optax_superconv.finders._range_test import RangeTestResult
from optax_superconv.finders._steps import Optimizer
from optax_superconv.recipes._optimizers import adamw, sgd
from optax_superconv.schedules._onecycle import onecycle

NAMES: dict[Optimizer, str] = {"adamw": "AdamW", "sgd": "SGD"}
METHODS: dict[Optimizer, str] = {
    "adamw": "the knee, where nine tenths of the fall are done",
    "sgd": "the middle between a tenth of the rate of the lowest loss and divergence",
}
NO_RATE = (
    "It suggests no rate: no fall stands out from the noise of its losses, or too few "
    "of them are finite."
)
RAISED = (
    "The peak is three times that, which did best with this weight decay on the small "
    "tasks that chose it."
)
PLATEAU = (
    "No fall stands out from the noise: there is a plateau at the start that takes "
    "longer to leave, or nothing to learn."
)
SHORT = (
    "How sure: the true one may lie between these rates, and a long run may want "
    "another peak than a short one."
)
USUALLY = (
    "The peak was not measured: it is the one that did best on a few small tasks, and "
    "may be off tenfold and more."
)
GROUPED = (
    "The state has rates of groups, of which the peak is the common one: `tx` has no "
    "groups, so make the optimizer of the schedules."
)


@dataclasses.dataclass(frozen=True, eq=False)
class ShortCycles:
    """One cycles of a part of the run, at several peaks, on the same batches.

    Attributes:
      peak_learning_rates: (n,) float32, ascending.
      losses: (n, steps) float64, the loss at each step before its update; NaN after
        divergence.
      scores: (n,) float64, the mean of the second half of the losses; infinite if a
        loss is not finite.
    """

    peak_learning_rates: np.ndarray
    losses: np.ndarray
    scores: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class AutoOneCycleResult:
    """The numbers of a recipe, and what they were read from.

    Attributes:
      total_steps: Of the run to come.
      optimizer: ``"sgd"`` or ``"adamw"``.
      hyperparams: ``peak_learning_rate``, ``warmup_steps``, ``max_momentum``,
        ``base_momentum`` and ``weight_decay``, by name; for AdamW ``b2`` and ``eps`` as
        the state last applied them.
      steps_used: Training steps that the probes took, those that were made twice or
        thrown away included.
      range_test: The range test; None if there was none.
      short_cycles: The short runs; None if there were none.
      reasons: What was read from them, and how sure it is, for :meth:`report`.
    """

    total_steps: int
    optimizer: Optimizer
    hyperparams: dict[str, float]
    steps_used: int
    range_test: RangeTestResult | None
    short_cycles: ShortCycles | None
    reasons: tuple[str, ...]

    @property
    def evidence(self) -> dict[str, RangeTestResult | ShortCycles]:
        """The probes that were made, ``"range_test"`` and ``"short_cycles"``."""
        made = {"range_test": self.range_test, "short_cycles": self.short_cycles}
        return {name: probe for name, probe in made.items() if probe is not None}

    @property
    def learning_rate(self) -> optax.Schedule:
        """The schedule of the rate."""
        return self._cycle()[0]

    @property
    def momentum(self) -> optax.Schedule:
        """The schedule of SGD's momentum, or of AdamW's b1."""
        return self._cycle()[1]

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer: :func:`adamw` or :func:`sgd`, otherwise with its defaults.

        A mask, groups, or no Nesterov cannot be read off a state.
        """
        make = {"adamw": adamw, "sgd": sgd}[self.optimizer]
        names = {"weight_decay", "b2", "eps"}.intersection(self.hyperparams)
        return make(*self._cycle(), **{name: self.hyperparams[name] for name in names})

    def _cycle(self) -> tuple[optax.Schedule, optax.Schedule]:
        names = "warmup_steps", "max_momentum", "base_momentum"
        options: Any = {name: self.hyperparams[name] for name in names}
        return onecycle(
            self.hyperparams["peak_learning_rate"], self.total_steps, **options
        )

    def __repr__(self) -> str:
        found = self.hyperparams
        return _runs.summary(
            self,
            f"{self.total_steps} steps of {NAMES[self.optimizer]}, peak "
            f"{found['peak_learning_rate']:.3g}",
            f"weight_decay {found['weight_decay']:.3g}, {self.steps_used} steps used",
        )

    def report(self) -> str:
        """What was measured, what was chosen, why, and how sure that is: a few lines.

        Returns:
          The text, in lines of at most 88 characters.
        """
        found, share = self.hyperparams, self.steps_used / self.total_steps
        moves = "b1" if self.optimizer == "adamw" else "the momentum"
        told = [
            f"One cycle of {self.total_steps:,} steps with {NAMES[self.optimizer]}: "
            f"the rate rises to {found['peak_learning_rate']:.3g} in "
            f"{found['warmup_steps']:,} steps and falls to 0; {moves} goes from "
            f"{found['max_momentum']} to {found['base_momentum']} and back; weight "
            f"decay {found['weight_decay']:.3g}.",
            *self.reasons,
            f"`tx` is one `osc.{self.optimizer}` of these numbers: chain before it "
            "what else your optimizer does, as clipping.",
            f"Cost: {self.steps_used:,} training steps, {share:.0%} of the run.",
        ]
        return "\n".join(line for text in told for line in textwrap.wrap(text, 88))


def told_of(test: RangeTestResult) -> str:
    """What a range test saw."""
    rates, losses = test.learning_rates, test.smoothed_losses
    lowest = int(np.nanargmin(losses))
    end = "it diverged" if test.diverged else "no divergence ended it"
    return (
        f"Range test: in {len(rates)} steps from {rates[0]:.3g} to {rates[-1]:.3g} the "
        f"smoothed loss went from {losses[0]:.4g} down to {losses[lowest]:.4g}, at "
        f"{rates[lowest]:.2g}, and {end}."
    )


def sure_of(test: RangeTestResult) -> str:
    """What to think of one reading."""
    steps = len(test.losses)
    better = ", where 200 are read better" if steps < 150 else ""
    return (
        f"How sure: it is one reading of one test of {steps} steps{better}. "
        "docs/find_the_rate.md says where that misses, and how far. A run at a third "
        "and one at three times the peak would tell."
    )


def told_of_decay(product: float) -> str:
    """What the decay is, given what it makes with peak and steps."""
    return (
        "The weight decay takes the place of yours. It was not measured: peak x decay "
        f"x steps is {product:.2g}, which says how much of its weights the run forgets."
    )


def told_of_cycles(cycles: ShortCycles) -> str:
    """What short cycles said, and whether clearly."""
    peaks = cycles.peak_learning_rates
    ends = ", ".join(
        f"{score:.4g} at {peak:.2g}" if np.isfinite(score) else f"nan at {peak:.2g}"
        for peak, score in zip(peaks, cycles.scores, strict=True)
    )
    text = f"Short cycles of {cycles.losses.shape[1]} steps: mean losses, second half, "
    text += f"of {ends}."
    best = int(cycles.scores.argmin())
    level = cycles.scores.min() == cycles.scores.max()
    for side, end in (("low", 0), ("high", len(peaks) - 1)):
        if best == end and np.isfinite(cycles.scores[best]) and not level:
            text += f" The {side}est rate was the best, so a {side}er may be better."
    return text
