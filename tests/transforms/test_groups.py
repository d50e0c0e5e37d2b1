"""Which rate for which parameter, and what is read back of it?"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from common import at, make_grads, make_params, train, types
from flax import nnx
from flax.core import FrozenDict

import optax_superconv as osc

LABELS = {"body": 0, "head": 1}
MULTIPLIERS = {0: 0.25, 1: 2.0}
by_path = osc.label_by_path([("body/.*", 0), ("head/.*", 1)])


def assert_matches(history, params, grads, expected):
    """``expected(path, params, grads)`` of each leaf, in float64."""

    def check(path, got, start, g):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        want = expected(name, np.asarray(start, float), np.asarray(g, float))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=name)

    jax.tree_util.tree_map_with_path(check, history, params, grads)


def assert_reads(state, values):
    read = osc.read_hyperparams(state)
    assert set(read) == set(values)
    for name, value in values.items():
        assert read[name].dtype == jnp.float32
        np.testing.assert_allclose(read[name], value, rtol=1e-5, err_msg=name)


# --- multipliers ----------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.75, 0.65])
def test_fourteen_groups_have_the_scales_of_timm(decay):
    multipliers = osc.layerwise_multipliers(range(14), decay)
    assert list(multipliers) == list(range(14))
    np.testing.assert_allclose(
        list(multipliers.values()), reference.LAYER_DECAY[decay], rtol=5e-6
    )


def test_layer_decay_of_a_tree_that_label_by_depth_made():
    params = {"embed": jnp.ones(1), "layers": [jnp.ones(1)] * 12, "head": jnp.ones(1)}
    labels = osc.label_by_depth()(params)
    multipliers = osc.layerwise_multipliers(labels, 0.75)
    values = [multipliers[labels[name]] for name in ("embed", "head")]
    np.testing.assert_allclose(values, [0.75**13, 1.0])


def test_ulmfit_divides_the_rate_by_2_6_per_group():
    multipliers = osc.layerwise_multipliers(range(4), 1 / 2.6)
    expected = [1 / 17.576, 1 / 6.76, 1 / 2.6, 1.0]
    np.testing.assert_allclose(list(multipliers.values()), expected, rtol=1e-12)


@pytest.mark.parametrize("least", [0.0, 0.1, 0.3, 1.0])
def test_no_multiplier_is_below_the_least(least):
    multipliers = osc.layerwise_multipliers(range(6), 0.5, min_multiplier=least)
    expected = reference.layer_decay(6, 0.5, least)
    np.testing.assert_allclose(list(multipliers.values()), expected)


def test_even_mults_of_fastai():
    """``even_mults(2, 8, 3)`` is [2, 4, 8] in fastai's own tests."""
    assert osc.geometric_multipliers(range(3), 2, 8) == {0: 2.0, 1: 4.0, 2: 8.0}


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
@pytest.mark.parametrize("ends", [(1e-5, 1e-3), (None, 1e-3), (0.01, 1.0), (2.0, 2.0)])
def test_geometric_multipliers_are_the_slice_of_fastai(groups, ends):
    multipliers = osc.geometric_multipliers(range(groups), *ends)
    np.testing.assert_allclose(
        list(multipliers.values()), reference.fastai_slice(*ends, groups), rtol=1e-12
    )


def test_both_ends_of_the_slice_are_exact():
    multipliers = osc.geometric_multipliers(range(7), 0.003, 0.7)
    assert (multipliers[0], multipliers[6]) == (0.003, 0.7)


ORDERS = {
    "range": (range(3), [0, 1, 2]),
    "gaps": ([7, 2, 11, 2], [2, 7, 11]),
    "negative": ([-1, -3, 4], [-3, -1, 4]),
    "tree": ({"x": [5, 1], "y": 3}, [1, 3, 5]),
    "set_of_integers": ({3, 1, 2}, [1, 2, 3]),
    "names": (["stem", "body", "head"], ["stem", "body", "head"]),
    "names_again": (("b", "a", "b", "c"), ["b", "a", "c"]),
}


@pytest.mark.parametrize(("labels", "order"), ORDERS.values(), ids=ORDERS)
def test_groups_are_ranked_from_the_input_to_the_output(labels, order):
    multipliers = osc.layerwise_multipliers(labels, 0.5)
    assert multipliers == dict(zip(order, (0.25, 0.5, 1.0), strict=True))


@pytest.mark.parametrize("labels", ["head", 3, ["head"], {"a": "head"}, {"head"}])
def test_a_single_group_has_the_whole_rate(labels):
    assert list(osc.layerwise_multipliers(labels, 0.5).values()) == [1.0]
    assert list(osc.geometric_multipliers(labels, 0.5).values()) == [1.0]
    assert list(osc.geometric_multipliers(labels).values()) == [1.0]


def test_labels_that_kept_the_variables_of_nnx_are_ranked():
    model = nnx.Sequential(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    labels = jax.tree.map(lambda _: 4, nnx.state(model, nnx.Param))
    assert osc.layerwise_multipliers(labels, 0.5) == {4: 1.0}


def lowest(decay):
    return osc.layerwise_multipliers(range(3), decay)[0]


def test_decay_may_be_traced_batched_and_derived():
    np.testing.assert_allclose(jax.jit(lowest)(0.5), 0.25)
    np.testing.assert_allclose(jax.vmap(lowest)(jnp.array([0.5, 0.2])), [0.25, 0.04])
    np.testing.assert_allclose(jax.jit(jax.grad(lowest))(0.3), 0.6, rtol=1e-6)


def test_the_least_multiplier_may_be_traced():
    def least(value):
        return osc.layerwise_multipliers(range(3), 0.5, min_multiplier=value)[0]

    np.testing.assert_allclose(jax.jit(least)(0.3), 0.3)
    np.testing.assert_allclose(jax.jit(least)(0.1), 0.25)


def test_the_ends_of_the_slice_may_be_traced():
    def middle(low, high):
        return osc.geometric_multipliers(range(3), low, high)[1]

    np.testing.assert_allclose(jax.jit(middle)(0.25, 4.0), 1.0)
    np.testing.assert_allclose(jax.jit(jax.grad(middle))(0.25, 1.0), 1.0, rtol=1e-6)


def test_nothing_raises_under_jit():
    np.testing.assert_allclose(jax.jit(lowest)(2.0), 4.0)


# --- scaling --------------------------------------------------------------------------


def test_scaling_is_the_partition_of_scales():
    params, grads = make_params(*LABELS), make_grads(3, *LABELS)
    ours = optax.chain(
        optax.scale_by_adam(), osc.scale_by_group(MULTIPLIERS, by_path), optax.scale(-1)
    )
    theirs = optax.chain(
        optax.scale_by_adam(),
        optax.partition({k: optax.scale(m) for k, m in MULTIPLIERS.items()}, by_path),
        optax.scale(-1),
    )
    chex.assert_trees_all_close(
        train(ours, params, grads)[0], train(theirs, params, grads)[0], rtol=1e-6
    )


@pytest.mark.parametrize(
    "labels",
    [LABELS, by_path, lambda params: LABELS, jax.tree.map(lambda x: x, LABELS)],
    ids=["prefix", "by_path", "function", "tree"],
)
def test_updates_are_multiplied_by_the_factor_of_their_label(labels):
    params = make_params(*LABELS)
    tx = osc.scale_by_group(MULTIPLIERS, labels)
    updates, _ = tx.update(params, tx.init(params))
    for name, factor in (("body", 0.25), ("head", 2.0)):
        for leaf in ("kernel", "bias"):
            np.testing.assert_allclose(updates[name][leaf], factor * params[name][leaf])


def test_each_label_may_have_a_schedule():
    tx = osc.scale_by_group({0: lambda count: 1 / (count + 1), 1: 3.0}, LABELS)
    params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    state = tx.init(params)
    for count in range(4):
        updates, state = jax.jit(tx.update)(params, state)
        np.testing.assert_allclose(updates["body"], 1 / (count + 1), rtol=1e-6)
        np.testing.assert_allclose(updates["head"], 3.0)


def test_multipliers_may_be_a_function_of_the_sorted_labels():
    seen = []

    def multipliers(labels):
        seen.append(labels)
        return osc.layerwise_multipliers(labels, 0.5)

    tx = osc.scale_by_group(multipliers, {"a": 9, "b": 10, "c": 2})
    params = dict.fromkeys("abc", jnp.ones(1))
    updates, _ = tx.update(params, tx.init(params))
    assert all(labels == [2, 9, 10] for labels in seen)
    assert {k: float(u[0]) for k, u in updates.items()} == {"a": 0.5, "b": 1, "c": 0.25}


def test_more_than_ten_integer_labels_keep_their_own_multipliers():
    params = {f"layer_{k}": jnp.ones(1) for k in range(12)}
    tx = osc.scale_by_group({k: float(k) for k in range(12)}, osc.label_by_depth())
    updates, state = tx.update(params, tx.init(params))
    read = osc.read_hyperparams(state)
    for k in range(12):
        assert updates[f"layer_{k}"] == k
        assert read[f"multiplier/{k}"] == k


def test_half_precision_is_rounded_once():
    params = make_params(*LABELS, dtype="bfloat16")
    tx = osc.scale_by_group({0: 0.123, 1: 0.7}, LABELS)
    updates, _ = tx.update(params, tx.init(params))
    for name, factor in (("body", 0.123), ("head", 0.7)):
        wide = params[name]["kernel"].astype(jnp.float32)
        expected = (np.float32(factor) * wide).astype(jnp.bfloat16)
        np.testing.assert_array_equal(updates[name]["kernel"], expected)


def test_every_leaf_keeps_its_dtype():
    params = {
        "body": {"x": jnp.ones(2, jnp.bfloat16), "y": jnp.ones(2)},
        "head": jnp.ones(2, jnp.float16),
    }
    tx = osc.scale_by_group({0: 0.5, 1: lambda count: 2.0}, LABELS)
    updates, _ = tx.update(params, tx.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_a_multiplier_of_zero_stops_a_group():
    params, grads = make_params(*LABELS), make_grads(3, *LABELS)
    tx = optax.chain(optax.adam(0.1), osc.scale_by_group({0: 0.0, 1: 1.0}, LABELS))
    history, _ = train(tx, params, grads)
    chex.assert_trees_all_equal(at(history, -1)["body"], params["body"])


DECAYED = {
    "after_the_decay": lambda decay, scale: (decay, scale),
    "before_the_decay": lambda decay, scale: (scale, decay),
}


@pytest.mark.parametrize("order", DECAYED.values(), ids=DECAYED)
def test_the_place_in_the_chain_decides_whether_decay_is_scaled(order):
    params, grads = make_params(*LABELS), make_grads(8, *LABELS)
    decay = optax.add_decayed_weights(0.3)
    scale = osc.scale_by_group(MULTIPLIERS, by_path)
    tx = optax.chain(
        osc.scale_by_scheduled_adam(0.9, 0.99),
        *order(decay, scale),
        osc.scale_by_learning_rate(0.05),
    )
    history, _ = train(tx, params, grads)
    is_scaled = order(0, 1) == (0, 1)

    def expected(path, p, g):
        factor = MULTIPLIERS[LABELS[path.split("/")[0]]]
        strength = 0.3 if is_scaled else 0.3 / factor
        return reference.adamw(
            p, g, lambda t: 0.05 * factor, lambda t: 0.9, lambda t: 0.99,
            decay=lambda t: strength,
        )  # fmt: skip

    assert_matches(history, params, grads, expected)


def test_before_adam_a_constant_factor_is_undone():
    params, grads = make_params(*LABELS), make_grads(4, *LABELS)
    scale = osc.scale_by_group(MULTIPLIERS, by_path)
    adam = optax.adam(0.1, eps=0.0)
    chex.assert_trees_all_close(
        train(optax.chain(scale, adam), params, grads)[0],
        train(adam, params, grads)[0],
        rtol=1e-5,
    )


def test_before_and_after_the_momentum_of_sgd_is_the_same_for_constants():
    params, grads = make_params(*LABELS), make_grads(6, *LABELS)
    scale = osc.scale_by_group(MULTIPLIERS, by_path)
    sgd = optax.sgd(0.1, momentum=0.9)
    chex.assert_trees_all_close(
        train(optax.chain(scale, sgd), params, grads)[0],
        train(optax.chain(sgd, scale), params, grads)[0],
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_finished_optimizer_may_be_scaled():
    params, grads = make_params(*LABELS), make_grads(10, *LABELS)
    tx = optax.chain(
        osc.onecycle_adamw(0.1, 10, weight_decay=0.2, mask=None),
        osc.scale_by_group(MULTIPLIERS, by_path),
    )
    history, _ = train(tx, params, grads)

    def expected(path, p, g):
        factor = MULTIPLIERS[LABELS[path.split("/")[0]]]
        return reference.adamw(
            p,
            g,
            lambda t: (
                factor * reference.onecycle(t, 0.1, 10, 3, 0.1 / 25, 0.0, 0, "cosine")
            ),
            lambda t: reference.onecycle(t, 0.85, 10, 3, 0.95, 0.95, 0, "cosine"),
            lambda t: 0.99,
            decay=lambda t: 0.2,
        )

    assert_matches(history, params, grads, expected)


def test_clipping_by_the_global_norm_outside_stays_global():
    params, grads = make_params(*LABELS), at(make_grads(1, *LABELS), 0)
    tx = optax.chain(
        optax.clip_by_global_norm(0.5), osc.scale_by_group(MULTIPLIERS, by_path)
    )
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    leaves = [np.asarray(x, float) for x in jax.tree.leaves(grads)]
    norm = np.sqrt(sum((x**2).sum() for x in leaves))
    assert norm > 1
    for name, factor in (("body", 0.25), ("head", 2.0)):
        expected = factor * 0.5 / norm * np.asarray(grads[name]["kernel"], float)
        np.testing.assert_allclose(updates[name]["kernel"], expected, rtol=1e-5)


def test_one_trace_serves_schedules_and_constants():
    tx = osc.scale_by_group({0: lambda count: 1.0 * count, 1: 1.0}, by_path)
    params, grads = make_params(*LABELS), make_grads(5, *LABELS)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, 1))
    state = tx.init(params)
    for t in range(5):
        _, state = update(at(grads, t), state)


def test_constant_and_schedule_share_one_structure():
    params = make_params(*LABELS)
    constant = osc.scale_by_group({0: 1.0, 1: 2.0}, by_path)
    scheduled = osc.scale_by_group({0: lambda t: 1.0, 1: 2.0}, by_path)
    first, second = (jax.eval_shape(tx.init, params) for tx in (constant, scheduled))
    assert types(first) == types(second)


# --- what is read back ----------------------------------------------------------------


def rate_of(count):
    return 0.1 / (count + 1)


def linked(rate, **options):
    """The rate link with a constant and a scheduled multiplier."""
    multipliers = {0: 0.25, 1: lambda count: 2.0 + count}
    return osc.scale_by_learning_rate(
        rate, multipliers=multipliers, param_labels=by_path, **options
    )


RATES = {"constant": (0.1, lambda count: 0.1), "schedule": (rate_of, rate_of)}


@pytest.mark.parametrize(("given", "rate"), RATES.values(), ids=RATES)
def test_reads_the_rate_that_each_group_got(given, rate):
    tx, params = linked(given), make_params(*LABELS)
    state = tx.init(params)
    for count in (0, 0, 1, 2):
        expected = {
            "learning_rate": rate(count),
            "learning_rate/0": 0.25 * rate(count),
            "learning_rate/1": (2.0 + count) * rate(count),
            "cooldown": 0.0,
        }
        assert_reads(state, expected)
        if count == 2:
            break
        _, state = tx.update(params, state, params)


def test_what_is_read_is_what_was_applied():
    tx = linked(rate_of)
    params = {"body": {"x": jnp.ones(())}, "head": {"x": jnp.ones(())}}
    state = tx.init(params)
    for count in range(3):
        updates, state = tx.update(params, state, params)
        read = osc.read_hyperparams(state)
        np.testing.assert_allclose(
            -updates["body"]["x"], 0.25 * rate_of(count), rtol=1e-6
        )
        np.testing.assert_allclose(-updates["body"]["x"], read["learning_rate/0"])
        np.testing.assert_allclose(-updates["head"]["x"], read["learning_rate/1"])


def test_the_rates_of_groups_are_those_of_scaling_by_group():
    params, grads = make_params(*LABELS), make_grads(4, *LABELS)
    apart = optax.chain(
        osc.scale_by_group(MULTIPLIERS, by_path), osc.scale_by_learning_rate(rate_of)
    )
    joined = osc.scale_by_learning_rate(
        rate_of, multipliers=MULTIPLIERS, param_labels=by_path
    )
    chex.assert_trees_all_close(
        train(joined, params, grads)[0], train(apart, params, grads)[0], rtol=1e-6
    )


def test_the_rates_of_groups_cool_down_in_proportion():
    tx, params = linked(0.1, cooldown_end=0.01), make_params(*LABELS)
    state = tx.init(params)
    for count in range(9):
        state = osc.start_cooldown(state, 5) if count == 2 else state
        _, state = tx.update(params, state, params)
        rate = reference.cooled(count, lambda t: 0.1, 7, 5, 0.01, "1-sqrt")
        # Once it cools down, the multipliers are those of the step where it started.
        assert_reads(
            state,
            {
                "learning_rate": rate,
                "learning_rate/0": 0.25 * rate,
                "learning_rate/1": (2.0 + min(count, 2)) * rate,
                "cooldown": min(max(count - 2, 0) / 5, 1.0),
            },
        )


PLACES = {"before": lambda scale, rate: (scale, rate)}
PLACES["after"] = lambda scale, rate: (rate, scale)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_factors_beside_a_rate_are_read_as_they_are(place):
    scale = osc.scale_by_group({0: 0.25, 1: lambda count: 2.0 + count}, by_path)
    tx = optax.chain(*place(scale, osc.scale_by_learning_rate(rate_of)))
    params = make_params(*LABELS)
    state = tx.init(params)
    for count in range(3):
        _, state = tx.update(params, state, params)
        assert_reads(
            state,
            {
                "multiplier/0": 0.25,
                "multiplier/1": 2.0 + count,
                "learning_rate": rate_of(count),
                "cooldown": 0.0,
            },
        )


def test_reads_each_group_inside_partition():
    tx = optax.partition(
        {
            "on": osc.scale_by_learning_rate(
                0.1,
                multipliers={0: 0.25, 1: 2.0},
                param_labels={"body": 0, "head": 1, "rest": 0},
            ),
            "off": osc.scale_by_learning_rate(0.3),
        },
        {"body": "on", "head": "on", "rest": "off"},
    )
    assert_reads(
        tx.init({**make_params(*LABELS), "rest": jnp.ones(2)}),
        {
            "learning_rate/on": 0.1,
            "learning_rate/on/0": 0.025,
            "learning_rate/on/1": 0.2,
            "cooldown/on": 0.0,
            "learning_rate/off": 0.3,
            "cooldown/off": 0.0,
        },
    )


def test_reads_each_group_around_partition():
    tx = optax.chain(
        optax.partition(
            {"a": osc.scheduled_trace(0.8), "b": osc.scheduled_trace(0.9)},
            {"body": "a", "head": "b"},
        ),
        osc.scale_by_learning_rate(0.1, multipliers=MULTIPLIERS, param_labels=by_path),
    )
    assert_reads(
        tx.init(make_params(*LABELS)),
        {
            "momentum/a": 0.8,
            "momentum/b": 0.9,
            "learning_rate": 0.1,
            "learning_rate/0": 0.025,
            "learning_rate/1": 0.2,
            "cooldown": 0.0,
        },
    )


def test_reads_each_group_around_gradual_unfreezing():
    """A frozen group reports the rate that it would have."""
    tx = optax.chain(
        osc.gradual_unfreezing(osc.scheduled_trace(0.9), {0: 3, 1: 0}, by_path),
        osc.scale_by_learning_rate(0.1, multipliers=MULTIPLIERS, param_labels=by_path),
    )
    params = make_params(*LABELS)
    state, update = tx.init(params), jax.jit(tx.update)
    for count in range(5):
        _, state = update(params, state, params)
        read = {name: float(x) for name, x in osc.read_hyperparams(state).items()}
        assert read == pytest.approx(
            {
                "frozen/0": float(count < 3),
                "frozen/1": 0.0,
                "momentum/0": 0.9,
                "momentum/1": 0.9,
                "learning_rate": 0.1,
                "learning_rate/0": 0.025,
                "learning_rate/1": 0.2,
                "cooldown": 0.0,
            }
        )


def test_reads_each_group_inside_gradual_unfreezing():
    """Each inner state has the rates of its own clock for the groups it holds."""
    inner = osc.scale_by_learning_rate(
        rate_of,
        multipliers=lambda labels: {k: MULTIPLIERS[k] for k in labels},
        param_labels=by_path,
    )
    tx = osc.gradual_unfreezing(inner, {0: 2, 1: 0}, by_path)
    params = make_params(*LABELS)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
    read = osc.read_hyperparams(state)
    applied = {0: 0.25 * rate_of(0), 1: 2.0 * rate_of(2)}
    for label, name in enumerate(("body", "head")):
        np.testing.assert_allclose(
            updates[name]["bias"], -applied[label] * params[name]["bias"], rtol=1e-5
        )
        np.testing.assert_allclose(
            read[f"learning_rate/{label}/{label}"], applied[label], rtol=1e-5
        )


def test_an_unknown_rate_leaves_the_multiplier():
    tx = optax.chain(optax.adamw(0.1), osc.scale_by_group(MULTIPLIERS, by_path))
    assert_reads(
        tx.init(make_params(*LABELS)), {"multiplier/0": 0.25, "multiplier/1": 2.0}
    )


def test_reads_each_group_under_jit_and_multi_steps():
    tx = optax.MultiSteps(linked(rate_of), 2)
    params = make_params(*LABELS)

    @jax.jit
    def step(state):
        _, state = tx.update(params, state, params)
        return state, osc.read_hyperparams(state)

    state = tx.init(params)
    for _ in range(4):
        state, read = step(state)
    np.testing.assert_allclose(read["learning_rate/0"], 0.25 * rate_of(1), rtol=1e-6)


def test_a_batch_of_states_gives_a_batch_of_rates():
    params = make_params(*LABELS)
    states = jax.vmap(lambda peak: linked(peak).init(params))(
        jnp.array([0.1, 0.2, 0.4])
    )
    np.testing.assert_allclose(
        osc.read_hyperparams(states)["learning_rate/0"], [0.025, 0.05, 0.1], rtol=1e-6
    )


def test_reads_each_group_of_an_nnx_optimizer():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = osc.scale_by_learning_rate(
        rate_of,
        multipliers={"k": 0.5, "b": 2.0},
        param_labels=osc.label_by_path([("kernel", "k"), ("bias", "b")]),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
        optimizer.update(model, grads)
        return osc.read_hyperparams(optimizer)

    for count in range(3):
        inside = step(model, optimizer)
        expected = {
            "learning_rate": rate_of(count),
            "learning_rate/k": 0.5 * rate_of(count),
            "learning_rate/b": 2.0 * rate_of(count),
            "cooldown": 0.0,
        }
        np.testing.assert_allclose(
            inside["learning_rate/k"], 0.5 * rate_of(count), rtol=1e-5
        )
        assert_reads(optimizer, expected)
        assert_reads(optimizer.opt_state, expected)


def test_groups_and_a_constant_rate_share_one_structure_with_schedules():
    params = make_params(*LABELS)
    constant = osc.scale_by_learning_rate(
        0.1, multipliers=MULTIPLIERS, param_labels=by_path
    )
    first, second = (
        types(jax.eval_shape(tx.init, params)) for tx in (constant, linked(rate_of))
    )
    assert first == second


# --- groups that differ in kind -------------------------------------------------------


def of_two_kinds(clip):
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.multi_transform(
            {
                "sgd": osc.onecycle_sgd(0.2, 10, max_momentum=0.9, base_momentum=0.8),
                "adamw": osc.onecycle_adamw(0.01, 10, weight_decay=0.1),
            },
            osc.label_by_path([("body/.*", "sgd"), ("head/.*", "adamw")]),
        ),
    )


def test_groups_of_two_kinds_are_clipped_together_and_trained_apart():
    params, grads = make_params(*LABELS), make_grads(10, *LABELS)
    history, _ = train(of_two_kinds(0.7), params, grads)
    squares = [
        np.asarray(g, float).reshape(10, -1) ** 2 for g in jax.tree.leaves(grads)
    ]
    norms = np.sqrt(np.concatenate(squares, axis=1).sum(1))
    factors = [min(1.0, 0.7 / norm) for norm in norms]
    assert max(factors) < 1

    def cycle(peak, ends):
        return lambda t: reference.onecycle(t, peak, 10, 3, *ends, 0, "cosine")

    def expected(path, p, g):
        g = np.stack([f * x for f, x in zip(factors, g, strict=True)])
        if path.startswith("body"):
            return reference.sgd(
                p, g, cycle(0.2, (0.008, 0.0)), cycle(0.8, (0.9, 0.9)), nesterov=True
            )
        is_matrix = p.ndim > 1
        return reference.adamw(
            p, g, cycle(0.01, (0.0004, 0.0)), cycle(0.85, (0.95, 0.95)),
            lambda t: 0.99, decay=lambda t: 0.1 * is_matrix,
        )  # fmt: skip

    assert_matches(history, params, grads, expected)


def test_groups_of_two_kinds_give_their_dials_by_label():
    _, state = train(of_two_kinds(1.0), make_params(*LABELS), make_grads(4, *LABELS))
    assert_reads(
        state,
        {
            "learning_rate/sgd": 0.2,
            "momentum/sgd": 0.8,
            "cooldown/sgd": 0.0,
            "learning_rate/adamw": 0.01,
            "b1/adamw": 0.85,
            "b2/adamw": 0.99,
            "eps/adamw": 1e-8,
            "weight_decay/adamw": 0.1,
            "cooldown/adamw": 0.0,
        },
    )


# --- state ----------------------------------------------------------------------------


TREE_LABELS = jax.tree.map(lambda _: 0, make_params(*LABELS)) | {
    "head": {"kernel": 1, "bias": 1}
}
MAPPED = {  # and how many arrays of its state are like a parameter
    "scale_by_group": (lambda labels: osc.scale_by_group(MULTIPLIERS, labels), 0),
    "scale_by_learning_rate": (
        lambda labels: osc.scale_by_learning_rate(
            0.1, multipliers=MULTIPLIERS, param_labels=labels
        ),
        0,
    ),
    "adamw": (
        lambda labels: osc.adamw(0.1, multipliers=MULTIPLIERS, param_labels=labels),
        8,
    ),
    "gradual_unfreezing": (
        lambda labels: osc.gradual_unfreezing(optax.adam(0.1), {0: 3, 1: 0}, labels),
        8,
    ),
    "never_thawed": (
        lambda labels: osc.gradual_unfreezing(optax.adam(0.1), {0: None, 1: 0}, labels),
        4,
    ),
    "fine_tune_adamw": (
        lambda labels: osc.fine_tune_adamw(0.1, 10, labels, freeze_steps=3),
        8,
    ),
    "fine_tune_adamw_at_once": (
        lambda labels: osc.fine_tune_adamw(0.1, 10, labels),
        8,
    ),
}


@pytest.mark.parametrize(
    "labels", [by_path, LABELS, TREE_LABELS], ids=["by_path", "prefix", "tree"]
)
@pytest.mark.parametrize(("make", "arrays"), MAPPED.values(), ids=MAPPED)
def test_map_params_finds_the_parameters_in_a_state(make, arrays, labels):
    tx = make(labels)
    state = tx.init(make_params(*LABELS))
    found = []
    optax.tree.map_params(tx, found.append, state)
    assert len(found) == arrays
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    chex.assert_trees_all_equal(mapped, state)


def test_factors_of_two_chains_side_by_side_are_numbered():
    def link(factor, rate, mask):
        tx = osc.scale_by_learning_rate(
            rate, multipliers={0: factor, 1: 1.0}, param_labels=[0, 1]
        )
        return optax.masked(tx, mask)

    tx = optax.chain(link(0.5, 1.0, [True, False]), link(0.25, 0.125, [False, True]))
    read = osc.read_hyperparams(tx.init([jnp.ones(1)] * 2))
    assert read["learning_rate/0"] == 0.5
    assert read["learning_rate/0_1"] == 0.25 * 0.125


def test_names_read_from_the_outside_in():
    tx = optax.partition(
        {"kind": osc.fine_tune_adamw(0.1, 10, [0, 1], freeze_steps=3)}, ["kind"] * 2
    )
    read = osc.read_hyperparams(tx.init([jnp.ones(1)] * 2))
    assert {"learning_rate/kind", "learning_rate/kind/1", "b1/kind/head"} <= set(read)


@pytest.mark.parametrize(
    "make",
    [
        lambda: osc.onecycle_adamw(0.1, 10),
        lambda: osc.fine_tune_adamw(0.1, 10, osc.label_by_depth(), freeze_steps=2),
        lambda: osc.scale_by_group(
            lambda labels: dict.fromkeys(labels, 0.5), osc.label_by_depth()
        ),
    ],
    ids=["onecycle_adamw", "fine_tune_adamw", "scale_by_group"],
)
def test_nnx_masks_that_are_made_leaf_by_leaf(make):
    """They leave an empty Variable at init, and nothing at update."""
    model = nnx.Sequential(*(nnx.Linear(2, 2, rngs=nnx.Rngs(k)) for k in range(2)))
    tx = optax.masked(make(), lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = model.layers[1].kernel[...]
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    nnx.jit(lambda optimizer, *args: optimizer.update(*args))(optimizer, model, grads)
    assert (model.layers[1].kernel[...] != before).any()


@pytest.mark.parametrize("labels", [{"x": "b", "y": "a"}, [["b"], ["a"]]])
def test_a_tree_of_names_has_no_order(labels):
    with pytest.raises(ValueError, match=r"^`labels` must be .* no order"):
        osc.layerwise_multipliers(labels, 0.5)


def test_a_function_of_names_gets_no_order_that_the_names_do_not_have():
    names = {"stem": "stem", "body": "body", "head": "head"}
    params = {name: jnp.ones(1) for name in names}
    multipliers = functools.partial(osc.layerwise_multipliers, decay=0.5)
    with pytest.raises(ValueError, match=r"^`labels` must be .* no order"):
        osc.scale_by_group(multipliers, names).init(params)


def test_a_dict_of_multipliers_may_change_afterwards():
    multipliers = {0: 0.5, 1: 1.0}
    tx = osc.scale_by_group(multipliers, [0, 1])
    multipliers[0] = -3.0
    params = [jnp.ones(1)] * 2
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates[0] == 0.5


# --- a table for a person -------------------------------------------------------------


TABLED = {
    "embed": jnp.ones((3, 5)),
    "layers": [{"w": jnp.ones((40, 30)), "b": jnp.ones(30), "g": jnp.ones(())}],
    "head": jnp.ones(1),
}


def test_the_table_has_a_line_for_each_group():
    label = osc.label_by_depth()
    multipliers = {0: 1 / 3, 1: lambda count: 0.5 + count, 2: 1.0}
    assert osc.describe_groups(TABLED, label, multipliers).splitlines() == [
        "group  leaves  parameters  multiplier  paths",
        "0           1          15      0.3333  embed",
        "1           3       1,231         0.5  layers/0/b, layers/0/g, ...",
        "2           1           1           1  head",
    ]


def test_the_table_has_a_line_for_each_leaf_on_request():
    label = osc.label_by_depth()
    multipliers = {0: 1 / 3, 1: lambda count: 0.5 + count, 2: 1.0}
    found = osc.describe_groups(TABLED, label, multipliers, leaves=True)
    assert found.splitlines() == [
        "group  parameters  multiplier  path",
        "0          (3, 5)      0.3333  embed",
        "2            (1,)           1  head",
        "1           (30,)         0.5  layers/0/b",
        "1              ()         0.5  layers/0/g",
        "1        (40, 30)         0.5  layers/0/w",
    ]


def test_the_table_does_without_multipliers():
    table = osc.describe_groups({"a": jnp.ones(1), "b": jnp.ones(1)}, ["x", "y"][0])
    assert table.splitlines() == [
        "group  leaves  parameters  paths",
        "x           2           2  a, b",
    ]


def test_the_table_shows_the_ends_of_an_array():
    multipliers = {0: np.linspace(0.1, 1, 12), 1: 1.0}
    table = osc.describe_groups(
        {"layers": jnp.ones((12, 2)), "head": jnp.ones(2)},
        {"layers": 0, "head": 1},
        multipliers,
    )
    assert table.splitlines()[1] == "0           1          24  0.1 ... 1 (12)  layers"


@pytest.mark.parametrize("leaves", [False, True])
def test_the_table_takes_what_has_shapes_only(leaves):
    label = osc.label_by_depth()
    abstract = jax.eval_shape(lambda: TABLED)
    found = osc.describe_groups(abstract, label, leaves=leaves)
    assert found == osc.describe_groups(TABLED, label, leaves=leaves)


def test_the_table_takes_multipliers_as_a_function_and_variables():
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    table = osc.describe_groups(
        nnx.state(model, nnx.Param),
        osc.label_by_path([("bias", 0), ("kernel", 1)]),
        functools.partial(osc.layerwise_multipliers, decay=0.5),
    )
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["0", "1", "1", "0.5", "bias"],
        ["1", "1", "1", "1", "kernel"],
    ]


# --- bad input ------------------------------------------------------------------------


ONES = {"body": jnp.ones(2), "head": jnp.ones(2)}
FACTORS = {
    "missing": ({0: 1.0}, r"`multipliers` must have every .* 1 \(head"),
    "idle": ({0: 1.0, 1: 1.0, 7: 1.0}, "`multipliers` must each have a parameter.* 7"),
    "function_missing": (lambda labels: {0: 1.0}, "`multipliers` must have every"),
    "function_negative": (
        lambda labels: dict.fromkeys(labels, -1.0), r"`multipliers\[0\]` must be finite"
    ),
    "function_empty": (lambda labels: {}, "`multipliers` must be a dict of at least"),
}  # fmt: skip


@pytest.mark.parametrize(("multipliers", "message"), FACTORS.values(), ids=FACTORS)
def test_multipliers_that_do_not_fit_the_labels_are_refused(multipliers, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        osc.scale_by_group(multipliers, LABELS).init(ONES)
    with pytest.raises(ValueError, match=f"^{message}"):
        osc.scale_by_learning_rate(
            0.1, multipliers=multipliers, param_labels=LABELS
        ).init(ONES)
    with pytest.raises(ValueError, match=f"^{message}"):
        osc.describe_groups(ONES, LABELS, multipliers)


@pytest.mark.parametrize("result", [3, None, [1.0, 2.0]], ids=str)
def test_a_function_that_makes_no_dict_is_refused(result):
    with pytest.raises(TypeError, match=r"^`multipliers` must"):
        osc.scale_by_group(lambda labels: result, LABELS).init(ONES)


def test_a_multiplier_is_one_number():
    with pytest.raises((ValueError, TypeError), match=r"^`multipliers"):
        osc.scale_by_group({0: jnp.ones(3), 1: 1.0}, LABELS).init(ONES)


@pytest.mark.parametrize("bad", [[1.0], {0: "x", 1: 1.0}], ids=str)
def test_the_table_refuses_what_scaling_refuses(bad):
    with pytest.raises((ValueError, TypeError), match=r"^`multipliers"):
        osc.describe_groups(ONES, LABELS, bad)


OTHERS = {
    "missing_leaf": ({"body": jnp.ones(2)}, "without 'head'"),
    "extra_leaf": ({**ONES, "tail": jnp.ones(2)}, "with new 'tail'"),
    "renamed_leaf": (
        {"body": jnp.ones(2), "hat": jnp.ones(2)}, "without 'head' and with new 'hat'"
    ),
    "deeper": (
        {"body": jnp.ones(2), "head": [jnp.ones(2)]},
        "without 'head' and with new 'head/0'",
    ),
    "list": (
        [jnp.ones(2), jnp.ones(2)], "without 'body', 'head' and with new '0', '1'"
    ),
    "frozen_dict": (FrozenDict(ONES), "containers of another kind (FrozenDict"),
    "none": ({"body": jnp.ones(2), "head": None}, "without 'head'"),
}  # fmt: skip
GUARDED = {
    "scale_by_group": osc.scale_by_group(MULTIPLIERS, lambda _: LABELS),
    "scale_by_learning_rate": osc.scale_by_learning_rate(
        0.1, multipliers=MULTIPLIERS, param_labels=lambda _: LABELS
    ),
    "gradual_unfreezing": osc.gradual_unfreezing(
        optax.sgd(0.1, momentum=0.9), {0: 1, 1: 0}, lambda _: LABELS
    ),
}


@pytest.mark.parametrize("tx", GUARDED.values(), ids=GUARDED)
@pytest.mark.parametrize(("updates", "reason"), OTHERS.values(), ids=OTHERS)
def test_updates_unlike_the_parameters_at_init_are_refused(tx, updates, reason):
    with pytest.raises(ValueError, match=r"^`updates` must have") as error:
        tx.update(updates, tx.init(ONES))
    assert reason in str(error.value)


def test_names_in_a_tree_have_no_order():
    with pytest.raises(ValueError, match=r"^`labels` must be numbers, or names.*'a'"):
        osc.layerwise_multipliers({"x": "a", "y": "b"}, 0.5)


@pytest.mark.parametrize("make", [osc.layerwise_multipliers, osc.geometric_multipliers])
def test_labels_must_be_called_first(make):
    with pytest.raises(TypeError, match=r"^`labels` must be.*Call it with"):
        make(osc.label_by_depth(), 0.5)


@pytest.mark.parametrize("labels", [["a", 0], [0.5, 1.5], True], ids=str)
@pytest.mark.parametrize("make", [osc.layerwise_multipliers, osc.geometric_multipliers])
def test_labels_of_several_kinds_are_refused_by_their_name(make, labels):
    with pytest.raises(TypeError, match=r"^`labels` must"):
        make(labels, 0.5)


@pytest.mark.parametrize("argument", ["multipliers", "thaw_steps"])
def test_keys_of_several_kinds_are_refused_by_their_name(argument):
    make = {
        "multipliers": lambda: osc.scale_by_group({"a": 1.0, 0: 1.0}, LABELS),
        "thaw_steps": lambda: osc.gradual_unfreezing(
            optax.sgd(0.1), {"a": 1, 0: 1}, LABELS
        ),
    }[argument]
    with pytest.raises(TypeError, match=f"^`{argument}` must"):
        make()


def test_labels_below_what_masked_hides_are_not_in_the_way():
    params = make_params(*LABELS)
    tx = optax.masked(
        osc.scale_by_group(MULTIPLIERS, TREE_LABELS), {"body": False, "head": True}
    )
    updates, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(updates["body"], params["body"])
    chex.assert_trees_all_close(
        updates["head"], jax.tree.map(lambda p: 2 * p, params["head"])
    )


class Converted(functools.partial):
    """A function that a library has made a pytree of, with what it closed over."""


jax.tree_util.register_pytree_node(
    Converted,
    lambda function: ((function.func, *function.args), None),
    lambda _, children: Converted(*children),
)


def test_functions_that_have_become_pytrees_are_called():
    params = {"body": jnp.ones((2, 2)), "head": jnp.ones((2, 2))}

    def label_fn(low, high, params):
        del params
        return {"body": low, "head": high}

    def mask(name, params):
        return {key: key == name for key in params}

    def made_by(wrap):
        return osc.adamw(
            0.1,
            mask=wrap(mask, "head"),
            multipliers=wrap(lambda labels: dict.fromkeys(labels, 0.5)),
            param_labels=wrap(label_fn, 0, 1),
        )

    found, wanted = (
        tx.update(params, tx.init(params), params)[0]
        for tx in (made_by(Converted), made_by(functools.partial))
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
