"""Learning-rate, momentum and weight-decay dials that compose into Optax chains.

Schedules are ``count -> value``, transformations are Optax's, and the range test takes
any training step. Start with :func:`onecycle_adamw` and :func:`range_test`.
"""

from optax_superconv import plotting
from optax_superconv._records import read_hyperparams
from optax_superconv._restarts import restart_schedules, start_cooldown
from optax_superconv._settings import set_hyperparams
from optax_superconv.finders._auto_onecycle import auto_onecycle
from optax_superconv.finders._auto_results import AutoOneCycleResult, ShortCycles
from optax_superconv.finders._curvature import (
    SharpnessResult,
    sharpness,
    stability_limit,
)
from optax_superconv.finders._grid_results import GridTestResult
from optax_superconv.finders._grid_test import grid_test
from optax_superconv.finders._range_test import RangeTestResult, range_test
from optax_superconv.finders._suggestions import (
    suggest_interval,
    suggest_learning_rate,
)
from optax_superconv.finders._threshold import ThresholdResult, convergence_threshold
from optax_superconv.recipes._fine_tune import fine_tune_adamw
from optax_superconv.recipes._optimizers import (
    adamw,
    onecycle_adamw,
    onecycle_sgd,
    sgd,
)
from optax_superconv.schedules._cycles import cyclical_schedule
from optax_superconv.schedules._late_decay import (
    warmup_stable_decay_schedule,
    with_cooldown,
)
from optax_superconv.schedules._onecycle import (
    onecycle,
    onecycle_momentum_schedule,
    onecycle_schedule,
)
from optax_superconv.schedules._peaks import transfer_peak
from optax_superconv.schedules._phases import Phase, phase_schedule
from optax_superconv.schedules._refined import refined_schedule
from optax_superconv.transforms._averages import average_params, ema_params, swa_params
from optax_superconv.transforms._batch_stats import recalibrate_batch_stats
from optax_superconv.transforms._describe import describe_groups
from optax_superconv.transforms._eval_params import eval_params
from optax_superconv.transforms._gradient_norms import record_gradient_norms
from optax_superconv.transforms._groups import scale_by_group
from optax_superconv.transforms._labels import label_by_depth, label_by_path
from optax_superconv.transforms._learning_rate import scale_by_learning_rate
from optax_superconv.transforms._momentum import (
    scale_by_scheduled_adam,
    scheduled_trace,
)
from optax_superconv.transforms._multipliers import (
    geometric_multipliers,
    layerwise_multipliers,
)
from optax_superconv.transforms._snapshots import lawa_params
from optax_superconv.transforms._unfreezing import gradual_unfreezing
from optax_superconv.transforms._weight_decay import add_decayed_weights

__version__ = "0.1.0"

__all__ = [
    "AutoOneCycleResult",
    "GridTestResult",
    "Phase",
    "RangeTestResult",
    "SharpnessResult",
    "ShortCycles",
    "ThresholdResult",
    "adamw",
    "add_decayed_weights",
    "auto_onecycle",
    "average_params",
    "convergence_threshold",
    "cyclical_schedule",
    "describe_groups",
    "ema_params",
    "eval_params",
    "fine_tune_adamw",
    "geometric_multipliers",
    "gradual_unfreezing",
    "grid_test",
    "label_by_depth",
    "label_by_path",
    "lawa_params",
    "layerwise_multipliers",
    "onecycle",
    "onecycle_adamw",
    "onecycle_momentum_schedule",
    "onecycle_schedule",
    "onecycle_sgd",
    "phase_schedule",
    "plotting",
    "range_test",
    "read_hyperparams",
    "recalibrate_batch_stats",
    "record_gradient_norms",
    "refined_schedule",
    "restart_schedules",
    "scale_by_group",
    "scale_by_learning_rate",
    "scale_by_scheduled_adam",
    "scheduled_trace",
    "set_hyperparams",
    "sgd",
    "sharpness",
    "stability_limit",
    "start_cooldown",
    "suggest_interval",
    "suggest_learning_rate",
    "swa_params",
    "transfer_peak",
    "warmup_stable_decay_schedule",
    "with_cooldown",
]
