"""Which groups train from which step on, and what of the others is touched?"""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import (
    assert_same_bits,
    at,
    frozen,
    make_grads,
    make_params,
    nothing,
    scan,
    train,
    types,
)
from flax import nnx, serialization
from flax.training.train_state import TrainState

import optax_superconv as osc

LABELS = {"body": 0, "neck": 1, "head": 2}
THAWS = {0: 6, 1: 3, 2: 0}
NAMES = {label: name for name, label in LABELS.items()}
by_path = osc.label_by_path(
    [("body/.*", 0), ("neck/.*", 1), ("head/.*", 2)], unmatched_rules="warn"
)
START = jax.tree.map(np.asarray, make_params(*LABELS))
GRADS = jax.tree.map(np.asarray, make_grads(101, *LABELS))
SCALARS = [np.zeros((), np.float32)] * 3
ADAMW = optax.adamw(0.1, weight_decay=0.3)
TX = osc.gradual_unfreezing(ADAMW, THAWS, by_path)


def run(tx, steps=10, thaw=0, dtype="float32"):
    """Parameters and states after each step, with the gradients from ``thaw`` on."""
    grads = at(GRADS, slice(thaw, thaw + steps))
    start, grads = jax.tree.map(lambda x: x.astype(dtype), (START, grads))
    return jax.device_get(scan(tx, start, grads))


def run_scalars(tx, steps):
    """The same for three scalars, labelled 0, 1, 2, whose gradients are 1."""
    return jax.device_get(scan(tx, SCALARS, [np.ones(steps, np.float32)] * 3))


def moments(state):
    """The Adam states inside, in the order of their labels."""
    leaves = jax.tree.leaves(
        state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
    )
    return [x for x in leaves if isinstance(x, optax.ScaleByAdamState)]


def only(tree, name):
    """The leaves of one group."""
    return jax.tree.leaves(tree[name])


def all_moved(new, old):
    """Whether every leaf has an element of another value."""
    changed = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), new, old)
    return all(jax.tree.leaves(changed))


# --- what is frozen keeps its bits ----------------------------------------------------


def frozen_adamw(thaws):
    return osc.gradual_unfreezing(ADAMW, thaws, by_path)


CHAINS = {
    "decay_inside": frozen_adamw,
    "decay_before": lambda thaws: optax.chain(
        optax.add_decayed_weights(0.3),
        osc.gradual_unfreezing(optax.sgd(0.1, momentum=0.9), thaws, by_path),
    ),
    "clipped_before": lambda thaws: optax.chain(
        optax.clip_by_global_norm(0.5), frozen_adamw(thaws)
    ),
    "noise_before": lambda thaws: optax.chain(
        optax.add_noise(0.1, 0.5, 0), frozen_adamw(thaws)
    ),
    "rate_after": lambda thaws: optax.chain(
        osc.gradual_unfreezing(
            optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.3)),
            thaws,
            by_path,
        ),
        osc.scale_by_learning_rate(0.1),
    ),
}


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        *(
            pytest.param(
                make,
                "float32",
                id=name,
                # Random numbers take long to compile.
                marks=pytest.mark.slow if name == "noise_before" else (),
            )
            for name, make in CHAINS.items()
        ),
        pytest.param(frozen_adamw, "bfloat16", id="bfloat16"),
    ],
)
def test_frozen_leaves_keep_their_bits_for_a_hundred_steps(make, dtype):
    start, grads = jax.tree.map(lambda x: x.astype(dtype), (START, GRADS))
    params, _ = jax.device_get(
        scan(make({0: None, 1: 100, 2: 0}), start, grads, read=nothing)
    )
    assert_same_bits(at(params["body"], 100), start["body"])
    assert_same_bits(at(params["neck"], 99), start["neck"])
    assert all_moved(at(params["head"], 99), start["head"])
    assert all_moved(at(params["neck"], 100), start["neck"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_do_no_harm_while_frozen(bad):
    tx = frozen_adamw({0: None, 1: 2, 2: 0})
    grads = jax.tree.map(np.copy, at(GRADS, slice(4)))
    for name, end in (("body", 4), ("neck", 2)):
        for leaf in only(grads, name):
            leaf[:end] = bad
    params, states = jax.device_get(scan(tx, START, grads))
    assert_same_bits(at(params["body"], -1), START["body"])
    chex.assert_tree_all_finite((params, states))
    chex.assert_trees_all_equal(params, run(tx, 4)[0])


# --- when it begins, and how ----------------------------------------------------------


def test_the_first_update_is_at_the_count_of_the_thaw_step():
    thaws = {0: 0, 1: 1, 2: 4, 3: None}
    tx = osc.gradual_unfreezing(optax.sgd(1.0), thaws, [0, 1, 2, 3])
    zero, one = np.zeros((), np.float32), np.ones(6, np.float32)
    params, _ = scan(tx, [zero] * 4, [one] * 4, read=nothing)
    for leaf, thaw in zip(params, (0, 1, 4, 6), strict=True):
        expected = -np.maximum(np.arange(6) + 1 - thaw, 0)
        np.testing.assert_array_equal(leaf, expected, err_msg=f"thaw at {thaw}")


def test_each_group_trains_as_alone_from_its_thaw_on(x64):
    """Parameters and moments, those of AdamW begun at the thaw, and its count."""
    params, states = run(TX, dtype="float64")
    adams = moments(at(states, -1))
    for (label, thaw), adam in zip(THAWS.items(), adams, strict=True):
        name = NAMES[label]
        alone, alone_states = run(ADAMW, thaw=thaw, dtype="float64")
        (expected,) = moments(at(alone_states, 9 - thaw))
        chex.assert_trees_all_close(
            at(params[name], slice(thaw, 10)), at(alone[name], slice(10 - thaw)),
            rtol=1e-6,
        )  # fmt: skip
        chex.assert_trees_all_close(only(adam.mu, name), only(expected.mu, name))
        chex.assert_trees_all_close(only(adam.nu, name), only(expected.nu, name))
        assert adam.count == expected.count == 10 - thaw
        assert len(jax.tree.leaves(adam.mu)) == 2


def test_a_frozen_state_is_the_one_of_init():
    _, states = run(TX)
    chex.assert_trees_all_equal(
        moments(at(states, THAWS[0] - 1))[0], moments(TX.init(START))[0]
    )


def test_schedules_inside_count_from_the_thaw():
    inner = optax.sgd(lambda count: 1.0 + count)
    tx = osc.gradual_unfreezing(inner, {0: 3, 1: 0, 2: None}, [0, 1, 2])
    (late, early, never), _ = run_scalars(tx, 5)
    np.testing.assert_array_equal(np.diff(late, prepend=0), [0, 0, 0, -1, -2])
    np.testing.assert_array_equal(np.diff(early, prepend=0), [-1, -2, -3, -4, -5])
    np.testing.assert_array_equal(never, 0)


def test_groups_that_thaw_together_have_states_of_their_own():
    """So each is clipped by its own norm."""
    inner = optax.chain(optax.clip_by_global_norm(0.1), optax.trace(0.9))
    tx = osc.gradual_unfreezing(inner, {0: 2, 1: 2, 2: 0}, by_path)
    zeros = jax.tree.map(np.zeros_like, START)
    params, _ = scan(tx, zeros, at(GRADS, slice(3)), read=nothing)
    for name in ("body", "neck"):
        grads = [np.asarray(x, float) for x in only(at(GRADS, 2), name)]
        norm = np.sqrt(sum((x**2).sum() for x in grads))
        assert norm > 0.1
        for update, g in zip(only(params, name), grads, strict=True):
            np.testing.assert_allclose(update[2], 0.1 / norm * g, rtol=1e-5)


@pytest.mark.parametrize("labels", [LABELS, lambda params: LABELS])
def test_labels_of_every_form_freeze_the_same(labels):
    params, _ = run(osc.gradual_unfreezing(ADAMW, THAWS, labels))
    chex.assert_trees_all_equal(params, run(TX)[0])


def test_all_at_once_is_the_inner_optimizer(x64):
    tx = osc.gradual_unfreezing(ADAMW, dict.fromkeys(THAWS, 0), by_path)
    ours, theirs = (run(each, dtype="float64")[0] for each in (tx, ADAMW))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


def test_without_parameters_where_the_inner_needs_none():
    tx = osc.gradual_unfreezing(optax.sgd(1.0), THAWS, by_path)
    updates, _ = jax.jit(tx.update)(START, tx.init(START))
    assert not any(np.any(x) for x in only(updates, "body"))
    assert all(np.all(x) for x in only(updates, "head"))


def test_extra_arguments_reach_the_inner_optimizer():
    seen = []

    def update_fn(updates, state, params=None, *, value, **extra):
        seen.append((value, sorted(extra)))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(
        lambda _: optax.EmptyState(), update_fn
    )
    tx = optax.chain(osc.gradual_unfreezing(inner, THAWS, by_path), optax.scale(-1))
    update = functools.partial(tx.update, value=3.0, grad=None)
    jax.eval_shape(update, START, jax.eval_shape(tx.init, START), START)
    assert seen == [(3.0, ["grad"])] * 3


def test_a_plateau_inside_sees_the_value():
    inner = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = osc.gradual_unfreezing(inner, {0: 3, 1: None, 2: 0}, [0, 1, 2])
    ones = [np.ones((), np.float32)] * 3
    state, update = tx.init(ones), jax.jit(tx.update)
    for _ in range(4):
        (body, _, head), state = update(ones, state, ones, value=np.float32(1.0))
    np.testing.assert_allclose(body, 1.0)
    assert head < 0.6


def test_updates_that_depend_on_parameters_see_their_own_group():
    inner = optax.chain(optax.scale_by_trust_ratio(), optax.scale(-0.1))
    params, _ = run(osc.gradual_unfreezing(inner, THAWS, by_path), 5)
    for name, thaw in (("neck", 3), ("head", 0)):
        alone, _ = run(inner, 5, thaw)
        chex.assert_trees_all_close(
            at(params[name], 4), at(alone[name], 4 - thaw), rtol=1e-6
        )


# --- memory, structure and traces -----------------------------------------------------


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_a_group_that_never_thaws_holds_no_moments():
    tx = osc.gradual_unfreezing(optax.adam(0.1), {0: None, 1: None, 2: 0}, by_path)
    state = jax.eval_shape(tx.init, START)
    assert size(state) <= 2 * size(START["head"]) + 16


def test_a_group_that_thaws_costs_what_the_optimizer_alone_costs():
    state, alone = (jax.eval_shape(tx.init, START) for tx in (TX, ADAMW))
    assert size(state) <= size(alone) + 18


def shapes_of(tx, dtype="float32"):
    """Parameters, the first state, then the updates and the state after an update."""
    params = make_params(*LABELS, dtype=dtype)
    state = jax.eval_shape(tx.init, params)
    return params, state, *jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "inner",
    [ADAMW, osc.onecycle_adamw(0.1, 10), optax.sgd(0.1, momentum=0.9)],
    ids=["adamw", "onecycle_adamw", "sgd"],
)
def test_structure_and_types_never_change_so_that_one_trace_serves_all(inner, dtype):
    tx = osc.gradual_unfreezing(inner, THAWS | {0: None}, by_path)
    params, state, updates, new_state = shapes_of(tx, dtype)
    assert types(new_state) == types(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_an_inner_state_whose_dtype_widens_is_kept_as_it_was():
    inner = optax.GradientTransformation(
        lambda params: jnp.zeros([], jnp.bfloat16),
        lambda updates, state, params=None: (updates, state.astype(jnp.float32) + 1),
    )
    tx = osc.gradual_unfreezing(inner, THAWS | {2: 1}, by_path)
    _, state, _, new_state = shapes_of(tx)
    assert types(new_state) == types(state)


def test_vmapped_states_thaw_in_lockstep():
    both = jax.tree.map(lambda p: np.stack([p, 2 * p]), START)
    grads = at(GRADS, slice(10))
    params, states = jax.device_get(
        jax.vmap(lambda start: scan(TX, start, grads))(both)
    )
    after = [frozen(at(states, (slice(None), t))) for t in range(7)]
    assert after == [{0, 1}] * 3 + [{0}] * 3 + [set()]
    for k in range(2):
        expected, _ = scan(TX, at(both, k), grads)
        chex.assert_trees_all_close(at(params, k), expected, rtol=1e-5)


# --- what is frozen, told from any state ----------------------------------------------


def staged():
    return osc.gradual_unfreezing(optax.adam(0.1), {0: None, 1: 2, 2: 0}, [0, 1, 2])


NESTS = {
    "bare": (lambda tx: tx, 1),
    "chain": (lambda tx: optax.chain(optax.clip(1.0), tx), 1),
    "named_chain": (lambda tx: optax.named_chain(("tx", tx)), 1),
    "multi_steps": (lambda tx: optax.MultiSteps(tx, 3), 3),
    "apply_if_finite": (lambda tx: optax.apply_if_finite(tx, 3), 1),
    "deep": (
        lambda tx: optax.MultiSteps(optax.chain(optax.apply_if_finite(tx, 3)), 2),
        2,
    ),
}


@pytest.mark.parametrize(("nest", "every"), NESTS.values(), ids=NESTS)
def test_what_is_frozen_is_read_of_the_last_update(nest, every):
    tx = nest(staged())
    _, states = run_scalars(tx, 3 * every)
    after = [tx.init(SCALARS), *(at(states, k * every - 1) for k in (1, 2, 3))]
    assert [frozen(state) for state in after] == [{0, 1}] * 3 + [{0}]


def test_what_is_frozen_is_a_bool():
    state = staged().init(SCALARS)
    read = osc.read_hyperparams(state)
    assert list(read) == ["frozen/0", "frozen/1", "frozen/2"]
    assert {value.dtype for value in read.values()} == {jnp.dtype(bool)}


def test_what_is_frozen_is_read_inside_jit():
    read = jax.jit(osc.read_hyperparams)(staged().init(SCALARS))
    assert [bool(read[f"frozen/{k}"]) for k in range(3)] == [True, True, False]


RECORDS = optax.chain(
    osc.scheduled_trace(lambda count: (1.0 + count) / 8),
    osc.scale_by_learning_rate(lambda count: 1.0 + count),
)


def records(thaws, steps):
    """What the links inside record after so many steps."""
    tx = osc.gradual_unfreezing(RECORDS, thaws, [0, 1, 2])
    read = osc.read_hyperparams(at(run_scalars(tx, steps)[1], -1))
    kinds = "learning_rate/", "momentum/"
    return {name: float(x) for name, x in read.items() if name.startswith(kinds)}


def test_records_inside_are_named_by_label():
    assert records({0: 3, 1: 3, 2: 0}, 5) == {
        "learning_rate/0": 2, "learning_rate/1": 2, "learning_rate/2": 5,
        "momentum/0": 2 / 8, "momentum/1": 2 / 8, "momentum/2": 5 / 8,
    }  # fmt: skip


def test_until_the_thaw_records_are_of_step_zero():
    assert records(THAWS, 3) == {
        "learning_rate/0": 1, "learning_rate/1": 1, "learning_rate/2": 3,
        "momentum/0": 1 / 8, "momentum/1": 1 / 8, "momentum/2": 3 / 8,
    }  # fmt: skip


def test_a_group_that_never_thaws_records_only_that_it_is_frozen():
    tx = osc.gradual_unfreezing(RECORDS, {0: None, 1: None, 2: 0}, [0, 1, 2])
    read = osc.read_hyperparams(tx.init(SCALARS))
    assert list(read) == [
        "frozen/0", "frozen/1", "frozen/2",
        "momentum/2", "learning_rate/2", "cooldown/2",
    ]  # fmt: skip


def test_a_function_of_the_thaw_step_makes_schedules_follow_the_run():
    made = []

    def rate_from(step):
        made.append(step)
        return osc.scale_by_learning_rate(lambda count: 1.0 + count + step)

    tx = osc.gradual_unfreezing(rate_from, THAWS, [0, 1, 2])
    params, states = run_scalars(tx, 9)
    rates = osc.read_hyperparams(states)
    for label, thaw in THAWS.items():
        applied = [0 if t < thaw else 1 + t for t in range(9)]
        np.testing.assert_array_equal(
            np.diff(params[label], prepend=0), np.negative(applied)
        )
        # Until the thaw, what a group records is what its first step will apply.
        recorded = [1 + max(t, thaw) for t in range(9)]
        np.testing.assert_array_equal(rates[f"learning_rate/{label}"], recorded)
    assert set(made) == set(THAWS.values())


def test_thaw_steps_are_a_dict_and_not_a_function():
    with pytest.raises(TypeError, match=r"^`thaw_steps` must be a dict"):
        osc.gradual_unfreezing(optax.sgd(1.0), lambda labels: {0: -5, 1: 0}, [0, 1])


def test_thaw_steps_may_be_integer_arrays():
    tx = osc.gradual_unfreezing(optax.sgd(1.0), {0: jnp.int32(1), 1: 0}, [0, 1])
    params = [np.ones((), np.float32)] * 2
    state = tx.init(params)
    for expected in ({0}, set()):
        _, state = jax.jit(tx.update)(params, state, params)
        assert frozen(state) == expected


# --- in other frames ------------------------------------------------------------------


class Net(nnx.Module):
    """A body, a neck and a head."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.body = nnx.Linear(2, 3, rngs=rngs)
        self.neck = nnx.Linear(3, 3, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):  # noqa: D102
        return self.head(nnx.relu(self.neck(nnx.relu(self.body(x)))))


@nnx.jit
def nnx_step(net, optimizer):
    def loss_fn(net):
        return ((net(jnp.array([[1.0, -1.0], [0.5, 2.0]])) - 1) ** 2).mean()

    optimizer.update(net, nnx.grad(loss_fn)(net))


NNX_TX = osc.gradual_unfreezing(optax.adamw(0.1), {0: 2, 1: 1, 2: 0}, by_path)


def nnx_optimizer():
    net = Net()
    return net, nnx.Optimizer(net, NNX_TX, wrt=nnx.Param)


def nnx_params(net):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.Param)))


def test_nnx_optimizer_thaws_group_after_group():
    net, optimizer = nnx_optimizer()
    before, found = nnx_params(net), []
    for t in range(3):
        nnx_step(net, optimizer)
        found.append(frozen(optimizer))
        if t < 2:
            assert_same_bits(nnx_params(net)["body"], before["body"])
        if t < 1:
            assert_same_bits(nnx_params(net)["neck"], before["neck"])
    after = nnx_params(net)
    assert found == [{0, 1}, {0}, set()]
    for name in LABELS:
        assert (after[name]["kernel"] != before[name]["kernel"]).any()


@pytest.mark.slow
def test_a_whole_nnx_loop_inside_jit_gives_the_same():
    net, optimizer = nnx_optimizer()
    for _ in range(3):
        nnx_step(net, optimizer)
    whole, whole_optimizer = nnx_optimizer()

    @nnx.jit
    def loop(net, optimizer):
        for _ in range(3):
            nnx_step(net, optimizer)

    loop(whole, whole_optimizer)
    chex.assert_trees_all_close(nnx_params(whole), nnx_params(net), rtol=1e-5)
    assert frozen(whole_optimizer) == set()


def test_linen_train_state_thaws_group_after_group():
    state = TrainState.create(apply_fn=None, params=START, tx=TX)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    found = []
    for t in range(7):
        state = step(state, at(GRADS, t))
        found.append(frozen(state))
    assert found == [{0, 1}] * 3 + [{0}] * 3 + [set()]
    expected, _ = run(TX)
    chex.assert_trees_all_close(state.params, at(expected, 6), rtol=1e-5)


class EquinoxNet(eqx.Module):
    """Has a function among its leaves."""

    body: eqx.nn.Linear
    head: eqx.nn.Linear
    activation: object

    def __call__(self, x):  # noqa: D102
        return self.head(self.activation(self.body(x)))


def test_equinox_modules_thaw_under_filter_jit():
    keys = jax.random.split(jax.random.key(0))
    net = start = EquinoxNet(
        eqx.nn.Linear(2, 3, key=keys[0]), eqx.nn.Linear(3, 1, key=keys[1]), jax.nn.relu
    )
    label = osc.label_by_path([("head/.*", 1), (".*", 0)])
    tx = osc.gradual_unfreezing(optax.adamw(0.1), {0: 2, 1: 0}, label)
    state = tx.init(eqx.filter(net, eqx.is_array))

    @eqx.filter_jit
    def step(net, state):
        grads = eqx.filter_grad(lambda net: net(jnp.array([1.0, -1.0])).sum())(net)
        updates, state = tx.update(grads, state, eqx.filter(net, eqx.is_array))
        return eqx.apply_updates(net, updates), state

    for t in range(3):
        net, state = step(net, state)
        assert frozen(state) == ({0} if t < 2 else set())
        if t < 2:
            assert_same_bits(net.body.weight, start.body.weight)
    assert (net.body.weight != start.body.weight).any()
    assert (net.head.weight != start.head.weight).any()


def test_haiku_shaped_parameters_thaw():
    body, head = (f"mlp/~/linear_{k}" for k in range(2))
    start = {name: {"w": np.ones((2, 2), "f"), "b": np.ones(2, "f")}
             for name in (body, head)}  # fmt: skip
    tx = osc.gradual_unfreezing(optax.adamw(0.1), {0: 2, 1: 0}, osc.label_by_depth())
    grads = jax.tree.map(lambda p: np.stack([p] * 3), start)
    params, _ = jax.device_get(scan(tx, start, grads, read=nothing))
    assert_same_bits(at(params[body], 1), start[body])
    assert all_moved(at(params[body], 2), start[body])
    assert all_moved(at(params[head], 0), start[head])


# --- checkpoints ----------------------------------------------------------------------


def orbax_round_trip(path, tree, like):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", tree)
        checkpointer.wait_until_finished()
        return jax.device_get(checkpointer.restore(path / "state", like))


def flax_round_trip(path, tree, like):
    del path
    return serialization.from_bytes(like, serialization.to_bytes(tree))


THAWED = {
    name: osc.gradual_unfreezing(
        osc.onecycle_adamw(0.1, 10), {0: thaw, 2: 0}, {"body": 0, "head": 2}
    )
    for name, thaw in {"thaws": 4, "never": None}.items()
}


@pytest.mark.parametrize("thaws", THAWED)
@pytest.mark.parametrize("round_trip", [orbax_round_trip, flax_round_trip])
def test_a_checkpoint_from_before_the_thaw_continues_bit_for_bit(
    round_trip, thaws, tmp_path
):
    tx, start = THAWED[thaws], {name: START[name] for name in ("body", "head")}
    grads = {name: at(GRADS[name], slice(7)) for name in start}
    expected, expected_state = train(tx, start, grads)
    params, saved = train(tx, start, at(grads, slice(2)))
    tree = at(params, -1), saved
    params, state = round_trip(tmp_path, tree, (start, tx.init(start)))
    assert jax.tree.structure(state) == jax.tree.structure(saved)
    assert frozen(state) == frozen(saved)
    params, state = train(tx, params, at(grads, slice(2, 7)), state)
    assert_same_bits(params, at(expected, slice(2, 7)))
    assert_same_bits(state, expected_state)


def as_arrays(state):
    """The state without its Variables."""
    return jax.tree.map(
        lambda variable: variable[...],
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def test_a_checkpoint_of_an_nnx_optimizer_continues_bit_for_bit(tmp_path):
    net, optimizer = nnx_optimizer()
    nnx_step(net, optimizer)
    saved = as_arrays(nnx.state((net, optimizer)))
    fresh = nnx_optimizer()
    like = as_arrays(nnx.state(fresh))
    restored = orbax_round_trip(tmp_path, saved, like)
    nnx.update(fresh, restored)
    assert frozen(fresh[1]) == {0, 1}
    for _ in range(3):
        nnx_step(net, optimizer)
        nnx_step(*fresh)
    assert_same_bits(nnx_params(fresh[0]), nnx_params(net))
    assert frozen(fresh[1]) == set()


# --- bad input ------------------------------------------------------------------------


STEPS = {
    "missing": (
        {0: 1, 1: 1},
        r"`thaw_steps` must have every label \(0 .* None never\), got none for 2 ",
    ),
    "idle": (THAWS | {7: 1}, "`thaw_steps` must each have a parameter, got 7"),
    "names": ({"body": 1}, r"`thaw_steps` must have every label .*, got none for 0 "),
}


@pytest.mark.parametrize(("steps", "message"), STEPS.values(), ids=STEPS)
def test_thaw_steps_that_do_not_fit_the_labels_are_refused(steps, message):
    tx = osc.gradual_unfreezing(optax.sgd(0.1), steps, by_path)
    with pytest.raises(ValueError, match=f"^{message}"):
        tx.init(START)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"body": False, "neck": True, "head": True}),
        lambda tx: optax.partition(
            {"on": tx, "off": optax.set_to_zero()},
            {"body": "off", "neck": "on", "head": "on"},
        ),
    ],
    ids=["masked", "partition"],
)
def test_thaw_steps_without_parameters_are_fine_where_something_is_hidden(wrap):
    tx = wrap(osc.gradual_unfreezing(optax.sgd(0.1), THAWS, by_path))
    updates, _ = jax.jit(tx.update)(START, tx.init(START), START)
    assert not np.any(updates["neck"]["kernel"])
    assert np.all(updates["head"]["kernel"])


def test_updates_that_are_masked_otherwise_than_at_init_are_refused():
    tx = osc.gradual_unfreezing(optax.sgd(0.1), THAWS, lambda _: LABELS)
    hidden = START | {"head": optax.MaskedNode()}
    with pytest.raises(ValueError, match=r"^`updates` must have .*head/bias"):
        tx.update(hidden, tx.init(START), START)
