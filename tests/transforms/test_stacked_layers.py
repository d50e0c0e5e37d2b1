"""Layers that are stacked in one leaf have rates of their own, as separate ones do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import optax_superconv as osc

pytestmark = pytest.mark.slow  # Most of it is compilation.

LAYERS = 12
FACTORS = osc.layerwise_multipliers(range(LAYERS + 2), 0.75)
STACKED = {
    "embed": FACTORS[0],
    "layers": np.array([FACTORS[k] for k in range(1, LAYERS + 1)]),
    "head": FACTORS[LAYERS + 1],
}
by_part = osc.label_by_path([(f"{k}/.*", k) for k in STACKED])
by_depth = osc.label_by_depth()


def stacked_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)

    def normal(key, *shape):
        return jax.random.normal(key, shape, dtype)

    return {
        "embed": {"kernel": normal(keys[0], 5, 8)},
        "layers": {
            "kernel": normal(keys[1], LAYERS, 8, 8),
            "norm": {"scale": 1 + normal(keys[2], LAYERS, 8)},
            "bias": jnp.zeros((LAYERS, 8), dtype),
        },
        "head": {"kernel": normal(keys[3], 8, 3)},
    }


def separate(tree):
    layers = [
        jax.tree.map(lambda leaf, k=k: leaf[k], tree["layers"]) for k in range(12)
    ]
    return {"embed": tree["embed"], "layers": layers, "head": tree["head"]}


def gradient(params):
    return jax.tree.map(lambda p: jnp.sin(3 * p.astype(jnp.float32)), params)


def run(tx, params, steps=5, change=lambda state, step: state):
    @jax.jit
    def step_fn(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for step in range(steps):
        params, state = step_fn(params, change(state, step))
    return params, state


RECIPES = {
    "sgd": functools.partial(osc.sgd, 0.1, weight_decay=0.1),
    "adamw": functools.partial(osc.adamw, 0.1, weight_decay=0.1),
    "onecycle_sgd": functools.partial(osc.onecycle_sgd, 0.1, 5, weight_decay=0.1),
    "onecycle_adamw": functools.partial(osc.onecycle_adamw, 0.1, 5, weight_decay=0.1),
}


def one_fast(rows, fast):
    return [
        pytest.param(row, id=name, marks=[] if name == fast else [pytest.mark.slow])
        for name, row in rows.items()
    ]


@pytest.mark.parametrize("recipe", one_fast(RECIPES, "onecycle_adamw"))
def test_the_steps_are_those_of_separate_layers(recipe):
    params = stacked_params()
    stacked, _ = run(recipe(multipliers=STACKED, param_labels=by_part), params)
    alone, _ = run(recipe(multipliers=FACTORS, param_labels=by_depth), separate(params))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6),
        separate(stacked),
        alone,
    )


def test_what_is_set_per_layer_is_what_is_set_of_separate_layers():
    rates = np.linspace(0.01, 0.1, LAYERS)

    def change(state, step):
        names = [
            k for k in osc.read_hyperparams(state) if k.startswith("learning_rate/")
        ]
        if step == 1:
            values = {"learning_rate/layers": rates}
            if "learning_rate/layers" not in names:
                values = {f"learning_rate/{k + 1}": r for k, r in enumerate(rates)}
            return osc.set_hyperparams(state, values)
        return osc.start_cooldown(state, 4) if step == 3 else state

    params = stacked_params()
    labels: dict = {"multipliers": STACKED, "param_labels": by_part}
    stacked, state = run(osc.adamw(0.1, **labels), params, 6, change)
    tx = osc.adamw(0.1, multipliers=FACTORS, param_labels=by_depth)
    alone, other = run(tx, separate(params), 6, change)
    read, wanted = osc.read_hyperparams(state), osc.read_hyperparams(other)
    assert read["learning_rate/layers"].shape == (LAYERS,)
    of_layers = [wanted[f"learning_rate/{k + 1}"] for k in range(LAYERS)]
    np.testing.assert_array_equal(read["learning_rate/layers"], of_layers)
    np.testing.assert_allclose(of_layers[-1], 0.1 * (1 - np.sqrt(0.5)), rtol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6),
        separate(stacked),
        alone,
    )


def test_the_recipe_is_the_chain_with_an_explicit_mask():
    params = stacked_params()
    mask = {
        "embed": True,
        "layers": {"kernel": True, "norm": False, "bias": False},
        "head": True,
    }
    groups: dict = {"multipliers": STACKED, "param_labels": by_part}
    chain = optax.chain(
        osc.scale_by_scheduled_adam(0.9, 0.99),
        osc.add_decayed_weights(1e-2, mask),
        osc.scale_by_learning_rate(0.1, **groups),
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        run(chain, params)[0],
        run(osc.adamw(0.1, **groups), params)[0],
    )


@pytest.mark.parametrize("mask", [True, None, lambda p: jax.tree.map(jnp.ndim, p)])
def test_a_mask_that_is_given_rules(mask):
    params = jax.tree.map(jnp.ones_like, stacked_params())
    groups: dict = {"multipliers": STACKED, "param_labels": by_part}
    tx = osc.sgd(0.1, 0.0, weight_decay=0.5, mask=mask, **groups)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    scale = updates["layers"]["norm"]["scale"][:, 0]
    np.testing.assert_allclose(scale, -0.1 * 0.5 * STACKED["layers"], rtol=1e-6)


def test_scale_by_group_has_a_factor_per_layer_and_keeps_dtypes():
    params = stacked_params(jnp.bfloat16)
    tx = osc.scale_by_group(
        {**STACKED, "layers": lambda count: jnp.arange(LAYERS) + count}, by_part
    )
    state = tx.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    for step in range(2):
        updates, state = tx.update(ones, state, params)
        for leaf in jax.tree.leaves(updates["layers"]):
            assert leaf.dtype == jnp.bfloat16
            wanted = np.broadcast_to(
                step + np.arange(12.0).reshape(12, *(leaf.ndim - 1) * [1]), leaf.shape
            )
            np.testing.assert_array_equal(leaf.astype(np.float32), wanted)
    read = osc.read_hyperparams(state)["multiplier/layers"]
    np.testing.assert_array_equal(read, np.arange(LAYERS) + 1)
    state = osc.set_hyperparams(state, {"multiplier/layers": 0.5})
    updates, state = tx.update(ones, state, params)
    assert set(np.unique(updates["layers"]["kernel"].astype(np.float32))) == {0.5}


def test_a_write_of_some_layers_holds_all():
    params = stacked_params()
    tx = osc.adamw(lambda count: 0.1 + count, multipliers=STACKED, param_labels=by_part)
    _, state = tx.update(params, tx.init(params), params)
    rates = osc.read_hyperparams(state)["learning_rate/layers"]
    held = rates.at[0].set(7.0)
    state = optax.tree.set(state, **{"learning_rate/layers": held})
    for _ in range(2):
        _, state = tx.update(params, state, params)
        np.testing.assert_array_equal(
            osc.read_hyperparams(state)["learning_rate/layers"], held
        )
    state = osc.set_hyperparams(state, {"learning_rate/layers": None})
    _, state = tx.update(params, state, params)
    rates = osc.read_hyperparams(state)["learning_rate/layers"]
    np.testing.assert_allclose(rates, 3.1 * STACKED["layers"], rtol=1e-6)


@pytest.mark.slow
def test_a_state_forks_by_vmap():
    params = stacked_params()
    tx = osc.adamw(0.1, multipliers=STACKED, param_labels=by_part)
    state, rates = tx.init(params), jnp.linspace(0.01, 0.1, 3 * LAYERS).reshape(3, -1)
    forks = jax.vmap(lambda r: osc.set_hyperparams(state, {"learning_rate/layers": r}))(
        rates
    )
    update = jax.vmap(lambda s: tx.update(params, s, params))
    _, forks = update(forks)
    np.testing.assert_array_equal(
        osc.read_hyperparams(forks)["learning_rate/layers"], rates
    )
    forks = osc.set_hyperparams(
        osc.start_cooldown(forks, 4), {"learning_rate/layers": 0.5}
    )
    _, forks = update(forks)
    read = osc.read_hyperparams(forks)
    assert set(np.unique(read["learning_rate/layers"])) == {0.5}
    assert read["learning_rate"].shape == (3,)


@pytest.mark.parametrize("box", ["nnx.Param", "nn.Partitioned"])
def test_layers_in_boxes(box):
    def boxed(leaf):
        if box == "nnx.Param":
            return nnx.Param(leaf)
        return nn.Partitioned(leaf, (None,) * leaf.ndim)

    plain = stacked_params()
    params = jax.tree.map(boxed, plain)
    tx = osc.adamw(0.1, multipliers=STACKED, param_labels=by_part)
    updates, _ = tx.update(params, tx.init(params), params)
    wanted, _ = tx.update(plain, tx.init(plain), plain)
    jax.tree.map(
        np.testing.assert_array_equal, jax.tree.leaves(updates), jax.tree.leaves(wanted)
    )


@pytest.mark.parametrize(
    "make", [osc.scale_by_group, functools.partial(osc.adamw, 0.1)]
)
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            np.ones(5),
            r"multipliers\['layers'\]` must be .*layers/bias of shape \(12, 8\)",
        ),
        (
            np.ones((12, 1)),
            r"multipliers\['layers'\]` must be .*of one axis.*\(12, 1\)",
        ),
        (np.ones(0), r"multipliers\['layers'\]` must be .*of one axis.*\(0,\)"),
        (-np.ones(12), r"multipliers\['layers'\]` must be finite and at least 0"),
        (np.full(12, np.nan), r"multipliers\['layers'\]` must be finite"),
    ],
)
def test_errors(make, layers, message):
    with pytest.raises(ValueError, match=message):
        make(multipliers={**STACKED, "layers": layers}, param_labels=by_part).init(
            stacked_params()
        )


def test_a_state_with_other_layers_is_refused():
    params = stacked_params()
    tx = osc.adamw(0.1, multipliers=STACKED, param_labels=by_part)
    numbers = {**STACKED, "layers": 0.5}
    other = osc.adamw(0.1, multipliers=numbers, param_labels=by_part)
    with pytest.raises(ValueError, match="`state` must be of this optimizer"):
        tx.update(params, other.init(params), params)
    state = tx.init(params)
    state[-1].hyperparams["learning_rate/layers"] = 0.5
    with pytest.raises(ValueError, match="`opt_state` must be with records"):
        osc.set_hyperparams(state, {"learning_rate": 0.5})
    with pytest.raises(ValueError, match=r"broadcasts to the shape \(12,\)"):
        osc.set_hyperparams(tx.init(params), {"learning_rate/layers": np.ones(3)})
