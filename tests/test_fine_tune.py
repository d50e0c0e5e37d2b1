"""The head first, then all, each at its own rate: against a run in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

import optax_superconv as osc

PEAK, TOTAL, FREEZE, WARMUP, DECAY = 0.1, 16, 5, 3, 0.4
DEPTHS = {"stem": 0, "blocks": 1, "head": 2}
by_path = osc.label_by_path([("stem/.*", 0), ("blocks/.*", 1), ("head/.*", 2)])


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=(3, 2)), dtype),
            "bias": jnp.asarray(rng.normal(size=2), dtype),
        }
        for name in DEPTHS
    }


def make_grads(steps):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)), p.dtype),
        make_params(),
    )


def train(tx, params, grads):
    """Parameters after each step, stacked, and the last state."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), history = jax.jit(
        lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads)
    )(params, grads)
    return history, state


def recipe(**options):
    options = {"decay": DECAY, "freeze_steps": FREEZE, "warmup_steps": WARMUP} | options
    return osc.fine_tune_adamw(PEAK, TOTAL, by_path, **options)


def multiplier(name, decay=DECAY, least=0.0):
    return reference.layer_decay(3, decay, least)[DEPTHS[name]]


def rate_at(count):
    return reference.fine_tune_dial(count, PEAK / 25, PEAK, TOTAL, FREEZE, WARMUP, 0.0)


def b1_at(count):
    return reference.fine_tune_dial(count, 0.95, 0.85, TOTAL, FREEZE, WARMUP, 0.95)


@pytest.mark.parametrize("least", [0.0, 0.3])
def test_matches_a_run_of_each_group_in_float64(least):
    params, grads = make_params(), make_grads(TOTAL + 3)
    tx = recipe(weight_decay=0.2, min_multiplier=least)
    history, _ = train(tx, params, grads)
    for name in DEPTHS:
        for leaf, decay in (("kernel", 0.2), ("bias", 0.0)):
            expected = reference.fine_tune(
                np.asarray(params[name][leaf], float),
                np.asarray(grads[name][leaf], float),
                PEAK, TOTAL, FREEZE, WARMUP,
                multiplier=multiplier(name, least=least),
                thaw=0 if name == "head" else FREEZE,
                decay=decay,
            )  # fmt: skip
            np.testing.assert_allclose(
                history[name][leaf], expected, rtol=1e-4, atol=1e-5
            )


def test_without_freezing_and_with_decay_one_it_is_onecycle_adamw():
    params, grads = make_params(), make_grads(TOTAL + 2)
    ours, _ = train(recipe(decay=1.0, freeze_steps=0), params, grads)
    theirs, _ = train(
        osc.onecycle_adamw(PEAK, TOTAL, warmup_steps=WARMUP), params, grads
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


def test_without_freezing_each_rate_is_that_of_onecycle_adamw_times_a_factor():
    params, grads = make_params(), make_grads(TOTAL)
    history, _ = train(recipe(freeze_steps=0, weight_decay=0.0), params, grads)
    for name in DEPTHS:
        scaled, _ = train(
            osc.onecycle_adamw(
                PEAK * multiplier(name), TOTAL, warmup_steps=WARMUP, weight_decay=0.0
            ),
            params[name],
            grads[name],
        )
        chex.assert_trees_all_close(history[name], scaled, rtol=1e-4, atol=1e-6)


def test_the_default_warmup_is_three_tenths_of_what_is_left():
    params, grads = make_params(), make_grads(TOTAL)
    default, _ = train(recipe(warmup_steps=None), params, grads)
    spelt_out, _ = train(recipe(warmup_steps=round(0.3 * (TOTAL - FREEZE))),
                         params, grads)  # fmt: skip
    other, _ = train(recipe(warmup_steps=6), params, grads)
    chex.assert_trees_all_equal(default, spelt_out)
    assert (default["head"]["bias"] != other["head"]["bias"]).any()


def test_the_default_decay_is_that_of_ulmfit():
    tx = osc.fine_tune_adamw(PEAK, TOTAL, by_path)
    read = osc.read_hyperparams(tx.init(make_params()))
    rates = [read[f"learning_rate/{k}"] * 25 / PEAK for k in range(3)]
    np.testing.assert_allclose(rates, [1 / 6.76, 1 / 2.6, 1.0], rtol=1e-5)


def dials_at(count):
    dials = {"learning_rate": rate_at(count)}
    for name, label in DEPTHS.items():
        is_head = name == "head"
        frozen = count < FREEZE and not is_head
        factor = 0.0 if frozen else multiplier(name)
        dials[f"learning_rate/{label}"] = factor * rate_at(count)
        # Until its thaw, what a group records is what its first step will apply.
        dials[f"b1/{label}"] = b1_at(count if is_head else max(count, FREEZE))
        dials[f"weight_decay/{label}"] = 0.01
    return dials


def test_reads_the_dials_of_each_step():
    params, tx = make_params(), recipe()
    state, update = tx.init(params), jax.jit(tx.update)
    for count in (None, *range(TOTAL + 2)):
        if count is not None:
            _, state = update(params, state, params)
        read, expected = osc.read_hyperparams(state), dials_at(count or 0)
        assert set(read) == set(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(
                read[key], value, rtol=1e-5, atol=1e-8, err_msg=f"{key} at {count}"
            )


def test_without_freezing_the_dials_have_no_labels():
    state = recipe(freeze_steps=0).init(make_params())
    assert set(osc.read_hyperparams(state)) == {
        "b1", "weight_decay", "learning_rate",
        "learning_rate/0", "learning_rate/1", "learning_rate/2",
    }  # fmt: skip


def test_all_but_the_last_group_are_frozen_until_the_thaw():
    params, tx = make_params(), recipe()
    state, update, frozen = tx.init(params), jax.jit(tx.update), []
    for _ in range(FREEZE + 1):
        frozen.append(osc.frozen_labels(state))
        _, state = update(params, state, params)
    assert frozen == [{0, 1}] * FREEZE + [set()]
    assert osc.frozen_labels(recipe(freeze_steps=0).init(params)) == set()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_groups_keep_their_bits(dtype):
    params = make_params(dtype)
    grads = jax.tree.map(lambda g: g.astype(dtype), make_grads(FREEZE + 5))
    history, _ = train(recipe(weight_decay=0.5), params, grads)
    for name in ("stem", "blocks"):
        for leaf in ("kernel", "bias"):
            before, trained = params[name][leaf], history[name][leaf]
            for count in range(FREEZE):
                assert np.asarray(trained[count]).tobytes() == (
                    np.asarray(before).tobytes()
                )
            assert (trained[-1] != before).any()


def test_the_head_keeps_its_moments_at_the_thaw():
    params, grads = make_params(), make_grads(TOTAL)
    history, _ = train(recipe(), params, grads)
    head = {"head": params["head"]}
    alone, _ = train(
        osc.fine_tune_adamw(
            PEAK, TOTAL, {"head": 2}, freeze_steps=FREEZE, warmup_steps=WARMUP
        ),
        head,
        {"head": grads["head"]},
    )
    chex.assert_trees_all_close(history["head"], alone["head"], rtol=1e-5)


def test_one_trace_and_one_structure_for_the_whole_run():
    params, tx = make_params(), recipe()
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, 1))
    state = tx.init(params)
    for _ in range(TOTAL):
        _, new_state = update(params, state, params)
        chex.assert_trees_all_equal_structs(new_state, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        state = new_state


@pytest.mark.parametrize("freeze_steps", [0, FREEZE])
def test_every_option_is_passed_on(freeze_steps):
    """From the thaw of everything on it is a cycle with the same options."""
    options = {
        "init_learning_rate": 0.05, "end_learning_rate": 0.01, "annihilation_steps": 2,
        "shape": "linear", "max_b1": 0.9, "base_b1": 0.7, "b2": 0.9, "eps": 0.1,
        "nesterov": True, "weight_decay": 0.3, "mu_dtype": jnp.bfloat16,
        "weight_decay_mask": lambda p: jax.tree.map(lambda x: x.ndim == 1, p),
    }  # fmt: skip
    params, grads = make_params(), make_grads(TOTAL)
    left = TOTAL - freeze_steps
    ours, _ = train(
        recipe(decay=1.0, freeze_steps=freeze_steps, **options), params, grads
    )
    theirs, _ = train(
        osc.onecycle_adamw(PEAK, left, warmup_steps=WARMUP, **options),
        params["stem"],
        jax.tree.map(lambda g: g[freeze_steps:], grads["stem"]),
    )
    after = jax.tree.map(lambda p: p[freeze_steps:], ours["stem"])
    chex.assert_trees_all_close(after, theirs, rtol=1e-4, atol=1e-6)


@functools.cache
def frozen_phase():
    return train(recipe(), make_params(), make_grads(FREEZE))[0]


@pytest.mark.parametrize("change", [
    {"init_learning_rate": 0.05}, {"shape": "linear"}, {"max_b1": 0.9},
    {"base_b1": 0.7}, {"b2": 0.9}, {"weight_decay": 0.3},
], ids=lambda change: next(iter(change)))  # fmt: skip
def test_every_option_moves_the_head_while_the_others_are_frozen(change):
    changed, _ = train(recipe(**change), make_params(), make_grads(FREEZE))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), frozen_phase(), changed)
    assert any(jax.tree.leaves(moved["head"]))
    assert not any(jax.tree.leaves([moved["stem"], moved["blocks"]]))


def test_schedules_of_the_other_dials_follow_the_run():
    """A weight decay that begins at step 9 begins there for late groups too."""
    params, grads = make_params(), make_grads(12)
    late = recipe(weight_decay=lambda count: jnp.where(count < 9, 0.0, 0.5))
    history, state = train(late, params, grads)
    plain, _ = train(recipe(weight_decay=0.0), params, grads)
    for name in DEPTHS:
        same = history[name]["kernel"] == plain[name]["kernel"]
        assert same[:9].all()
        assert not same[9:].all()
    read = osc.read_hyperparams(state)
    assert {float(read[f"weight_decay/{k}"]) for k in range(3)} == {0.5}


def test_values_may_be_traced():
    params, grads = make_params(), make_grads(TOTAL)

    def final(peak, decay):
        tx = osc.fine_tune_adamw(
            peak, TOTAL, by_path, decay=decay, freeze_steps=FREEZE, warmup_steps=WARMUP
        )
        return jax.tree.map(lambda p: p[-1], train(tx, params, grads)[0])

    plain, _ = train(recipe(), params, grads)
    chex.assert_trees_all_close(
        jax.jit(final)(PEAK, DECAY),
        jax.tree.map(lambda p: p[-1], plain),
        rtol=1e-4,
        atol=1e-6,
    )


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


def test_works_in_nnx_optimizer_with_labels_by_depth():
    net, start = Net(), Net()
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
        expected = {0, 1, 2} if count < 4 else set()
        assert osc.frozen_labels(optimizer) == expected
        losses.append(float(step(net, optimizer)))
        if count == 3:
            assert (net.embed.kernel[...] == start.embed.kernel[...]).all()
            assert (net.blocks[1].kernel[...] == start.blocks[1].kernel[...]).all()
            assert (net.head.kernel[...] != start.head.kernel[...]).all()
    assert (net.embed.kernel[...] != start.embed.kernel[...]).any()
    assert losses[-1] < losses[0] / 2


def test_multi_steps_counts_optimizer_steps():
    params = make_params()
    tx = optax.MultiSteps(recipe(), 2)
    state, update, frozen = tx.init(params), jax.jit(tx.update), []
    for _ in range(2 * FREEZE + 1):
        frozen.append(osc.frozen_labels(state))
        _, state = update(params, state, params)
    assert frozen == [{0, 1}] * (2 * FREEZE) + [set()]


def test_a_single_group_trains_through_both_phases():
    params, grads = make_params(), make_grads(TOTAL)
    tx = osc.fine_tune_adamw(
        PEAK, TOTAL, 0, freeze_steps=FREEZE, warmup_steps=WARMUP, weight_decay=0.0
    )
    history, state = train(tx, params, grads)
    assert osc.frozen_labels(state) == set()
    expected = reference.fine_tune(
        np.asarray(params["stem"]["bias"], float),
        np.asarray(grads["stem"]["bias"], float),
        PEAK, TOTAL, FREEZE, WARMUP, multiplier=1.0, thaw=0,
    )  # fmt: skip
    np.testing.assert_allclose(history["stem"]["bias"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("freeze_steps", [0, 3])
def test_a_tree_without_parameters_is_no_error(freeze_steps):
    tx = recipe(freeze_steps=freeze_steps)
    assert tx.update({}, tx.init({}), {})[0] == {}


@pytest.mark.parametrize("freeze_steps", [0, 3])
def test_labels_of_names_are_refused(freeze_steps):
    names = {"stem": "a", "blocks": "b", "head": "c"}
    tx = osc.fine_tune_adamw(PEAK, TOTAL, names, freeze_steps=freeze_steps)
    with pytest.raises(ValueError, match=r"^`param_labels` must give integers.*'a'"):
        tx.init(make_params())


def test_labels_that_do_not_fit_are_refused():
    tx = osc.fine_tune_adamw(PEAK, TOTAL, {"stem": 0, "head": 1}, freeze_steps=2)
    with pytest.raises(ValueError, match=r"^`param_labels`.*no label for 'blocks/bias"):
        tx.init(make_params())


def test_no_parameters_are_no_groups():
    tx = osc.fine_tune_adamw(0.1, 10, {}, freeze_steps=3)
    assert osc.frozen_labels(tx.init({})) == set()


def test_schedules_hold_at_the_largest_count():
    """The count of the run is the group's plus its thaw step, and both are int32."""
    tx = osc.fine_tune_adamw(
        0.1,
        10,
        [0, 1],
        freeze_steps=3,
        weight_decay=lambda count: jnp.where(count < 0, 9.0, 0.5),
    )
    params = [jnp.ones(1)] * 2
    last = jnp.int32(2**31 - 1)
    state = jax.tree.map(
        lambda leaf: last if leaf.dtype == jnp.int32 else leaf, tx.init(params)
    )
    _, state = tx.update(params, state, params)
    assert osc.read_hyperparams(state)["weight_decay/0"] == 0.5
