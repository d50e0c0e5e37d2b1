"""Exact debiasing, precision of the betas, and what the recipes decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_superconv as osc


def first_moments(b1, b2, steps):
    """Updates for a constant gradient of 1: first moment over a root of 1."""
    tx = osc.scale_by_scheduled_adam(b1, b2, eps=0.0)
    state = tx.init(jnp.zeros(()))
    return jax.lax.scan(
        lambda state, _: tx.update(jnp.ones(()), state)[::-1], state, length=steps
    )[1]


@pytest.mark.parametrize("b2", [0.0, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("total", [2, 20, 100, 1000])
def test_the_mean_of_a_constant_is_that_constant(total, b2):
    moments = first_moments(osc.onecycle_momentum_schedule(total), b2, total)
    np.testing.assert_allclose(moments, 1.0, rtol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.0, 0.9990234375), min_size=30, max_size=30))
def test_the_mean_of_a_constant_is_that_constant_for_any_schedule(betas):
    table = jnp.asarray(betas, jnp.float32)
    moments = first_moments(lambda t: table[t], 0.999, 30)
    np.testing.assert_allclose(moments, 1.0, rtol=1e-5)


def test_a_constant_b1_is_optax_adam():
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(50, 6)).astype(np.float32)
    for nesterov in (False, True):
        ours = osc.scale_by_scheduled_adam(0.9, 0.99, nesterov=nesterov)
        theirs = optax.scale_by_adam(0.9, 0.99, nesterov=nesterov)
        state, other = ours.init(grads[0]), theirs.init(grads[0])
        our_update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
        for g in grads:
            update, state = our_update(g, state)
            expected, other = their_update(g, other)
            np.testing.assert_allclose(update, expected, rtol=1e-4)


def test_complex_parameters_keep_their_phase():
    tx = osc.scale_by_scheduled_adam(0.9)
    g = np.asarray([3 + 4j, -1j], np.complex64)
    update, state = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_allclose(update, [0.6 + 0.8j, -1j], rtol=1e-5)
    assert state.nu.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("make", [osc.onecycle_adamw, osc.onecycle_sgd])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_thousand_steps_in_half_precision(make, dtype):
    total = 1000
    tx = make(0.01, total)
    params = jnp.ones((4, 4), dtype)

    def step(carry, t):
        params, state = carry
        g = (params - 0.5).astype(dtype)
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (updates, osc.read_hyperparams(state)["learning_rate"])

    start = params, tx.init(params)
    _, (updates, rates) = jax.lax.scan(step, start, jnp.arange(total))
    assert updates.dtype == jnp.dtype(dtype)
    assert np.all(np.isfinite(np.asarray(updates, np.float32)))
    assert len(np.unique(rates)) >= 990


def test_b2_is_kept_in_bfloat16():
    """A gradient that shrinks: bfloat16's 0.999 is 1 and would never forget it."""
    grads = np.where(np.arange(2000) < 200, 1.0, 0.25)
    tx = osc.scale_by_scheduled_adam(0.0, 0.999, eps=0.0)
    state = tx.init(jnp.zeros((), jnp.bfloat16))
    _, updates = jax.lax.scan(
        lambda state, g: tx.update(g, state)[::-1],
        state,
        jnp.asarray(grads, "bfloat16"),
    )
    expected = np.diff(
        reference.adamw(
            np.zeros(()), grads, lambda t: -1.0, lambda t: 0.0, lambda t: 0.999, 0.0
        ),
        prepend=0.0,
    )
    np.testing.assert_allclose(np.asarray(updates, float), expected, rtol=0.01)


def test_accumulators_take_the_dtype_they_are_given():
    params = jnp.zeros(3, jnp.bfloat16)
    assert osc.scheduled_trace(0.9).init(params).trace.dtype == jnp.float32
    trace = osc.scheduled_trace(0.9, accumulator_dtype=jnp.bfloat16).init(params)
    assert trace.trace.dtype == jnp.bfloat16
    adam = osc.scale_by_scheduled_adam(0.9, mu_dtype=jnp.bfloat16).init(params)
    assert (adam.mu.dtype, adam.nu.dtype) == (jnp.bfloat16, jnp.float32)


class Attention(nnx.Module):
    """Has biases of one dimension and of two."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
        self.norm = nnx.LayerNorm(4, rngs=rngs)


@functools.cache
def attention():
    return Attention(nnx.Rngs(0))


def decayed(params, make):
    """Paths of the leaves that a step with zero gradients changes."""
    tx = make(1.0, 10, weight_decay=0.1)
    zeros = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), params)
    params = jax.tree.map(lambda p: np.ones(p.shape, p.dtype), params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
        if np.any(leaf)
    }


@pytest.mark.parametrize("make", [osc.onecycle_adamw, osc.onecycle_sgd])
def test_decays_matrices_and_no_biases(make):
    expected = {f"attention/{k}/kernel" for k in ("query", "key", "value", "out")}
    model = attention()
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert decayed(pure, make) == expected
    boxed = decayed(nnx.state(model, nnx.Param), make)
    assert {path.removesuffix("/value") for path in boxed} == expected
    assert pure["attention"]["query"]["bias"].ndim == 2  # What the name is for.

    variables = linen.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
    assert decayed(variables["params"], make) == {"kernel"}


def test_nnx_optimizer_decays_the_same():
    model = Attention(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tx = osc.onecycle_adamw(1.0, 10, weight_decay=0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    nnx.jit(lambda optimizer, *args: optimizer.update(*args))(optimizer, model, zeros)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before, after)
    assert changed == {
        "attention": {
            k: {"kernel": True, "bias": False} for k in ("query", "key", "value", "out")
        },
        "norm": {"scale": False, "bias": False},
    }


def test_sgd_couples_its_decay_and_adamw_does_not():
    """With zero gradients: through the momentum, or times the rate alone."""
    params = jnp.full((2, 2), 10.0)
    zeros = jnp.zeros_like(params)
    for make, second in ((osc.onecycle_sgd, None), (osc.onecycle_adamw, 1.0)):
        tx = make(0.1, 10, weight_decay=0.1, warmup_steps=0)
        state = tx.init(params)
        update = jax.jit(tx.update)
        first_update, state = update(zeros, state, params)
        second_update, state = update(zeros, state, params)
        rates = osc.onecycle_schedule(0.1, 10, warmup_steps=0)(jnp.arange(2))
        growth = (second_update / rates[1]) / (first_update / rates[0])
        if second is None:
            assert np.all(growth > 1.3)
        else:
            np.testing.assert_allclose(growth, second, rtol=1e-5)


def test_needs_no_parameters_where_nothing_is_decayed():
    tx = osc.onecycle_sgd(0.1, 10)
    g = jnp.ones((2, 2))
    tx.update(g, tx.init(g))


def test_asks_for_parameters_where_something_is_decayed():
    tx = osc.onecycle_adamw(0.1, 10)
    g = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="params"):
        tx.update(g, tx.init(g))
