"""Does any run that is told to finish do so as if that had been planned?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from dialed import LABELS, Link, falling

import optax_superconv as osc

pytestmark = pytest.mark.slow

TOTAL, STEPS = 20, 32
MULTIPLIERS = {0: 0.25, 1: 3.0}
GRAD = {"body": np.ones((), np.float32), "head": np.ones((), np.float32)}
AT = [0, 1, 2, 5, 6, 7, 13, 18, 19, 20, 21, 27]
LENGTHS = [1, 2, 3, 7, 12, 40, 10**6]
PAIRS = np.array([(k, n) for k in AT for n in LENGTHS], np.int32)


def quadratic(remaining):
    return remaining**2


def runs(tx, pairs, act=lambda state, t: state):
    """What each of STEPS updates applied, for a cooldown of n steps before update k.

    ``act`` changes the state before each update, before the cooldown starts.
    """

    @jax.jit
    @jax.vmap
    def run(pair):
        def step(state, t):
            state = act(state, t)
            # A traced length of 0 starts nothing.
            length = jnp.where(t == pair[0], pair[1], 0)
            state = osc.start_cooldown(state, length)
            updates, state = tx.update(GRAD, state, GRAD)
            return state, osc.read_hyperparams(state) | {"updates": updates}

        return jax.lax.scan(step, tx.init(GRAD), jnp.arange(STEPS))[1]

    return jax.tree.map(np.asarray, run(jnp.asarray(pairs)))


@functools.cache
def planned(schedule):
    """The rates of the plan for each pair."""
    plans = [osc.with_cooldown(schedule, int(k + n), int(n)) for k, n in PAIRS]
    # Without `jit`, which would compile each of them.
    return np.stack([plan(jnp.arange(STEPS)) for plan in plans])


FEW = PAIRS[::6]


def planned_few(schedule, end, shape):
    """Those of FEW, compiled like the runs: geometric rates move by a few ulps."""
    options = {"end_value": end, "shape": shape}
    plans = [osc.with_cooldown(schedule, int(k + n), int(n), **options) for k, n in FEW]

    @jax.jit
    def run():
        return jax.lax.map(lambda t: [plan(t) for plan in plans], jnp.arange(STEPS))

    return np.stack(run())


ONECYCLE = osc.onecycle_schedule(0.1, TOTAL)
RECIPES = {
    "onecycle_adamw": lambda **options: osc.onecycle_adamw(0.1, TOTAL, **options),
    "onecycle_sgd": lambda **options: osc.onecycle_sgd(0.1, TOTAL, **options),
    "adamw": lambda **options: osc.adamw(ONECYCLE, **options),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_told_to_finish_had_planned_to(recipe):
    applied = runs(RECIPES[recipe](), PAIRS)
    np.testing.assert_array_max_ulp(applied["learning_rate"], planned(ONECYCLE), 2)


def test_groups_of_a_recipe_keep_their_proportion():
    tx = osc.onecycle_adamw(0.1, TOTAL, multipliers=MULTIPLIERS, param_labels=LABELS)
    applied = runs(tx, PAIRS)
    np.testing.assert_array_max_ulp(applied["learning_rate"], planned(ONECYCLE), 2)
    for label, factor in MULTIPLIERS.items():
        expected = np.float32(factor) * planned(ONECYCLE)
        np.testing.assert_allclose(
            applied[f"learning_rate/{label}"], expected, rtol=5e-7, atol=0
        )


def test_fine_tuning_can_be_told_to_finish():
    tx = osc.fine_tune_adamw(0.1, TOTAL, LABELS, decay=0.5)
    applied = runs(tx, PAIRS)
    np.testing.assert_array_max_ulp(applied["learning_rate"], planned(ONECYCLE), 2)
    np.testing.assert_allclose(
        applied["learning_rate/0"], 0.5 * planned(ONECYCLE), rtol=5e-7, atol=0
    )


CYCLE = osc.onecycle_schedule(0.1, TOTAL, end_value=1e-3)
ENDS = [("linear", 0.0, CYCLE), ("cosine", 0.01, CYCLE), ("1-sqrt", 0.3, CYCLE)]
ENDS += [("1-sqrt", 1e-4, falling), (quadratic, 1e-3, falling)]
ENDS += [("exponential", 1e-4, CYCLE)]


@pytest.mark.parametrize(("shape", "end", "schedule"), ENDS)
def test_the_link_has_the_shapes_and_ends_of_the_plan(shape, end, schedule):
    tx = osc.scale_by_learning_rate(
        schedule,
        cooldown_shape=shape,
        cooldown_end=end,
        multipliers={0: 0.5, 1: 1.0},
        param_labels=LABELS,
    )
    applied, expected = runs(tx, FEW), planned_few(schedule, end, shape)
    np.testing.assert_array_max_ulp(applied["learning_rate"], expected, 2)
    np.testing.assert_array_max_ulp(applied["learning_rate/1"], expected, 2)
    np.testing.assert_allclose(
        applied["learning_rate/0"], expected / 2, rtol=2e-6, atol=0
    )
    np.testing.assert_array_equal(
        applied["updates"]["body"], -applied["learning_rate/0"]
    )


def test_rates_by_the_formula():
    """Against float64, so that a plan and a cooldown cannot be wrong together."""
    pairs = [(0, 9), (3, 20), (17, 5), (19, 1), (25, 4)]
    tx = osc.onecycle_adamw(0.1, TOTAL, end_learning_rate=1e-3)

    def cycle(t):
        return reference.onecycle(t, 0.1, TOTAL, 6, 0.004, 1e-3, 0, "cosine")

    expected = [
        [reference.cooled(t, cycle, k + n, n, 0.0, "1-sqrt") for t in range(STEPS)]
        for k, n in pairs
    ]
    applied = runs(tx, pairs)["learning_rate"]
    np.testing.assert_allclose(applied, expected, rtol=2e-6, atol=0)


def test_the_fraction_that_is_over():
    shown = runs(osc.sgd(0.1), PAIRS)["cooldown"]
    elapsed = np.arange(STEPS) - PAIRS[:, :1]
    expected = np.clip(np.float32(elapsed) / np.float32(PAIRS[:, 1:]), 0, 1)
    np.testing.assert_array_equal(shown, expected)


def test_before_it_starts_nothing_changes():
    applied = runs(osc.onecycle_adamw(0.1, TOTAL), [(STEPS, 3), (9, 5)])
    plain = np.asarray(ONECYCLE(jnp.arange(STEPS)))
    np.testing.assert_array_max_ulp(applied["learning_rate"][0], plain, 1)
    np.testing.assert_array_equal(
        applied["learning_rate"][1, :10], applied["learning_rate"][0, :10]
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_other_dials_follow_their_schedules(recipe):
    applied = runs(RECIPES[recipe](), [(STEPS, 3), (9, 5)])
    for name in set(applied) - {"learning_rate", "cooldown", "updates"}:
        np.testing.assert_array_equal(applied[name][0], applied[name][1])


# --- with what is held ----------------------------------------------------------------


def test_a_held_rate_falls_from_where_it_is_held():
    tx = osc.onecycle_adamw(0.1, TOTAL)

    def hold(state, t):
        held = osc.set_hyperparams(state, {"learning_rate": 0.3})
        return jax.tree.map(lambda a, b: jnp.where(t == 0, a, b), held, state)

    applied = runs(tx, PAIRS, hold)["learning_rate"]
    np.testing.assert_array_max_ulp(applied, planned(lambda t: 0.3 + 0.0 * t), 2)


def test_a_held_group_falls_from_where_it_is_held():
    tx = osc.onecycle_adamw(0.1, TOTAL, multipliers=MULTIPLIERS, param_labels=LABELS)

    def hold(state, t):
        held = osc.set_hyperparams(state, {"learning_rate/0": 0.3})
        return jax.tree.map(lambda a, b: jnp.where(t == 0, a, b), held, state)

    applied = runs(tx, PAIRS, hold)
    np.testing.assert_array_max_ulp(applied["learning_rate"], planned(ONECYCLE), 2)
    # A rate of 0 past the end of the cycle has no proportion, but the end is 0 too.
    expected = planned(lambda t: 0.3 + 0.0 * t)
    np.testing.assert_allclose(applied["learning_rate/0"], expected, rtol=5e-7, atol=0)


def test_a_group_held_while_the_base_is_zero_falls_to_its_multiple_of_the_end():
    link = Link(
        0.0,
        multipliers={0: 0.5, 1: 1.0},
        param_labels=LABELS,
        cooldown_shape="linear",
        cooldown_end=0.02,
    )
    link.set(learning_rate__0=0.4).cool(2)
    rates = [link.step("learning_rate/0") for _ in range(4)]
    np.testing.assert_allclose(rates, [0.4, 0.205, 0.01, 0.01], rtol=1e-6)


def test_a_rate_set_to_zero_stays_there():
    link = Link(0.1).set(learning_rate=0.0).cool(3)
    assert [link.step() for _ in range(4)] == [0, 0, 0, 0]


def test_the_schedule_of_a_multiplier_is_not_looked_at_again():
    link = Link(
        0.1,
        multipliers={0: lambda t: 1.0 + t, 1: 1.0},
        param_labels=LABELS,
        cooldown_shape="linear",
    )
    link.step(), link.cool(4)
    rates = [link.step("learning_rate/0") for _ in range(5)]
    np.testing.assert_allclose(rates, [0.2, 0.15, 0.1, 0.05, 0.0], rtol=1e-6)


def test_set_and_started_before_one_update_it_falls_from_what_was_set():
    link = Link(0.1, cooldown_shape="linear").set(learning_rate=0.4).cool(4)
    rates = [link.step() for _ in range(5)]
    np.testing.assert_allclose(rates, [0.4, 0.3, 0.2, 0.1, 0.0], rtol=1e-6)


def written(link):
    link.state.hyperparams["learning_rate"] = jnp.float32(0.4)
    return link


def test_written_and_started_before_one_update_it_falls_from_what_was_written():
    link = written(Link(0.1, cooldown_shape="linear")).cool(4)
    rates = [link.step() for _ in range(5)]
    np.testing.assert_allclose(rates, [0.4, 0.3, 0.2, 0.1, 0.0], rtol=1e-6)


@pytest.mark.parametrize("act", [written, lambda link: link.set(learning_rate=0.4)])
def test_what_is_set_after_the_start_outranks_it_before_one_update_too(act):
    link = act(Link(0.1, cooldown_shape="linear").cool(4))
    assert [link.step() for _ in range(2)] == [np.float32(0.4)] * 2
    rates = [link.set(learning_rate=None).step() for _ in range(3)]
    np.testing.assert_allclose(rates, [0.05, 0.025, 0.0], rtol=1e-6)


# --- again ----------------------------------------------------------------------------


def test_pressed_again_it_goes_on_from_the_present_rate():
    link = Link(0.1, cooldown_shape="linear").cool(4)
    first = [link.step() for _ in range(2)]
    link.cool(2)
    again = [link.step() for _ in range(4)]
    np.testing.assert_allclose(first + again, [0.1, 0.075, 0.05, 0.025, 0, 0], 1e-6)


def test_pressed_again_groups_go_on_from_theirs():
    link = Link(
        0.1,
        multipliers={0: 0.5, 1: 2.0},
        param_labels=LABELS,
        cooldown_shape="linear",
        cooldown_end=0.02,
    )
    link.set(learning_rate__1=0.4).cool(4)
    link.step(), link.step(), link.cool(2)
    rates = [link.step("learning_rate/1") for _ in range(4)]
    np.testing.assert_allclose(rates, [0.24, 0.16, 0.08, 0.08], rtol=1e-6)


def test_pressed_while_a_rate_is_held_it_falls_from_that():
    link = Link(0.1, cooldown_shape="linear").cool(4)
    link.step(), link.set(learning_rate=0.4).step(), link.cool(2)
    np.testing.assert_allclose([link.step() for _ in range(3)], [0.4, 0.2, 0.0], 1e-6)


def test_pressed_after_its_end_it_stays_there():
    link = Link(0.1, cooldown_end=0.01).cool(1)
    link.step(), link.step(), link.cool(3)
    np.testing.assert_allclose([link.step() for _ in range(5)], 0.01, rtol=1e-6)


def test_the_last_of_two_lengths_counts():
    link = Link(0.1, cooldown_shape="linear").cool(100).cool(2)
    np.testing.assert_allclose([link.step() for _ in range(3)], [0.1, 0.05, 0], 1e-6)


def test_a_length_of_zero_takes_nothing_back():
    link = Link(0.1, cooldown_shape="linear").cool(2)
    link.state = jax.jit(osc.start_cooldown)(link.state, 0)
    np.testing.assert_allclose([link.step() for _ in range(3)], [0.1, 0.05, 0], 1e-6)


# --- forks ----------------------------------------------------------------------------


def test_a_state_forks_into_cooldowns_of_several_lengths():
    tx = osc.scale_by_learning_rate(0.1, cooldown_shape="linear")
    state, lengths = tx.init(GRAD), jnp.array([1, 2, 4])
    forks = jax.vmap(lambda n: osc.start_cooldown(state, n))(lengths)
    rates = []
    for _ in range(5):
        _, forks = jax.vmap(lambda state: tx.update(GRAD, state))(forks)
        rates.append(osc.read_hyperparams(forks)["learning_rate"])
    fractions = 1 - np.arange(5)[:, None] / np.asarray(lengths)
    np.testing.assert_allclose(rates, 0.1 * fractions.clip(0), rtol=1e-6)


@pytest.mark.parametrize("lengths", [3, np.array([1, 3])])
def test_forks_can_be_told_at_once(lengths):
    tx = osc.scale_by_learning_rate(0.1, cooldown_shape="linear")
    forks = jax.vmap(
        lambda rate: osc.set_hyperparams(tx.init(GRAD), {"learning_rate": rate})
    )
    state = osc.start_cooldown(forks(jnp.array([0.3, 0.6])), lengths)
    for _ in range(2):
        _, state = jax.vmap(lambda state: tx.update(GRAD, state))(state)
    expected = np.array([0.3, 0.6]) * (1 - 1 / np.asarray(lengths))
    read = osc.read_hyperparams(state)["learning_rate"]
    np.testing.assert_allclose(read, expected, rtol=1e-6)
