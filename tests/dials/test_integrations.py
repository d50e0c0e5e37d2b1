"""Do the dials work where other libraries look, and around other optimizers?"""

import functools

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_same_bits, at
from dialed import (
    GRADS,
    LABELS,
    MULTIPLIERS,
    PARAMS,
    RECIPES,
    TOTAL,
    UNFREEZING,
    falling,
    follow,
    rates,
    setting,
)
from flax import nnx

import optax_superconv as osc

pytestmark = pytest.mark.slow

GRAD = at(GRADS, 0)
ALL = RECIPES | UNFREEZING


# --- a trainer's log ------------------------------------------------------------------


def logged(opt_state):
    """As Tunix's trainer finds the rate: the first part that has a dict of them."""
    try:
        return opt_state.hyperparams["learning_rate"]
    except AttributeError:
        for part in opt_state:
            if isinstance(part, optax.EmptyState):
                break
            if hasattr(part, "hyperparams"):
                return part.hyperparams["learning_rate"]
    return None


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_trainer_logs_the_rate_that_was_applied(recipe):
    tx = RECIPES[recipe]()
    _, read, state = follow(tx, 3, {2: setting("learning_rate", 0.3)})
    assert float(logged(state)) == read["learning_rate"][-1] == np.float32(0.3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_trainer_logs_the_rate_of_an_nnx_optimizer(recipe):
    model = nnx.Dict(
        body=nnx.Linear(4, 2, rngs=nnx.Rngs(0)), head=nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    )
    optimizer = nnx.Optimizer(model, RECIPES[recipe](), wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    osc.set_hyperparams(optimizer, {"learning_rate": 0.3})
    optimizer.update(model, grads)
    assert float(logged(optimizer.opt_state)[...]) == np.float32(0.3)


def test_only_the_rate_link_has_the_field():
    state = RECIPES["groups"]().init(PARAMS)
    assert [hasattr(part, "hyperparams") for part in state] == [False, False, True]
    names = {"learning_rate", "learning_rate/0", "learning_rate/1"}
    assert set(state[-1].hyperparams) == names


# --- other directions -----------------------------------------------------------------

DIRECTIONS = {
    "lion": lambda: optax.scale_by_lion(),
    "adafactor": lambda: optax.scale_by_factored_rms(),
    "muon": lambda: optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda params: jax.tree.map(
            lambda p: optax.contrib.MuonDimensionNumbers() if p.ndim == 2 else None,
            params,
        )
    ),
}
MATRICES = {"body": PARAMS["body"]["kernel"], "head": PARAMS["head"]["kernel"]}


def around(direction, rate=falling, **options):
    return optax.chain(
        DIRECTIONS[direction](),
        osc.add_decayed_weights(0.01),
        osc.scale_by_learning_rate(
            rate, multipliers=MULTIPLIERS, param_labels=LABELS, **options
        ),
    )


def matrix_rates(tx, steps, actions, name="learning_rate"):
    """As :func:`rates`, of two matrices."""
    state, found = tx.init(MATRICES), []
    update = jax.jit(tx.update)
    for t in range(steps):
        state = actions.get(t, lambda s: s)(state)
        updates, state = update(MATRICES, state, MATRICES)
        found.append(float(osc.read_hyperparams(state)[name]))
    return found, updates


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_around_another_direction_rates_are_set_and_cool_down(direction):
    tx = around(direction, cooldown_shape="linear")
    actions = {
        1: setting("learning_rate", 0.4),
        3: lambda state: osc.start_cooldown(state, 2),
    }
    applied, updates = matrix_rates(tx, 6, actions)
    np.testing.assert_allclose(applied, [0.1, 0.4, 0.4, 0.4, 0.2, 0.0], rtol=1e-6)
    assert not any(x.any() for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_around_another_direction_held_is_constant(direction):
    _, held = matrix_rates(around(direction), 3, {0: setting("learning_rate", 0.25)})
    _, constant = matrix_rates(around(direction, lambda t: 0.25 + 0.0 * t), 3, {})
    assert_same_bits(held, constant)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_around_another_direction_it_restarts(direction):
    applied, _ = matrix_rates(around(direction), 6, {3: osc.restart_schedules})
    assert applied[3:] == applied[:3]


# --- recipes are chains of public names -----------------------------------------------

CYCLE = osc.onecycle(0.1, TOTAL)
SCALED = {"multipliers": MULTIPLIERS, "param_labels": LABELS}
CHAINS = {
    "sgd": (
        lambda: osc.sgd(falling, 0.8, weight_decay=0.1),
        lambda: optax.chain(
            osc.add_decayed_weights(0.1),
            osc.scheduled_trace(0.8, nesterov=True),
            osc.scale_by_learning_rate(falling),
        ),
    ),
    "adamw": (
        lambda: osc.adamw(falling, 0.8, 0.95, eps=1e-6, nesterov=True, **SCALED),
        lambda: optax.chain(
            osc.scale_by_scheduled_adam(0.8, 0.95, eps=1e-6, nesterov=True),
            osc.add_decayed_weights(1e-2, "matrices"),
            osc.scale_by_learning_rate(falling, **SCALED),
        ),
    ),
    "onecycle_sgd": (
        lambda: osc.onecycle_sgd(0.1, TOTAL, weight_decay=falling, mask=None, **SCALED),
        lambda: optax.chain(
            osc.add_decayed_weights(falling, None),
            osc.scheduled_trace(CYCLE[1], nesterov=True),
            osc.scale_by_learning_rate(CYCLE[0], **SCALED),
        ),
    ),
    "onecycle_adamw": (
        lambda: osc.onecycle_adamw(0.1, TOTAL),
        lambda: optax.chain(
            osc.scale_by_scheduled_adam(CYCLE[1], 0.99),
            osc.add_decayed_weights(1e-2),
            osc.scale_by_learning_rate(CYCLE[0]),
        ),
    ),
    "fine_tune": (
        lambda: osc.fine_tune_adamw(0.1, TOTAL, LABELS, decay=0.5),
        lambda: optax.chain(
            osc.scale_by_scheduled_adam(CYCLE[1], 0.99),
            osc.add_decayed_weights(1e-2),
            osc.scale_by_learning_rate(CYCLE[0], **SCALED),
        ),
    ),
}


@pytest.mark.parametrize(("recipe", "chain"), CHAINS.values(), ids=CHAINS)
def test_what_a_recipe_does_can_be_chained(recipe, chain):
    actions = {
        2: lambda state: osc.start_cooldown(state, 5),
        4: setting("learning_rate", 0.3),
        5: osc.restart_schedules,
    }
    one, read, state = follow(recipe(), 7, actions)
    other, read_other, state_other = follow(chain(), 7, actions)
    assert_same_bits(one, other)
    assert_same_bits(read, read_other)
    assert_same_bits(state, state_other)


# --- trees of other libraries ---------------------------------------------------------


@pytest.mark.parametrize("recipe", ALL)
def test_none_for_whole_subtrees(recipe):
    """Equinox filters gradients, and gives its model as parameters."""
    tx = ALL[recipe]()
    model = PARAMS | {"static": {"name": "relu", "size": 3, "call": jax.nn.relu}}
    grads = GRAD | {"static": None}
    state = tx.init(eqx.filter(model, eqx.is_array) | {"static": None})
    updates, state = jax.jit(lambda g, s: tx.update(g, s, model))(grads, state)
    assert updates["static"] is None
    expected, _ = jax.jit(tx.update)(GRAD, tx.init(PARAMS), PARAMS)
    assert_same_bits({k: updates[k] for k in PARAMS}, expected)


@pytest.mark.parametrize("recipe", ["onecycle_adamw", "sgd-decay"])
def test_an_equinox_model(recipe):
    tx = RECIPES[recipe]()
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda m: m(jnp.ones(2)).sum())(model)
        updates, state = tx.update(grads, state, model)
        return eqx.apply_updates(model, updates), state

    state = osc.set_hyperparams(state, {"learning_rate": 0.0})
    same, state = step(model, state)
    assert eqx.tree_equal(same, model)
    state = osc.set_hyperparams(state, {"learning_rate": 0.3})
    moved, state = step(model, state)
    assert not eqx.tree_equal(moved, model)


BARE = {
    "sgd": lambda: osc.sgd(0.1, weight_decay=0.1),
    "adamw": lambda: osc.adamw(0.1),
    "groups": lambda: osc.adamw(0.1, multipliers={0: 0.5}, param_labels=0),
    "fine_tune": lambda: osc.fine_tune_adamw(0.1, TOTAL, 0),
    "freeze": lambda: osc.fine_tune_adamw(0.1, TOTAL, 0, freeze_steps=3),
    "freeze-function": lambda: osc.fine_tune_adamw(
        0.1, TOTAL, lambda params: 0, freeze_steps=3
    ),
    "unfreezing": lambda: osc.gradual_unfreezing(osc.adamw(0.1), {0: 1}, 0),
}


@pytest.mark.parametrize("make", BARE.values(), ids=BARE)
def test_a_bare_array(make):
    tx, params = make(), jnp.ones((2, 3))
    state = osc.restart_schedules(osc.start_cooldown(tx.init(params), 3))
    for _ in range(2):
        updates, state = tx.update(params, state, params)
    assert updates.shape == params.shape
    assert np.isfinite(updates).all()


@pytest.mark.parametrize("recipe", ALL)
def test_moments_are_mapped_like_parameters_and_dials_are_not(recipe):
    tx = ALL[recipe]()
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(tx, lambda x: "moment", state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(mapped), jax.tree.leaves(state), strict=True):
        assert (new == "moment") if old.shape in ((8, 4), (4,)) else (new is old)


@pytest.mark.parametrize("recipe", ALL)
def test_closures_that_become_pytrees(recipe):
    """As Optimistix does to the optimizer it is given: no array hides in a function."""
    tx = ALL[recipe]()
    converted = eqxi.closure_to_pytree(tx)
    state = converted.init(PARAMS)
    assert_same_bits(state, tx.init(PARAMS))
    update = eqx.filter_jit(lambda tx, *args: tx.update(*args))
    updates, state = update(converted, GRAD, state, PARAMS)
    expected, _ = jax.jit(tx.update)(GRAD, tx.init(PARAMS), PARAMS)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), updates, expected
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda labels: osc.scale_by_learning_rate(
            0.1, multipliers=MULTIPLIERS, param_labels=labels
        ),
        lambda labels: osc.scale_by_group(MULTIPLIERS, labels),
        lambda labels: osc.gradual_unfreezing(osc.sgd(0.1), {0: 1, 1: 0}, labels),
    ],
    ids=["rate", "group", "unfreezing"],
)
def test_a_function_of_labels_that_became_a_pytree_works(make):
    labels = osc.label_by_path([("body/.*", 0), ("head/.*", 1)])
    state = make(eqxi.closure_to_pytree(labels)).init(PARAMS)
    assert_same_bits(state, make(labels).init(PARAMS))
    # What holds labels and nothing else may be a tree of them.
    ambiguous = jax.tree_util.Partial(lambda label, params: label, 0)
    with pytest.raises(ValueError, match="trees of labels work"):
        make(ambiguous).init(PARAMS)


def test_a_rate_of_a_partition_and_its_neighbour():
    """Optax's own optimizer in one part is left alone."""
    tx = optax.partition({0: osc.sgd(0.1), 1: optax.adamw(0.1)}, LABELS)
    applied = rates(tx, 2, {1: setting("learning_rate/0", 0.3)}, "learning_rate/0")
    np.testing.assert_array_equal(applied, np.float32([0.1, 0.3]))
