"""Reading back what was applied, at any nesting and in any framework."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_superconv as osc

TOTAL = 10
RATE = osc.onecycle_schedule(0.1, TOTAL)
BETA = osc.onecycle_momentum_schedule(TOTAL)
PARAMS = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}


def recipe():
    return osc.onecycle_adamw(0.1, TOTAL)


def expected(step):
    constants = {"b2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "cooldown": 0.0}
    return {"b1": BETA(step), "learning_rate": RATE(step)} | constants


def assert_reads(state, values):
    read = osc.read_hyperparams(state)
    assert set(read) == set(values)
    for name, value in values.items():
        assert read[name].shape == ()
        np.testing.assert_allclose(read[name], value, rtol=1e-6)


NESTINGS = {
    "bare": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("tx", tx)),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": False}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1),
    "deep": lambda tx: optax.MultiSteps(
        optax.apply_if_finite(
            optax.chain(optax.masked(tx, {"a": True, "b": False})), 5
        ),
        1,
    ),
}


@pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS)
def test_reads_what_the_last_update_applied(nest):
    tx = nest(recipe())
    state = tx.init(PARAMS)
    assert_reads(state, expected(0))
    for step in range(3):
        _, state = tx.update(PARAMS, state, PARAMS)
        assert_reads(state, expected(step))


@pytest.mark.parametrize("labels", [("slow", "fast"), (3, 11)])
def test_partition_names_its_labels(labels):
    peaks = dict(zip(labels, (0.01, 0.1), strict=True))
    tx = optax.partition(
        {label: osc.onecycle_sgd(peak, TOTAL) for label, peak in peaks.items()},
        dict(zip("ab", labels, strict=True)),
    )
    read = osc.read_hyperparams(tx.init(PARAMS))
    assert set(read) == {
        f"{name}/{label}"
        for name in ("momentum", "learning_rate", "cooldown")
        for label in labels
    }
    for label, peak in peaks.items():
        rate = read[f"learning_rate/{label}"]
        np.testing.assert_allclose(rate, peak / 25, rtol=1e-6)


def test_partition_in_partition():
    inner = optax.partition(
        {"in": osc.scale_by_learning_rate(0.5)},
        lambda tree: jax.tree.map(lambda _: "in", tree),
    )
    tx = optax.partition({"out": inner}, {"a": "out", "b": "out"})
    assert_reads(tx.init(PARAMS), {"learning_rate/out/in": 0.5, "cooldown/out/in": 0.0})


def test_equal_names_are_numbered():
    tx = optax.chain(*(osc.scale_by_learning_rate(rate) for rate in (0.1, 0.2, 0.3)))
    assert_reads(
        tx.init(PARAMS),
        {"learning_rate": 0.1, "learning_rate_1": 0.2, "learning_rate_2": 0.3}
        | {"cooldown": 0.0, "cooldown_1": 0.0, "cooldown_2": 0.0},
    )


def test_inject_hyperparams_is_read_too():
    tx = optax.inject_hyperparams(optax.adamw)(RATE, b1=BETA, weight_decay=0.02)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(PARAMS, state, PARAMS)
    read = osc.read_hyperparams(state)
    np.testing.assert_allclose(read["learning_rate"], RATE(2))
    np.testing.assert_allclose(read["b1"], BETA(2))
    np.testing.assert_allclose(read["weight_decay"], 0.02)


def test_what_inject_hyperparams_wraps_is_read_too():
    tx = optax.inject_hyperparams(osc.onecycle_sgd, static_args=("total_steps",))(
        peak_learning_rate=0.1, total_steps=TOTAL, mask=None
    )
    read = osc.read_hyperparams(tx.init(PARAMS))
    np.testing.assert_allclose(read["peak_learning_rate"], 0.1)
    np.testing.assert_allclose(read["learning_rate"], 0.1 / 25, rtol=1e-6)


def test_inject_hyperparams_inside_partition_is_labelled():
    injected = optax.inject_hyperparams(
        osc.scale_by_learning_rate, static_args="cooldown_end"
    )(learning_rate=0.3)
    tx = optax.partition({"on": injected}, {"a": "on", "b": "on"})
    assert_reads(
        tx.init(PARAMS),
        {"learning_rate/on": 0.3, "learning_rate/on_1": 0.3, "cooldown/on": 0.0},
    )


def test_the_older_state_of_inject_hyperparams_is_read_too():
    inner = osc.scale_by_learning_rate(0.3).init(PARAMS)
    state = optax.InjectHyperparamsState(jnp.zeros([]), {"b1": jnp.float32(0.9)}, inner)
    assert_reads(state, {"b1": 0.9, "learning_rate": 0.3, "cooldown": 0.0})


@pytest.mark.parametrize(
    "state",
    [(), {}, None, optax.EmptyState(), optax.adam(0.1).init(PARAMS)],
    ids=str,
)
def test_a_state_that_holds_nothing_gives_nothing(state):
    assert osc.read_hyperparams(state) == {}


def test_reads_inside_jit_without_waiting():
    tx = recipe()

    @jax.jit
    def step(state):
        _, state = tx.update(PARAMS, state, PARAMS)
        return state, osc.read_hyperparams(state)

    state = tx.init(PARAMS)
    for count in range(3):
        state, read = step(state)
        assert set(read) == set(expected(count))
        np.testing.assert_allclose(read["learning_rate"], RATE(count), rtol=1e-6)


def test_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, recipe(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
        optimizer.update(model, grads)
        return osc.read_hyperparams(optimizer.opt_state)

    assert_reads(optimizer.opt_state, expected(0))
    for count in range(3):
        inside = step(model, optimizer)
        np.testing.assert_allclose(inside["learning_rate"], RATE(count), rtol=1e-6)
        assert_reads(optimizer, expected(count))
        assert_reads(optimizer.opt_state, expected(count))


def test_linen_train_state():
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=recipe())
    for step in range(3):
        state = jax.jit(lambda s: s.apply_gradients(grads=PARAMS))(state)
        assert_reads(state, expected(step))


@pytest.mark.parametrize(
    "scale",
    [
        optax.scale_by_lion,
        optax.scale_by_factored_rms,
        functools.partial(optax.trace, 0.9),
    ],
)
def test_any_chain_can_be_read(scale):
    tx = optax.chain(scale(), osc.scale_by_learning_rate(RATE))
    state = tx.init(PARAMS)
    for step in range(2):
        _, state = tx.update(PARAMS, state, PARAMS)
        assert_reads(state, {"learning_rate": RATE(step), "cooldown": 0.0})


def test_learning_rate_has_optax_semantics():
    for flip in (True, False):
        ours = osc.scale_by_learning_rate(0.3, flip_sign=flip)
        theirs = optax.scale_by_learning_rate(0.3, flip_sign=flip)
        update, state = ours.update(PARAMS, ours.init(PARAMS))
        expected_update, _ = theirs.update(PARAMS, theirs.init(PARAMS))
        jax.tree.map(np.testing.assert_array_equal, update, expected_update)
        assert_reads(state, {"learning_rate": 0.3, "cooldown": 0.0})


def test_rate_stays_float32_for_bfloat16_updates():
    params = jnp.ones(3, jnp.bfloat16)
    tx = osc.scale_by_learning_rate(0.3)
    update, state = tx.update(params, tx.init(params))
    assert update.dtype == jnp.bfloat16
    assert osc.read_hyperparams(state)["learning_rate"] == np.float32(0.3)


def test_half_precision_is_rounded_once():
    """In float32 and then to bfloat16, not with a rate rounded to bfloat16 first."""
    rng = np.random.default_rng(0)
    params, g = (jnp.asarray(rng.normal(size=(64, 4)), jnp.bfloat16) for _ in range(2))
    wide_params, wide = params.astype(jnp.float32), g.astype(jnp.float32)
    tx = osc.scale_by_learning_rate(0.0123)
    update, _ = tx.update(g, tx.init(params))
    expected = (-np.float32(0.0123) * wide).astype(jnp.bfloat16)
    np.testing.assert_array_equal(update, expected)
    tx = osc.onecycle_sgd(
        1.0, 1, max_momentum=0.0, base_momentum=0.0, weight_decay=0.0123
    )
    update, _ = tx.update(g, tx.init(params), params)
    expected = -(wide + np.float32(0.0123) * wide_params).astype(jnp.bfloat16)
    np.testing.assert_array_equal(update, expected)


def test_whole_number_updates_become_floats_as_in_optax():
    updates = jnp.array([1, 2])
    tx = osc.scale_by_learning_rate(0.1)
    scaled, _ = tx.update(updates, tx.init(updates))
    np.testing.assert_allclose(scaled, [-0.1, -0.2], rtol=1e-6)
