"""The range test and its suggestions."""

import collections
import contextlib
import dataclasses
import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_superconv as osc

# The form of most steps below.
range_test = functools.partial(osc.range_test, pass_hyperparams=True)
ZERO = np.float32(0)


def echo(state, learning_rate, loss):
    """A step that loses its batch; its state is the rate."""
    return learning_rate, loss


def run(losses, **options):
    losses = list(np.float32(losses))
    return range_test(echo, ZERO, losses, num_steps=len(losses), **options)


@jax.jit
def quadratic_step(w, learning_rate, batch):
    loss, grad = jax.value_and_grad(lambda w: jnp.mean((w - batch) ** 2))(w)
    return w - learning_rate * grad, loss


# --- the ladder and the loop ----------------------------------------------------------


@pytest.mark.parametrize("num_steps", [2, 3, 16, 17, 100])
def test_ladder_is_geometric_and_hits_both_ends(num_steps):
    seen = []

    def step_fn(state, learning_rate, batch):
        assert learning_rate.shape == ()
        assert learning_rate.dtype == jnp.float32
        assert isinstance(learning_rate, jax.Array)
        seen.append(float(learning_rate))
        return learning_rate, jnp.float32(1.0)

    result = range_test(
        step_fn,
        ZERO,
        [None],
        min_learning_rate=1e-5,
        max_learning_rate=3.0,
        num_steps=num_steps,
    )
    expected = 1e-5 * (3.0 / 1e-5) ** (np.arange(num_steps) / (num_steps - 1))
    np.testing.assert_allclose(result.learning_rates, expected, rtol=1e-6)
    again, *seen = seen  # The first step is tried at the highest rate, too.
    assert again == result.learning_rates[-1]
    np.testing.assert_array_equal(result.learning_rates, np.float32(seen))
    assert result.learning_rates[0] == np.float32(1e-5)
    assert result.learning_rates[-1] == np.float32(3.0)


def test_losses_are_those_of_the_same_steps_run_bare():
    w, losses = jnp.zeros(()), []
    for rate in np.geomspace(1e-3, 0.5, 40, dtype=np.float32):
        w, loss = quadratic_step(w, rate, jnp.ones(3))
        losses.append(loss)
    result = range_test(
        quadratic_step,
        jnp.zeros(()),
        [jnp.ones(3)],
        min_learning_rate=1e-3,
        max_learning_rate=0.5,
        num_steps=40,
    )
    np.testing.assert_allclose(result.losses, np.stack(losses), rtol=1e-6)
    assert not result.diverged
    for array in (result.learning_rates, result.losses, result.smoothed_losses):
        assert isinstance(array, np.ndarray)


@pytest.mark.parametrize("smoothing", [0.0, 0.9, 0.98])
def test_smoothing_is_debiased(smoothing):
    losses = np.random.default_rng(0).normal(size=50) + 5
    result = run(losses, smoothing=smoothing)
    expected = reference.debiased_average(np.float32(losses), smoothing)
    np.testing.assert_allclose(result.smoothed_losses, expected, rtol=1e-6)


@pytest.mark.parametrize("level", [-3.0, 0.0, 0.7, 1e20])
def test_a_constant_loss_smooths_to_itself(level):
    result = run(np.full(100, level))
    np.testing.assert_allclose(result.smoothed_losses, np.float32(level), rtol=1e-12)
    assert not result.diverged


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [1, 7, 8, 15, 16, 31, 99])
def test_stops_at_the_first_loss_that_is_not_finite(bad, step):
    losses = np.ones(100)
    losses[step:] = bad
    result = run(losses)
    assert result.diverged
    assert len(result.losses) == len(result.learning_rates) == step + 1
    assert np.all(np.isfinite(result.losses[:-1]))
    assert not np.isfinite(result.losses[-1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    offset=st.sampled_from([-50.0, -1.0, 0.0, 2.0]),
    factor=st.floats(1.1, 6.0),
    patience=st.integers(1, 15),
    smoothing=st.sampled_from([0.0, 0.5, 0.98]),
)
def test_stops_where_the_rule_says(seed, offset, factor, patience, smoothing):
    rng = np.random.default_rng(seed)
    losses = np.float32(offset + np.cumsum(rng.normal(size=100)))
    result = run(
        losses, divergence_factor=factor, patience=patience, smoothing=smoothing
    )
    stop = reference.divergence_step(np.float64(losses), smoothing, factor, patience)
    assert result.diverged == (stop is not None)
    assert len(result.losses) == (stop or 100)


@pytest.mark.parametrize("start", [2.3, 0.0, -5.0])
def test_a_catapult_is_not_divergence(start):
    losses = start - np.linspace(0, 1, 100)
    losses[50:55] += 100.0
    assert not run(losses, smoothing=0.0, patience=10).diverged
    losses[50:65] += 100.0
    assert run(losses, smoothing=0.0, patience=10).diverged


def test_two_catapults_do_not_add_up():
    losses = 2.3 - np.linspace(0, 1, 100)
    losses[20:26] += 100.0
    losses[60:66] += 100.0  # 12 steps too high, never more than 6 in a row.
    assert not run(losses, smoothing=0.0, patience=10).diverged


def test_looks_at_the_losses_at_least_every_sixteen_steps():
    for bad in range(1, 40):
        calls = itertools.count()

        def step_fn(state, learning_rate, batch, bad=bad, calls=calls):
            return learning_rate, jnp.float32(np.nan if next(calls) > bad else 1.0)

        range_test(step_fn, ZERO, [None])
        assert next(calls) - (bad + 2) < 16


def test_does_not_wait_for_the_device_at_every_step():
    """A loss is looked at when at least eight later steps have been dispatched."""
    lags, dispatched = [], itertools.count(1)

    class Loss(np.float32):
        def __float__(self):
            lags.append(calls[-1] - (len(lags) + 1))
            return 1.0

    calls = []

    def step_fn(state, learning_rate, batch):
        calls.append(next(dispatched))
        return learning_rate, Loss(1.0)

    range_test(step_fn, ZERO, [None], num_steps=64)
    assert len(lags) == 1 + 64  # The first loss is looked at once more.
    assert min(lags[1:49]) >= 8


def held_out(state):
    return 2.0 * jnp.sum(state)


def test_held_out_losses_are_taken_after_every_update():
    rates = np.geomspace(1e-3, 0.1, 20)
    expected, w = [], 3.0
    for rate in rates:
        w -= rate * 2 * (w - 1.0)
        expected.append(2 * w)
    options = {"min_learning_rate": 1e-3, "max_learning_rate": 0.1, "num_steps": 20}
    result = range_test(
        quadratic_step, jnp.full((), 3.0), [jnp.ones(1)], eval_fn=held_out, **options
    )
    np.testing.assert_allclose(result.eval_losses, expected, rtol=1e-5)
    assert result.losses[0] == 4.0
    bare = range_test(quadratic_step, jnp.full((), 3.0), [jnp.ones(1)], **options)
    assert bare.eval_losses is None


def test_held_out_losses_end_where_the_losses_do():
    result = range_test(
        quadratic_step,
        jnp.full((), 3.0),
        [jnp.ones(1)],
        max_learning_rate=1e4,
        eval_fn=held_out,
        patience=2,
    )
    assert result.diverged
    assert len(result.eval_losses) == len(result.losses) < 100


def test_a_ladder_of_thousands_is_applied_rung_by_rung():
    """Its values are put where the state is in blocks."""
    tx = osc.sgd(0.1)

    def step_fn(state, batch):
        w, opt_state = state
        updates, opt_state = tx.update(jnp.ones(()), opt_state, w)
        rate = osc.read_hyperparams(opt_state)["learning_rate"]
        return (w + updates, opt_state), rate

    w = jnp.zeros(())
    found = osc.range_test(
        jax.jit(step_fn), (w, tx.init(w)), [None], num_steps=2100, divergence_factor=1e9
    )
    np.testing.assert_array_equal(found.losses, found.learning_rates)
    assert len(found.losses) == 2100


# --- the caller's things --------------------------------------------------------------


def test_the_state_survives_a_step_that_donates_it():
    donating = jax.jit(
        lambda s, lr, x: (jax.tree.map(lambda w: w - lr * x, s), s["w"].sum()),
        donate_argnums=0,
    )
    state = {"w": jnp.ones(4), "n": np.ones(2), "none": None}
    range_test(donating, state, [1.0], num_steps=10)
    np.testing.assert_array_equal(state["w"], np.ones(4))
    np.testing.assert_array_equal(state["n"], np.ones(2))


def test_the_state_survives_a_step_that_writes_into_numpy():
    def step_fn(state, learning_rate, batch):
        state += np.asarray(learning_rate)
        return state, jnp.float32(1.0)

    state = np.zeros(2)
    range_test(step_fn, state, [None], num_steps=5)
    np.testing.assert_array_equal(state, 0)


def test_random_keys_and_static_leaves_may_be_in_the_state():
    def step_fn(state, learning_rate, batch):
        key, name, _ = state
        key, sub = jax.random.split(key)
        return (key, name, learning_rate), jax.random.uniform(sub)

    state = jax.random.key(0), "name", ZERO
    first = range_test(step_fn, state, [None], num_steps=20)
    again = range_test(step_fn, state, [None], num_steps=20)
    np.testing.assert_array_equal(first.losses, again.losses)


def test_the_state_stays_where_it_is_and_nothing_is_compiled_again():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    for state in (jnp.zeros(8), jax.device_put(jnp.zeros(8), sharding)):
        step = jax.jit(lambda s, lr, b: (s - lr, s.sum()))
        step(state, jnp.float32(1.0), 1.0)
        range_test(step, state, [1.0], num_steps=20)
        assert step._cache_size() == 1


def test_a_weakly_typed_state_is_traced_once():
    traces = itertools.count()

    @jax.jit
    def step_fn(w, learning_rate, batch):
        next(traces)
        return w - learning_rate, w * 1.0

    state = jnp.asarray(0.5)
    assert state.weak_type
    range_test(step_fn, state, np.zeros((2, 1)), num_steps=5, stacked=True)
    assert next(traces) == 1


def test_nnx_model_and_optimizer_survive():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    graphdef, params = nnx.split(model)

    @jax.jit
    def step_fn(params, learning_rate, x):
        def loss_fn(params):
            return jnp.mean(nnx.merge(graphdef, params)(x) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads), loss

    result = range_test(step_fn, params, [jnp.ones((4, 2))])
    assert result.losses[0] > result.losses.min()
    jax.tree.map(
        np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model))
    )


def test_nnx_objects_that_change_in_place_survive():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.trace(0.9), wrt=nnx.Param)
    before = np.asarray(model.kernel[...])

    @nnx.jit
    def step(model, optimizer, learning_rate, x):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
        optimizer.update(model, jax.tree.map(lambda g: -learning_rate * g, grads))
        return loss

    def step_fn(state, learning_rate, x):
        return state, step(*state, learning_rate, x)

    result = range_test(step_fn, (model, optimizer), [jnp.ones((4, 2))])
    assert result.losses.min() < 0.5 * result.losses[0]
    np.testing.assert_array_equal(model.kernel[...], before)


class Trainer(nnx.Module):
    """Shares the model that it is given."""

    def __init__(self, model):
        self.model = model


def test_nnx_objects_that_share_a_variable_go_on_sharing_it():
    def start():
        model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        return model, Trainer(model)

    @nnx.jit
    def step(state, learning_rate, x):
        model, trainer = state
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
        params = nnx.state(trainer.model)
        nnx.update(
            trainer.model,
            jax.tree.map(lambda p, g: p - learning_rate * g, params, grads),
        )
        return loss

    def step_fn(state, learning_rate, x):
        return state, step(state, learning_rate, x)

    rates = np.geomspace(1e-3, 0.1, 20, dtype=np.float32)
    state = start()
    expected = [float(step(state, rate, jnp.ones((4, 2)))) for rate in rates]
    state = start()
    before = np.asarray(state[0].kernel[...])
    result = range_test(
        step_fn,
        state,
        [jnp.ones((4, 2))],
        min_learning_rate=1e-3,
        max_learning_rate=0.1,
        num_steps=20,
    )
    np.testing.assert_allclose(result.losses, expected, rtol=1e-5)
    assert result.losses[-1] < result.losses[0]
    np.testing.assert_array_equal(state[0].kernel[...], before)


def test_equinox_models_are_states():
    model = eqx.nn.Linear(2, 1, key=jax.random.key(0))

    @eqx.filter_jit
    def step_fn(model, learning_rate, x):
        loss, grads = eqx.filter_value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
        return eqx.apply_updates(
            model, jax.tree.map(lambda g: -learning_rate * g, grads)
        ), loss

    result = range_test(step_fn, model, [jnp.ones(2)])
    assert result.losses.min() < 0.5 * result.losses[0]


# --- batches --------------------------------------------------------------------------


def seen_batches(batches, num_steps, **options):
    seen = []

    def step_fn(state, learning_rate, batch):
        seen.append(batch)
        return learning_rate, jnp.float32(1.0)

    range_test(step_fn, ZERO, batches, num_steps=num_steps, **options)
    return seen[1:]  # The first step is tried at the highest rate, too.


def test_a_sequence_starts_again_at_its_end():
    assert seen_batches([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert seen_batches(range(3), 5) == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    "stacked",
    [
        np.arange(6.0).reshape(3, 2),
        {"x": np.arange(6.0).reshape(3, 2)},
        (np.arange(6.0).reshape(3, 2), jnp.arange(3)[:, None]),
        collections.namedtuple("Pair", "x")(np.ones((3, 2))),
    ],
    ids=lambda stacked: type(stacked).__name__,
)
def test_stacked_batches_are_taken_one_by_one(stacked):
    for k, batch in enumerate(seen_batches(stacked, 7, stacked=True)):
        jax.tree.map(
            lambda leaf, whole, k=k: np.testing.assert_array_equal(leaf, whole[k % 3]),
            batch,
            stacked,
        )


def test_a_tuple_of_batches_is_a_sequence():
    batches = ((np.ones(2), np.zeros(2)), (np.zeros(2), np.ones(2)))
    seen = seen_batches(batches, 3)
    assert [batch[0][0] for batch in seen] == [1.0, 0.0, 1.0]


def test_an_iterator_is_consumed_and_no_further_than_needed():
    iterator = iter(range(100))
    assert seen_batches(iterator, 7) == list(range(7))
    assert next(iterator) == 7


def test_a_generator_can_be_used_on_afterwards():
    generator = (k for k in range(100))
    assert seen_batches(generator, 7) == list(range(7))
    assert list(generator) == list(range(7, 100))


def test_an_iterator_that_runs_dry_says_after_how_many():
    with pytest.raises(ValueError, match=r"batches.*100.*ran dry after 37"):
        seen_batches(iter(range(37)), 100)


def test_an_iterator_that_runs_dry_after_divergence_is_no_error():
    result = range_test(echo, ZERO, iter([1.0, np.nan, np.nan]))
    assert len(result.losses) == 2


# --- suggestions ----------------------------------------------------------------------

RATES = np.geomspace(1e-7, 10, 100)


def falling(x):
    """The noiseless curve: falls by 1.8 around 10**-2.5 and explodes near 1."""
    return 2.3 - 1.8 / (1 + np.exp(-2 * (x + 2.5))) + 0.02 * np.exp(4 * x)


def as_result(losses, rates=RATES, diverged=False):
    rates = np.float32(rates[: len(losses)])
    return osc.RangeTestResult(
        rates, np.asarray(losses), np.asarray(losses), diverged, optimizer="adamw"
    )


METHODS = ("knee", "halfway", "steepest", "minimum", "middle", "divergence")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shift", [-10.0, 0.0, 10.0])
def test_suggestions_on_a_known_curve(scale, shift):
    """Whatever the units of the loss, and below 0 as well."""
    x = np.log10(RATES)
    result = as_result(scale * (falling(x) + shift), diverged=True)
    fine = np.linspace(-7, 1, 100_001)
    lowest = fine[falling(fine).argmin()]
    before = fine[fine < lowest]

    def fallen(fraction):
        level = falling(-7) + fraction * (falling(lowest) - falling(-7))
        return before[falling(before) > level][-1]

    known = {
        "knee": fallen(0.9),
        "halfway": fallen(0.5),
        "steepest": -2.5,
        "minimum": lowest - 1,
        "divergence": fine[np.flatnonzero(falling(fine) <= falling(-7))][-1],
    }
    known["middle"] = (known["minimum"] + known["divergence"]) / 2
    for method in METHODS:
        suggested = osc.suggest_learning_rate(result, method=method)
        assert abs(np.log10(suggested) - known[method]) < 0.25, method


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1, 0.2])
def test_the_default_is_steady_under_noise(noise):
    """5 to 95 % over 200 seeds within a factor of 2, in each of 5 families of seeds."""
    x = np.log10(RATES)
    for family in range(5):
        suggested = []
        for seed in range(200):
            rng = np.random.default_rng([family, seed])
            noisy = falling(x) + noise * rng.normal(size=100)
            suggested.append(osc.suggest_learning_rate(as_result(noisy)))
        low, median, high = np.percentile(suggested, [5, 50, 95])
        assert high / low <= 2
        # Between a tenth of the noiseless fall and its end.
        assert 4e-4 < median < 0.6


def test_a_suggestion_does_not_depend_on_the_running_average():
    x = np.log10(RATES)
    suggestions = {
        osc.suggest_learning_rate(
            run(falling(x), smoothing=smoothing, min_learning_rate=1e-7),
            method="knee",
        )
        for smoothing in (0.0, 0.9, 0.98)
    }
    assert len(suggestions) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_ignored(method, bad):
    x = np.log10(RATES)
    clean = falling(x)[:85]
    assert osc.suggest_learning_rate(
        as_result(np.append(clean, bad), diverged=True), method=method
    ) == osc.suggest_learning_rate(as_result(clean, diverged=True), method=method)


@pytest.mark.parametrize("method", METHODS[:4])
def test_an_explosion_does_not_reach_back(method):
    """Losses of 1e30 from 2 on move it by less than the kernel is wide."""
    x = np.log10(RATES)
    wild = np.where(x > 0.3, 1e30, falling(x))
    suggested, expected = (
        osc.suggest_learning_rate(as_result(losses), method=method)
        for losses in (wild, falling(x))
    )
    assert abs(np.log10(suggested / expected)) < 0.5


@pytest.mark.parametrize("method", METHODS[:4])
def test_a_curve_that_only_falls_has_a_suggestion(method):
    result = as_result(2.0 - np.linspace(0, 1, 100))
    assert RATES[0] < osc.suggest_learning_rate(result, method=method) <= RATES[-1]


def test_where_nothing_diverges_the_middle_takes_the_highest_rate():
    x = np.log10(RATES)
    falls = 2.0 - 1 / (1 + np.exp(-3 * (x + 2)))
    with pytest.raises(ValueError, match=r"diverged .*max_learning_rate"):
        osc.suggest_learning_rate(as_result(falls[:60]), method="middle")
    result = as_result(falls + 0.02 * np.maximum(x + 0.5, 0))
    minimum = osc.suggest_learning_rate(result, method="minimum")
    middle = osc.suggest_learning_rate(result, method="middle")
    assert middle == pytest.approx(np.sqrt(RATES[-1] * minimum), rel=0.25)
    with pytest.raises(ValueError, match=r"diverged .*max_learning_rate"):
        osc.suggest_learning_rate(result, method="divergence")


def test_the_middle_stays_below_rates_that_unlearn():
    """Back to chance from 0.1 on, without an explosion, wherever the ladder ends."""
    losses = np.interp(np.log10(RATES), [-4, -2, -1.2, -1], [2.3, 0.8, 0.8, 2.4])
    for num_rates in (82, 100):
        suggested = osc.suggest_learning_rate(
            as_result(losses[:num_rates]), method="middle"
        )
        assert 1e-3 < suggested < 2e-2


@pytest.mark.parametrize("diverged", [False, True])
def test_the_middle_refuses_a_ladder_that_begins_too_high(diverged):
    losses = np.full(200, 4.6)
    losses[:14] = np.linspace(2.3, 1.5, 14)
    rates = np.geomspace(1e-2, 10, 200)
    result = osc.RangeTestResult(rates, losses, losses, diverged, optimizer="sgd")
    with pytest.raises(ValueError, match="lower `min_learning_rate`"):
        osc.suggest_learning_rate(result)


def test_on_a_plateau_noise_does_not_move_the_middle():
    """Wherever on it the loss is lowest, even at the end of the ladder."""
    x = np.log10(RATES)
    falls = 2.0 - 0.6 * np.clip((x + 3) / 2, 0, 1)  # Level from a rate of 0.1 on.
    lowest, found = [], []
    for seed in range(30):
        noise = np.random.default_rng(seed).normal(size=len(x))
        result = as_result(falls + 0.03 * noise)
        lowest.append(osc.suggest_learning_rate(result, method="minimum"))
        found.append(osc.suggest_learning_rate(result, method="middle"))
    assert max(lowest) / min(lowest) > 10
    assert max(found) / min(found) < 2
    assert 0.15 < np.median(found) < 0.5


@pytest.mark.parametrize("method", METHODS[:-1])
@pytest.mark.parametrize(
    ("losses", "advice"),
    [
        (np.full(100, 2.3), "flat.*max_learning_rate"),
        (np.zeros(100), "flat.*max_learning_rate"),
        (np.linspace(1, 3, 100), "rises from the start.*min_learning_rate"),
        (np.geomspace(1, 1e6, 100), "rises from the start.*min_learning_rate"),
        (np.linspace(3, 1, 9), "10.*num_steps"),
        (np.append(np.linspace(3, 1, 9), [np.nan] * 20), "10.*not the rate's fault"),
        (np.full(30, np.nan), "10.*not the rate's fault"),
    ],
)
def test_a_curve_without_suggestion_says_what_to_change(method, losses, advice):
    with pytest.raises(ValueError, match=f"`result`.*{advice}"):
        osc.suggest_learning_rate(as_result(losses), method=method)


def test_noise_alone_is_flat():
    """At most 5 of 200 curves of pure noise pass for a fall."""
    passed = 0
    for seed in range(200):
        losses = 2.3 + 0.1 * np.random.default_rng(seed).normal(size=100)
        try:
            osc.suggest_learning_rate(as_result(losses))
            passed += 1
        except ValueError:
            pass
    assert passed <= 5


def test_divergence_is_seen_in_a_curve_that_settles_again():
    """An explosion to a dead network, too short for the running average."""
    x = np.log10(RATES)
    losses = np.where(x > 0, 2.4, falling(x))
    losses[(x > -0.2) & (x < 0.2)] = 30.0
    edge = osc.suggest_learning_rate(as_result(losses), method="divergence")
    assert edge < 10**-0.19
    assert edge > 0.5


def test_a_fall_of_four_times_the_noise_is_found():
    """In at least 190 of 200 curves."""
    x, found = np.log10(RATES), 0
    for seed in range(200):
        noise = 0.45 * np.random.default_rng(seed).normal(size=100)
        try:
            osc.suggest_learning_rate(as_result(falling(x) + noise))
            found += 1
        except ValueError:
            pass
    assert found >= 190


@pytest.mark.parametrize("method", METHODS[:-1])
def test_a_fall_that_begins_late_is_found_by_all(method):
    """Within half a decade of the explosion, in at least 90 of 100 curves."""
    rates = np.geomspace(1e-6, 10, 200)
    x, found = np.log10(rates), 0
    smooth = 1 - 0.3 / (1 + np.exp(-8 * (x + 0.8))) + np.where(x > -0.5, 5.0, 0.0)
    for seed in range(100):
        losses = smooth + 0.05 * np.random.default_rng(seed).normal(size=200)
        with contextlib.suppress(ValueError):
            rate = osc.suggest_learning_rate(
                as_result(losses, rates, diverged=True), method=method
            )
            found += 1e-3 < rate < 10**-0.4
    assert found >= 90


def test_the_steepest_fall_is_sought_before_the_minimum():
    """Not where an exploded loss collapses again."""
    x = np.log10(RATES)
    losses = np.where(x > 0, 30.0, falling(x))
    losses[x > 0.5] = 0.9
    steepest = osc.suggest_learning_rate(as_result(losses), method="steepest")
    assert abs(np.log10(steepest) + 2.5) < 0.25


@pytest.mark.parametrize("jump", [1e3, np.geomspace(2, 1e6, 40)])
def test_divergence_is_seen_where_nothing_fell_before(jump):
    losses = np.append(np.ones(60), np.ones(40) * jump)
    edge = osc.suggest_learning_rate(
        as_result(losses, diverged=True), method="divergence"
    )
    assert edge == pytest.approx(RATES[59])


def test_divergence_from_the_start_asks_for_a_lower_rate():
    with pytest.raises(ValueError, match="rises from the start"):
        osc.suggest_learning_rate(
            as_result(np.linspace(1, 30, 60), diverged=True), method="divergence"
        )


def test_divergence_needs_divergence():
    with pytest.raises(ValueError, match="max_learning_rate"):
        osc.suggest_learning_rate(
            as_result(2.0 - np.linspace(0, 1, 100)), method="divergence"
        )


def test_divergence_is_read_where_it_happens_on_a_real_run():
    """Gradient descent on curvature 2 diverges above a rate of 1."""
    result = range_test(
        quadratic_step,
        jnp.full((), 100.0),
        [jnp.zeros(1)],
        max_learning_rate=1e4,
        patience=3,
    )
    assert result.diverged
    edge = osc.suggest_learning_rate(result, method="divergence")
    assert 1 < edge < 30


# --- repeats --------------------------------------------------------------------------


def repeats(count, noise=0.2):
    x = np.log10(RATES)
    rng = np.random.default_rng(1)
    return [as_result(falling(x) + noise * rng.normal(size=100)) for _ in range(count)]


@pytest.mark.parametrize("method", METHODS)
def test_several_results_give_the_median(method):
    results = [dataclasses.replace(r, diverged=True) for r in repeats(5)]
    single = [osc.suggest_learning_rate(r, method=method) for r in results]
    assert osc.suggest_learning_rate(results, method=method) == sorted(single)[2]
    assert osc.suggest_learning_rate(tuple(results), method=method) == np.median(single)


def test_the_interval_holds_its_level_of_the_suggestions():
    results = repeats(200)
    single = np.array([osc.suggest_learning_rate(r) for r in results])
    for level in (0.5, 0.9):
        low, high = osc.suggest_interval(results, level=level)
        inside = np.mean((low <= single) & (single <= high))
        assert abs(inside - level) <= 0.02
        assert abs(np.mean(single < low) - np.mean(single > high)) <= 0.02
    assert osc.suggest_interval(results, level=1.0) == pytest.approx(
        (single.min(), single.max())
    )


def test_repeats_that_diverge_at_once_are_counted_and_left_out():
    good = repeats(3)
    at_once = as_result([2.3, 50.0, np.inf], diverged=True)
    rising = as_result(np.geomspace(2.3, 1e6, 100), diverged=True)
    results = [at_once, *good, rising]
    with pytest.warns(UserWarning, match=r"2 of 5 range tests.*left out"):
        suggested = osc.suggest_learning_rate(results)
    assert suggested == osc.suggest_learning_rate(good)
    with pytest.warns(UserWarning, match=r"2 of 5 range tests"):
        interval = osc.suggest_interval(results)
    assert interval == osc.suggest_interval(good)


def test_held_out_losses_are_what_is_read():
    x = np.log10(RATES)
    held_out = falling(x + 1)
    result = dataclasses.replace(as_result(falling(x)), eval_losses=held_out)
    expected = osc.suggest_learning_rate(as_result(falling(x + 1)))
    assert osc.suggest_learning_rate(result) == expected
    assert expected < 0.5 * osc.suggest_learning_rate(as_result(falling(x)))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["n"]
)
@dataclasses.dataclass
class Counted:
    """An array beside a number that a program is compiled for."""

    w: jax.Array
    n: int = 0


CHANGES = {
    "static": (Counted(jnp.zeros(2)), lambda state: Counted(state.w, state.n + 1)),
    "container": ([jnp.zeros(2)], tuple),
    "empty": ({"w": jnp.zeros(2), "x": None}, lambda state: state | {"x": ()}),
}


@pytest.mark.parametrize(("state", "change"), CHANGES.values(), ids=CHANGES)
def test_a_step_that_would_compile_anew_is_refused(state, change):
    with pytest.raises(ValueError, match=r"^`step_fn` must be .* of structure"):
        range_test(lambda s, rate, b: (change(s), jnp.ones(())), state, [None])
