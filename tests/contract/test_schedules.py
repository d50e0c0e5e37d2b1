"""The contract of every schedule."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import evaluate
from descriptors import SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import optax_superconv as osc

INT32_MAX = np.iinfo(np.int32).max
COUNTS = np.arange(60, dtype=np.int32)

# Rows that vary another row.
VARIANTS = {"onecycle-linear-6-14", "onecycle-linear-0-0", "onecycle-quadratic-6-0"}
VARIANTS |= {"pair-learning_rate", "pair-momentum", "cyclical-triangular2"}


def rows(cases):
    params = [
        pytest.param(case, marks=[pytest.mark.slow] * (case.name in VARIANTS))
        for case in cases
    ]
    return pytest.mark.parametrize("case", params, ids=lambda case: case.name)


every = rows(SCHEDULES)
ending = rows([case for case in SCHEDULES if case.total])


def reference_values(case, counts):
    return np.array([case.reference(int(count)) for count in counts])


@every
def test_matches_reference(case):
    values = jax.jit(case.make(case.value))(COUNTS)
    np.testing.assert_allclose(values, reference_values(case, COUNTS), rtol=1e-5)


@every
def test_matches_reference_in_float64(case, x64):
    values = case.make(case.value)(COUNTS)
    assert values.dtype == jnp.float64
    np.testing.assert_allclose(values, reference_values(case, COUNTS), rtol=1e-12)


@every
def test_eager_jit_vmap_and_scan_agree(case):
    schedule = case.make(case.value)
    eager = np.stack([schedule(int(count)) for count in COUNTS[:30]])
    scanned = jax.lax.scan(lambda carry, t: (carry, schedule(t)), 0, COUNTS)[1]
    for values in (jax.jit(schedule)(COUNTS), jax.vmap(schedule)(COUNTS), scanned):
        np.testing.assert_allclose(values[:30], eager, rtol=1e-6)


@every
def test_value_may_be_traced_batched_and_broadcast(case):
    values = case.value * np.float32([1.0, 0.9])

    @jax.jit
    def all_forms(values):
        alone = [case.make(value)(COUNTS) for value in values]
        batched = jax.vmap(lambda value: case.make(value)(COUNTS))(values)
        return jnp.stack(alone), batched, case.make(values)(COUNTS[:, None])

    alone, batched, grid = all_forms(values)
    assert grid.shape == (len(COUNTS), 2)
    np.testing.assert_allclose(batched, alone, rtol=1e-6)
    np.testing.assert_allclose(grid.T, alone, rtol=1e-6)
    for row, value in zip(alone, values, strict=True):
        np.testing.assert_allclose(row, case.make(value)(COUNTS), rtol=1e-6)


@every
def test_derivative_in_the_value_is_the_finite_difference(case, x64):
    counts = np.int32([count + d for count in case.knots for d in (-1, 0, 1)])
    counts = np.append(counts, np.int32(INT32_MAX))
    values = jax.jit(lambda value: case.make(value)(counts))
    step = 1e-6
    slopes = (values(case.value + step) - values(case.value - step)) / (2 * step)
    np.testing.assert_allclose(jax.jacfwd(values)(case.value), slopes, atol=1e-6)


@every
def test_derivative_in_the_count_is_finite(case):
    counts = np.float32(case.knots)
    slopes = jax.jit(jax.vmap(jax.grad(case.make(case.value))))(counts)
    assert np.all(np.isfinite(slopes))


@every
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32, jnp.uint32])
def test_any_integer_count_under_strict_promotion(case, dtype, strict):
    value = case.make(jnp.asarray(case.value, jnp.bfloat16))(jnp.asarray(7, dtype))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, case.reference(7), rtol=0.02)


@every
def test_one_trace_for_many_steps(case):
    chex.clear_trace_counter()
    schedule = jax.jit(chex.assert_max_traces(case.make(case.value), 1))
    for count in range(5):
        schedule(jnp.int32(count))


@every
def test_leaks_no_tracer(case):
    with jax.checking_leaks():
        jax.jit(lambda value, t: case.make(value)(t))(case.value, 3)


@ending
@pytest.mark.parametrize("past", [0, 1, 9, INT32_MAX])
def test_constant_after_the_end(case, past):
    schedule = case.make(case.value)
    count = min(case.total * (past + 1) if past < 10 else past, INT32_MAX)
    assert schedule(count) == schedule(case.total)


@ending
def test_constant_before_the_start(case):
    schedule = case.make(case.value)
    before = schedule(jnp.array([-1, -INT32_MAX - 1]))
    assert np.all(np.isfinite(before))
    assert before[0] == before[1]


@every
def test_exports_for_all_platforms(case):
    exported = export.export(
        jax.jit(case.make(case.value)), platforms=("cpu", "cuda", "tpu")
    )(jnp.int32(0))
    np.testing.assert_allclose(
        exported.call(jnp.int32(7)), case.reference(7), rtol=1e-5
    )


SHAPES = ("linear", "cosine", "1-sqrt", "exponential")
PEAK, END = np.float32(0.3), np.float32(1e-6)


def make_onecycle(total, warmup, annihilation, shape):
    return osc.onecycle_schedule(
        PEAK,
        total,
        warmup_steps=warmup,
        end_value=END,
        annihilation_steps=annihilation,
        shape=shape,
    )


def check_onecycles(lengths, shape, counts):
    """One program of all: ``lengths`` are of the run, warm-up and annihilation."""
    schedules = [make_onecycle(*each, shape) for each in lengths]
    rows = jax.jit(lambda counts: [schedule(counts) for schedule in schedules])(counts)
    for row, each in zip(rows, lengths, strict=True):
        check_onecycle(np.asarray(row), *each, counts)


def check_onecycle(values, total, warmup, annihilation, counts):
    up, down = values[counts <= warmup], values[counts >= warmup]
    assert np.all(np.isfinite(values))
    assert np.all(values >= END)
    assert values.max() == PEAK
    assert up[-1] == PEAK == down[0]
    assert np.all(values[counts >= total] == END)
    assert np.all(np.diff(up) >= 0)
    assert np.all(np.diff(down) <= 0)
    if total <= 1000:  # Beyond, neighbours are closer than float32 can tell.
        assert np.sum(values == PEAK) == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total", [1, 2, 3, 4, pytest.param(5, marks=pytest.mark.slow)])
def test_onecycle_of_every_short_length(total, shape):
    lengths = [
        (total, warmup, annihilation)
        for warmup in range(total)
        for annihilation in range(total - warmup + 1)
    ]
    check_onecycles(lengths, shape, np.arange(total + 3))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total", [100, 1000, 10**8])
def test_onecycle_of_long_length(total, shape):
    warmups = (0, 1, round(0.3 * total), total - 1)
    lengths = [
        (total, warmup, annihilation)
        for warmup in warmups
        for annihilation in (0, 1, total - warmup)
    ]
    near = [k + np.arange(-50, 51) for k in (*warmups, total // 2, total)]
    counts = np.concatenate([*near, np.linspace(0, total, 1001).astype(int)])
    check_onecycles(lengths, shape, np.unique(np.clip(counts, 0, None)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data(), total=st.integers(1, 2**31 - 1))
def test_onecycle_of_any_length(data, total):
    warmup = data.draw(st.integers(0, total - 1))
    annihilation = data.draw(st.integers(0, total - warmup))
    counts = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=1))
    counts = np.unique([*counts, 0, warmup, total])
    schedule = make_onecycle(total, warmup, annihilation, "cosine")
    check_onecycle(evaluate(schedule, counts), total, warmup, annihilation, counts)


@pytest.mark.parametrize("shape", SHAPES)
def test_tail_keeps_its_relative_precision(shape):
    total, end = 1000, 1e-9
    schedule = osc.onecycle_schedule(1.0, total, end_value=end, shape=shape)
    counts = np.arange(total - 300, total)
    with jax.enable_x64(True):
        exact = evaluate(
            osc.onecycle_schedule(1.0, total, end_value=end, shape=shape), counts
        )
    np.testing.assert_allclose(evaluate(schedule, counts), exact, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_head_keeps_its_relative_precision(shape):
    total = 10**6
    counts = np.arange(1, 300)

    def values():
        schedule = osc.onecycle_schedule(
            1.0, total, init_value=1e-9, end_value=1e-9, shape=shape
        )
        return evaluate(schedule, counts)

    with jax.enable_x64(True):
        exact = values()
    np.testing.assert_allclose(values(), exact, rtol=1e-5)


def test_rate_moves_in_single_ulps_above_2_to_the_24():
    total = 10**8
    schedule = jax.jit(osc.onecycle_schedule(1.0, total, shape="linear"))
    values = np.asarray(schedule(5 * 10**7 + jnp.arange(1000)))
    steps = np.diff(values)
    assert np.all((steps == 0) | (-steps <= 2 * np.spacing(values[1:])))
    assert len(np.unique(values)) > 100


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_momentum_is_the_mirror_image_of_the_rate(total, shape):
    counts = np.arange(total + 1)
    rate = osc.onecycle_schedule(1.0, total, init_value=0.0, end_value=0.0, shape=shape)
    momentum = osc.onecycle_momentum_schedule(total, shape=shape)
    rates, momenta = evaluate(rate, counts), evaluate(momentum, counts)
    np.testing.assert_allclose(momenta, 0.95 - 0.1 * rates, rtol=1e-6)


@pytest.mark.parametrize(("total", "warmup"), [(6, 2), (100, 30), (10**8, 3 * 10**7)])
def test_default_warmup_and_initial_value(total, warmup):
    schedule = osc.onecycle_schedule(1.0, total)
    assert schedule(warmup) == 1.0
    np.testing.assert_allclose(schedule(0), 1 / 25)


def test_a_cycle_may_start_or_end_at_its_peak():
    schedule = osc.onecycle_schedule(1.0, 10, init_value=1.0, end_value=1.0)
    np.testing.assert_array_equal(schedule(jnp.arange(12)), 1.0)


def test_mixed_dtypes_under_strict_promotion(strict):
    schedule = osc.onecycle_schedule(
        jnp.bfloat16(0.5), 1000, init_value=jnp.float32(0.1), end_value=np.float16(0.1)
    )
    assert schedule(jnp.int8(100)).dtype == jnp.float32


def test_a_small_integer_count_meets_a_large_total():
    schedule = osc.onecycle_schedule(1.0, 1000, shape="linear")
    assert schedule(jnp.int8(100)) == schedule(100)
    assert osc.cyclical_schedule(0.0, 1.0, 1000)(jnp.uint8(200)) == np.float32(0.2)


def test_without_phases_it_is_constant():
    np.testing.assert_array_equal(osc.phase_schedule(0.5, [])(jnp.arange(3)), [0.5] * 3)


@pytest.mark.parametrize("peak", [0.1, 0.3, 1 / 3, 0.7])
def test_a_cycle_hits_its_ends_exactly(peak):
    for base in (0.0, 0.05, 0.9):
        schedule = osc.cyclical_schedule(base, peak, 7)
        assert schedule(0) == schedule(14) == schedule(-3) == np.float32(base)
        assert schedule(7) == schedule(21) == np.float32(peak)


def test_small_peak_of_a_cycle_keeps_its_relative_precision():
    schedule = osc.cyclical_schedule(1.0, 0.0, 100_000)
    counts = np.arange(99_000, 100_000)
    np.testing.assert_allclose(schedule(counts), 1 - counts / 100_000, rtol=1e-5)


@pytest.mark.parametrize("count", [2**31, np.int64(2**40), np.array([2**33])])
def test_a_count_that_int32_does_not_hold_is_past_the_end(count):
    assert osc.onecycle_schedule(1.0, 10, end_value=0.1)(count) == np.float32(0.1)


def test_a_shape_may_close_over_a_traced_value():
    def value(power):
        return osc.onecycle_schedule(1.0, 10, warmup_steps=0, shape=lambda r: r**power)(
            5
        )

    np.testing.assert_allclose(jax.jit(value)(3.0), 0.5**3, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(value)(3.0), np.log(0.5) / 8, rtol=1e-5)
