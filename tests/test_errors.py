"""Bad input: which error, naming argument, rule and value."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_superconv as osc

STEP = lambda state, rate, batch: (rate, jnp.float32(1.0))  # noqa: E731
ZERO = np.float32(0)


def run(**options):
    step_fn, batches = options.pop("step_fn", STEP), options.pop("batches", [None])
    return osc.range_test(step_fn, ZERO, batches, pass_hyperparams=True, **options)


RATES = np.geomspace(1e-6, 1, 50)
FALLING = 2 - 1 / (1 + 1e-3 / RATES)
CURVE = osc.RangeTestResult(RATES, FALLING, FALLING, False, optimizer="adamw")
FLAT = osc.RangeTestResult(RATES, np.ones(50), np.ones(50), False, optimizer="adamw")


def suggest(**options):
    return osc.suggest_learning_rate(CURVE, **options)


LABELS = {"a": 0, "b": 1}


def unfreeze(thaw_steps):
    return osc.gradual_unfreezing(optax.sgd(0.1), thaw_steps, LABELS)


def fine_tune(total_steps=10, **options):
    return osc.fine_tune_adamw(options.pop("peak", 0.1), total_steps, LABELS, **options)


COOLDOWN = osc.scale_by_learning_rate(0.1).init(None)

BAD_VALUES = [
    # call, argument, rule, value
    (lambda: osc.onecycle_schedule(1.0, 0), "total_steps", "at least 1", "0"),
    (lambda: osc.onecycle_schedule(1.0, -5), "total_steps", "at least 1", "-5"),
    (
        lambda: osc.onecycle_schedule(1.0, 3 * 10**9),
        "total_steps",
        "at most 2147483647",
        "3000000000",
    ),
    (
        lambda: osc.onecycle_schedule(1.0, 10, warmup_steps=-1),
        "warmup_steps",
        "at least 0 and less than `total_steps` (10)",
        "-1",
    ),
    (
        lambda: osc.onecycle_schedule(1.0, 10, warmup_steps=10),
        "warmup_steps",
        "at least 0 and less than `total_steps` (10)",
        "10",
    ),
    (
        lambda: osc.onecycle_schedule(1.0, 10, annihilation_steps=-1),
        "annihilation_steps",
        "at least 0",
        "-1",
    ),
    (
        lambda: osc.onecycle_schedule(1.0, 10, warmup_steps=4, annihilation_steps=7),
        "warmup_steps + annihilation_steps",
        "at most `total_steps` (10)",
        "11",
    ),
    (lambda: osc.onecycle_schedule(-0.1, 10), "peak_value", "at least 0", "-0.1"),
    (lambda: osc.onecycle_schedule(np.nan, 10), "peak_value", "finite", "nan"),
    (
        lambda: osc.onecycle_schedule(jnp.array([0.1, -0.2]), 10),
        "peak_value",
        "at least 0",
        "-0.2",
    ),
    (
        lambda: osc.onecycle_schedule(1.0, 10, init_value=2.0),
        "init_value",
        "at most `peak_value` (1.0)",
        "2.0",
    ),
    (
        lambda: osc.onecycle_schedule(1.0, 10, end_value=-1e-9),
        "end_value",
        "at least 0",
        "-1e-09",
    ),
    (
        lambda: osc.onecycle_schedule(1.0, 10, shape="exponential"),
        "end_value",
        "above 0",
        "0.0",
    ),
    (
        lambda: osc.onecycle_schedule(1.0, 10, shape="cos"),
        "shape",
        "one of 'linear', 'cosine', '1-sqrt', 'exponential'",
        "'cos'",
    ),
    (
        lambda: osc.onecycle_schedule(1.0, 10, shape=lambda r: 1 - r),
        "shape",
        "shape(1) == 1",
        "[0. 1.]",
    ),
    (
        lambda: osc.onecycle_momentum_schedule(10, max_momentum=1.0),
        "max_momentum",
        "at least 0 and less than 1",
        "1.0",
    ),
    (
        lambda: osc.onecycle_momentum_schedule(10, base_momentum=-0.1),
        "base_momentum",
        "at least 0 and less than 1",
        "-0.1",
    ),
    (
        lambda: osc.onecycle_momentum_schedule(10, base_momentum=0.99),
        "base_momentum",
        "at most `max_momentum` (0.95)",
        "0.99",
    ),
    (lambda: osc.onecycle_momentum_schedule(0), "total_steps", "at least 1", "0"),
    (
        lambda: osc.phase_schedule(0.0, [(3, 1.0), (-2, 0.0)]),
        "phases[1].steps",
        "at least 0",
        "-2",
    ),
    (
        lambda: osc.phase_schedule(0.0, [(3, np.inf)]),
        "phases[0].end_value",
        "finite",
        "inf",
    ),
    (
        lambda: osc.phase_schedule(0.0, [(3, 1.0, "exponential")]),
        "init_value",
        "above 0",
        "0.0",
    ),
    (
        lambda: osc.phase_schedule(0.0, [(2**31 - 1, 1.0), (1, 0.0)]),
        "phases",
        "at most 2147483647",
        "2147483648",
    ),
    (
        lambda: osc.cyclical_schedule(0.1, 0.2, 3, mode="triangle"),
        "mode",
        "one of 'triangular', 'triangular2', 'exp_range'",
        "'triangle'",
    ),
    (lambda: osc.cyclical_schedule(0.1, 0.2, 0), "steps_up", "at least 1", "0"),
    (lambda: osc.cyclical_schedule(0.1, 0.2, 3, 0), "steps_down", "at least 1", "0"),
    (lambda: osc.cyclical_schedule(0.1, -0.2, 3), "peak_value", "at least 0", "-0.2"),
    (
        lambda: osc.cyclical_schedule(0.1, 0.2, 3, mode="exp_range", gamma=1.1),
        "gamma",
        "above 0 and at most 1",
        "1.1",
    ),
    (lambda: osc.scheduled_trace(1.0), "decay", "less than 1", "1.0"),
    (lambda: osc.scale_by_scheduled_adam(-0.1), "b1", "at least 0", "-0.1"),
    (lambda: osc.scale_by_scheduled_adam(0.9, 1.0), "b2", "less than 1", "1.0"),
    (lambda: osc.scale_by_scheduled_adam(0.9, eps=-1.0), "eps", "at least 0", "-1.0"),
    (lambda: osc.scale_by_learning_rate(np.nan), "learning_rate", "finite", "nan"),
    (
        lambda: osc.onecycle_sgd(-0.1, 10),
        "peak_learning_rate",
        "at least 0",
        "-0.1",
    ),
    (
        lambda: osc.onecycle_sgd(0.1, 10, init_learning_rate=0.2),
        "init_learning_rate",
        "at most `peak_learning_rate` (0.1)",
        "0.2",
    ),
    (lambda: osc.onecycle_sgd(0.1, 0), "total_steps", "at least 1", "0"),
    (
        lambda: osc.onecycle_sgd(0.1, 10, weight_decay=-1.0),
        "weight_decay",
        "at least 0",
        "-1.0",
    ),
    (
        lambda: osc.onecycle_adamw(0.1, 10, max_momentum=1.5),
        "max_momentum",
        "less than 1",
        "1.5",
    ),
    (
        lambda: osc.onecycle_adamw(0.1, 10, base_momentum=0.96),
        "base_momentum",
        "at most `max_momentum` (0.95)",
        "0.96",
    ),
    (lambda: osc.onecycle(-0.1, 10), "peak_learning_rate", "at least 0", "-0.1"),
    (
        lambda: osc.onecycle(0.1, 10, end_learning_rate=0.2),
        "end_learning_rate",
        "at most `peak_learning_rate` (0.1)",
        "0.2",
    ),
    (
        lambda: osc.onecycle(0.1, 10, base_momentum=1.0),
        "base_momentum",
        "less than 1",
        "1.0",
    ),
    (lambda: osc.sgd(np.inf), "learning_rate", "finite", "inf"),
    (lambda: osc.sgd(0.1, 1.0), "momentum", "less than 1", "1.0"),
    (lambda: osc.sgd(0.1, weight_decay=-1.0), "weight_decay", "at least 0", "-1.0"),
    (lambda: osc.adamw(np.inf), "learning_rate", "finite", "inf"),
    (lambda: osc.adamw(0.1, 1), "b1", "less than 1", "1"),
    (lambda: osc.adamw(0.1, b2=1.0), "b2", "less than 1", "1.0"),
    (lambda: osc.adamw(0.1, eps=-1.0), "eps", "at least 0", "-1.0"),
    (lambda: osc.adamw(0.1, weight_decay=-1.0), "weight_decay", "at least 0", "-1.0"),
    (lambda: osc.add_decayed_weights(-1.0), "weight_decay", "at least 0", "-1.0"),
    (lambda: osc.add_decayed_weights(np.nan), "weight_decay", "finite", "nan"),
    (
        lambda: osc.add_decayed_weights(0.1, "kernels"),
        "mask",
        "one of 'matrices'",
        "'kernels'",
    ),
    (
        lambda: osc.scale_by_learning_rate(0.1, multipliers={0: 1.0}),
        "param_labels",
        "given with `multipliers`",
        "None",
    ),
    (
        lambda: osc.scale_by_learning_rate(0.1, param_labels=LABELS),
        "multipliers",
        "given with `param_labels`",
        "None",
    ),
    (
        lambda: osc.scale_by_learning_rate(
            0.1, multipliers={0: 1.0, 1: -2.0}, param_labels=LABELS
        ),
        "multipliers[1]",
        "finite and at least 0",
        "-2.0",
    ),
    (
        lambda: osc.onecycle_adamw(0.1, 10, shape="exponential"),
        "end_learning_rate",
        "above 0",
        "0.0",
    ),
    (lambda: run(min_learning_rate=0.0), "min_learning_rate", "above 0", "0.0"),
    (
        lambda: run(min_learning_rate=10.0),
        "max_learning_rate",
        "above `min_learning_rate` (10.0)",
        "10.0",
    ),
    (lambda: run(num_steps=1), "num_steps", "at least 2", "1"),
    (lambda: run(smoothing=1.0), "smoothing", "less than 1", "1.0"),
    (lambda: run(divergence_factor=1.0), "divergence_factor", "above 1", "1.0"),
    (lambda: run(patience=0), "patience", "at least 1", "0"),
    (
        lambda: run(step_fn=lambda s, r, b: (s, jnp.ones(3))),
        "step_fn",
        "a real scalar",
        "(3,)",
    ),
    (lambda: run(min_learning_rate=1e-60), "min_learning_rate", "above 0", "1e-60"),
    (
        lambda: run(max_learning_rate=1e39),
        "max_learning_rate",
        "finite in float32",
        "1e+39",
    ),
    (
        lambda: osc.onecycle_schedule(
            1.0, 10, init_value=0.1, end_value=0.5, annihilation_steps=3
        ),
        "end_value",
        "at most `init_value` (0.1)",
        "0.5",
    ),
    (
        lambda: osc.onecycle_sgd(
            1.0,
            10,
            init_learning_rate=0.1,
            end_learning_rate=0.5,
            annihilation_steps=3,
        ),
        "end_learning_rate",
        "at most `init_learning_rate` (0.1)",
        "0.5",
    ),
    (
        lambda: osc.onecycle_sgd(0.1, 10, mask="kernels"),
        "mask",
        "one of 'matrices'",
        "'kernels'",
    ),
    (
        lambda: run(batches={"x": 1}, stacked=True),
        "batches",
        "a pytree of arrays with one leading axis of steps",
        "leaves of shapes [()]",
    ),
    (
        lambda: run(batches={"x": np.ones((3, 2))}),
        "batches",
        "put a single batch in a list",
        "a single dict",
    ),
    (lambda: osc.suggest_learning_rate([]), "result", "at least one", "none"),
    (lambda: osc.suggest_learning_rate([FLAT] * 2), "result", "suggestion", "2 w"),
    (lambda: osc.suggest_interval([CURVE]), "results", "at least 2", "1"),
    (lambda: osc.suggest_interval([]), "results", "at least one", "none"),
    (lambda: osc.suggest_interval(CURVE), "results", "at least 2", "1"),
    (lambda: osc.plotting.plot_range_test([]), "result", "at least one", "none"),
    (lambda: osc.suggest_interval([CURVE] * 2, level=0), "level", "above 0", "0"),
    (lambda: osc.suggest_interval([CURVE] * 2, level=1.1), "level", "at most 1", "1.1"),
    (
        lambda: osc.suggest_interval([CURVE] * 2, method="no"),
        "method",
        "one of",
        "'no'",
    ),
    (
        lambda: run(eval_fn=lambda state: jnp.ones(2)),
        "eval_fn",
        "a real scalar",
        "float32 of shape (2,)",
    ),
    (
        lambda: run(step_fn=lambda s, r, b: (s, jnp.float32(np.nan))),
        "step_fn",
        "finite before any update",
        "nan",
    ),
    (
        lambda: run(step_fn=lambda s, r, b: ((s, s), jnp.float32(1.0))),
        "step_fn",
        "a state like the one it is given, with float32[] at state",
        "nothing",
    ),
    (
        lambda: run(batches=(np.ones((3, 2)), np.ones((4, 2))), stacked=True),
        "batches",
        "one leading axis of steps",
        "[(3, 2), (4, 2)]",
    ),
    (
        lambda: run(batches=(np.ones((3, 2)), np.ones(3))),
        "batches",
        "put a single batch in a list",
        "[(3, 2), (3,)]",
    ),
    (
        lambda: run(eval_fn=lambda state: jnp.float32(np.nan)),
        "eval_fn",
        "finite after the first update",
        "nan",
    ),
    (
        lambda: run(min_learning_rate=1.0, max_learning_rate=1.0 + 1e-12),
        "max_learning_rate",
        "above `min_learning_rate` (1.0) in float32",
        "1.000000000001",
    ),
    (
        lambda: run(batches=[]),
        "batches",
        "at least one batch",
        "none",
    ),
    (
        lambda: suggest(method="slide"),
        "method",
        "one of 'knee', 'halfway', 'steepest', 'minimum', 'middle', 'divergence'",
        "'slide'",
    ),
    (
        lambda: osc.plotting.plot_schedule(lambda t: t, 0),
        "total_steps",
        "at least 1",
        "0",
    ),
    (
        lambda: osc.plotting.plot_schedule({}, 10),
        "dials",
        "at least one",
        "none",
    ),
    (lambda: osc.label_by_path([]), "rules", "at least one pair", "[]"),
    (lambda: osc.label_by_path([("(", 0)]), "rules", "a regular expression", "'('"),
    (
        lambda: osc.label_by_path([("a", 0)], unmatched_rules="ignore"),
        "unmatched_rules",
        "one of 'error', 'warn'",
        "'ignore'",
    ),
    (
        lambda: osc.label_by_depth(final_norm="stem"),
        "final_norm",
        "one of 'last_block', 'head'",
        "'stem'",
    ),
    (lambda: osc.label_by_depth(r"\d+"), "pattern", "with a group", r"'\\d+'"),
    (lambda: osc.label_by_depth(stem="("), "stem", "a regular expression", "'('"),
    (lambda: osc.label_by_depth(head=["("]), "head", "a regular expression", "'('"),
    (
        lambda: osc.layerwise_multipliers(range(3), 0.0),
        "decay",
        "above 0 and at most 1",
        "0.0",
    ),
    (lambda: osc.layerwise_multipliers(range(3), 1.5), "decay", "at most 1", "1.5"),
    (lambda: osc.layerwise_multipliers(range(3), np.nan), "decay", "at most 1", "nan"),
    (
        lambda: osc.layerwise_multipliers(range(3), 0.5, min_multiplier=-0.1),
        "min_multiplier",
        "at least 0 and at most 1",
        "-0.1",
    ),
    (lambda: osc.layerwise_multipliers([], 0.5), "labels", "at least one label", "[]"),
    (lambda: osc.layerwise_multipliers(None, 0.5), "labels", "at least one", "None"),
    (
        lambda: osc.geometric_multipliers(range(3), 0.0),
        "lowest",
        "above 0",
        "0.0",
    ),
    (
        lambda: osc.geometric_multipliers(range(3), 2.0),
        "lowest",
        "at most `highest` (1.0)",
        "2.0",
    ),
    (
        lambda: osc.geometric_multipliers(range(3), None, -1.0),
        "highest",
        "above 0",
        "-1.0",
    ),
    (
        lambda: osc.scale_by_group({}, LABELS),
        "multipliers",
        "a dict of at least one label",
        "{}",
    ),
    (
        lambda: osc.scale_by_group({0: 1.0, 1: -2.0}, LABELS),
        "multipliers[1]",
        "finite and at least 0",
        "-2.0",
    ),
    (
        lambda: osc.scale_by_group({"a": np.inf}, LABELS),
        "multipliers['a']",
        "finite",
        "inf",
    ),
    (lambda: unfreeze({}), "thaw_steps", "a dict of at least one label", "{}"),
    (lambda: unfreeze({0: 1, 1: -3}), "thaw_steps[1]", "at least 0", "-3"),
    (lambda: unfreeze({0: 2**31}), "thaw_steps[0]", "at most 2147483647", "2147483648"),
    (lambda: fine_tune(0), "total_steps", "at least 1", "0"),
    (
        lambda: fine_tune(freeze_steps=10),
        "freeze_steps",
        "less than `total_steps` (10)",
        "10",
    ),
    (lambda: fine_tune(freeze_steps=-1), "freeze_steps", "at least 0", "-1"),
    (lambda: fine_tune(decay=0.0), "decay", "above 0 and at most 1", "0.0"),
    (lambda: fine_tune(min_multiplier=2.0), "min_multiplier", "at most 1", "2.0"),
    (lambda: fine_tune(peak=-0.1), "peak_learning_rate", "at least 0", "-0.1"),
    (
        lambda: fine_tune(init_learning_rate=0.2),
        "init_learning_rate",
        "at most `peak_learning_rate` (0.1)",
        "0.2",
    ),
    (lambda: fine_tune(max_momentum=1.0), "max_momentum", "less than 1", "1.0"),
    (lambda: fine_tune(weight_decay=-1.0), "weight_decay", "at least 0", "-1.0"),
    (
        lambda: fine_tune(weight_decay=-1.0, freeze_steps=3),
        "weight_decay",
        "at least 0",
        "-1.0",
    ),
    (
        lambda: fine_tune(mask="kernels", freeze_steps=3),
        "mask",
        "one of 'matrices'",
        "'kernels'",
    ),
    (
        lambda: fine_tune(freeze_steps=6, warmup_steps=4),
        "warmup_steps",
        "at least 0 and less than `total_steps - freeze_steps` (4)",
        "4",
    ),
    (
        lambda: osc.scale_by_learning_rate(0.1, cooldown_end=np.inf),
        "cooldown_end",
        "finite",
        "inf",
    ),
    (
        lambda: osc.scale_by_learning_rate(0.1, cooldown_shape="exponential"),
        "cooldown_end",
        'above 0 with shape="exponential"',
        "0.0",
    ),
    (
        lambda: osc.scale_by_learning_rate(
            0.0, cooldown_end=0.1, cooldown_shape="exponential"
        ),
        "learning_rate",
        "above 0",
        "0.0",
    ),
    (
        lambda: osc.scale_by_learning_rate(0.1, cooldown_shape="step"),
        "cooldown_shape",
        "one of 'linear'",
        "'step'",
    ),
    (lambda: osc.start_cooldown(COOLDOWN, 0), "cooldown_steps", "at least 1", "0"),
    (
        lambda: osc.start_cooldown(COOLDOWN, jnp.array([2, -1])),
        "cooldown_steps",
        "at least 1",
        "[ 2 -1]",
    ),
    (
        lambda: osc.start_cooldown(COOLDOWN, 2**31),
        "cooldown_steps",
        "at most 2147483647",
        "2147483648",
    ),
    (
        lambda: osc.start_cooldown(COOLDOWN, np.array([2**31])),
        "cooldown_steps",
        "at most 2147483647",
        "[2147483648]",
    ),
    (
        lambda: osc.start_cooldown(COOLDOWN, np.array([2, 3])),
        "cooldown_steps",
        "a single number, or of the shape () of the state's count",
        "shape (2,)",
    ),
    (
        lambda: osc.start_cooldown(optax.sgd(0.1, momentum=0.9).init(0.0), 3),
        "opt_state",
        "of an optimizer that ends with this package's `scale_by_learning_rate`",
        "TraceState, EmptyState",
    ),
    (lambda: osc.start_cooldown({}, 3), "opt_state", "of an optimizer", "a dict"),
    (lambda: osc.average_params(0.0), "weight", "above 0 and at most 1", "0.0"),
    (lambda: osc.average_params(1.5), "weight", "above 0 and at most 1", "1.5"),
    (lambda: osc.ema_params(1.0), "decay", "at least 0 and less than 1", "1.0"),
    (lambda: osc.ema_params(0.9, warmup=0), "warmup", "above 0 and at most 1", "0"),
    (lambda: osc.ema_params(0.9, start_step=-1), "start_step", "at least 0", "-1"),
    (lambda: osc.swa_params(-1), "start_step", "at least 0", "-1"),
    (lambda: osc.swa_params(0, every=0), "every", "at least 1", "0"),
    (lambda: osc.lawa_params(0), "window", "at least 1", "0"),
    (lambda: osc.lawa_params(2, every=0), "every", "at least 1", "0"),
    (lambda: osc.average_params(power=-1), "power", "at least 0", "-1"),
    (
        lambda: osc.average_params(),
        "weight",
        "given, or `power`",
        "weight=None and power=None",
    ),
    (
        lambda: osc.average_params(0.1, power=1),
        "weight",
        "given, or `power` in its place",
        "weight=0.1 and power=1",
    ),
    (
        lambda: osc.ema_params(0.9, accumulator_dtype=int),
        "accumulator_dtype",
        "a floating-point type",
        "<class 'int'>",
    ),
]


@pytest.mark.parametrize(
    ("call", "argument", "rule", "value"),
    BAD_VALUES,
    ids=[f"{k}-{row[1]}" for k, row in enumerate(BAD_VALUES)],
)
def test_a_bad_value_is_named_with_its_rule(call, argument, rule, value):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    message = str(error.value)
    assert message.startswith(f"`{argument}`")
    assert rule in message
    assert value in message.rsplit(", got ")[-1]


BAD_TYPES = [
    (lambda: osc.onecycle_schedule(1.0, 10.0), "total_steps", "10.0 of type float"),
    (lambda: osc.onecycle_schedule(1.0, True), "total_steps", "bool"),
    (lambda: osc.onecycle_schedule(1.0, "10"), "total_steps", "str"),
    (lambda: osc.onecycle_schedule(1.0, 10, warmup_steps=0.3), "warmup_steps", "0.3"),
    (lambda: osc.onecycle_schedule("1.0", 10), "peak_value", "str"),
    (lambda: osc.onecycle_schedule(None, 10), "peak_value", "NoneType"),
    (lambda: osc.onecycle_schedule([1.0], 10), "peak_value", "list"),
    (lambda: osc.onecycle_schedule(True, 10), "peak_value", "bool"),
    (lambda: osc.onecycle_schedule(1.0, 10, shape=3), "shape", "int"),
    (lambda: osc.phase_schedule(0.0, [7]), "phases[0]", "int"),
    (lambda: osc.phase_schedule(0.0, [(1.5, 0.0)]), "phases[0].steps", "float"),
    (lambda: osc.scale_by_learning_rate("fast"), "learning_rate", "str"),
    (lambda: osc.scheduled_trace(None), "decay", "NoneType"),
    (lambda: osc.onecycle_adamw(0.1, 10, weight_decay="x"), "weight_decay", "str"),
    (lambda: run(step_fn=3), "step_fn", "int"),
    (lambda: run(step_fn=lambda s, r, b: s), "step_fn", "float32"),
    (lambda: run(step_fn=lambda s, r, b: (s, {"loss": 1.0})), "step_fn", "dict"),
    (lambda: run(step_fn=lambda s, r, b: (s, None)), "step_fn", "NoneType"),
    (lambda: run(step_fn=lambda s, r, b: (s, (1.0, {}))), "step_fn", "tuple"),
    (lambda: run(smoothing=np.ones(2) / 2), "smoothing", "array"),
    (lambda: run(num_steps=10.0), "num_steps", "float"),
    (lambda: run(batches=3), "batches", "int"),
    (lambda: osc.suggest_learning_rate([1.0]), "result", "float"),
    (lambda: osc.suggest_learning_rate(1.0), "result", "float"),
    (lambda: osc.suggest_interval(1.0), "results", "float"),
    (lambda: osc.suggest_interval([1.0, 2.0]), "results", "float"),
    (lambda: run(eval_fn=1.0), "eval_fn", "float"),
    (lambda: run(eval_fn=lambda s: None), "eval_fn", "NoneType"),
    (lambda: suggest(method=3), "method", "int"),
    (lambda: osc.plotting.plot_schedule(0.1, 10), "dials", "float"),
    (lambda: osc.plotting.plot_range_test(0.1), "result", "float"),
    (lambda: osc.label_by_path(["ab"]), "rules", "'ab'"),
    (lambda: osc.label_by_path([(3, 0)]), "rules", "int"),
    (lambda: osc.label_by_path([("a", 0)], unmatched_rules=None), "unmatched", "None"),
    (lambda: osc.label_by_depth(3), "pattern", "int"),
    (lambda: osc.label_by_depth(stem=[3]), "stem", "int"),
    (lambda: osc.label_by_depth(final_norm=1), "final_norm", "int"),
    (lambda: osc.layerwise_multipliers(range(3), "x"), "decay", "str"),
    (lambda: osc.layerwise_multipliers(range(3), None), "decay", "NoneType"),
    (lambda: osc.layerwise_multipliers(range(3), np.ones(2)), "decay", "array"),
    (lambda: osc.layerwise_multipliers(len, 0.5), "labels", "function"),
    (lambda: osc.geometric_multipliers(range(3), "x"), "lowest", "str"),
    (lambda: osc.geometric_multipliers(range(3), 0.1, None), "highest", "NoneType"),
    (lambda: osc.geometric_multipliers(range(3), np.ones(2)), "lowest", "array"),
    (lambda: osc.scale_by_group([1.0], LABELS), "multipliers", "[1.0]"),
    (lambda: osc.scale_by_group({0: "x"}, LABELS), "multipliers[0]", "str"),
    (lambda: osc.scale_by_group({0: None}, LABELS), "multipliers[0]", "NoneType"),
    (lambda: osc.gradual_unfreezing(3, {0: 1}, LABELS), "inner", "int"),
    (lambda: unfreeze([1]), "thaw_steps", "list"),
    (lambda: unfreeze({0: 1.5}), "thaw_steps[0]", "float"),
    (lambda: unfreeze({0: True}), "thaw_steps[0]", "bool"),
    (lambda: unfreeze({0: "1"}), "thaw_steps[0]", "str"),
    (lambda: fine_tune(10.0), "total_steps", "float"),
    (lambda: fine_tune(freeze_steps=2.0), "freeze_steps", "float"),
    (lambda: fine_tune(freeze_steps=None), "freeze_steps", "NoneType"),
    (lambda: fine_tune(decay="x"), "decay", "str"),
    (
        lambda: osc.scale_by_learning_rate(0.1, cooldown_end="x"),
        "cooldown_end",
        "str",
    ),
    (
        lambda: osc.scale_by_learning_rate(0.1, cooldown_shape=1),
        "cooldown_shape",
        "int",
    ),
    (lambda: osc.start_cooldown(COOLDOWN, 3.0), "cooldown_steps", "float"),
    (lambda: osc.start_cooldown(COOLDOWN, True), "cooldown_steps", "bool"),
    (lambda: osc.start_cooldown(COOLDOWN, None), "cooldown_steps", "NoneType"),
    (lambda: osc.start_cooldown(COOLDOWN, np.ones(2)), "cooldown_steps", "float"),
    (
        lambda: jax.jit(osc.start_cooldown)(COOLDOWN, 3.0),
        "cooldown_steps",
        "float32",
    ),
    (lambda: osc.average_params("x"), "weight", "str"),
    (lambda: osc.ema_params(0.9, every=2.0), "every", "float"),
    (lambda: osc.ema_params(0.9, warmup="x"), "warmup", "str"),
    (lambda: osc.ema_params(0.9, name=3), "name", "int"),
    (lambda: osc.lawa_params(2, name=None), "name", "NoneType"),
    (lambda: osc.lawa_params(2.0), "window", "float"),
    (lambda: osc.average_params(power="x"), "power", "str"),
    (lambda: osc.sgd(None), "learning_rate", "NoneType"),
    (lambda: osc.sgd(0.1, None), "momentum", "NoneType"),
    (lambda: osc.sgd(0.1, weight_decay="x"), "weight_decay", "str"),
    (lambda: osc.adamw("x"), "learning_rate", "str"),
    (lambda: osc.adamw(0.1, eps=None), "eps", "NoneType"),
    (lambda: osc.add_decayed_weights(None), "weight_decay", "NoneType"),
    (lambda: osc.onecycle(0.1, 10.0), "total_steps", "float"),
    (
        lambda: osc.onecycle(0.1, 10, annihilation_steps=2.5),
        "annihilation_steps",
        "2.5",
    ),
    (
        lambda: osc.scale_by_learning_rate(0.1, multipliers=[1.0], param_labels=LABELS),
        "multipliers",
        "[1.0]",
    ),
]


@pytest.mark.parametrize(
    ("call", "argument", "kind"),
    BAD_TYPES,
    ids=[f"{k}-{row[1]}" for k, row in enumerate(BAD_TYPES)],
)
def test_the_wrong_kind_is_named(call, argument, kind):
    with pytest.raises(TypeError) as error:
        call()
    assert str(error.value).startswith(f"`{argument}")
    assert kind in str(error.value)


def test_a_traced_duration_says_what_to_do():
    with pytest.raises(TypeError, match=r"`total_steps`.*static_args"):
        jax.jit(lambda total: osc.onecycle_schedule(1.0, total)(0))(10)
    injected = optax.inject_hyperparams(osc.onecycle_sgd)
    with pytest.raises(TypeError, match=r"`total_steps`.*static_args"):
        jax.jit(injected(peak_learning_rate=0.1, total_steps=10).init)(jnp.ones(3))


def test_traced_values_are_never_refused():
    """Even bad ones: nothing may raise under jit."""
    value = jax.jit(
        lambda peak, low: osc.onecycle_schedule(peak, 10, init_value=low)(3)
    )(-1.0, 2.0)
    assert value == -1.0
