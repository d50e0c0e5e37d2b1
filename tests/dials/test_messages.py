"""Does bad input get a sentence that says what would be good?"""

import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import at
from dialed import GRADS, LABELS, PARAMS, RECIPES, TOTAL, falling

import optax_superconv as osc

GRAD = at(GRADS, 0)
ADAMW = osc.onecycle_adamw(0.1, TOTAL).init(PARAMS)


def named(names):
    """Every name in whatever order."""
    return "".join(f"(?=.*{re.escape(name)}\\b)" for name in names)


# --- names ----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_unknown_name_lists_all_that_there_are(recipe):
    state = RECIPES[recipe]().init(PARAMS)
    dials = [
        name
        for name in osc.read_hyperparams(state)
        if not name.startswith(("cooldown", "frozen"))
    ]
    with pytest.raises(ValueError, match=named([*dials, "lr"])):
        osc.set_hyperparams(state, {"lr": 0.1})


def test_of_many_groups_all_are_listed():
    labels = {f"l{k}": k for k in range(48)}
    params = dict.fromkeys(labels, jnp.ones(2))
    factors = dict.fromkeys(labels.values(), 1.0)
    tx = osc.sgd(0.1, multipliers=factors, param_labels=labels)
    names = [f"learning_rate/{k}" for k in range(48)]
    with pytest.raises(ValueError, match=named(names)):
        osc.set_hyperparams(tx.init(params), {"learning_rate/48": 0.1})


@pytest.mark.parametrize(
    "name", ["learning_rate/body", "learning_rate_1", "B1", 0, None]
)
def test_almost_a_name(name):
    with pytest.raises(ValueError, match="learning_rate"):
        osc.set_hyperparams(ADAMW, {name: 0.1})


@pytest.mark.parametrize("state", [(), None, optax.adam(0.1).init(PARAMS)], ids=str)
def test_a_state_without_dials_says_so(state):
    with pytest.raises(ValueError, match=r"none.*learning_rate"):
        osc.set_hyperparams(state, {"learning_rate": 0.1})


def test_a_bad_name_among_good_ones_sets_nothing():
    state = osc.sgd(0.1).init(PARAMS)
    before = jax.tree.map(np.asarray, state)
    with pytest.raises(ValueError, match="lr"):
        osc.set_hyperparams(state, {"learning_rate": 0.3, "lr": 0.1})
    jax.tree.map(np.testing.assert_array_equal, state, before)


@pytest.mark.parametrize("value", [0.5, None])
def test_a_cooldown_is_started_and_not_set(value):
    with pytest.raises(ValueError, match="start_cooldown"):
        osc.set_hyperparams(ADAMW, {"cooldown": value})


@pytest.mark.parametrize("value", [True, 0, None])
@pytest.mark.parametrize("recipe", ["fine_tune-freeze"])
def test_freezing_follows_from_thaw_steps(recipe, value):
    state = RECIPES[recipe]().init(PARAMS)
    with pytest.raises(ValueError, match="thaw_steps"):
        osc.set_hyperparams(state, {"frozen/0": value})


@pytest.mark.parametrize(
    "values", [None, 0.1, [("learning_rate", 0.1)], {"learning_rate"}]
)
def test_values_that_are_no_dict(values):
    with pytest.raises(TypeError, match="`values` must be a dict"):
        osc.set_hyperparams(ADAMW, values)


# --- ranges ---------------------------------------------------------------------------

OUT = {
    "b1": (1.0, 1.5, -0.1, 1 - 1e-9, np.nan),
    "b2": (1.0, 1 - 1e-8, -1e-9, np.inf),
    "eps": (-1e-8, 1e39, np.nan),
    "weight_decay": (-0.1, np.inf, 1e39),
    "learning_rate": (np.nan, np.inf, -np.inf, 1e39, -1e39),
    "learning_rate/0": (np.nan, 1e39),
}
IN = {
    "b1": (0.0, 0, 0.999999),
    "b2": (0.0, 1 - 1e-7),
    "eps": (0.0, 1.0, 1e-30),
    "weight_decay": (0, 100.0),
    "learning_rate": (0.0, -0.1, 1e38, 3),
    "learning_rate/0": (0.0, 1e-38),
}
GROUPS = osc.adamw(0.1, multipliers={0: 0.5, 1: 1.0}, param_labels=LABELS).init(PARAMS)


@pytest.mark.parametrize(
    ("name", "value"), [(name, x) for name, values in OUT.items() for x in values]
)
def test_out_of_range_as_it_would_be_applied(name, value):
    with pytest.raises(ValueError, match=named([name])):
        osc.set_hyperparams(GROUPS, {name: value})


@pytest.mark.parametrize(
    ("name", "value"), [(name, x) for name, values in IN.items() for x in values]
)
def test_in_range(name, value):
    osc.set_hyperparams(GROUPS, {name: value})


@pytest.mark.parametrize("value", [1.0, -0.1, 1 - 1e-9])
def test_a_momentum_has_the_range_of_one(value):
    with pytest.raises(ValueError, match="momentum"):
        osc.set_hyperparams(osc.sgd(0.1).init(PARAMS), {"momentum": value})


@pytest.mark.parametrize("value", [-0.1, np.nan])
def test_a_multiplier_has_the_range_of_one(value):
    state = osc.scale_by_group({0: 1.0, 1: 1.0}, LABELS).init(PARAMS)
    with pytest.raises(ValueError, match="multiplier/0"):
        osc.set_hyperparams(state, {"multiplier/0": value})


def test_ranges_hold_under_labels_and_numbers():
    state = RECIPES["fine_tune-freeze"]().init(PARAMS)
    with pytest.raises(ValueError, match="b1/body"):
        osc.set_hyperparams(state, {"b1/body": 1.0})
    twice = optax.chain(osc.sgd(0.1), osc.sgd(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match="momentum_1"):
        osc.set_hyperparams(twice, {"momentum_1": 1.0})


def test_traced_values_pass():
    jax.jit(lambda x: osc.set_hyperparams(GROUPS, {"b1": x}))(1.5)


def test_one_of_several_out_of_range():
    tx = osc.sgd(0.1)
    fork = jax.vmap(lambda m: osc.set_hyperparams(tx.init(PARAMS), {"momentum": m}))
    with pytest.raises(ValueError, match="momentum"):
        osc.set_hyperparams(fork(jnp.zeros(3)), {"momentum": np.array([0.5, 1.0, 0.5])})


# --- types and shapes -----------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["0.1", b"0.1", True, np.bool_(True), [0.1], (0.1,), 1j, object(), falling]
)
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match=r"learning_rate.*number"):
        osc.set_hyperparams(ADAMW, {"learning_rate": value})


@pytest.mark.parametrize("shape", [(1,), (2,), (8, 1)])
def test_an_array_where_there_is_one_number(shape):
    with pytest.raises(ValueError, match=r"learning_rate.*shape"):
        osc.set_hyperparams(ADAMW, {"learning_rate": np.full(shape, 0.1)})


def test_an_array_of_another_length_than_the_fork():
    tx = osc.sgd(0.1)
    fork = jax.vmap(
        lambda r: osc.set_hyperparams(tx.init(PARAMS), {"learning_rate": r})
    )
    with pytest.raises(ValueError, match=r"learning_rate.*\(3,\)"):
        osc.set_hyperparams(fork(jnp.zeros(3)), {"learning_rate": np.full(2, 0.1)})


# --- cooldowns and restarts -----------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, 2**31])
def test_a_length_out_of_range(steps):
    with pytest.raises(ValueError, match="cooldown_steps"):
        osc.start_cooldown(ADAMW, steps)


@pytest.mark.parametrize("steps", [1.0, "1", None, True, np.float32(3), jnp.ones(())])
def test_a_length_that_is_no_whole_number(steps):
    with pytest.raises(TypeError, match="cooldown_steps"):
        osc.start_cooldown(ADAMW, steps)


def test_lengths_for_a_single_state():
    with pytest.raises(ValueError, match="vmap"):
        osc.start_cooldown(ADAMW, np.array([1, 2]))


@pytest.mark.parametrize("tx", [optax.adam(0.1), osc.scale_by_scheduled_adam(0.9)])
def test_what_cannot_cool_down(tx):
    with pytest.raises(ValueError, match=r"scale_by_learning_rate.*Adam"):
        osc.start_cooldown(tx.init(PARAMS), 3)


@pytest.mark.parametrize("state", [optax.adam(0.1).init(PARAMS), ()], ids=str)
def test_what_has_nothing_to_restart(state):
    with pytest.raises(ValueError, match="schedules"):
        osc.restart_schedules(state)


# --- states that are not understood ---------------------------------------------------


def raw_flax(state, path):
    return flax.serialization.msgpack_restore(
        flax.serialization.msgpack_serialize(flax.serialization.to_state_dict(state))
    )


def raw_orbax(state, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / "state")


USES = {
    "read": osc.read_hyperparams,
    "set": lambda state: osc.set_hyperparams(state, {"learning_rate": 0.1}),
    "cooldown": lambda state: osc.start_cooldown(state, 3),
    "restart": osc.restart_schedules,
    "average": lambda state: osc.eval_params(state, PARAMS),
}
RAW = {
    "adamw": lambda: osc.adamw(0.1),
    "freeze": RECIPES["fine_tune-freeze"],
    "link": lambda: osc.scale_by_learning_rate(0.1),
    "momentum": lambda: osc.scheduled_trace(0.9),
    "nested": lambda: optax.MultiSteps(osc.sgd(0.1), 2),
    "inject": lambda: optax.inject_hyperparams(optax.sgd)(0.1),
    "average": lambda: osc.ema_params(0.9),
    "snapshots": lambda: osc.lawa_params(3),
    "norms": lambda: osc.record_gradient_norms(10, ord=2),
    "optax": lambda: optax.adam(0.1),
}


def as_lists(state):
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        state = state._asdict()
    if isinstance(state, dict):
        return {key: as_lists(child) for key, child in state.items()}
    return [as_lists(x) for x in state] if isinstance(state, list | tuple) else state


def as_tuples(state):
    if isinstance(state, dict):
        return {key: as_tuples(child) for key, child in state.items()}
    return tuple(map(as_tuples, state)) if isinstance(state, list | tuple) else state


FORMS = {
    "msgpack": lambda state: raw_flax(state, None),
    "lists": as_lists,
    "tuples": as_tuples,
    "leaves": jax.tree.leaves,
    "inside": lambda state: {"params": PARAMS, "opt_state": raw_flax(state, None)},
    "parameters instead": lambda _: PARAMS,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("make", RAW.values(), ids=RAW)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_state_restored_without_its_structure(use, make, form):
    with pytest.raises(ValueError, match=r"`opt_state`.*restore"):
        use(form(make().init(PARAMS)))


def test_a_state_that_orbax_restored_without_its_structure(tmp_path):
    raw = raw_orbax(ADAMW, tmp_path)
    for use in USES.values():
        with pytest.raises(ValueError, match=r"`opt_state`.*restore"):
            use(raw)


OTHERS = {
    "sgd for adamw": (osc.adamw(0.1, weight_decay=0.0), osc.sgd(0.1)),
    "adamw for sgd": (osc.sgd(0.1), osc.adamw(0.1, weight_decay=0.0)),
    "decay first": (osc.adamw(0.1), osc.sgd(0.1, weight_decay=0.1)),
    "without decay": (osc.adamw(0.1), osc.adamw(0.1, weight_decay=0.0)),
    "groups": (
        osc.sgd(0.1),
        osc.sgd(0.1, multipliers={0: 1.0, 1: 1.0}, param_labels=LABELS),
    ),
    "no groups": (
        osc.sgd(0.1, multipliers={0: 1.0, 1: 1.0}, param_labels=LABELS),
        osc.sgd(0.1),
    ),
    "group": (
        osc.scale_by_group({"a": 1.0, "b": 1.0}, {"body": "a", "head": "b"}),
        osc.scale_by_group({0: 1.0, 1: 1.0}, LABELS),
    ),
    "adam for rate": (
        osc.scale_by_learning_rate(0.1),
        osc.scale_by_scheduled_adam(0.9),
    ),
    "rate for momentum": (osc.scheduled_trace(0.9), osc.scale_by_learning_rate(0.1)),
    "optax.adamw": (osc.adamw(0.1), optax.adamw(0.1)),
    "optax.sgd": (osc.sgd(0.1), optax.sgd(0.1, 0.9)),
    "no freezing": (
        osc.gradual_unfreezing(osc.sgd(0.1), {0: 2, 1: 0}, LABELS),
        osc.sgd(0.1),
    ),
}


@pytest.mark.parametrize(("tx", "other"), OTHERS.values(), ids=OTHERS)
def test_the_state_of_another_optimizer(tx, other):
    with pytest.raises(ValueError, match=r"state") as caught:
        tx.update(GRAD, other.init(PARAMS), PARAMS)
    assert len(str(caught.value).split()) > 5


def test_a_state_in_dicts_is_not_the_state():
    tx = osc.scale_by_learning_rate(0.1)
    raw = flax.serialization.to_state_dict(tx.init(PARAMS))
    with pytest.raises(ValueError, match="`state` must be"):
        tx.update(GRAD, raw, PARAMS)


def test_a_record_that_has_lost_a_name():
    tx = osc.adamw(0.1)
    state = tx.init(PARAMS)
    del state[0].dials["eps"]
    with pytest.raises(ValueError, match=r"`state` must be.*eps"):
        tx.update(GRAD, state, PARAMS)


def test_a_record_with_a_name_too_many():
    tx = osc.sgd(0.1)
    state = tx.init(PARAMS)
    state[-1].hyperparams["lr"] = 0.1
    with pytest.raises(ValueError, match=r"`state` must be.*lr"):
        tx.update(GRAD, state, PARAMS)
