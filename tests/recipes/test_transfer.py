"""The same fine-tuning of a trained body under a new head in Linen, NNX and Equinox."""

import functools
import itertools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import frozen
from flax import linen, nnx
from flax.training.train_state import TrainState

import optax_superconv as osc

pytestmark = pytest.mark.slow

WIDTHS, CLASSES, NUM_STEPS, FREEZE_STEPS = (4, 8, 8), 3, 30, 10
HEAD = len(WIDTHS) - 1


class _Snapshot(NamedTuple):
    weights: list[np.ndarray]  # kernel, bias of the blocks and of the head
    rates: dict[str, float]
    frozen: set[int]
    loss: float


def make_tx():
    return osc.fine_tune_adamw(
        0.03, NUM_STEPS, osc.label_by_depth(), decay=0.5, freeze_steps=FREEZE_STEPS
    )


def make_problem():
    """Images of three new classes; weights of two trained blocks and a new head."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 60)
    centres = 2 * rng.normal(size=(CLASSES, WIDTHS[0]))
    inputs = centres[labels] + rng.normal(size=(60, WIDTHS[0]))
    shapes = zip(WIDTHS, (*WIDTHS[1:], CLASSES), strict=True)
    kernels = [rng.normal(size=shape) / shape[0] ** 0.5 for shape in shapes]
    layers = [(k.astype(np.float32), np.zeros(k.shape[1], np.float32)) for k in kernels]
    return layers, (jnp.asarray(inputs, jnp.float32), jnp.asarray(labels))


def cross_entropy(logits, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(logits, labels).mean()


def snapshot(layers: Any, opt_state: Any, loss: Any) -> _Snapshot:
    rates = osc.read_hyperparams(opt_state)
    return _Snapshot(
        [np.array(array) for layer in layers for array in layer],
        {name: float(jax.tree.leaves(rate)[0]) for name, rate in rates.items()},
        frozen(opt_state),
        float(loss),
    )


# --- Linen ----------------------------------------------------------------------------


class _LinenNetwork(linen.Module):
    def setup(self):
        self.blocks = [linen.Dense(width) for width in WIDTHS[1:]]
        self.head = linen.Dense(CLASSES)

    def __call__(self, x):
        for block in self.blocks:
            x = linen.tanh(block(x))
        return self.head(x)


def fine_tune_linen():
    layers, (inputs, labels) = make_problem()
    names = [*(f"blocks_{k}" for k in range(HEAD)), "head"]
    network = _LinenNetwork()
    fresh = jax.eval_shape(network.init, jax.random.key(0), inputs)["params"]
    params = {
        name: {"kernel": kernel, "bias": bias}
        for name, (kernel, bias) in zip(names, layers, strict=True)
    }
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
    state = TrainState.create(apply_fn=network.apply, params=params, tx=make_tx())

    @jax.jit
    def step(state):
        def loss_fn(params):
            return cross_entropy(state.apply_fn({"params": params}, inputs), labels)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    for _ in range(NUM_STEPS):
        state, loss = step(state)
        found = [(state.params[n]["kernel"], state.params[n]["bias"]) for n in names]
        yield snapshot(found, state, loss)


# --- NNX ------------------------------------------------------------------------------


class _NNXNetwork(nnx.Module):
    def __init__(self, *, rngs):
        pairs = itertools.pairwise(WIDTHS)
        self.blocks = nnx.List(nnx.Linear(i, o, rngs=rngs) for i, o in pairs)
        self.head = nnx.Linear(WIDTHS[-1], CLASSES, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.tanh(block(x))
        return self.head(x)


def fine_tune_nnx():
    layers, (inputs, labels) = make_problem()
    network = _NNXNetwork(rngs=nnx.Rngs(0))
    parts = [*network.blocks, network.head]
    for part, (kernel, bias) in zip(parts, layers, strict=True):
        part.kernel = nnx.Param(jnp.asarray(kernel))
        part.bias = nnx.Param(jnp.asarray(bias))
    optimizer = nnx.Optimizer(network, make_tx(), wrt=nnx.Param)

    @nnx.jit
    def step(network, optimizer):
        def loss_fn(network):
            return cross_entropy(network(inputs), labels)

        loss, grads = nnx.value_and_grad(loss_fn)(network)
        optimizer.update(network, grads)
        return loss

    for _ in range(NUM_STEPS):
        loss = step(network, optimizer)
        found = [(part.kernel[...], part.bias[...]) for part in parts]
        yield snapshot(found, optimizer, loss)


# --- Equinox --------------------------------------------------------------------------


class _EquinoxNetwork(eqx.Module):
    blocks: list[eqx.nn.Linear]
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, len(WIDTHS))
        pairs = zip(itertools.pairwise(WIDTHS), keys[:-1], strict=True)
        self.blocks = [eqx.nn.Linear(*pair, key=key) for pair, key in pairs]
        self.head = eqx.nn.Linear(WIDTHS[-1], CLASSES, key=keys[-1])

    def __call__(self, x):
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return self.head(x)


def fine_tune_equinox():
    layers, (inputs, labels) = make_problem()

    def arrays(network):
        parts = [*network.blocks, network.head]
        return [array for part in parts for array in (part.weight, part.bias)]

    ours = [jnp.asarray(a) for kernel, bias in layers for a in (kernel.T, bias)]
    network = eqx.tree_at(arrays, _EquinoxNetwork(jax.random.key(0)), ours)
    tx = make_tx()
    opt_state = tx.init(eqx.filter(network, eqx.is_array))

    @eqx.filter_jit
    def step(network, opt_state):
        @eqx.filter_value_and_grad
        def loss_fn(network):
            return cross_entropy(jax.vmap(network)(inputs), labels)

        loss, grads = loss_fn(network)
        params = eqx.filter(network, eqx.is_array)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(network, updates), opt_state, loss

    for _ in range(NUM_STEPS):
        network, opt_state, loss = step(network, opt_state)
        flat = arrays(network)
        found = [(w.T, b) for w, b in zip(flat[::2], flat[1::2], strict=True)]
        yield snapshot(found, opt_state, loss)


# --- what holds for all three ---------------------------------------------------------

FRAMEWORKS = {
    "linen": fine_tune_linen,
    "nnx": fine_tune_nnx,
    "equinox": fine_tune_equinox,
}


@functools.cache
def history_of(framework):
    return list(FRAMEWORKS[framework]())


@pytest.fixture(params=FRAMEWORKS)
def history(request):
    return history_of(request.param)


def test_the_body_keeps_its_bits_until_the_thaw_and_then_moves(history):
    trained = [array for layer in make_problem()[0] for array in layer]
    body = slice(0, 2 * HEAD)
    for count, now in enumerate(history, start=1):
        same = [
            np.array_equal(*pair) for pair in zip(now.weights, trained, strict=True)
        ]
        assert same[body] == [count <= FREEZE_STEPS] * 2 * HEAD
        assert not any(same[2 * HEAD :])
        assert now.frozen == (set(range(HEAD)) if count <= FREEZE_STEPS else set())


def test_the_loss_falls_before_and_after_the_thaw(history):
    losses = [now.loss for now in history]
    assert losses[FREEZE_STEPS] < 0.9 * losses[0]
    assert losses[-1] < 0.7 * losses[FREEZE_STEPS]


def test_rates_read_back_per_depth(history):
    peak_of_head = max(now.rates["learning_rate/2"] for now in history)
    np.testing.assert_allclose(peak_of_head, 0.03, rtol=1e-6)
    for now in history:
        rate = now.rates["learning_rate"]
        expected = [0.25 * rate, 0.5 * rate, rate]
        found = [now.rates[f"learning_rate/{depth}"] for depth in range(HEAD + 1)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("framework", ["nnx", "equinox"])
def test_frameworks_agree(framework):
    for ours, linens in zip(history_of(framework), history_of("linen"), strict=True):
        np.testing.assert_allclose(ours.loss, linens.loss, rtol=1e-4)
        assert ours.rates == linens.rates
        for array, reference in zip(ours.weights, linens.weights, strict=True):
            np.testing.assert_allclose(array, reference, atol=2e-4)
