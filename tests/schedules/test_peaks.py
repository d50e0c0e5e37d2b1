"""A peak carried from one schedule to another: the bound, and what it is blind to."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import optax_superconv as osc

RNG = np.random.default_rng(0)
NOISE = RNG.lognormal(size=1000).tolist()
# Of the fraction t / T of the run, in Python alone.
SHAPES = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: reference.cosine(1.0, 0.0, x),
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "quadratic": lambda x: (1 - x) ** 2,
    "exponential": lambda x: 1e-3**x,
    "one cycle": lambda x: reference.onecycle(x, 1.0, 1.0, 0.3, 0.04, 0.0, 0, "cosine"),
    "warm-up": lambda x: min(1.0, 0.01 + 10 * x),
    "late linear": lambda x: min(1.0, 5 * (1 - x)),
    "late 1-sqrt": lambda x: 1 - math.sqrt(max(0.0, 5 * x - 4)),
    "to a tenth": lambda x: 1 - 0.9 * x,
    "a step down": lambda x: 1.0 if x < 0.5 else 0.1,
    "rising": lambda x: 0.1 + x,
    "waves": lambda x: 1.1 + math.sin(20 * x),
    "noise": lambda x: NOISE[int(999 * x)],
}
LENGTHS = (1, 2, 17, 300)


@functools.cache
def rates_of(name, total):
    return tuple(SHAPES[name](t / total) for t in range(total))


@functools.cache
def best_peak(name, total):
    rates = rates_of(name, total)
    return reference.best_factor(rates) * max(rates)


def python_schedule(name, total):
    return rates_of(name, total).__getitem__


# --- the bound ------------------------------------------------------------------------


@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_formula_of_the_paper(name, total):
    others = [*SHAPES]
    other = others[(others.index(name) + 1) % len(others)]
    for to_name, to_total in ((other, total), (other, 40), ("linear", total)):
        found = osc.transfer_peak(
            0.3,
            python_schedule(name, total),
            python_schedule(to_name, to_total),
            total,
            to_total_steps=to_total,
        )
        expected = 0.3 * best_peak(to_name, to_total) / best_peak(name, total)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


T = 3200


def kept(schedule):
    """What a schedule gives, without asking it at every step again."""
    return np.asarray(jax.vmap(schedule)(np.arange(T)), np.float64).__getitem__


LINEAR = kept(optax.linear_schedule(1.0, 0.0, T))


def late(fraction, shape):
    steps = round(fraction * T)
    return kept(
        osc.warmup_stable_decay_schedule(1.0, T, decay_steps=steps, shape=shape)
    )


@pytest.mark.parametrize(
    ("schedule", "ratio"),
    [
        (late(1, "1-sqrt"), 1.490),
        (kept(optax.cosine_decay_schedule(1.0, T)), 0.971),
        (kept(osc.onecycle_schedule(1.0, T)), 0.907),
        (kept(optax.cosine_onecycle_schedule(T, 1.0, 0.3)), 0.907),
        (late(0.2, "linear"), 0.514),
        (late(0.2, "1-sqrt"), 0.543),
        (late(0.4, "linear"), 0.607),
        (late(0.6, "linear"), 0.708),
        (late(0.6, "1-sqrt"), 0.825),
        (1.0, 0.322),
    ],
)
def test_peaks_relative_to_linear_decay(schedule, ratio):
    assert round(osc.transfer_peak(1.0, LINEAR, schedule, T), 3) == ratio


def test_a_constant_has_a_closed_form():
    for total in (1, 2, 100):
        harmonic = sum(1 / k for k in range(1, total))
        expected = 1 / math.sqrt(total * (1 + harmonic))
        found = osc.transfer_peak(1.0, 1.0, 1.0, 1, to_total_steps=total)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_linear_decay_four_times_as_long_has_half_the_peak():
    longer = optax.linear_schedule(1.0, 0.0, 4 * T)
    found = osc.transfer_peak(1.0, LINEAR, longer, T, to_total_steps=4 * T)
    np.testing.assert_allclose(found, 0.5, rtol=2e-3)


# --- one peak, many ways --------------------------------------------------------------


def test_the_same_schedule_keeps_its_peak():
    assert osc.transfer_peak(0.3, LINEAR, LINEAR, 100) == 0.3


def test_there_and_back_and_on_is_the_straight_way():
    a, b, c = LINEAR, osc.onecycle_schedule(1.0, 50), 1.0
    there = osc.transfer_peak(0.3, a, b, 100, to_total_steps=50)
    back = osc.transfer_peak(there, b, a, 50, to_total_steps=100)
    np.testing.assert_allclose(back, 0.3, rtol=1e-12)
    on = osc.transfer_peak(there, b, c, 50, to_total_steps=70)
    straight = osc.transfer_peak(0.3, a, c, 100, to_total_steps=70)
    np.testing.assert_allclose(on, straight, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-250, 1e-30, 7.0, 1e250])
def test_the_peaks_of_the_schedules_do_not_matter(scale):
    rates = python_schedule("one cycle", 50)
    found = [
        osc.transfer_peak(0.3, scaled, 1.0, 50)
        / osc.transfer_peak(0.3, 1.0, scaled, 50)
        for scaled in (rates, lambda t: scale * rates(t))
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)


@pytest.mark.parametrize("nothing", [0.0, 1e-16])
def test_steps_that_change_nothing_do_not_count(nothing):
    """At the start, between and at the end: zeros, or what rounding leaves of them."""
    rates = list(rates_of("cosine", 50))
    idle = [nothing] * 5
    spread = [*idle, *rates[:20], *idle, *rates[20:], *idle]
    found = osc.transfer_peak(
        0.3, rates.__getitem__, spread.__getitem__, 50, to_total_steps=65
    )
    np.testing.assert_allclose(found, 0.3, rtol=1e-12)


def test_a_long_schedule_of_python_is_kept_in_float64():
    """JAX could evaluate it as well, in float32."""
    total = 2000
    linear, quadratic = (
        lambda t, shape=SHAPES[name]: shape(t / total)
        for name in ("linear", "quadratic")
    )
    found = osc.transfer_peak(0.3, linear, quadratic, total)
    expected = 0.3 * best_peak("quadratic", total) / best_peak("linear", total)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_single_step_that_trains():
    assert osc.transfer_peak(0.3, lambda t: t == 2, 1.0, 5, to_total_steps=1) == 0.3


@pytest.mark.parametrize(
    "schedule",
    [
        lambda t: 1.0 if t < 20 else 0.5,
        lambda t: np.float32(1.0 if t < 20 else 0.5),
        lambda t: {True: 1, False: 0.5}[t < 20],
        lambda t: jnp.where(t < 20, 1.0, 0.5),
        lambda t: jax.lax.cond(t < 20, lambda: 1.0, lambda: 0.5),
        optax.join_schedules([lambda t: 1.0, lambda t: 0.5], [20]),
        osc.phase_schedule(1.0, [(20, 1.0), (0, 0.5)]),
    ],
)
@pytest.mark.parametrize("total", [50, 5000])
def test_schedules_of_any_kind(schedule, total):
    """Step by step, and all steps of a long run at once."""
    rates = [1.0] * 20 + [0.5] * (total - 20)
    expected = osc.transfer_peak(1.0, 1.0, rates.__getitem__, total)
    np.testing.assert_allclose(
        osc.transfer_peak(1.0, 1.0, schedule, total), expected, rtol=1e-12
    )


def test_a_peak_may_be_traced_and_a_schedule_may_not():
    cosine = optax.cosine_decay_schedule(1.0, 50)
    found = jax.jit(lambda peak: osc.transfer_peak(peak, LINEAR, cosine, 50))(0.3)
    expected = osc.transfer_peak(0.3, LINEAR, cosine, 50)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(TypeError, match=r"`from_schedule` .* known values, got traced"):
        jax.jit(
            lambda peak: osc.transfer_peak(
                1.0, optax.linear_schedule(peak, 0.0, 50), 1.0, 50
            )
        )(0.3)


# --- bad input ------------------------------------------------------------------------

BAD = [
    # arguments, what the message says
    ((0.0, 1.0, 1.0, 5), "`peak` must be above 0, got 0.0"),
    ((np.nan, 1.0, 1.0, 5), "`peak` must be above 0 and finite, got nan"),
    ((0.1, 0.0, 1.0, 5), "`from_schedule` must be above 0, got 0.0"),
    ((0.1, 1.0, np.inf, 5), "`to_schedule` must be above 0 and finite, got inf"),
    (
        (0.1, lambda t: 2 - t, 1.0, 5),
        "`from_schedule` must be finite and at least 0 at every step, "
        "got -1.0 at step 3",
    ),
    (
        (0.1, 1.0, lambda t: np.nan if t > 3 else 1.0, 5),
        "`to_schedule` must be finite and at least 0 at every step, got nan at step 4",
    ),
    (
        (0.1, 1.0, lambda t: 1 / (4 - jnp.float32(t)), 5),
        "`to_schedule` must be finite and at least 0 at every step, got inf at step 4",
    ),
    (
        (0.1, 1.0, lambda t: 0.0, 5),
        "`to_schedule` must be above 0 at some step of the run, got 0 at all",
    ),
    (
        (0.1, 1.0, lambda t: jnp.ones(2), 5),
        "`to_schedule` must be one number a step, got shape (5, 2)",
    ),
    ((0.1, 1.0, 1.0, 0), "`total_steps` must be at least 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_values_are_named_with_their_rule(arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        osc.transfer_peak(*arguments)
    assert str(error.value) == f"{message}."


def test_the_length_of_the_other_run_is_checked():
    with pytest.raises(ValueError, match="`to_total_steps` must be at least 1, got 0"):
        osc.transfer_peak(0.1, 1.0, 1.0, 5, to_total_steps=0)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("0.1", 1.0, 1.0, 5), "peak"),
        ((np.ones(2), 1.0, 1.0, 5), "peak"),
        ((0.1, "cosine", 1.0, 5), "from_schedule"),
        ((0.1, 1.0, None, 5), "to_schedule"),
        ((0.1, 1.0, 1.0, 5.0), "total_steps"),
    ],
)
def test_the_wrong_kind_is_named(arguments, name):
    with pytest.raises(TypeError, match=f"^`{name}` must be"):
        osc.transfer_peak(*arguments)
