"""Are a state's buffers its own, for a step that donates, and its dicts, for a fork?"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import at
from dialed import GRADS, LABELS, PARAMS, RECIPES, TOTAL, UNFREEZING, falling

import optax_superconv as osc

pytestmark = pytest.mark.slow

GRAD = at(GRADS, 0)


def injected(make, **options):
    return lambda: optax.inject_hyperparams(make)(**options)


MADE = RECIPES | UNFREEZING
MADE |= {
    "inject-adamw": injected(osc.adamw, learning_rate=0.1),
    "inject-schedules": injected(osc.sgd, learning_rate=falling, momentum=0.9),
    "inject-link": injected(osc.scale_by_learning_rate, learning_rate=0.1),
    "group": lambda: optax.chain(
        optax.adamw(0.1), osc.scale_by_group({0: 0.5, 1: 1.0}, LABELS)
    ),
    "averages": lambda: optax.chain(
        osc.sgd(0.1), osc.ema_params(0.9), osc.record_gradient_norms(TOTAL, ord=2)
    ),
    "MultiSteps": lambda: optax.MultiSteps(osc.adamw(0.1), 2),
}
ACTIONS = {
    "init": lambda state: state,
    "set": lambda state: osc.set_hyperparams(state, {name_of(state): 0.25}),
    "release": lambda state: osc.set_hyperparams(
        osc.set_hyperparams(state, {name_of(state): 0.25}), {name_of(state): 0.5}
    ),
    "restart": osc.restart_schedules,
}


def name_of(state):
    """Some dial, of ours if there is one."""
    read = osc.read_hyperparams(state)
    return [k for k in read if not k.startswith(("cooldown", "frozen"))][-1]


def shared(state):
    """Addresses that several leaves have."""
    leaves = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array) and x.size]
    taken = collections.Counter(x.unsafe_buffer_pointer() for x in leaves)
    return [k for k, n in taken.items() if n > 1]


@pytest.mark.parametrize("act", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_no_buffer_has_two_names(make, act):
    tx = make()
    state = act(tx.init(PARAMS))
    assert not shared(state)
    _, state = tx.update(GRAD, state, PARAMS)
    assert not shared(act(state))


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_state_can_be_donated_whole(make):
    """To a program that gives everything back, so that nothing is left out."""
    tx = make()
    donating = jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)
    donating(tx.init(PARAMS))
    donating(tx.update(GRAD, tx.init(PARAMS), PARAMS)[1])


def test_a_copy_is_a_fork_that_can_be_donated():
    tx = osc.onecycle_adamw(0.1, TOTAL)
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(GRAD, tx.init(PARAMS), PARAMS)
    fork = jax.tree.map(jnp.copy, osc.start_cooldown(state, 5))
    update(GRAD, fork, PARAMS)
    update(GRAD, state, PARAMS)  # Not deleted.


# --- dicts ----------------------------------------------------------------------------

FORKS = {
    "set": lambda s: osc.set_hyperparams(s, {"learning_rate": 0.25}),
    "set-another": lambda s: osc.set_hyperparams(s, {"b1": 0.25}),
    "release": lambda s: osc.set_hyperparams(s, {"learning_rate": None}),
    "restart": osc.restart_schedules,
    "cooldown": lambda s: osc.start_cooldown(s, 3),
    "update": lambda s: osc.onecycle_adamw(0.1, TOTAL).update(GRAD, s, PARAMS)[1],
    "copy": lambda s: jax.tree.map(jnp.copy, s),
}


@pytest.mark.parametrize("fork", FORKS.values(), ids=FORKS)
def test_writing_into_a_fork_leaves_the_other_alone(fork):
    tx = osc.onecycle_adamw(0.1, TOTAL)
    state = tx.init(PARAMS)
    other = fork(state)
    for k, key in ((-1, "learning_rate"), (0, "b1"), (1, "weight_decay")):
        record = getattr(other[k], "hyperparams", None) or other[k].dials
        record[key] = jnp.float32(0.77)
    read = osc.read_hyperparams(state)
    assert not {np.float32(0.77)} & {np.float32(v) for v in read.values()}


@pytest.mark.parametrize("fork", FORKS.values(), ids=FORKS)
def test_writing_into_the_old_state_leaves_the_fork_alone(fork):
    tx = osc.onecycle_adamw(0.1, TOTAL)
    state = tx.init(PARAMS)
    other = fork(state)
    state[-1].hyperparams["learning_rate"] = jnp.float32(0.77)
    assert osc.read_hyperparams(other)["learning_rate"] != np.float32(0.77)


def test_two_inits_have_two_dicts():
    tx = osc.sgd(0.1)
    one, other = tx.init(PARAMS), tx.init(PARAMS)
    one[-1].hyperparams["learning_rate"] = 0.77
    assert osc.read_hyperparams(other)["learning_rate"] == np.float32(0.1)


def test_the_state_given_is_not_changed():
    tx = osc.sgd(falling)
    state = tx.init(PARAMS)
    osc.set_hyperparams(state, {"learning_rate": 0.77})
    osc.start_cooldown(state, 1)
    for t in range(2):
        _, state = tx.update(GRAD, state, PARAMS)
        read = osc.read_hyperparams(state)["learning_rate"]
        np.testing.assert_allclose(read, falling(t), rtol=1e-6)
