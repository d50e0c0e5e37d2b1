"""Late decay: what the contract of every schedule in test_schedules.py leaves open."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import evaluate

import optax_superconv as osc

SHAPES = ("linear", "cosine", "1-sqrt", "exponential")
INT32_MAX = np.iinfo(np.int32).max


def test_one_minus_sqrt_by_the_fraction_of_the_cooldown():
    """Hägele et al. (2024): the values that their formula gives, to four digits."""
    expected = [1.0, 0.6838, 0.5, 0.2929, 0.1340, 0.0]
    counts = [80, 82, 85, 90, 95, 100]
    late = osc.warmup_stable_decay_schedule(1.0, 100, decay_steps=20)
    cooled = osc.with_cooldown(1.0, 100, 20)
    for schedule in (late, cooled):
        np.testing.assert_allclose(evaluate(schedule, counts), expected, atol=5e-5)


def check_late_decay(shape, *runs):
    """Of ``(total, warmup, decay, counts)``, all in one program."""
    peak, end = np.float32(0.3), np.float32(1e-6)

    @jax.jit
    def evaluate_all(counts):
        return [
            osc.warmup_stable_decay_schedule(
                peak,
                total,
                warmup_steps=warmup,
                decay_steps=decay,
                end_value=end,
                shape=shape,
            )(steps)
            for (total, warmup, decay, _), steps in zip(runs, counts, strict=True)
        ]

    curves = evaluate_all([counts for *_, counts in runs])
    for (total, warmup, decay, counts), values in zip(runs, curves, strict=True):
        values, case = np.asarray(values), (total, warmup, decay)
        stable = (counts >= warmup) & (counts <= total - decay)
        assert np.all(np.isfinite(values)), case
        assert values.min() >= 0, case
        assert np.all(values[stable] == peak), case
        assert np.all(values[counts >= total] == end), case
        assert np.all(np.diff(values[counts <= warmup]) >= 0), case
        assert np.all(np.diff(values[counts >= warmup]) <= 0), case
        if warmup:
            assert values[0] == 0, case
        if total <= 1000:  # Beyond, neighbours are closer than float32 can tell.
            assert np.all(values[~stable] < peak), case


@pytest.mark.parametrize("shape", SHAPES)
def test_late_decay_of_every_short_length(shape):
    runs = [
        (total, warmup, decay, np.arange(total + 3))
        for total in (1, 2, 3, 4)
        for warmup in range(total)
        for decay in range(1, total - warmup + 1)
    ]
    check_late_decay(shape, *runs)


@pytest.mark.parametrize("shape", SHAPES)
def test_late_decay_of_long_length(shape):
    runs = []
    for total in (100, 1000, 10**8, INT32_MAX):
        for warmup, decay in ((0, 1), (total // 10, total // 5), (1, total - 1)):
            near = (k + np.arange(-9, 10) for k in (0, warmup, total - decay, total))
            counts = np.unique(np.clip(np.concatenate([*near]), 0, INT32_MAX))
            runs.append((total, warmup, decay, counts))
    check_late_decay(shape, *runs)


@pytest.mark.parametrize(
    ("total", "warmup", "decay"),
    [(100, 0, 20), (13, 0, 3), (2, 0, 1), (1, 0, 1), (10, 9, 1), (100, 85, 15)],
)
def test_default_decay_is_a_fifth_of_the_run_or_what_the_warmup_leaves(
    total, warmup, decay
):
    default = osc.warmup_stable_decay_schedule(1.0, total, warmup_steps=warmup)
    stated = osc.warmup_stable_decay_schedule(
        1.0, total, warmup_steps=warmup, decay_steps=decay
    )
    counts = np.arange(total + 1)
    np.testing.assert_array_equal(evaluate(default, counts), evaluate(stated, counts))


def test_the_warmup_is_linear_whatever_the_shape_of_the_decay():
    schedule = osc.warmup_stable_decay_schedule(
        1.0, 20, warmup_steps=4, end_value=0.1, shape="exponential"
    )
    np.testing.assert_allclose(evaluate(schedule, np.arange(5)), np.arange(5) / 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_cooldown_of_a_constant_is_a_late_decay_without_warmup(shape):
    counts = np.arange(25)
    late = osc.warmup_stable_decay_schedule(
        0.3, 20, decay_steps=7, end_value=0.01, shape=shape
    )
    cooled = osc.with_cooldown(0.3, 20, 7, end_value=0.01, shape=shape)
    np.testing.assert_array_equal(evaluate(cooled, counts), evaluate(late, counts))


def test_the_schedule_is_asked_once_and_never_beyond_the_cooldown():
    asked = []

    def inner(count):
        asked.append(np.asarray(count))
        return np.where(asked[-1] <= 12, 1.0, np.nan)

    schedule = osc.with_cooldown(inner, 20, 8)
    assert np.all(np.isfinite(evaluate(schedule, [0, 12, 13, 20, 99])))
    (counts,) = asked
    assert counts[:5].tolist() == [0, 12, 12, 12, 12]


def test_before_its_cooldown_a_schedule_is_itself():
    counts = np.arange(-3, 41)
    cycle = osc.onecycle_schedule(0.3, 60)
    cooled = osc.with_cooldown(cycle, 60, 20)
    np.testing.assert_array_equal(evaluate(cooled, counts), evaluate(cycle, counts))


def test_cooldowns_of_one_run_share_what_comes_before():
    counts = np.arange(200)
    linear = optax.linear_schedule(1.0, 0.5, 200)
    for total in (50, 100, 200):
        cooled = osc.with_cooldown(linear, total, 20, shape="linear")
        expected = np.interp(
            counts, [0, total - 20, total], [1.0, 1 - (total - 20) / 400, 0.0]
        )
        values = evaluate(cooled, counts)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


def test_a_momentum_may_rise_to_its_end():
    momentum = osc.onecycle_momentum_schedule(40, warmup_steps=10)
    schedule = osc.with_cooldown(momentum, 20, 10, end_value=0.95, shape="linear")
    np.testing.assert_allclose(
        evaluate(schedule, [10, 15, 20, 30]), [0.85, 0.9, 0.95, 0.95], rtol=1e-6
    )


def test_ends_of_several_cooldowns_broadcast():
    ends = np.array([0.0, 0.1, 2.0])
    schedule = osc.with_cooldown(1.0, 20, 8, end_value=ends, shape="linear")
    values = jax.jit(schedule)(np.array([[0], [16], [20]]))
    np.testing.assert_allclose(values, [[1.0] * 3, (1 + ends) / 2, ends], rtol=1e-6)


@pytest.mark.parametrize("value", [1, 0.5, np.float16(0.5), jnp.bfloat16(0.5)])
@pytest.mark.parametrize("as_schedule", [False, True])
def test_a_cooldown_is_float32_under_strict_promotion(value, as_schedule, strict):
    inner = (lambda count: value) if as_schedule else value
    schedule = osc.with_cooldown(inner, 20, 8, end_value=jnp.bfloat16(0.1))
    for count in (jnp.int8(3), jnp.uint32(15), jnp.float16(15.5)):
        assert jax.eval_shape(schedule, count).dtype == jnp.float32


def test_a_cooldown_of_a_float64_schedule_is_float64(x64):
    schedule = osc.with_cooldown(
        lambda t: jnp.float64(1 / 3), 20, 8, end_value=np.float32(0)
    )
    assert jax.jit(schedule)(3) == np.float64(1 / 3)


@pytest.mark.parametrize("count", [2**31, np.int64(2**40), np.array([2**33])])
def test_a_count_that_int32_does_not_hold_is_past_the_end(count):
    schedule = osc.with_cooldown(1.0, 10, 5, end_value=0.1)
    assert jax.jit(lambda: schedule(count))() == np.float32(0.1)


def test_a_fractional_count_is_between_its_neighbours():
    schedule = osc.with_cooldown(lambda t: 1 - t / 100, 20, 10, shape="linear")
    values = jax.jit(schedule)(np.array([4.5, 12.5]))
    np.testing.assert_allclose(values, [0.955, 0.9 * 0.75], rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_tail_of_a_cooldown_keeps_its_relative_precision(shape):
    counts = np.arange(10**6 - 300, 10**6)
    schedule = osc.with_cooldown(1.0, 10**6, 10**5, end_value=1e-9, shape=shape)
    with jax.enable_x64(True):
        exact = jax.jit(schedule)(counts)
    assert exact.dtype == jnp.float64
    np.testing.assert_allclose(evaluate(schedule, counts), exact, rtol=1e-5)


def test_cooldown_moves_in_single_ulps_above_2_to_the_24():
    schedule = jax.jit(osc.with_cooldown(1.0, 10**8, 6 * 10**7, shape="linear"))
    values = np.asarray(schedule(7 * 10**7 + jnp.arange(1000)))
    steps = np.diff(values)
    assert np.all((steps == 0) | (-steps <= 2 * np.spacing(values[1:])))
    assert len(np.unique(values)) > 100


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
def test_exponential_cooldown_of_a_traced_schedule(transform):
    def value(rate):
        inner = lambda count: rate * jnp.exp2(-count / 10.0)  # noqa: E731
        return osc.with_cooldown(
            inner, 20, 10, end_value=0.125, shape="exponential"
        )(15)  # fmt: skip

    rate = np.ones(3) if transform is jax.vmap else 1.0
    # The geometric mean of rate / 2 and 1 / 8 is 1 / 4, and its slope 1 / 8.
    expected = 0.125 if transform is jax.grad else 0.25
    np.testing.assert_allclose(jax.jit(transform(value))(rate), expected, rtol=1e-6)


def test_exponential_cooldown_from_zero_is_found_under_jit():
    def value(count):
        inner = lambda t: jnp.maximum(5.0 - t, 0)  # noqa: E731
        return osc.with_cooldown(inner, 10, 5, end_value=0.1, shape="exponential")(
            count
        )

    with pytest.raises(ValueError, match=r"^`schedule\(5\)` must be above 0"):
        jax.jit(value)(3)


BAD = [
    # call, argument, rule, value
    (
        lambda: osc.warmup_stable_decay_schedule(1.0, 0),
        ("total_steps", "at least 1", "0"),
    ),
    (
        lambda: osc.warmup_stable_decay_schedule(1.0, 10, warmup_steps=10),
        ("warmup_steps", "at least 0 and less than `total_steps` (10)", "10"),
    ),
    (
        lambda: osc.warmup_stable_decay_schedule(1.0, 10, decay_steps=0),
        ("decay_steps", "at least 1", "0"),
    ),
    (
        lambda: osc.warmup_stable_decay_schedule(
            1.0, 10, warmup_steps=4, decay_steps=7
        ),
        (
            "warmup_steps + decay_steps",
            "at least 0 and at most `total_steps` (10)",
            "11",
        ),
    ),
    (
        lambda: osc.warmup_stable_decay_schedule(-1.0, 10),
        ("peak_value", "finite and at least 0", "-1.0"),
    ),
    (
        lambda: osc.warmup_stable_decay_schedule(1.0, 10, init_value=2.0),
        ("init_value", "at most `peak_value` (1.0)", "2.0"),
    ),
    (
        lambda: osc.warmup_stable_decay_schedule(1.0, 10, end_value=2.0),
        ("end_value", "at most `peak_value` (1.0)", "2.0"),
    ),
    (
        lambda: osc.warmup_stable_decay_schedule(1.0, 10, shape="exponential"),
        ("end_value", "above 0", "0.0"),
    ),
    (
        lambda: osc.warmup_stable_decay_schedule(1.0, 10, shape="sqrt"),
        ("shape", "one of 'linear', 'cosine', '1-sqrt', 'exponential'", "'sqrt'"),
    ),
    (
        lambda: osc.with_cooldown(1.0, 0, 1),
        ("total_steps", "at least 1", "0"),
    ),
    (
        lambda: osc.with_cooldown(1.0, 10, 0),
        ("cooldown_steps", "at least 1", "0"),
    ),
    (
        lambda: osc.with_cooldown(1.0, 10, 11),
        ("cooldown_steps", "at least 1 and at most `total_steps` (10)", "11"),
    ),
    (
        lambda: osc.with_cooldown(np.inf, 10, 5),
        ("schedule", "finite", "inf"),
    ),
    (
        lambda: osc.with_cooldown(1.0, 10, 5, end_value=np.nan),
        ("end_value", "finite", "nan"),
    ),
    (
        lambda: osc.with_cooldown(1.0, 10, 5, shape="sqrt"),
        ("shape", "one of 'linear', 'cosine', '1-sqrt', 'exponential'", "'sqrt'"),
    ),
    (
        lambda: osc.with_cooldown(1.0, 10, 5, shape="exponential"),
        ("end_value", "above 0", "0.0"),
    ),
    (
        lambda: osc.with_cooldown(
            lambda t: 5.0 - t, 10, 5, end_value=0.1, shape="exponential"
        ),
        ("schedule(5)", "above 0", "0.0"),
    ),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_a_bad_value_is_named_with_its_rule(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    argument, rule, value = words
    message = str(error.value)
    assert message.startswith(f"`{argument}` must be {rule}")
    assert message.endswith(f"got {value}.")


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: osc.with_cooldown("cosine", 10, 5), "schedule"),
        (lambda: osc.with_cooldown(1.0, 10, 0.2), "cooldown_steps"),
        (lambda: osc.with_cooldown(1.0, 10.0, 5), "total_steps"),
        (lambda: osc.with_cooldown(1.0, 10, 5, end_value=None), "end_value"),
        (
            lambda: osc.warmup_stable_decay_schedule(1.0, 10, decay_steps=0.2),
            "decay_steps",
        ),
        (lambda: osc.warmup_stable_decay_schedule(None, 10), "peak_value"),
        (
            lambda: jax.jit(lambda n: osc.with_cooldown(1.0, 10, n)(3))(5),
            "cooldown_steps",
        ),
    ],
)
def test_a_bad_type_is_named(call, argument):
    with pytest.raises(TypeError, match=f"^`{argument}` must be"):
        call()
