"""Learning-rate, momentum and weight-decay dials that compose into Optax chains.

Schedules are ``count -> value``, transformations are Optax's, and the range test takes
any training step. Start with :func:`onecycle_adamw` and :func:`range_test`.
"""

from optax_superconv import plotting
from optax_superconv._curvature import (
    SharpnessResult,
    hessian_free_rate,
    sharpness,
    stability_limit,
)
from optax_superconv._grid_test import GridTestResult, grid_test
from optax_superconv._hyperparams import read_hyperparams, scale_by_learning_rate
from optax_superconv._momentum import scale_by_scheduled_adam, scheduled_trace
from optax_superconv._range_test import RangeTestResult, range_test
from optax_superconv._recipes import onecycle_adamw, onecycle_sgd
from optax_superconv._schedules import (
    Phase,
    cyclical_schedule,
    onecycle_momentum_schedule,
    onecycle_schedule,
    phase_schedule,
)
from optax_superconv._suggestions import suggest_interval, suggest_learning_rate
from optax_superconv._threshold import ThresholdResult, convergence_threshold

__version__ = "0.1.0"

__all__ = [
    "GridTestResult",
    "Phase",
    "RangeTestResult",
    "SharpnessResult",
    "ThresholdResult",
    "convergence_threshold",
    "cyclical_schedule",
    "grid_test",
    "hessian_free_rate",
    "onecycle_adamw",
    "onecycle_momentum_schedule",
    "onecycle_schedule",
    "onecycle_sgd",
    "phase_schedule",
    "plotting",
    "range_test",
    "read_hyperparams",
    "scale_by_learning_rate",
    "scale_by_scheduled_adam",
    "scheduled_trace",
    "sharpness",
    "stability_limit",
    "suggest_interval",
    "suggest_learning_rate",
]
