"""What the finders return: small frozen objects that print in two lines."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_superconv as osc


@jax.jit
def step_fn(w, learning_rate, batch):
    loss, grad = jax.value_and_grad(lambda w: jnp.sum(w**2))(w)
    return w - learning_rate * grad, loss


def grid_step_fn(w, hyperparams, batch):
    shift = hyperparams["first"] + 0 * hyperparams["second"]
    return step_fn(w, hyperparams["learning_rate"] + shift, batch)


TX = osc.sgd(0.1)


def dialled_step_fn(state, batch):
    w, opt_state = state
    loss, grad = jax.value_and_grad(parabola)(w)
    updates, opt_state = TX.update(grad, opt_state, w)
    return (w + updates, opt_state), loss


def parabola(w):
    return jnp.sum(w**2)


PASSED = {"pass_hyperparams": True}
GRID = {"first": np.linspace(0, 1, 25), "second": [1.0, 2.0], "third": [1.0, 2.0]}
RESULTS = {
    "range": lambda: osc.range_test(step_fn, jnp.ones(2), [None], **PASSED),
    "grid": lambda: osc.grid_test(
        grid_step_fn, jnp.ones(2), [None], GRID, num_steps=20, vectorize=True, **PASSED
    ),
    "threshold": lambda: osc.convergence_threshold(
        step_fn, jnp.ones(2), [None], num_steps=20, **PASSED
    ),
    "sharpness": lambda: osc.sharpness(parabola, jnp.ones(2)),
    "auto": lambda: osc.auto_onecycle(
        dialled_step_fn, (jnp.ones(2), TX.init(jnp.ones(2))), [None], 1000
    ),
}
FACTS = {
    "range": ["100 steps from 1e-06 to 10", "losses from 2 down to", "not diverged"],
    "grid": ["20 steps of 25 first x 2 second x 2 third", "margin 0", "second = 1"],
    "threshold": ["threshold 0.96", "22 rates from 1e-05 to 10: ", "1 '2', 4 '3'"],
    "sharpness": ["value 1.99", "residual 0"],
    "auto": ["1000 steps of SGD, peak 0.", "weight_decay 0, 2", "steps used"],
}


@pytest.fixture(scope="module", params=RESULTS)
def named(request):
    return request.param, RESULTS[request.param]()


def as_dict(value):
    """The fields, and those of results in them."""
    if not dataclasses.is_dataclass(value):
        return value
    return {name: as_dict(field) for name, field in vars(value).items()}


def check_is_short(result):
    lines = repr(result).splitlines()
    assert lines[0].startswith(f"{type(result).__name__}(")
    assert len(lines) <= 2
    assert max(map(len, lines)) <= 88


def test_a_result_prints_its_essentials_in_two_short_lines(named):
    name, result = named
    check_is_short(result)
    for fact in FACTS[name]:
        assert fact in repr(result)


def test_a_result_is_frozen_and_compares_by_identity(named):
    result = named[1]
    copy = dataclasses.replace(result)
    assert copy != result == result
    assert len({result, copy}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, dataclasses.fields(result)[0].name, None)
    with pytest.raises(TypeError, match="not iterable"):
        iter(result)
    with pytest.raises(TypeError, match="has no len"):
        len(result)


def test_a_result_pickles_and_is_built_from_its_fields_in_order(named):
    result = named[1]
    fields = [field.name for field in dataclasses.fields(result)]
    values = [getattr(result, name) for name in fields]
    for copy in (
        pickle.loads(pickle.dumps(result)),
        type(result)(*values),
        type(result)(**dict(zip(fields, values, strict=True))),
    ):
        np.testing.assert_equal(as_dict(copy), as_dict(result))


def test_a_sharpness_comes_out_of_jit_and_vmap_and_prints_anywhere():
    seen = []

    def measure(w):
        seen.append(osc.sharpness(lambda w: jnp.sum(w**4), w))  # 12 w².
        return seen[-1]

    w = jnp.arange(36.0).reshape(12, 3)
    batched = jax.jit(jax.vmap(measure))(w)
    assert isinstance(batched, osc.SharpnessResult)
    np.testing.assert_allclose(batched.value, 12 * w[:, -1] ** 2, rtol=1e-5)
    assert batched.residual.shape == (12,)
    assert "value [ 48. ... 14" in repr(batched)
    for result in (batched, seen[0], jax.tree.map(lambda x: [None], batched)):
        check_is_short(result)
