"""The convergence threshold: known on parabolas, and never made up."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_superconv as osc
from optax_superconv.finders import _runs

# On a parabola of curvature L an optimizer is stable up to this over L: 2 for gradient
# descent, 2 + 2b with a trace, (2 + 2b) / (1 + 2b) with Nesterov's, and
# (2 + 2b) / (1 - b) for Adam while its preconditioner stays as it is.
# The form of all steps below.
convergence_threshold = functools.partial(
    osc.convergence_threshold, pass_hyperparams=True
)


def between(low, high):
    return {"min_learning_rate": low, "max_learning_rate": high}


OPTIMIZERS = {
    "sgd": (optax.sgd, 2.0),
    "momentum": (lambda rate: optax.sgd(rate, momentum=0.9), 3.8),
    "nesterov": (lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True), 3.8 / 2.8),
    "adam": (lambda rate: optax.adam(rate, b1=0.9, b2=1 - 1e-7, eps=0.0), 38.0),
}


def frozen(opt_state):
    """Adam's preconditioner is held at 1, its bias corrections are over."""
    adam = opt_state[0]
    if not hasattr(adam, "nu"):
        return opt_state
    nu = jnp.ones_like(adam.nu)
    return (adam._replace(nu=nu, count=jnp.int32(2**30)), *opt_state[1:])


@functools.cache
def parabola_step(name):
    """A jitted step of an Optax optimizer; its batches are curvatures."""
    make = OPTIMIZERS[name][0]

    @jax.jit
    def step_fn(state, learning_rate, curvatures):
        w, opt_state = state
        loss, grad = jax.value_and_grad(lambda w: (curvatures * w**2).sum() / 2)(w)
        updates, opt_state = make(learning_rate).update(grad, opt_state, w)
        return (optax.apply_updates(w, updates), frozen(opt_state)), loss

    return step_fn


@jax.jit
def gd_step(w, learning_rate, batch):
    """Gradient descent with threshold 0.5, on curvatures 0.1, 1 and 4."""
    curvatures = jnp.array([0.1, 1.0, 4.0])
    loss, grad = jax.value_and_grad(lambda w: (curvatures * w**2).sum() / 2)(w)
    return w - learning_rate * grad, loss


def end_loss_step(end_of_rate):
    """Falls from 1 to an end loss that is known for each rate, at step 1."""

    @jax.jit
    def step_fn(step, learning_rate, batch):
        return step + 1, jnp.where(step == 0, 1.0, end_of_rate(learning_rate))

    return step_fn


def run(**options):
    options.setdefault("num_steps", 50)
    step_fn, state, batches = (
        options.pop(name, default)
        for name, default in (
            ("step_fn", gd_step),
            ("state", jnp.ones(3)),
            ("batches", [None]),
        )
    )
    return convergence_threshold(step_fn, state, batches, **options)


# --- the threshold --------------------------------------------------------------------


SPECTRA = {
    "10 from L/100, geometric": lambda top: np.geomspace(top / 100, top, 10),
    "50 from L/100, geometric": lambda top: np.geomspace(top / 100, top, 50),
    "50 from L/50, linear": lambda top: np.linspace(top / 50, top, 50),
    "20, one high": lambda top: np.append(np.full(19, top / 10), top),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("spectrum", "top", "num_steps"),
    [
        *((spectrum, 20.0, 100) for spectrum in SPECTRA),
        ("20, one high", 5.0, 500),
        *(
            pytest.param(spectrum, 5.0, 500, marks=pytest.mark.slow)
            for spectrum in [*SPECTRA][:-1]
        ),
    ],
)
def test_the_threshold_of_a_parabola_is_its_stability_limit(
    name, spectrum, top, num_steps
):
    curvatures = np.float32(SPECTRA[spectrum](top))
    w = np.float32(np.random.default_rng(len(curvatures)).normal(size=len(curvatures)))
    first = float((curvatures * np.float64(w) ** 2).sum() / 2)
    make, limit = OPTIMIZERS[name]
    for target_loss in (None, 0.01 * first):
        result = convergence_threshold(
            parabola_step(name),
            jax.device_put((w, frozen(make(0.1).init(w)))),
            [curvatures],
            num_steps=num_steps,
            target_loss=target_loss,
        )
        assert abs(result.threshold / (limit / top) - 1) < 0.05


@pytest.mark.parametrize("rtol", [0.3, 0.02, 1e-4])
def test_the_last_bracket_is_as_narrow_as_asked_and_was_run(rtol):
    result = run(rtol=rtol, num_steps=300)
    assert list(result.rates) == sorted(result.rates)
    last = int(np.flatnonzero(np.array(result.regimes) == "1")[-1])
    low, high = map(float, result.rates[[last, last + 1]])
    assert 1 < high / low <= 1 + rtol
    assert result.threshold == pytest.approx(np.sqrt(low * high))
    assert result.end_losses[last] <= result.target_loss
    assert not result.end_losses[last + 1] <= result.target_loss


@pytest.mark.parametrize("dies_at", [100.0, 1.8, 1.2])
def test_what_comes_before_fine_tuning_is_above_the_threshold_and_still_learns(dies_at):
    """One and a half times and up to twice, unless nothing is learned there."""

    def ends(rate):
        learned = jnp.where(rate < 1, 0.01, jnp.where(rate < dies_at, 0.5, 1.0))
        return jnp.where(jnp.abs(rate - 0.1) < 0.005, jnp.nan, learned)  # By bad luck.

    result = run(step_fn=end_loss_step(ends), state=jnp.int32(0), num_rates=100)
    low, high = result.band_before_fine_tuning
    assert low == result.threshold == pytest.approx(1, rel=0.02)
    dead = result.rates[(result.rates > low) & (np.array(result.regimes) == "3")]
    limit = min([*dead, np.inf])
    assert high == min(2 * low, limit)
    assert high == pytest.approx(min(2, dies_at), rel=0.16)  # A rung of the ladder.
    assert low < result.rate_before_fine_tuning <= 1.5 * low
    assert result.rate_before_fine_tuning < limit
    if dies_at > 1.6:
        assert result.rate_before_fine_tuning == 1.5 * low


def test_the_default_target_is_nine_tenths_of_the_way_from_the_first_loss():
    """A run that ends at 1e-3 converges, whatever another one ends at."""
    ends = lambda rate: jnp.where(rate < 1e-2, 1e-3, jnp.where(rate < 1, 1e-30, 2.0))  # noqa: E731
    result = run(step_fn=end_loss_step(ends), state=jnp.int32(0), rtol=1e-3)
    assert result.target_loss == pytest.approx(1 - 0.9)
    assert result.threshold == pytest.approx(1.0, rel=1e-3)
    assert set(result.regimes) == {"1", "3"}


def test_the_end_loss_is_the_mean_of_the_last_tenth():
    result = run(num_steps=57)
    expected = np.mean(result.losses[:, -5:], axis=1)
    np.testing.assert_array_equal(result.end_losses, np.where(
        np.isfinite(expected), expected, np.nan))  # fmt: skip
    assert np.isnan(result.end_losses[-1])


def test_the_losses_are_those_of_the_same_steps_run_bare():
    result = run(num_rates=5)
    for rate, losses in zip(result.rates, result.losses, strict=True):
        w, alone = jnp.ones(3), []
        for _ in range(50):
            w, loss = gd_step(w, rate, None)
            alone.append(float(loss))
        alone = np.array(alone)
        end = (
            int(np.argmin(np.isfinite(alone))) + 1 if not np.isfinite(alone[-1]) else 50
        )
        np.testing.assert_allclose(losses[:end], alone[:end], rtol=1e-6)
        assert np.isnan(losses[end:]).all()


# --- regimes --------------------------------------------------------------------------


def staircase(*levels):
    """End losses by decade of the rate, from 1e-5 on."""
    table = jnp.array(levels, jnp.float32)
    decade = lambda rate: jnp.floor(jnp.log10(rate) + 5 + 1e-3).astype(int)  # noqa: E731
    return end_loss_step(lambda rate: table[jnp.clip(decade(rate), 0, len(levels) - 1)])


def ladder_labels(result, num_rates):
    """The labels of the ladder alone, which is every rate that is a power of 10."""
    exponents = np.log10(result.rates.astype(np.float64))
    on = np.abs(exponents - np.round(exponents)) < 1e-6
    assert on.sum() == num_rates
    return [label for label, keep in zip(result.regimes, on, strict=True) if keep]


@pytest.mark.parametrize(
    ("levels", "labels", "threshold_decade"),
    [
        # Too slow below; learns without converging, and nothing, above.
        ([0.9, 0.3, 0.0, 0.0, 0.3, 0.6, 0.99], "s s 1 1 2 2 3", -1),
        ([0.9, 0.3, 0.0, 0.0, np.nan, np.inf, 0.99], "s s 1 1 3 3 3", -1),
        # One rate between that misses the target does not end the interval.
        ([0.9, 0.0, 0.3, 0.0, 0.0, 0.3, 2.0], "s 1 2 1 1 2 3", 0),
        ([0.9, 0.0, 0.3, 0.05, 0.05, 0.3, 2.0], "s 1 2 1 1 2 3", 0),
        # A rate that converges beyond two that do not is luck.
        ([0.9, 0.0, 0.0, 0.3, 0.3, 0.05, 2.0], "s 1 1 2 2 1 3", -2),
        # And so is one below.
        ([0.05, 0.3, 0.3, 0.0, 0.0, 0.3, 2.0], "1 s s 1 1 2 3", 0),
    ],
)
def test_regimes(levels, labels, threshold_decade):
    result = run(
        step_fn=staircase(*levels),
        state=jnp.int32(0),
        **between(1e-5, 10.0),
        num_rates=7,
        rtol=1e-3,
    )
    expected = ["too slow" if label == "s" else label for label in labels.split()]
    assert ladder_labels(result, 7) == expected
    # A decade of the stairs begins 1e-3 early.
    assert np.log10(result.threshold) == pytest.approx(threshold_decade, abs=2e-3)


def test_what_is_within_the_noise_of_the_first_loss_is_not_learned():
    """The lowest rate shows the noise: 0.2 here, so that 0.8 is no progress."""
    noise = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)

    def step_fn(size):
        @jax.jit
        def step(step, rate, batch):
            end = jnp.where(rate < 3e-5, 1.0, jnp.where(rate < 1, 0.0, 0.8))
            wobble = jnp.where(rate < 3e-5, size * noise[step], 0.0)
            return step + 1, jnp.where(step == 0, 1.0, end + wobble)

        return step

    for size, label in ((0.01, "2"), (0.2, "3")):
        result = run(step_fn=step_fn(size), state=jnp.int32(0), num_rates=7)
        assert result.regimes[-1] == label
        assert result.regimes[0] == "too slow"


def test_noise_is_seen_apart_from_the_trend():
    rng = np.random.default_rng(0)
    losses = 5 - np.linspace(0, 3, 2000) + 0.1 * rng.normal(size=2000)
    assert _runs.noise(losses) == pytest.approx(0.1, rel=0.1)
    losses[1500:] = np.nan
    assert _runs.noise(losses) == pytest.approx(0.1, rel=0.1)


# --- the state and the batches --------------------------------------------------------


def test_every_run_sees_the_batches_from_their_beginning():
    seen = []

    def step_fn(state, rate, batch):
        step = state[0]
        if int(step) == 0:
            seen.append([])
        seen[-1].append(int(batch))
        loss = 1.0 if step == 0 or not 0.01 < rate < 0.5 else 0.0
        return (step + 1, rate), loss

    run(
        step_fn=step_fn,
        state=(0, np.float32(0)),
        batches=range(3),
        num_steps=5,
        num_rates=3,
        **between(1e-3, 1.0),
        rtol=0.5,
    )
    first, *seen = seen  # The first step is tried at the highest rate, too.
    assert first == [0]
    assert seen[0:2] == [[0], [0]]  # The ladder, in lockstep.
    assert seen[2] == [0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 1, 1, 1]
    assert len(seen) > 4
    assert all(batches == [0, 1, 2, 0, 1] for batches in seen[3:])


def test_stacked_batches_start_again_as_well():
    x = np.float32(np.random.default_rng(0).normal(size=7))
    step_fn = jax.jit(
        lambda w, r, x: (w - r * (w - 0.01 * x), 0.5 * (w - 0.01 * x) ** 2)
    )
    stacked, listed = (
        run(
            step_fn=step_fn,
            state=jnp.float32(1.0),
            batches=batches,
            stacked=batches is x,
            **between(1e-4, 10),
        )
        for batches in (x, list(x))
    )
    np.testing.assert_array_equal(stacked.losses, listed.losses)


def test_an_iterator_is_drawn_on():
    iterator = itertools.count()
    result = run(batches=iterator)
    num_bisections = len(result.rates) - 16
    assert num_bisections >= 5
    assert next(iterator) == 50 * (1 + num_bisections)


def test_an_iterator_that_runs_dry_says_after_how_many():
    with pytest.raises(ValueError, match=r"batches.*50 steps of.*ran dry after 20"):
        run(batches=iter(range(70)))


def test_a_rate_that_diverged_is_trained_no_further():
    calls = itertools.count()

    def step_fn(step, rate, batch):
        next(calls)
        loss = 1.0 if step == 0 or rate < 1e-2 else 0.0
        return step + 1, np.nan if rate > 0.5 and step > 2 else loss

    result = run(
        step_fn=step_fn, state=0, num_steps=100, **between(1e-3, 1.0), num_rates=3,
        rtol=100.0,
    )  # fmt: skip
    assert result.regimes == ("too slow", "1", "3")
    assert next(calls) <= 100 + 100 + 3 + 16 + 2  # Two are tried at another rate.


def test_one_trace_and_the_state_survives_a_step_that_donates_it():
    traces = itertools.count()

    def step_fn(w, learning_rate, batch):
        next(traces)
        return gd_step(w, learning_rate, batch)

    state = jnp.ones(3)
    expected = run()
    result = run(step_fn=jax.jit(step_fn, donate_argnums=0), state=state)
    assert next(traces) == 1
    np.testing.assert_array_equal(state, np.ones(3))
    assert result.threshold == pytest.approx(expected.threshold)


def test_pytrees_and_nnx_models_are_states():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...])
    graphdef, params = nnx.split(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.float32)

    def loss_fn(params):
        return jnp.mean(nnx.merge(graphdef, params)(x) ** 2)

    @jax.jit
    def step_fn(params, learning_rate, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads), loss

    result = run(step_fn=step_fn, state=params, num_steps=200)
    inputs = np.c_[x, np.ones(16)]
    curvature = np.linalg.eigvalsh(2 * inputs.T @ inputs / 16)[-1]
    assert result.threshold == pytest.approx(2 / curvature, rel=0.05)
    np.testing.assert_array_equal(model.kernel[...], before)

    @nnx.jit
    def update(model, learning_rate):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
        old = nnx.state(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - learning_rate * g, old, grads))
        return loss

    in_place = run(
        step_fn=lambda model, rate, batch: (model, update(model, rate)),
        state=model,
        num_steps=200,
    )
    assert in_place.threshold == pytest.approx(result.threshold)
    np.testing.assert_array_equal(model.kernel[...], before)


# --- where there is none, and bad input -----------------------------------------------


def replaced(*levels):
    return {"step_fn": staircase(*levels), "state": jnp.int32(0), "num_rates": 7}


BAD_VALUES = [
    # options, argument, rule, value
    (between(1.0, 0.1), "max_learning_rate", "above `min_learning_rate` (1.0)", "0.1"),
    (between(1.0, 1.0), "max_learning_rate", "above `min_learning_rate` (1.0)", "1.0"),
    (between(0.0, 0.1), "min_learning_rate", "above 0", "0.0"),
    (between(-1.0, 0.1), "min_learning_rate", "above 0", "-1.0"),
    (between(1e-3, np.inf), "max_learning_rate", "above 0 and finite", "inf"),
    ({"num_steps": 1}, "num_steps", "at least 2", "1"),
    ({"num_rates": 2}, "num_rates", "at least 3", "2"),
    ({"rtol": 0.0}, "rtol", "at least 1e-6", "0.0"),
    ({"rtol": -0.1}, "rtol", "at least 1e-6", "-0.1"),
    ({"rtol": np.inf}, "rtol", "finite", "inf"),
    ({"target_loss": np.nan}, "target_loss", "finite", "nan"),
    ({"target_loss": 2.55}, "target_loss", "below the first loss (2.55)", "2.55"),
    ({"batches": []}, "batches", "at least one batch", "none"),
    ({"step_fn": lambda w, r, b: (w, w)}, "step_fn", "a real scalar", "(3,)"),
    ({"step_fn": lambda w, r, b: (w[:2], w.sum())}, "step_fn", "float32[3]", "[2]"),
    (
        {"step_fn": lambda w, r, b: ([w], w.sum())},
        "step_fn",
        "like the one",
        "nothing",
    ),
    (
        {"step_fn": lambda w, r, b: (w, np.nan)},
        "step_fn",
        "finite before any update",
        "nan",
    ),
    # Too small all, too large all, and neither.
    (between(1e-5, 0.1), "max_learning_rate", "raise it", "0.1, which reaches"),
    (
        between(1e-8, 1e-7) | {"target_loss": 1.0},
        "target_loss",
        "raise `max_learning_rate`",
        "at rate 1e-07",
    ),
    (
        between(10.0, 1e3),
        "min_learning_rate",
        "lower it",
        "losses that cease to be finite at every rate from 10 up",
    ),
    (
        between(0.6, 0.8) | {"num_steps": 4},
        "min_learning_rate",
        "lower it",
        "noise",
    ),
    (
        replaced(1.0, 1.0, 1.0, 1.0, 1.0, 0.9999999),
        "max_learning_rate",
        "raise it",
        "no more than noise",
    ),
    (
        replaced(1.0, 1.0, 1.0, 1.5, 2.0, 2.0),
        "num_steps",
        "leave the plateau at the start",
        "of 1 (at",
    ),
    (
        replaced(1.5, 1.5, 2.0, 2.0, 2.0, 2.0),
        "min_learning_rate",
        "low enough to learn at: lower it",
        "of 1.5 (at",
    ),
    (
        replaced(0.3, 0.5, 0.7, 0.7, 0.7, 0.7),
        "min_learning_rate",
        "not the best: lower it",
        "higher",
    ),
    (
        replaced(0.9, 0.5, 0.3, 0.1, 0.0, 0.0),
        "max_learning_rate",
        "raise it",
        "reaches",
    ),
    (
        {"target_loss": 0.1} | replaced(0.9, 0.5, 0.2, 0.7, 0.7, 0.7),
        "target_loss",
        "raise `num_steps`",
        "0.2 (at rate 0.001), never 0.1",
    ),
    (
        {"target_loss": 0.1} | replaced(0.2, 0.5, 0.7, 0.7, 0.7, 0.7),
        "target_loss",
        "lower `min_learning_rate`",
        "0.2 (at rate 1e-05), never 0.1",
    ),
]


@pytest.mark.parametrize(
    ("options", "argument", "rule", "value"),
    BAD_VALUES,
    ids=[f"{k}-{row[1]}" for k, row in enumerate(BAD_VALUES)],
)
def test_a_bad_value_is_named_with_its_rule(options, argument, rule, value):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run(**options)
    message = str(error.value)
    assert message.startswith(f"`{argument}`")
    assert rule in re.split(", got (?=[a-z0-9(-])", message)[0]
    assert value in message.rsplit(", got ")[-1]


@pytest.mark.parametrize(
    ("options", "argument", "kind"),
    [
        (between("a", 1.0), "min_learning_rate", "str"),
        (between(1.0, None), "max_learning_rate", "NoneType"),
        ({"num_steps": 10.0}, "num_steps", "float"),
        ({"num_rates": None}, "num_rates", "NoneType"),
        ({"rtol": "x"}, "rtol", "str"),
        ({"target_loss": "x"}, "target_loss", "str"),
        ({"step_fn": 3}, "step_fn", "int"),
        ({"step_fn": lambda w, r, b: w}, "step_fn", "ArrayImpl"),
        ({"step_fn": lambda w, r, b: (w, None)}, "step_fn", "NoneType"),
        ({"batches": 3}, "batches", "int"),
    ],
)
def test_the_wrong_kind_is_named(options, argument, kind):
    with pytest.raises(TypeError) as error:
        run(**options)
    assert str(error.value).startswith(f"`{argument}")
    assert kind in str(error.value)


def test_a_lowest_rate_may_converge_where_the_target_is_given():
    result = run(**replaced(0.0, 0.05, 0.5, 0.5, 0.5, 0.5), target_loss=0.1)
    assert result.regimes[0] == "1"
    assert result.threshold == pytest.approx(1e-3, rel=0.02)


def test_a_lowest_rate_may_be_the_best_by_a_hair():
    result = run(**replaced(0.0, 1e-4, 0.5, 0.5, 0.5, 0.5))
    assert result.threshold == pytest.approx(1e-3, rel=0.02)


def test_progress_counts_the_steps(capsys):
    run(progress=True)
    assert "100%" in capsys.readouterr().out


def test_an_easy_or_hard_first_batch_does_not_set_the_target():
    """Three standard deviations; gradient descent on a curvature of 1."""
    targets = []
    for first in (-0.15, 0.15):
        noise = 0.05 * np.random.default_rng(0).normal(size=200)
        noise[0] = first
        noise = jnp.asarray(noise, jnp.float32)

        @jax.jit
        def step_fn(state, rate, batch, noise=noise):
            w, step = state
            return (w - rate * w, step + 1), w**2 / 2 + noise[step]

        result = convergence_threshold(
            step_fn, (jnp.ones(()), jnp.int32(0)), [None], num_steps=200
        )
        assert result.threshold == pytest.approx(2.0, rel=0.05)
        targets.append(result.target_loss)
    assert targets == pytest.approx([0.05, 0.05], abs=0.03)
    assert abs(targets[0] - targets[1]) < 0.005  # A tenth of the first losses: 0.03.


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_is_nothing_learned(seed):
    noise = jnp.asarray(np.random.default_rng(seed).normal(size=100), jnp.float32)

    @jax.jit
    def step_fn(step, rate, batch):
        return step + 1, 1 + 0.1 * noise[step] + jnp.where(rate > 1, 1.0, 0.0)

    with pytest.raises(ValueError, match="no more than noise"):
        run(step_fn=step_fn, state=jnp.int32(0), num_steps=100)
