"""The head first, then all, each at its own rate: against a run in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from common import (
    assert_same_bits,
    at,
    frozen,
    make_grads,
    make_params,
    nothing,
    scan,
)
from flax import nnx

import optax_superconv as osc

pytestmark = pytest.mark.slow  # Most of it is compilation.

PEAK, TOTAL, FREEZE, WARMUP, DECAY = 0.1, 16, 5, 3, 0.4
DEPTHS = {"stem": 0, "blocks": 1, "head": 2}
by_path = osc.label_by_path([("stem/.*", 0), ("blocks/.*", 1), ("head/.*", 2)])
START = jax.tree.map(np.asarray, make_params(*DEPTHS))
GRADS = jax.tree.map(np.asarray, make_grads(TOTAL + 3, *DEPTHS))
VALUES = {
    "decay": DECAY, "min_multiplier": 0.0, "init_learning_rate": PEAK / 25,
    "max_momentum": 0.95, "base_momentum": 0.85, "weight_decay": 0.01,
}  # fmt: skip


def recipe(**options):
    options = {"decay": DECAY, "freeze_steps": FREEZE, "warmup_steps": WARMUP} | options
    return osc.fine_tune_adamw(PEAK, TOTAL, by_path, **options)


@functools.partial(jax.jit, static_argnames=("freeze_steps", "warmup_steps", "shape"))
def program(start, grads, **options):
    return scan(recipe(**options), start, grads)


def run(start=START, grads=GRADS, **options):
    """Parameters and states after each step, of one program for all ``VALUES``."""
    return jax.device_get(program(start, grads, **VALUES | options))


@jax.jit
def cycle(peak, start, grads, **options):
    tx = osc.onecycle_adamw(peak, TOTAL, warmup_steps=WARMUP, **options)
    return scan(tx, start, grads, read=nothing)[0]


def multiplier(name, decay=DECAY, least=0.0):
    return reference.layer_decay(3, decay, least)[DEPTHS[name]]


def rate_at(count):
    return reference.fine_tune_dial(count, PEAK / 25, PEAK, TOTAL, FREEZE, WARMUP, 0.0)


def b1_at(count):
    return reference.fine_tune_dial(count, 0.95, 0.85, TOTAL, FREEZE, WARMUP, 0.95)


@pytest.mark.parametrize("least", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_matches_a_run_of_each_group_in_float64(least):
    history, _ = run(weight_decay=0.2, min_multiplier=least)
    for name in DEPTHS:
        for leaf, decay in (("kernel", 0.2), ("bias", 0.0)):
            expected = reference.fine_tune(
                np.asarray(START[name][leaf], float),
                np.asarray(GRADS[name][leaf], float),
                PEAK, TOTAL, FREEZE, WARMUP,
                multiplier=multiplier(name, least=least),
                thaw=0 if name == "head" else FREEZE,
                decay=decay,
            )  # fmt: skip
            np.testing.assert_allclose(
                history[name][leaf], expected, rtol=1e-4, atol=1e-5
            )


def test_without_freezing_and_with_decay_one_it_is_onecycle_adamw():
    ours, _ = run(decay=1.0, freeze_steps=0)
    theirs = cycle(PEAK, START, GRADS, weight_decay=0.01)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


def test_without_freezing_each_rate_is_that_of_onecycle_adamw_times_a_factor():
    history, _ = run(freeze_steps=0, weight_decay=0.0)
    for name in DEPTHS:
        scaled = cycle(PEAK * multiplier(name), START, GRADS, weight_decay=0.0)
        chex.assert_trees_all_close(history[name], scaled[name], rtol=1e-4, atol=1e-6)


def test_the_default_warmup_is_three_tenths_of_what_is_left():
    assert WARMUP == round(0.3 * (TOTAL - FREEZE))
    # Two programs: XLA may round the same operations apart.
    ours, theirs = run(warmup_steps=None)[0], run()[0]
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_default_decay_is_that_of_ulmfit():
    tx = osc.fine_tune_adamw(PEAK, TOTAL, by_path)
    read = jax.jit(lambda params: osc.read_hyperparams(tx.init(params)))(START)
    rates = [read[f"learning_rate/{k}"] * 25 / PEAK for k in range(3)]
    np.testing.assert_allclose(rates, [1 / 6.76, 1 / 2.6, 1.0], rtol=1e-5)


def dials_at(count):
    dials = {"learning_rate": rate_at(count), "cooldown": 0.0}
    for name, label in DEPTHS.items():
        dials[f"frozen/{label}"] = count < FREEZE and name != "head"
        dials[f"learning_rate/{label}"] = multiplier(name) * rate_at(count)
    moments = {"b1": b1_at(count), "b2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
    for part in ("body", "head"):
        dials |= {f"{name}/{part}": value for name, value in moments.items()}
    return dials


def test_reads_the_dials_of_each_step():
    first = jax.jit(lambda params: osc.read_hyperparams(recipe().init(params)))(START)
    states = run()[1]
    reads = [first, *(osc.read_hyperparams(at(states, t)) for t in range(TOTAL + 2))]
    for step, read in enumerate(reads):
        expected = dials_at(max(step - 1, 0))
        assert set(read) == set(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(
                float(read[key]),
                value,
                rtol=1e-5,
                atol=1e-9,
                err_msg=f"{key} after {step}",
            )


def test_without_freezing_the_dials_of_the_moments_have_no_labels():
    tx = recipe(freeze_steps=0)
    read = jax.eval_shape(lambda params: osc.read_hyperparams(tx.init(params)), START)
    assert set(read) == {
        "b1", "b2", "eps", "weight_decay", "cooldown",
        "learning_rate", "learning_rate/0", "learning_rate/1", "learning_rate/2",
    }  # fmt: skip


def test_all_but_the_last_group_are_frozen_until_the_thaw():
    states = run()[1]
    assert frozen(recipe().init(START)) == {0, 1}
    after = [frozen(at(states, t)) for t in range(FREEZE + 1)]
    assert after == [{0, 1}] * FREEZE + [set()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_groups_keep_their_bits(dtype):
    start, grads = jax.tree.map(lambda x: x.astype(dtype), (START, GRADS))
    history, _ = run(start, grads, weight_decay=0.5)
    for name in ("stem", "blocks"):
        for count in range(FREEZE):
            assert_same_bits(at(history[name], count), start[name])
        for leaf in ("kernel", "bias"):
            assert (history[name][leaf][-1] != start[name][leaf]).any()


def test_the_head_keeps_its_moments_at_the_thaw():
    history, _ = run()
    alone = osc.fine_tune_adamw(
        PEAK, TOTAL, {"head": 2}, freeze_steps=FREEZE, warmup_steps=WARMUP
    )
    expected, _ = scan(
        alone, {"head": START["head"]}, {"head": GRADS["head"]}, read=nothing
    )
    chex.assert_trees_all_close(history["head"], expected["head"], rtol=1e-5)


@pytest.mark.parametrize(
    "freeze_steps", [pytest.param(0, marks=pytest.mark.slow), FREEZE]
)
def test_every_option_is_passed_on(freeze_steps):
    """From the thaw of everything on it is a cycle with the same options."""
    options = {
        "init_learning_rate": 0.05, "end_learning_rate": 0.01, "annihilation_steps": 2,
        "shape": "linear", "max_momentum": 0.9, "base_momentum": 0.7,
        "weight_decay": 0.3, "mask": lambda p: jax.tree.map(lambda x: x.ndim == 1, p),
    }  # fmt: skip
    tx = recipe(decay=1.0, freeze_steps=freeze_steps, **options)
    ours = jax.device_get(scan(tx, START, GRADS, read=nothing)[0]["stem"])
    left, after = TOTAL - freeze_steps, slice(freeze_steps, None)
    alone = osc.onecycle_adamw(PEAK, left, warmup_steps=WARMUP, **options)
    theirs, _ = scan(alone, START["stem"], at(GRADS["stem"], after), read=nothing)
    chex.assert_trees_all_close(at(ours, after), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"init_learning_rate": 0.05}, {"shape": "linear"}, {"max_momentum": 0.9},
    {"base_momentum": 0.7}, {"weight_decay": 0.3},
], ids=lambda change: next(iter(change)))  # fmt: skip
def test_every_option_moves_the_head_while_the_others_are_frozen(change):
    plain, changed = (at(run(**options)[0], FREEZE - 1) for options in ({}, change))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), plain, changed)
    assert any(jax.tree.leaves(moved["head"]))
    assert not any(jax.tree.leaves([moved["stem"], moved["blocks"]]))


def test_schedules_of_the_other_dials_follow_the_run():
    """A weight decay that begins at step 9 begins there for late groups too."""

    @jax.jit
    def decayed_from(begin):
        tx = recipe(weight_decay=lambda count: jnp.where(count < begin, 0.0, 0.5))
        return scan(tx, START, GRADS)

    history, states = jax.device_get(decayed_from(9))
    plain, _ = jax.device_get(decayed_from(TOTAL + 3))
    for name in DEPTHS:
        same = history[name]["kernel"] == plain[name]["kernel"]
        assert same[:9].all()
        assert not same[9].all()
    read = osc.read_hyperparams(at(states, 9))
    assert {float(read[f"weight_decay/{part}"]) for part in ("body", "head")} == {0.5}


@pytest.mark.slow
def test_values_may_be_traced():
    traced, _ = run()
    constant, _ = scan(recipe(), START, GRADS, read=nothing)
    chex.assert_trees_all_close(traced, constant, rtol=1e-4, atol=1e-6)


class Net(nnx.Module):
    """A stem, two blocks and a head."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Linear(2, 3, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):  # noqa: D102
        x = self.embed(x)
        for block in self.blocks:
            x = x + nnx.gelu(block(x))
        return self.head(x)


@pytest.mark.slow
def test_works_in_nnx_optimizer_with_labels_by_depth():
    net = Net()
    start = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.Param)))
    tx = osc.fine_tune_adamw(0.05, 20, osc.label_by_depth(), freeze_steps=4)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    x = jnp.array([[1.0, -1.0], [0.5, 2.0]])

    @nnx.jit
    def step(net, optimizer):
        loss, grads = nnx.value_and_grad(lambda net: ((net(x) - 1) ** 2).mean())(net)
        optimizer.update(net, grads)
        return loss

    losses = []
    for count in range(20):
        losses.append(float(step(net, optimizer)))
        assert frozen(optimizer) == ({0, 1, 2} if count < 4 else set())
        if count == 3:
            assert (net.embed.kernel[...] == start["embed"]["kernel"]).all()
            assert (net.blocks[1].kernel[...] == start["blocks"][1]["kernel"]).all()
            assert (net.head.kernel[...] != start["head"]["kernel"]).all()
    assert (net.embed.kernel[...] != start["embed"]["kernel"]).any()
    assert losses[-1] < losses[0] / 2


def test_a_single_group_trains_through_both_phases():
    start, grads = START["stem"]["bias"], GRADS["stem"]["bias"]
    tx = osc.fine_tune_adamw(
        PEAK, TOTAL, 0, freeze_steps=FREEZE, warmup_steps=WARMUP, weight_decay=0.0
    )
    history, states = jax.device_get(scan(tx, start, grads))
    assert frozen(at(states, -1)) == set()
    expected = reference.fine_tune(
        np.asarray(start, float), np.asarray(grads, float),
        PEAK, TOTAL, FREEZE, WARMUP, multiplier=1.0, thaw=0,
    )  # fmt: skip
    np.testing.assert_allclose(history, expected, rtol=1e-4, atol=1e-5)


MIXED = {
    "end": {"end_learning_rate": np.float64(1e-5)},
    "integers": {"peak_learning_rate": 1, "init_learning_rate": 0},
    "momentum": {"max_momentum": np.float64(0.95), "base_momentum": np.float32(0.85)},
}


@pytest.mark.slow
@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_values_of_several_dtypes_work_under_strict_promotion(mixed, x64, strict):
    options = {"peak_learning_rate": np.float32(1e-3)} | mixed
    tx = osc.fine_tune_adamw(
        total_steps=10, param_labels=by_path, freeze_steps=2, **options
    )
    state = tx.init(START)
    for _ in range(3):
        _, state = tx.update(START, state, START)
    assert osc.read_hyperparams(state)["learning_rate"].dtype == jnp.float32


@pytest.mark.parametrize("freeze_steps", [0, 3])
def test_a_tree_without_parameters_is_no_error(freeze_steps):
    tx = recipe(freeze_steps=freeze_steps)
    assert jax.eval_shape(tx.update, {}, jax.eval_shape(tx.init, {}), {})[0] == {}


@pytest.mark.parametrize("freeze_steps", [0, 3])
def test_labels_of_names_are_refused(freeze_steps):
    names = {"stem": "a", "blocks": "b", "head": "c"}
    tx = osc.fine_tune_adamw(PEAK, TOTAL, names, freeze_steps=freeze_steps)
    with pytest.raises(ValueError, match=r"^`param_labels` must be integers.*'a'"):
        tx.init(START)


def test_labels_that_do_not_fit_are_refused():
    tx = osc.fine_tune_adamw(PEAK, TOTAL, {"stem": 0, "head": 1}, freeze_steps=2)
    with pytest.raises(ValueError, match=r"^`param_labels`.*no label for 'blocks/bias"):
        tx.init(START)


def test_no_parameters_are_no_groups():
    tx = osc.fine_tune_adamw(0.1, 10, {}, freeze_steps=3)
    assert frozen(tx.init({})) == set()


def test_schedules_hold_at_the_largest_count():
    """The count of the run is the group's plus its thaw step, and both are int32."""
    tx = osc.fine_tune_adamw(
        0.1,
        10,
        [0, 1],
        freeze_steps=3,
        weight_decay=lambda count: jnp.where(count < 0, 9.0, 0.5),
    )
    params = [np.ones((), np.float32)] * 2
    last = np.int32(2**31 - 1)
    state = jax.tree.map(
        lambda leaf: last if leaf.dtype == jnp.int32 else leaf, tx.init(params)
    )
    _, state = jax.jit(tx.update)(params, state, params)
    assert osc.read_hyperparams(state)["weight_decay/body"] == 0.5
