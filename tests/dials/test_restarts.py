"""Does a run begin anew with all of its schedules, and with nothing else?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_same_bits, at
from dialed import (
    GRADS,
    LABELS,
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
RUN = 8


def injected(make, **options):
    return lambda: optax.inject_hyperparams(make)(**options)


RUNS = RECIPES | UNFREEZING
RUNS |= {
    "inject-sgd": injected(osc.sgd, learning_rate=falling, momentum=0.9),
    "inject-optax": injected(optax.adamw, learning_rate=falling, b1=falling),
    "link": lambda: osc.scale_by_learning_rate(falling),
    "group": lambda: osc.scale_by_group({0: falling, 1: 1.0}, LABELS),
    "averages": lambda: optax.chain(
        osc.onecycle_sgd(0.1, TOTAL), osc.ema_params(0.9), osc.swa_params(2)
    ),
    "partition": lambda: optax.partition(
        {0: osc.sgd(falling), 1: osc.onecycle_adamw(0.1, TOTAL)}, LABELS
    ),
    "masked": lambda: optax.masked(osc.sgd(falling), {"body": True, "head": False}),
    "apply_if_finite": lambda: optax.apply_if_finite(osc.sgd(falling), 3),
    "named_chain": lambda: optax.named_chain(("tx", osc.sgd(falling))),
    "cooldown-end": lambda: osc.scale_by_learning_rate(
        falling, cooldown_shape="exponential", cooldown_end=0.01
    ),
}


def two_runs(tx, between=osc.restart_schedules, steps=RUN, **options):
    """What each of two runs has read."""
    _, read, _ = follow(tx, 2 * steps, {steps: between}, **options)
    return [
        {k: v[part] for k, v in read.items()}
        for part in (slice(steps), slice(steps, None))
    ]


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_the_second_run_applies_the_dials_of_the_first(make):
    first, second = two_runs(make())
    jax.tree.map(np.testing.assert_array_equal, second, first)


@pytest.mark.parametrize("run", ["groups", "fine_tune-freeze", "inject-sgd", "link"])
def test_restarted_in_the_middle_of_jit(run):
    """As above, decided inside the program."""
    tx = RUNS[run]()

    @jax.jit
    def run():
        def step(state, t):
            again = osc.restart_schedules(state)
            state = jax.tree.map(lambda a, b: jnp.where(t == 3, a, b), again, state)
            _, state = tx.update(GRAD, state, PARAMS)
            return state, osc.read_hyperparams(state)

        return jax.lax.scan(step, tx.init(PARAMS), jnp.arange(6))[1]

    read = run()
    jax.tree.map(lambda v: np.testing.assert_array_equal(v[3:], v[:3]), read)


def test_after_a_cooldown_and_with_holds_it_is_the_first_run_again():
    tx = osc.onecycle_adamw(0.1, RUN, multipliers={0: 0.5, 1: 1.0}, param_labels=LABELS)
    _, first, _ = follow(tx, RUN)

    def disturb(state):
        values = {"learning_rate/0": 0.7, "b1": 0.3, "weight_decay": 0.5, "eps": 0.1}
        return osc.set_hyperparams(state, values)

    actions = {
        1: setting("learning_rate", 0.4),
        2: lambda state: osc.start_cooldown(state, 4),
        4: disturb,
        RUN: osc.restart_schedules,
    }
    _, read, _ = follow(tx, 2 * RUN, actions)
    jax.tree.map(lambda v, w: np.testing.assert_array_equal(v[RUN:], w), read, first)


PENDING = {
    "set": setting("learning_rate", 0.4),
    "tree.set": lambda state: optax.tree.set(state, learning_rate=0.4),
    "dict": lambda s: s[-1].hyperparams.update(learning_rate=jnp.float32(0.4)) or s,
    "cooldown": lambda state: osc.start_cooldown(state, 2),
    "momentum": lambda s: s[0].dials.update(momentum=jnp.float32(0.4)) or s,
}


@pytest.mark.parametrize("pending", PENDING.values(), ids=PENDING)
def test_what_has_not_been_applied_yet_is_lifted(pending):
    first, second = two_runs(
        osc.onecycle_sgd(0.1, RUN), lambda s: osc.restart_schedules(pending(s))
    )
    jax.tree.map(np.testing.assert_array_equal, second, first)


@pytest.mark.parametrize("wanted", PENDING.values(), ids=PENDING)
def test_what_is_wanted_after_the_restart_is_applied(wanted):
    tx = osc.sgd(falling)
    _, plain, _ = follow(tx, 6, {3: osc.restart_schedules})
    _, read, _ = follow(tx, 6, {3: lambda s: wanted(osc.restart_schedules(s))})
    assert any((read[k][4:] != plain[k][4:]).any() for k in read)


def test_a_second_cooldown_is_the_first_again():
    tx = osc.onecycle_sgd(0.1, RUN)
    cool = {2: lambda state: osc.start_cooldown(state, 3)}
    cool |= {RUN: osc.restart_schedules, RUN + 2: cool[2]}
    _, read, _ = follow(tx, 2 * RUN, cool)
    jax.tree.map(lambda v: np.testing.assert_array_equal(v[RUN:], v[:RUN]), read)


# --- what goes on ---------------------------------------------------------------------


def warm(tx, steps=5):
    return follow(tx, steps)[2]


@pytest.mark.parametrize("make", [osc.onecycle_adamw, osc.onecycle_sgd])
def test_moments_and_their_weights_stay(make):
    state = warm(make(0.1, TOTAL))
    again = osc.restart_schedules(state)
    kept = ("mu", "nu", "mu_weight", "nu_weight", "trace")
    for old, new in zip(state, again, strict=True):
        for name in kept:
            assert_same_bits(getattr(new, name, ()), getattr(old, name, ()))


def test_the_second_run_goes_on_with_the_moments_of_the_first():
    """A constant gradient has a momentum of 1 + .5 + .25 ..., however often begun."""
    tx = osc.sgd(1.0, 0.5, nesterov=False)
    state, ones = tx.init(1.0), jnp.ones(())
    for k in range(6):
        state = osc.restart_schedules(state) if k == 3 else state
        updates, state = tx.update(ones, state)
        assert float(updates) == -(2 - 0.5**k)


@pytest.mark.parametrize(
    "link",
    [
        osc.ema_params(0.9),
        osc.swa_params(2),
        osc.average_params(power=1.0),
        osc.lawa_params(2),
        osc.record_gradient_norms(TOTAL, ord=2),
    ],
    ids=["ema", "swa", "average", "lawa", "norms"],
)
def test_averages_and_records_stay(link):
    state = warm(optax.chain(osc.sgd(falling), link))
    assert_same_bits(osc.restart_schedules(state)[-1], state[-1])


def test_the_micro_steps_of_an_accumulation_stay():
    state = warm(optax.MultiSteps(osc.sgd(falling), 3), 5)
    again = osc.restart_schedules(state)
    for name in set(state._fields) - {"inner_opt_state"}:
        assert_same_bits(getattr(again, name), getattr(state, name))


def test_an_accumulation_that_is_interrupted_is_step_0_when_it_is_emitted():
    tx = optax.MultiSteps(osc.sgd(falling), 2)
    applied = rates(tx, 9, {5: osc.restart_schedules})
    # Steps are emitted at 1, 3 and, after the restart, 5 and 7.
    expected = [falling(t) for t in (0, 0, 0, 1, 1, 0, 0, 1, 1)]
    np.testing.assert_array_equal(applied, expected)


def test_a_counter_of_bad_steps_stays():
    tx = optax.apply_if_finite(osc.sgd(falling), 3)
    bad = jax.tree.map(lambda g: g * jnp.nan, GRAD)
    _, state = tx.update(bad, warm(tx), PARAMS)
    again = osc.restart_schedules(state)
    assert int(again.notfinite_count) == int(again.total_notfinite) == 1


# --- schedules of Optax ---------------------------------------------------------------


def updates_of(tx, between, steps=3):
    """Updates of a constant gradient, before and after."""
    state, found = tx.init(PARAMS), []
    update = jax.jit(tx.update)
    for t in range(2 * steps):
        state = between(state) if t == steps else state
        updates, state = update(GRAD, state, PARAMS)
        found.append(updates)
    return found[:steps], found[steps:]


OPTAX = {
    "sgd": lambda: optax.sgd(falling),
    "decay": lambda: optax.add_decayed_weights(falling),
    "scale_by_schedule": lambda: optax.scale_by_schedule(falling),
    "chain": lambda: optax.chain(
        optax.add_decayed_weights(falling), optax.sgd(falling)
    ),
    "masked": lambda: optax.masked(
        optax.sgd(falling), lambda tree: jax.tree.map(lambda _: True, tree)
    ),
    "inject": injected(optax.sgd, learning_rate=falling),
    "inject-inject": lambda: optax.chain(
        injected(optax.add_decayed_weights, weight_decay=falling)(),
        injected(optax.sgd, learning_rate=falling)(),
    ),
    "unfreezing": lambda: osc.gradual_unfreezing(
        optax.sgd(falling), {0: 1, 1: 0}, LABELS
    ),
}


@pytest.mark.parametrize("make", OPTAX.values(), ids=OPTAX)
def test_schedules_of_optax_begin_anew(make):
    first, second = updates_of(make(), osc.restart_schedules)
    assert_same_bits(second, first)


def test_adams_count_is_no_schedule():
    state = warm(optax.adamw(falling))
    again = osc.restart_schedules(state)
    assert [int(x) for x in optax.tree.get_all_with_path(again, "count")[0][1:]] == [5]
    counts = [int(value) for _, value in optax.tree.get_all_with_path(again, "count")]
    assert sorted(counts) == [0, 5]


def test_of_inject_hyperparams_constants_that_were_set_stay():
    tx = optax.inject_hyperparams(osc.sgd)(learning_rate=falling, momentum=0.5)
    actions = {1: setting("momentum", 0.7), 3: osc.restart_schedules}
    np.testing.assert_array_equal(
        rates(tx, 5, actions, "momentum")[3:], np.float32(0.7)
    )


def test_of_inject_hyperparams_adams_count_stays():
    state = warm(optax.inject_hyperparams(optax.adamw)(falling))
    again = osc.restart_schedules(state)
    assert_same_bits(again.inner_state, state.inner_state)
    assert int(again.count) == 0


# --- freezing -------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*UNFREEZING, "fine_tune-freeze"])
def test_groups_freeze_and_thaw_again(recipe):
    tx = RUNS[recipe]()
    first, second = two_runs(tx)
    np.testing.assert_array_equal(first["frozen/0"], np.arange(RUN) < 3)
    np.testing.assert_array_equal(second["frozen/0"], first["frozen/0"])


@pytest.mark.parametrize("recipe", [*UNFREEZING, "fine_tune-freeze"])
def test_frozen_again_every_bit_stays(recipe):
    tx = RUNS[recipe]()
    history, *_ = follow(tx, RUN + 4, {RUN: osc.restart_schedules})
    last = at(history, RUN - 1)["body"]
    for t in range(RUN, RUN + 3):
        assert_same_bits(at(history, t)["body"], last)
    moved = jax.tree.map(np.not_equal, at(history, RUN + 3)["body"], last)
    assert all(x.any() for x in jax.tree.leaves(moved))


def test_a_thawed_group_keeps_its_moments_through_a_restart():
    tx = osc.gradual_unfreezing(osc.onecycle_adamw(0.1, TOTAL), {0: 3, 1: 0}, LABELS)
    state = warm(tx)
    again = osc.restart_schedules(state)
    for label in (0, 1):
        old, new = (
            s.inner_state.inner_states[label].inner_state for s in (state, again)
        )
        assert_same_bits((new[0].mu, new[0].nu_weight), (old[0].mu, old[0].nu_weight))


# --- states ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_a_fresh_state_is_as_it_was_before(make):
    tx = make()
    state = tx.init(PARAMS)
    again = osc.restart_schedules(state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert_same_bits(osc.read_hyperparams(again), osc.read_hyperparams(state))


def test_in_place_in_nnx():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, osc.onecycle_adamw(0.1, TOTAL), wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    read = []
    for t in range(6):
        if t == 3:
            osc.restart_schedules(optimizer)
        optimizer.update(model, grads)
        read.append(float(osc.read_hyperparams(optimizer)["learning_rate"]))
    assert read[3:] == read[:3]


def test_forks_restart_together():
    tx = osc.sgd(falling)
    fork = functools.partial(osc.set_hyperparams, tx.init(PARAMS))
    state = jax.vmap(lambda rate: fork({"learning_rate": rate}))(jnp.arange(3.0))
    update = jax.vmap(lambda state: tx.update(GRAD, state, PARAMS)[1])
    state = update(osc.restart_schedules(update(state)))
    read = osc.read_hyperparams(state)["learning_rate"]
    np.testing.assert_array_equal(read, np.float32([0.1] * 3))
