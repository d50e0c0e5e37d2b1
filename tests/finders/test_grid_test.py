"""The grid of short runs: each member is the run that it would be alone."""

import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import ROOT
from flax import nnx

import optax_superconv as osc
from optax_superconv.finders import _members, _steps

DECAYS, MOMENTA = [0.0, 1e-4, 1e-3, 1e-2], [0.0, 0.5, 0.9]
GRID = {"weight_decay": DECAYS, "momentum": MOMENTA}
RATES = {"min_learning_rate": 1e-3, "max_learning_rate": 0.3}


# The form of most steps below.
grid_test = functools.partial(osc.grid_test, pass_hyperparams=True)
range_test = functools.partial(osc.range_test, pass_hyperparams=True)


def loss_fn(params, batch):
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["in"])
    return jnp.mean((hidden @ params["out"] - targets) ** 2)


def optimizer(weight_decay, momentum):
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(momentum))


def train_step(state, hyperparams, batch):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    tx = optimizer(hyperparams["weight_decay"], hyperparams["momentum"])
    updates, opt_state = tx.update(grads, opt_state, params)
    rate = hyperparams["learning_rate"]
    return (jax.tree.map(lambda p, u: p - rate * u, params, updates), opt_state), loss


def start():
    rng = np.random.default_rng(1)
    shapes = {"in": (3, 4), "out": (4, 2)}
    params = {k: jnp.float32(0.5 * rng.normal(size=s)) for k, s in shapes.items()}
    return params, optimizer(0.1, 0.9).init(params)


def make_batches(n=7):
    rng = np.random.default_rng(0)
    return [
        (np.float32(rng.normal(size=(8, 3))), np.float32(rng.normal(size=(8, 2))))
        for _ in range(n)
    ]


@functools.cache
def alone_in(mode, weight_decay, momentum):
    rates = np.full(30, np.float32(0.05))
    if mode == "range":
        rates = np.geomspace(1e-3, 0.3, 30, dtype=np.float32)
    return alone(rates, weight_decay, momentum)


alone_step = jax.jit(train_step)


def alone(rates, weight_decay, momentum):
    """The losses of one combination, by a plain loop."""
    hyperparams = {"weight_decay": weight_decay, "momentum": momentum}
    state, losses = start(), []
    for rate, batch in zip(rates, itertools.cycle(make_batches())):
        state, loss = alone_step(state, hyperparams | {"learning_rate": rate}, batch)
        losses.append(float(loss))
    return losses


@jax.jit
def parabola_step(w, hyperparams, batch):
    """Diverges where rate times curvature is above 2."""
    loss, grad = jax.value_and_grad(
        lambda w: 0.5 * jnp.sum(hyperparams["curvature"] * (w - batch) ** 2)
    )(w)
    return w - hyperparams.get("learning_rate", 0.5) * grad, loss


def run(**options):
    """A small grid test; 'curvature' is a hyperparameter like any other."""
    options.setdefault("grid", {"curvature": [1.0, 2.0, 3.0]})
    options.setdefault("num_steps", 30)
    step_fn = options.pop("step_fn", parabola_step)
    state = options.pop("state", jnp.ones(3))
    batches = options.pop("batches", [jnp.zeros(3)])
    return grid_test(step_fn, state, batches, **options)


# --- the members ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["range", "constant"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_a_grid_compiles_once_and_equals_the_single_runs(mode, vectorize):
    traces = itertools.count()

    @jax.jit
    def step_fn(state, hyperparams, batch):
        next(traces)
        assert all(h.shape == () for h in hyperparams.values())
        assert all(h.dtype == jnp.float32 for h in hyperparams.values())
        if mode == "constant":
            hyperparams = hyperparams | {"learning_rate": jnp.float32(0.05)}
        return train_step(state, hyperparams, batch)

    result = grid_test(
        step_fn,
        start(),
        make_batches(),
        grid=GRID,
        num_steps=30,
        mode=mode,
        vectorize=vectorize,
        **RATES,
    )
    assert next(traces) == 1
    assert result.losses.shape == (4, 3, 30)
    assert (result.learning_rates is None) == (mode == "constant")
    for i, j in itertools.product(range(4), range(3)):
        single = alone_in(mode, DECAYS[i], MOMENTA[j])
        np.testing.assert_allclose(result.losses[i, j], single, rtol=2e-5)


def test_a_plain_function_is_traced_once_too_under_vmap():
    traces = itertools.count()

    def step_fn(state, hyperparams, batch):
        next(traces)
        return train_step(state, hyperparams, batch)

    grid_test(step_fn, start(), make_batches(), grid=GRID, vectorize=True, num_steps=20)
    assert next(traces) == 1


def test_python_numbers_in_state_and_batch_are_traced_once_too_under_vmap():
    traces = itertools.count()

    @jax.jit
    def step_fn(state, hyperparams, batch):
        next(traces)
        w = state["w"] + hyperparams["learning_rate"]  # No Python number's type.
        return {"w": w, "n": 7}, hyperparams["a"] * batch * state["w"]

    result = run(
        step_fn=step_fn,
        state={"w": 1.0, "n": 0},
        batches=[2.0],
        grid={"a": [1.0, 2.0]},
        vectorize=True,
    )
    assert next(traces) == 1
    np.testing.assert_array_equal(result.losses[:, 0], [2.0, 4.0])


@pytest.mark.parametrize("vectorize", [True, False])
def test_learning_rate_may_be_an_axis_of_constant_runs(vectorize):
    rates = [0.01, 0.1, 0.3]
    result = grid_test(
        alone_step,
        start(),
        make_batches(),
        grid={"learning_rate": rates, "weight_decay": [0.01], "momentum": [0.5]},
        mode="constant",
        num_steps=12,
        vectorize=vectorize,
    )
    for k, rate in enumerate(rates):
        single = alone(np.full(12, np.float32(rate)), 0.01, 0.5)
        np.testing.assert_allclose(result.losses[k, 0, 0], single, rtol=2e-5)
    assert list(result.axes) == ["learning_rate", "weight_decay", "momentum"]


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("mode", ["range", "constant"])
def test_a_member_that_diverges_leaves_the_others_as_they_are(vectorize, mode):
    """To the last bit, whether its neighbour overflows or not."""
    results = [
        run(
            grid={"curvature": [1.0, other, 0.5]},
            vectorize=vectorize,
            mode=mode,
            num_steps=100,
            max_learning_rate=1.0,
        )
        for other in (0.7, 1e9)
    ]
    for k in (0, 2):
        np.testing.assert_array_equal(results[0].losses[k], results[1].losses[k])
    assert not results[0].diverged.any()
    assert results[1].diverged.tolist() == [False, True, False]
    losses = results[1].losses[1]
    end = int(np.flatnonzero(np.isnan(losses))[0])
    assert 2 < end < 99
    assert np.isnan(losses[end:]).all()
    assert np.isfinite(losses[: end - 1]).all()
    assert np.isfinite(results[1].scores[[0, 2]]).all()


def test_a_member_that_diverged_is_trained_no_further():
    ran = []

    def step_fn(step, hyperparams, batch):
        ran.append(float(hyperparams["a"]))
        bad = hyperparams["a"] > 1 and step > 2
        return step + 1, jnp.float32(np.nan if bad else 1.0)

    result = run(
        step_fn=step_fn,
        state=0,
        grid={"a": [1.0, 2.0]},
        mode="constant",
        num_steps=100,
        vectorize=False,
    )
    assert ran.count(1.0) == 100
    assert ran.count(2.0) <= 3 + 16
    assert result.diverged.tolist() == [False, True]
    assert result.scores.tolist() == [1.0, np.inf]


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_grid_ends_when_all_members_have_diverged(vectorize):
    iterator = itertools.count()

    def step_fn(state, hyperparams, batch):
        loss = jnp.where(batch > 20, jnp.nan, hyperparams["a"])
        return hyperparams["learning_rate"], loss

    options = {"step_fn": step_fn, "batches": iterator, "vectorize": vectorize}
    run(**options, state=np.float32(0), grid={"a": [1.0, 2.0]}, num_steps=100)
    assert 21 < next(iterator) <= 21 + 16


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_range_mode_curve_is_the_range_test_of_its_combination(vectorize):
    grid = {"curvature": [4.0, 30.0], "unused": [0.0]}
    result = run(grid=grid, vectorize=vectorize, num_steps=100, max_learning_rate=1e3)
    for k, curvature in enumerate(grid["curvature"]):
        expected = range_test(
            jax.jit(
                lambda w, rate, batch, c=curvature: parabola_step(
                    w, {"learning_rate": rate, "curvature": c}, batch
                )
            ),
            jnp.ones(3),
            [jnp.zeros(3)],
            max_learning_rate=1e3,
        )
        curve = result.curve(curvature=curvature, unused=0.0)
        assert isinstance(curve, osc.RangeTestResult)
        assert curve.diverged
        assert expected.diverged
        assert result.diverged[k, 0]
        n = len(expected.losses)
        np.testing.assert_allclose(curve.losses, expected.losses, rtol=1e-5)
        np.testing.assert_array_equal(curve.learning_rates, expected.learning_rates)
        np.testing.assert_allclose(
            curve.smoothed_losses, expected.smoothed_losses, rtol=1e-5
        )
        np.testing.assert_array_equal(result.losses[k, 0, :n], curve.losses)
        assert np.isnan(result.losses[k, 0, n:]).all()
        assert osc.suggest_learning_rate(curve, method="knee") == pytest.approx(
            osc.suggest_learning_rate(expected, method="knee"), rel=1e-4
        )


# --- the state and the batches --------------------------------------------------------


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_state_survives_a_step_that_donates_it(vectorize):
    donating = jax.jit(
        lambda s, h, x: (
            jax.tree.map(lambda w: w - h["a"] * h["learning_rate"] * x, s),
            s["w"].sum(),
        ),
        donate_argnums=0,
    )
    w = jnp.ones(4)
    state = {"w": w, "n": np.ones(2), "none": None}
    if vectorize:  # One by one, such a state cannot be donated, here or elsewhere.
        state["same"] = w
    run(
        step_fn=donating,
        state=state,
        batches=[jnp.float32(1.0)],
        grid={"a": [1.0, 2.0]},
        vectorize=vectorize,
    )
    np.testing.assert_array_equal(state["w"], np.ones(4))
    np.testing.assert_array_equal(state["n"], np.ones(2))


@pytest.mark.parametrize("vectorize", [True, False])
def test_random_keys_may_be_in_the_state(vectorize):
    def step_fn(key, hyperparams, batch):
        key, sub = jax.random.split(key)
        return key, hyperparams["a"] * jax.random.uniform(sub)

    result = run(
        step_fn=step_fn,
        state=jax.random.key(0),
        batches=[None],
        grid={"a": [1.0, 2.0]},
        vectorize=vectorize,
        mode="constant",
    )
    np.testing.assert_allclose(2 * result.losses[0], result.losses[1], rtol=1e-6)


@pytest.mark.parametrize("vectorize", [True, False])
def test_an_nnx_model_that_is_split(vectorize):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...])
    graphdef, params = nnx.split(model)

    @jax.jit
    def step_fn(params, hyperparams, x):
        def loss_fn(params):
            return jnp.mean(nnx.merge(graphdef, params)(x) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        rate = hyperparams["learning_rate"]
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), loss

    result = run(
        step_fn=step_fn,
        state=params,
        batches=[jnp.ones((4, 2))],
        grid={"learning_rate": [0.01, 0.1]},
        mode="constant",
        vectorize=vectorize,
    )
    assert result.best == {"learning_rate": 0.1}
    assert result.losses[1, -1] < 0.01 * result.losses[1, 0]
    np.testing.assert_array_equal(model.kernel[...], before)


def test_nnx_objects_that_change_in_place():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...])

    @nnx.jit
    def step(model, rate, x):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
        params = nnx.state(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - rate * g, params, grads))
        return loss

    def step_fn(model, hyperparams, x):
        return model, step(model, hyperparams["learning_rate"], x)

    result = run(
        step_fn=step_fn,
        state=model,
        batches=[jnp.ones((4, 2))],
        grid={"learning_rate": [0.01, 0.1]},
        mode="constant",
    )
    assert result.best == {"learning_rate": 0.1}
    assert result.losses[1, -1] < 0.01 * result.losses[1, 0]
    np.testing.assert_array_equal(model.kernel[...], before)


@pytest.mark.parametrize("vectorize", [True, False])
def test_one_batch_per_step_is_seen_by_all(vectorize):
    iterator = iter(np.float32(np.arange(100)))
    result = run(
        step_fn=lambda s, h, x: (s, h["a"] * x),
        batches=iterator,
        grid={"a": [1.0, 2.0, 3.0]},
        mode="constant",
        num_steps=20,
        vectorize=vectorize,
    )
    expected = np.outer([1, 2, 3], np.arange(20))
    np.testing.assert_array_equal(result.losses, expected)
    assert next(iterator) == 20


# --- devices --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "members", "vectorize"),
    [
        (2, 4, True),
        (2, 4, False),
        (3, 7, False),
        (8, 12, True),
        (8, 3, True),
        (8, 3, False),
    ],
)
def test_members_spread_over_devices_do_as_on_one(count, members, vectorize):
    traces = itertools.count()

    @jax.jit
    def step_fn(state, hyperparams, batch):
        next(traces)
        return train_step(state, hyperparams | {"momentum": 0.9}, batch)

    def test(**options):
        return grid_test(
            step_fn,
            start(),
            make_batches(),
            grid={"weight_decay": np.linspace(0, 0.1, members)},
            num_steps=20,
            vectorize=vectorize,
            **RATES,
            **options,
        )

    spread = test(devices=jax.devices()[:count])
    assert next(traces) == 1
    one = test()
    assert spread.losses.shape == (members, 20)
    np.testing.assert_allclose(spread.losses, one.losses, rtol=1e-5)
    assert spread.best == one.best


@pytest.mark.parametrize("vectorize", [True, False])
def test_members_live_where_they_are_sent(vectorize):
    devices = jax.devices()[2:5]
    seen = set()

    def step_fn(w, hyperparams, batch):
        if not isinstance(w, jax.core.Tracer):
            seen.add((*w.devices(), *batch.devices(), *hyperparams["a"].devices()))
        rate = hyperparams.get("learning_rate", 0)
        return w + batch * rate, hyperparams["a"] * w.sum()

    if vectorize:
        form = _steps.form_of(step_fn, True, 1, "hyperparams")
        members = _members.together(
            form, jnp.ones(2), {"a": np.ones(5, np.float32)}, None, devices
        )
        (losses,) = members.advance(0, [jnp.ones(2)], np.ones(5, bool))
        assert losses.sharding.device_set == set(devices)
        assert losses.shape == (6,)
        return
    grid = {"a": [1.0, 2.0, 3.0, 4.0]}
    run(
        step_fn=step_fn,
        state=jnp.ones(2),
        batches=[jnp.ones(2)],
        grid=grid,
        vectorize=False,
        devices=devices,
    )
    assert seen == {(d, d, d) for d in devices}


@pytest.mark.slow
def test_two_devices_in_a_process_of_its_own():
    code = """
import jax, jax.numpy as jnp, numpy as np
import optax_superconv as osc
assert jax.device_count() == 2
def step_fn(w, hyperparams, x):
    loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
    return w - hyperparams["learning_rate"] * (grad + hyperparams["decay"] * w), loss
x = jax.random.normal(jax.random.key(0), (8, 3))
for vectorize in (True, False):
    one, two = (
        osc.grid_test(
            jax.jit(step_fn), jnp.ones(3), [x], grid={"decay": [0, 0.1, 0.3]},
            pass_hyperparams=True, num_steps=40, vectorize=vectorize, devices=devices)
        for devices in (None, jax.devices()))
    np.testing.assert_allclose(one.losses, two.losses, rtol=1e-5)
    assert one.best == two.best
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    root = ROOT
    subprocess.run([sys.executable, "-c", code], env=env, cwd=root, check=True)


# --- one by one or together -----------------------------------------------------------


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_step_is_vmapped_where_that_is_asked_for(vectorize):
    seen = []

    def step_fn(w, hyperparams, batch):
        seen.append(isinstance(hyperparams["a"], jax.core.Tracer))
        return w + hyperparams["learning_rate"], w.sum()

    run(step_fn=step_fn, grid={"a": [1.0, 2.0]}, vectorize=vectorize, num_steps=10)
    assert seen == ([True] if vectorize else [False] * 21)


def test_by_default_a_step_need_not_be_traceable():
    def step_fn(state, hyperparams, batch):
        loss = np.float64(hyperparams["a"]) * len(state["name"])
        return state | {"w": hyperparams["learning_rate"]}, loss

    state = {"name": "abc", "w": np.float32(0)}
    result = run(step_fn=step_fn, state=state, grid={"a": [1, 2]})
    np.testing.assert_array_equal(result.losses[:, 0], [3, 6])


# --- scores ---------------------------------------------------------------------------


def replay(curves, **options):
    """A grid test that sees these curves, (members, num_steps)."""
    return grid_test(
        lambda state, hyperparams, losses: (
            np.asarray(hyperparams.get("learning_rate", 0), np.float32),
            losses[int(hyperparams["k"])],
        ),
        np.float32(0),
        list(np.float32(curves).T),
        grid={"k": np.arange(len(curves))},
        num_steps=len(curves[0]),
        vectorize=False,
        **options,
    )


def test_the_score_of_constant_runs_is_the_mean_of_the_last_tenth():
    rng = np.random.default_rng(0)
    curves = rng.normal(size=(4, 120))
    curves[2, 30] = np.nan
    result = replay(curves, mode="constant")
    expected = curves[:, -12:].mean(axis=1)
    expected[2] = np.inf
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5)
    order = np.argsort(expected)
    assert result.best == {"k": float(order[0])}
    margin = expected[order[1]] - expected[order[0]]
    assert result.margin == pytest.approx(margin, rel=1e-5)
    apart = curves[order[1], -12:] - curves[order[0], -12:]
    error = np.std(apart, ddof=1) / np.sqrt(12)
    assert result.margin_in_errors == pytest.approx(margin / error, rel=1e-4)


class Tied(nnx.Module):
    """Two names for one Variable."""

    def __init__(self):
        self.a = nnx.Param(jnp.ones(2))
        self.b = self.a


def tied_step(model, hyperparams, batch):
    graph, weights = nnx.split(model)

    def loss_fn(weights):
        merged = nnx.merge(graph, weights)
        return jnp.sum(merged.a[...] ** 2) + jnp.sum(merged.b[...] ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(weights)
    rate = hyperparams["learning_rate"]
    weights = jax.tree.map(lambda w, g: w - rate * g, weights, grads)
    return nnx.merge(graph, weights), loss


def test_variables_that_are_shared_stay_shared():
    options = {"mode": "constant", "num_steps": 5}
    grid = {"learning_rate": [0.01, 0.02]}
    result = grid_test(tied_step, Tied(), [None], grid, **options)
    rates = np.array([0.01, 0.02])
    expected = 4 * (1 - 4 * rates[:, None]) ** (2 * np.arange(5))
    np.testing.assert_allclose(result.losses, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="`state` must be without Variables"):
        grid_test(tied_step, Tied(), [None], grid, **options, vectorize=True)


def test_a_short_tail_tells_no_errors():
    curves = np.random.default_rng(0).normal(size=(3, 99))
    result = replay(curves, mode="constant")
    assert np.isfinite(result.margin)
    assert np.isnan(result.margin_in_errors)


def test_the_score_of_a_climbing_rate_is_the_lowest_point_without_noise():
    x = np.linspace(-6, 1, 100)
    clean = 2 - np.array([[0.8], [1.0], [0.9]]) / (1 + np.exp(-3 * (x + 3)))
    noisy = clean + 0.05 * np.random.default_rng(0).normal(size=clean.shape)
    noisy[0, 40] = 0.5  # One lucky batch is no low curve.
    noisy[:, 90:] = 1e9
    result = replay(noisy)
    np.testing.assert_allclose(result.scores, [1.2, 1.0, 1.1], atol=0.05)
    assert result.best == {"k": 1.0}
    assert result.margin == pytest.approx(0.1, abs=0.05)
    assert 2 < result.margin_in_errors < 10
    assert result.diverged.all()


def test_a_margin_within_the_noise_says_so():
    rng = np.random.default_rng(1)
    x = np.linspace(-6, 1, 100)
    clean = 2 - 1 / (1 + np.exp(-3 * (x + 3)))
    sigmas = [
        replay(clean + 0.1 * rng.normal(size=(2, 100))).margin_in_errors
        for _ in range(10)
    ]
    assert np.mean(np.array(sigmas) < 2) >= 0.8


def test_a_single_combination_has_no_margin():
    result = replay(np.ones((1, 30)), mode="constant")
    assert np.isnan(result.margin)
    assert np.isnan(result.margin_in_errors)


def test_if_all_others_diverged_the_margin_is_infinite():
    curves = np.ones((2, 30))
    curves[1, 5] = np.inf
    result = replay(curves, mode="constant")
    assert result.margin == np.inf
    assert result.best == {"k": 0.0}


# --- bad input ------------------------------------------------------------------------


def nan_step(state, hyperparams, batch):
    return state, jnp.float32(np.nan)


BAD_VALUES = [
    # options, argument, rule, value
    ({"grid": {}}, "grid", "at least one axis", "none"),
    ({"grid": {"a": []}}, "grid['a']", "at least one value", "none"),
    ({"grid": {"a": [1.0, np.nan]}}, "grid['a'][1]", "finite", "nan"),
    ({"grid": {"a": [1e39]}}, "grid['a'][0]", "finite in float32", "1e+39"),
    ({"grid": {"a": [0.1, 0.1]}}, "grid['a']", "distinct", "[0.1, 0.1]"),
    ({"grid": {"learning_rate": [1.0]}}, "grid", "climbs", "learning_rate"),
    ({"mode": "climb"}, "mode", "one of 'range', 'constant'", "'climb'"),
    ({"num_steps": 9}, "num_steps", "at least 10", "9"),
    ({"num_steps": 0, "mode": "constant"}, "num_steps", "at least 1", "0"),
    ({"min_learning_rate": 0.0}, "min_learning_rate", "above 0", "0.0"),
    (
        {"max_learning_rate": 1e-7},
        "max_learning_rate",
        "above `min_learning_rate`",
        "1e-07",
    ),
    ({"batches": []}, "batches", "at least one batch", "none"),
    ({"batches": iter([])}, "batches", "30 steps of", "dry after 0"),
    ({"batches": iter([np.zeros(3)] * 7)}, "batches", "30 steps of", "dry after 7"),
    ({"devices": []}, "devices", "at least one device", "none"),
    ({"step_fn": nan_step}, "step_fn", "finite first loss", "nan for all"),
    ({"step_fn": lambda w, h, b: (w, w)}, "step_fn", "a real scalar", "(3,)"),
    ({"step_fn": lambda w, h, b: (w[:2], w.sum())}, "step_fn", "float32[3]", "[2]"),
    (
        {"step_fn": lambda w, h, b: ((w, w), w.sum())},
        "step_fn",
        "state like",
        "nothing",
    ),
    (
        {"step_fn": lambda w, h, b: (jnp.bfloat16(w), w.sum())},
        "step_fn",
        "float32[3]",
        "bfloat16[3]",
    ),
    (
        {"grid": {"curvature": [1e30, 2e30]}, "mode": "constant"},
        "grid",
        "lower learning rates",
        "1 to 1 steps",
    ),
    (
        {"grid": {"curvature": [1e30, 2e30]}},
        "grid",
        "lower `min_learning_rate`",
        "steps",
    ),
]


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(("options", "argument", "rule", "value"), BAD_VALUES)
def test_a_bad_value_is_named_with_its_rule(options, argument, rule, value, vectorize):
    options = dict(options)
    if "batches" in options and not isinstance(options["batches"], list):
        left = 7 if "7" in value else 0  # Each test needs an iterator of its own.
        options["batches"] = iter([np.zeros(3)] * left)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run(**{"vectorize": vectorize} | options)
    message = str(error.value)
    assert message.startswith(f"`{argument}`")
    assert rule in message
    assert value in message.rsplit(", got ")[-1]


@pytest.mark.parametrize(
    ("options", "argument", "kind"),
    [
        ({"grid": [1.0]}, "grid", "list"),
        ({"grid": {"a": 1.0}}, "grid['a']", "1.0"),
        ({"grid": {"a": "1, 2"}}, "grid['a']", "'1, 2'"),
        ({"grid": {"a": ["1"]}}, "grid['a'][0]", "str"),
        ({"grid": {"a": [True]}}, "grid['a'][0]", "bool"),
        ({"grid": {"a": [None]}}, "grid['a'][0]", "NoneType"),
        ({"grid": {"a": np.ones((2, 2))}}, "grid['a']", "[1., 1.]"),
        ({"grid": {3: [1.0]}}, "grid", "3"),
        ({"mode": 3}, "mode", "int"),
        ({"step_fn": 3}, "step_fn", "int"),
        ({"step_fn": lambda w, h, b: w}, "step_fn", "ArrayImpl"),
        ({"step_fn": lambda w, h, b: (w, None)}, "step_fn", "NoneType"),
        ({"num_steps": 10.0}, "num_steps", "float"),
        ({"batches": 3}, "batches", "int"),
        ({"devices": "cpu"}, "devices", "'cpu'"),
        ({"vectorize": "auto"}, "vectorize", "'auto'"),
        ({"vectorize": 1}, "vectorize", "1"),
    ],
)
def test_the_wrong_kind_is_named(options, argument, kind):
    with pytest.raises(TypeError) as error:
        run(vectorize=options.pop("vectorize", False), **options)
    assert str(error.value).startswith(f"`{argument}")
    assert kind in str(error.value)


@pytest.mark.parametrize("mode", ["range", "constant"])
def test_a_first_loss_that_only_some_members_lack_is_theirs(mode):
    result = replay([[np.nan] * 30, np.linspace(2, 1, 30)], mode=mode)
    assert result.diverged.tolist() == [True, False]
    assert result.best == {"k": 1.0}
    assert np.isnan(result.losses[0]).all()


def test_a_curve_is_asked_for_by_all_of_its_values():
    result = run(grid={"curvature": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"`combination` .*'curvature'"):
        result.curve()
    with pytest.raises(ValueError, match=r"`curvature` must be one of \[1.0, 2.0\]"):
        result.curve(curvature=1.5)
    constant = run(mode="constant")
    with pytest.raises(ValueError, match="mode='range'"):
        constant.curve(curvature=1.0)


def test_progress_counts_the_steps(capsys):
    run(progress=True)
    assert "100%" in capsys.readouterr().out
