"""What several test files need: parameters, gradients, runs, comparisons."""

import functools
import pathlib

import jax
import numpy as np
import optax

import optax_superconv as osc

ROOT = pathlib.Path(__file__).parents[1]


def make_params(*groups, dtype="float32"):
    """A kernel and a bias, or a dict of such pairs, one for each of ``groups``."""
    rng = np.random.default_rng(0)
    draws = [(rng.normal(size=(8, 4)), rng.normal(size=4)) for _ in groups or [None]]
    pairs = [
        {"kernel": jax.numpy.asarray(k, dtype), "bias": jax.numpy.asarray(b, dtype)}
        for k, b in draws
    ]
    return dict(zip(groups, pairs, strict=True)) if groups else pairs[0]


def make_grads(steps, *groups, dtype="float32"):
    """Gradients for :func:`make_params`, stacked: (steps, ...) per leaf."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: jax.numpy.asarray(rng.normal(size=(steps, *p.shape)), dtype),
        make_params(*groups),
    )


def at(stacked, t):
    """Row ``t`` of every leaf, a slice if ``t`` is one."""
    return jax.tree.map(lambda leaf: leaf[t], stacked)


def train(tx, params, grads, state=None, *, update=None):
    """Parameters after each step, stacked, and the last state; a loop over updates."""
    update = update or jax.jit(tx.update)
    state, history = tx.init(params) if state is None else state, []
    for t in range(len(jax.tree.leaves(grads)[0])):
        updates, state = update(at(grads, t), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *history), state


def scan_steps(tx, params, grads, state=None, *, read=lambda state: state):
    """The same in one ``scan``: parameters after each step, and ``read(state)``.

    Both are stacked. A program that reads less compiles in half of the time.
    """

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, read(state))

    carry = params, tx.init(params) if state is None else state
    return jax.lax.scan(step, carry, grads)[1]


def nothing(state):
    """For :func:`scan_steps`, where parameters alone matter."""


scan = functools.partial(jax.jit, static_argnums=0, static_argnames="read")(scan_steps)


def evaluate(schedule, counts):
    """Values in NumPy; of at least 1024 counts, so that all share their programs."""
    padded = np.resize(counts, max(1024, len(counts)))
    return np.asarray(schedule(jax.numpy.asarray(padded)))[: len(counts)]


def frozen(state):
    """The labels that the last update of every state of a batch left alone."""
    read = osc.read_hyperparams(state)
    names = [key.partition("/")[2] for key in read if key.startswith("frozen/")]
    found = {name for name in names if np.all(read[f"frozen/{name}"])}
    return {int(name) if name.isdigit() else name for name in found}


def types(tree):
    """Shape, dtype and weak type of every leaf, arrays or ``jax.eval_shape``'s."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def assert_same_bits(new, old):
    """The same structure, and every leaf the same bytes."""
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
