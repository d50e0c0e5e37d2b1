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
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

import optax_superconv as osc

LABELS = {"body": 0, "neck": 1, "head": 2}
THAWS = {0: 6, 1: 3, 2: 0}
NAMES = {label: name for name, label in LABELS.items()}
by_path = osc.label_by_path(
    [("body/.*", 0), ("neck/.*", 1), ("head/.*", 2)], unmatched_rules="warn"
)


def as_arrays(state):
    """The state without its Variables."""
    return jax.tree.map(
        lambda variable: variable[...],
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def make_params(dtype=jnp.float32, names=tuple(LABELS)):
    rng = np.random.default_rng(0)
    draws = {n: (rng.normal(size=(8, 2)), rng.normal(size=2)) for n in LABELS}
    return {
        name: {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.asarray(bias, dtype)}
        for name, (kernel, bias) in draws.items()
        if name in names
    }


def noise(params, seed):
    """Gradients that depend on nothing but the name and the seed."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rng = np.random.default_rng([seed, *name.encode()])
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


def train(tx, params, begin, end, state=None, update=None):
    """Parameters and state after the steps from ``begin`` to ``end``."""
    update = update or jax.jit(tx.update)
    state = tx.init(params) if state is None else state
    for t in range(begin, end):
        updates, state = update(noise(params, t), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same_bits(new, old):
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.aval.weak_type), tree)


def moments(state):
    """The Adam states inside, in the order of their thaws."""
    leaves = jax.tree.leaves(
        state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
    )
    return [x for x in leaves if isinstance(x, optax.ScaleByAdamState)]


def only(tree, name):
    """The leaves of one group."""
    return jax.tree.leaves(tree[name])


# --- what is frozen keeps its bits ----------------------------------------------------


def frozen_adamw(thaws):
    return osc.gradual_unfreezing(optax.adamw(0.1, weight_decay=0.3), thaws, by_path)


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
    [*((make, "float32") for make in CHAINS.values()), (frozen_adamw, "bfloat16")],
    ids=[*CHAINS, "bfloat16"],
)
def test_frozen_leaves_keep_their_bits_for_a_hundred_steps(make, dtype):
    start = make_params(dtype)
    tx = make({0: None, 1: 100, 2: 0})
    params, state = train(tx, start, 0, 100)
    assert_same_bits(params["body"], start["body"])
    assert_same_bits(params["neck"], start["neck"])
    assert all((a != b).any() for a, b in zip(
        only(params, "head"), only(start, "head"), strict=True))  # fmt: skip
    params, _ = train(tx, params, 100, 101, state)
    assert_same_bits(params["body"], start["body"])
    assert all((a != b).any() for a, b in zip(
        only(params, "neck"), only(start, "neck"), strict=True))  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_do_no_harm_while_frozen(bad):
    start = make_params()
    tx = frozen_adamw({0: None, 1: 2, 2: 0})
    params, state, update = start, tx.init(start), jax.jit(tx.update)
    for t in range(4):
        grads = noise(params, t)
        for name in ("body", "neck") if t < 2 else ("body",):
            grads[name] = jax.tree.map(lambda g: jnp.full_like(g, bad), grads[name])
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_same_bits(params["body"], start["body"])
    chex.assert_tree_all_finite(params)
    chex.assert_tree_all_finite(state)
    expected, _ = train(tx, start, 0, 4)
    chex.assert_trees_all_equal(params, expected)


# --- when it begins, and how ----------------------------------------------------------


@pytest.mark.parametrize("thaw", [0, 1, 4])
def test_the_first_update_is_at_the_count_of_the_thaw_step(thaw):
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    tx = osc.gradual_unfreezing(optax.sgd(1.0), {0: thaw, 1: None}, {"a": 0, "b": 1})
    state, update = tx.init(params), jax.jit(tx.update)
    seen = []
    for _ in range(thaw + 2):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        seen.append((float(updates["a"]), float(updates["b"])))
    assert seen == [(0.0, 0.0)] * thaw + [(-1.0, 0.0)] * 2


def test_each_group_trains_as_alone_from_its_thaw_on():
    """Parameters and moments, those of AdamW begun at the thaw, and its count."""
    start, inner = make_params(), optax.adamw(0.1, weight_decay=0.3)
    params, state = train(osc.gradual_unfreezing(inner, THAWS, by_path), start, 0, 10)
    in_order = sorted(THAWS.items(), key=lambda item: item[1])
    for (label, thaw), adam in zip(in_order, moments(state), strict=True):
        name = NAMES[label]
        alone, alone_state = train(inner, {name: start[name]}, thaw, 10)
        (expected,) = moments(alone_state)
        chex.assert_trees_all_close(params[name], alone[name], rtol=1e-6)
        chex.assert_trees_all_close(only(adam.mu, name), only(expected.mu, name))
        chex.assert_trees_all_close(only(adam.nu, name), only(expected.nu, name))
        assert adam.count == expected.count == 10 - thaw
        assert len(jax.tree.leaves(adam.mu)) == 2


def test_a_frozen_state_is_the_one_of_init():
    start = make_params()
    tx = osc.gradual_unfreezing(optax.adam(0.1), THAWS, by_path)
    _, state = train(tx, start, 0, 6)
    chex.assert_trees_all_equal(moments(state)[2], moments(tx.init(start))[2])


def test_schedules_inside_count_from_the_thaw():
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    tx = osc.gradual_unfreezing(
        optax.sgd(lambda count: 1.0 + count), {0: 3, 1: 0}, {"a": 0, "b": 1}
    )
    state, seen = tx.init(params), []
    for _ in range(5):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        seen.append((float(updates["a"]), float(updates["b"])))
    assert seen == [(0, -1), (0, -2), (0, -3), (-1, -4), (-2, -5)]


def test_groups_that_thaw_together_share_a_state():
    params = make_params()
    inner = optax.chain(optax.clip_by_global_norm(0.1), optax.trace(0.9))
    tx = osc.gradual_unfreezing(inner, {0: 2, 1: 2, 2: 0}, by_path)
    grads = [noise(params, t) for t in range(3)]
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
    together = [
        np.asarray(x, float) for name in ("body", "neck") for x in only(grads[2], name)
    ]
    norm = np.sqrt(sum((x**2).sum() for x in together))
    got = [x for name in ("body", "neck") for x in only(updates, name)]
    for update, g in zip(got, together, strict=True):
        np.testing.assert_allclose(update, 0.1 / norm * g, rtol=1e-5)


@pytest.mark.parametrize("labels", [LABELS, by_path, lambda params: LABELS])
def test_labels_of_every_form_freeze_the_same(labels):
    start = make_params()
    params, _ = train(
        osc.gradual_unfreezing(optax.adam(0.1), THAWS, labels), start, 0, 5
    )
    expected, _ = train(osc.gradual_unfreezing(optax.adam(0.1), THAWS, by_path),
                        start, 0, 5)  # fmt: skip
    assert_same_bits(params["body"], start["body"])
    chex.assert_trees_all_equal(params, expected)


def test_all_at_once_is_the_inner_optimizer():
    start, inner = make_params(), optax.adamw(0.1)
    tx = osc.gradual_unfreezing(inner, dict.fromkeys(THAWS, 0), by_path)
    chex.assert_trees_all_close(
        train(tx, start, 0, 5)[0], train(inner, start, 0, 5)[0], rtol=1e-6
    )


def test_without_parameters_where_the_inner_needs_none():
    params = make_params()
    tx = osc.gradual_unfreezing(optax.sgd(1.0), THAWS, by_path)
    updates, _ = tx.update(noise(params, 0), tx.init(params))
    assert not any(x.any() for x in only(updates, "body"))


def test_extra_arguments_reach_the_inner_optimizer():
    seen = []

    def update_fn(updates, state, params=None, *, value, **extra):
        seen.append((value, sorted(extra)))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(
        lambda _: optax.EmptyState(), update_fn
    )
    params = make_params()
    tx = optax.chain(osc.gradual_unfreezing(inner, THAWS, by_path), optax.scale(-1))
    tx.update(noise(params, 0), tx.init(params), params, value=3.0, grad=None)
    assert seen == [(3.0, ["grad"])] * 3


def test_a_plateau_inside_sees_the_value():
    params = make_params()
    inner = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = osc.gradual_unfreezing(inner, {0: 3, 1: None, 2: 0}, by_path)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(4):
        updates, state = update(noise(params, t), state, params, value=jnp.float32(1.0))
    grads = noise(params, 3)
    head = updates["head"]["bias"] / grads["head"]["bias"]
    body = updates["body"]["bias"] / grads["body"]["bias"]
    np.testing.assert_allclose(body, 1.0)
    assert (head < 0.6).all()


def test_updates_that_depend_on_parameters_see_their_own_group():
    start = make_params()
    inner = optax.chain(optax.scale_by_trust_ratio(), optax.scale(-0.1))
    params, _ = train(osc.gradual_unfreezing(inner, THAWS, by_path), start, 0, 5)
    for name, thaw in (("neck", 3), ("head", 0)):
        alone, _ = train(inner, {name: start[name]}, thaw, 5)
        chex.assert_trees_all_close(params[name], alone[name], rtol=1e-6)


# --- memory, structure and traces -----------------------------------------------------


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_a_group_that_never_thaws_holds_no_moments():
    params = make_params()
    tx = osc.gradual_unfreezing(optax.adam(0.1), {0: None, 1: None, 2: 0}, by_path)
    state = jax.eval_shape(tx.init, params)
    assert size(state) <= 2 * size(params["head"]) + 16


def test_a_group_that_thaws_costs_what_the_optimizer_alone_costs():
    params = make_params()
    state = osc.gradual_unfreezing(optax.adam(0.1), THAWS, by_path).init(params)
    assert size(state) <= size(optax.adam(0.1).init(params)) + 18


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "inner",
    [
        functools.partial(optax.adamw, 0.1),
        functools.partial(osc.onecycle_adamw, 0.1, 10),
        functools.partial(optax.sgd, 0.1, momentum=0.9),
    ],
    ids=["adamw", "onecycle_adamw", "sgd"],
)
def test_structure_and_dtypes_never_change_and_one_trace_serves_all(inner, dtype):
    params = make_params(dtype)
    tx = osc.gradual_unfreezing(inner(), THAWS | {0: None}, by_path)
    state = tx.init(params)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, 1))
    for t in range(8):
        updates, new_state = update(noise(params, t), state, params)
        assert types(new_state) == types(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        state = new_state


def test_an_inner_state_whose_dtype_widens_is_kept_as_it_was():
    inner = optax.GradientTransformation(
        lambda params: jnp.zeros([], jnp.bfloat16),
        lambda updates, state, params=None: (updates, state.astype(jnp.float32) + 1),
    )
    params = make_params()
    tx = osc.gradual_unfreezing(inner, THAWS | {2: 1}, by_path)
    _, state = train(tx, params, 0, 4)
    assert types(state) == types(tx.init(params))


def test_scan_runs_across_the_thaws():
    start = make_params()
    tx = osc.gradual_unfreezing(optax.adamw(0.1), THAWS, by_path)
    grads = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(noise(start, t) for t in range(9))
    )

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), grads)
    expected, _ = train(tx, start, 0, 9)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)


def test_vmapped_states_thaw_in_lockstep():
    start = make_params()
    both = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), start)
    tx = osc.gradual_unfreezing(optax.adamw(0.1), THAWS, by_path)
    params, state = both, jax.vmap(tx.init)(both)
    update, frozen = jax.jit(jax.vmap(tx.update)), []
    for t in range(7):
        frozen.append(osc.frozen_labels(state))
        grads = jax.tree.map(lambda g: jnp.stack([g, g]), noise(start, t))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert frozen == [{0, 1}] * 3 + [{0}] * 3 + [set()]
    expected, _ = train(tx, start, 0, 7)
    second, _ = train(tx, jax.tree.map(lambda p: 2 * p, start), 0, 7)
    chex.assert_trees_all_close(
        params,
        jax.tree.map(lambda a, b: jnp.stack([a, b]), expected, second),
        rtol=1e-5,
    )


# --- what is frozen, told from any state ----------------------------------------------


def staged():
    return osc.gradual_unfreezing(optax.adam(0.1), {0: None, 1: 2, 2: 0}, by_path)


def reached(state, steps, tx, params):
    update = jax.jit(tx.update)
    for _ in range(steps):
        _, state = update(params, state, params)
    return state


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
def test_frozen_labels_are_those_of_the_next_update(nest, every):
    params, tx = make_params(), nest(staged())
    seen, state, update = [], tx.init(params), jax.jit(tx.update)
    for t in range(4 * every):
        if t % every == 0:
            seen.append(osc.frozen_labels(state))
        _, state = update(params, state, params)
    assert seen == [{0, 1}, {0, 1}, {0}, {0}]


def test_frozen_labels_of_two_such_states_are_put_together():
    params = make_params()
    names = dict(zip(LABELS, ["a", "b", "c"], strict=True))
    tx = optax.chain(
        staged(),
        osc.gradual_unfreezing(optax.identity(), {"a": 1, "b": 0, "c": 0}, names),
    )
    assert osc.frozen_labels(tx.init(params)) == {0, 1, "a"}


@pytest.mark.parametrize("state", [None, (), {}, optax.adam(0.1).init(jnp.ones(2))],
                         ids=["none", "tuple", "dict", "adam"])  # fmt: skip
def test_a_state_without_unfreezing_has_nothing_frozen(state):
    assert osc.frozen_labels(state) == set()


def test_frozen_labels_of_a_traced_state_are_refused():
    params = make_params()
    state = staged().init(params)
    with pytest.raises(TypeError, match=r"^`opt_state` must be concrete"):
        jax.jit(lambda state: osc.frozen_labels(state))(state)


def test_records_inside_are_named_by_label():
    params = make_params()
    tx = osc.gradual_unfreezing(
        osc.scale_by_learning_rate(lambda count: 1.0 + count),
        {0: 3, 1: 3, 2: 0},
        by_path,
    )
    state = reached(tx.init(params), 5, tx, params)
    read = {name: float(value) for name, value in osc.read_hyperparams(state).items()}
    assert read == {"learning_rate/0": 2, "learning_rate/1": 2, "learning_rate/2": 5}


def test_until_the_thaw_the_rate_is_zero_and_other_records_are_of_step_zero():
    params = make_params()
    inner = optax.chain(
        osc.scheduled_trace(lambda count: (1.0 + count) / 8),
        osc.scale_by_learning_rate(lambda count: 1.0 + count),
    )
    tx = osc.gradual_unfreezing(inner, THAWS, by_path)
    state = reached(tx.init(params), 3, tx, params)
    read = {name: float(value) for name, value in osc.read_hyperparams(state).items()}
    assert read == {
        "learning_rate/0": 0, "learning_rate/1": 0, "learning_rate/2": 3,
        "momentum/0": 1 / 8, "momentum/1": 1 / 8, "momentum/2": 3 / 8,
    }  # fmt: skip


def test_a_function_of_the_thaw_step_makes_schedules_follow_the_run():
    params, made = make_params(), []

    def rate_from(step):
        made.append(step)
        return osc.scale_by_learning_rate(lambda count: 1.0 + count + step)

    tx = osc.gradual_unfreezing(rate_from, THAWS, by_path)
    state = tx.init(params)
    for t in range(7):
        _, state = tx.update(params, state, params)
        rates = osc.read_hyperparams(state)
        for label, thaw in THAWS.items():
            expected = 0 if thaw is None or t < thaw else 1 + t
            assert rates.get(f"learning_rate/{label}", 0) == expected
    assert set(made) == {step for step in THAWS.values() if step is not None}


def test_thaw_steps_are_a_dict_and_not_a_function():
    with pytest.raises(TypeError, match=r"^`thaw_steps` must be a dict"):
        osc.gradual_unfreezing(optax.sgd(1.0), lambda labels: {0: -5, 1: 0}, [0, 1])


def test_thaw_steps_may_be_integer_arrays():
    tx = osc.gradual_unfreezing(optax.sgd(1.0), {0: jnp.int32(1), 1: 0}, [0, 1])
    params = [jnp.ones(1)] * 2
    state = tx.init(params)
    assert osc.frozen_labels(state) == {0}
    _, state = tx.update(params, state, params)
    assert osc.frozen_labels(state) == set()


def test_what_is_frozen_is_not_known_of_shapes():
    tx = osc.gradual_unfreezing(optax.sgd(1.0), {0: 1, 1: 0}, [0, 1])
    with pytest.raises(TypeError, match=r"^`opt_state` must be concrete"):
        osc.frozen_labels(jax.eval_shape(tx.init, [jnp.ones(1)] * 2))


# --- in other frames ------------------------------------------------------------------


def test_multi_steps_counts_optimizer_steps():
    start = make_params()
    tx = optax.MultiSteps(osc.gradual_unfreezing(optax.sgd(0.1), THAWS, by_path), 2)
    params, state, changed = start, tx.init(start), []
    update = jax.jit(tx.update)
    for t in range(10):
        updates, state = update(noise(params, t), state, params)
        params = optax.apply_updates(params, updates)
        changed.append([
            bool((params[name]["kernel"] != start[name]["kernel"]).any())
            for name in LABELS
        ])  # fmt: skip
    first = [[row[k] for row in changed].index(True) for k in (1, 2)]
    assert first == [7, 1]  # The second micro-step of optimizer steps 3 and 0.
    assert not any(row[0] for row in changed)


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


def nnx_optimizer(net=None):
    net = net or Net()
    tx = osc.gradual_unfreezing(optax.adamw(0.1), THAWS, by_path)
    return net, nnx.Optimizer(net, tx, wrt=nnx.Param)


def nnx_params(net):
    return nnx.to_pure_dict(nnx.state(net, nnx.Param))


def test_nnx_optimizer_thaws_group_after_group():
    net, optimizer = nnx_optimizer()
    before, frozen = nnx_params(net), []
    for t in range(7):
        frozen.append(osc.frozen_labels(optimizer))
        nnx_step(net, optimizer)
        if t < 6:
            assert_same_bits(nnx_params(net)["body"], before["body"])
        if t < 3:
            assert_same_bits(nnx_params(net)["neck"], before["neck"])
    after = nnx_params(net)
    assert frozen == [{0, 1}] * 3 + [{0}] * 3 + [set()]
    for name in LABELS:
        assert (after[name]["kernel"] != before[name]["kernel"]).any()


def test_a_whole_nnx_loop_inside_jit_gives_the_same():
    net, optimizer = nnx_optimizer()
    for _ in range(4):
        nnx_step(net, optimizer)
    whole, whole_optimizer = nnx_optimizer()

    @nnx.jit
    def loop(net, optimizer):
        for _ in range(4):
            nnx_step(net, optimizer)

    loop(whole, whole_optimizer)
    chex.assert_trees_all_close(nnx_params(whole), nnx_params(net), rtol=1e-5)
    assert osc.frozen_labels(whole_optimizer) == {0}


def test_linen_train_state_thaws_group_after_group():
    start = make_params()
    tx = osc.gradual_unfreezing(optax.adamw(0.1), THAWS, by_path)
    state = TrainState.create(apply_fn=None, params=start, tx=tx)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    frozen = []
    for t in range(7):
        frozen.append(osc.frozen_labels(state))
        state = step(state, noise(start, t))
    assert frozen == [{0, 1}] * 3 + [{0}] * 3 + [set()]
    expected, _ = train(tx, start, 0, 7)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5)


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
        assert osc.frozen_labels(state) == ({0} if t < 2 else set())
        net, state = step(net, state)
        if t < 2:
            assert_same_bits(net.body.weight, start.body.weight)
    assert (net.body.weight != start.body.weight).any()
    assert (net.head.weight != start.head.weight).any()


def test_haiku_shaped_parameters_thaw():
    start = {f"mlp/~/linear_{k}": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
             for k in range(2)}  # fmt: skip
    tx = osc.gradual_unfreezing(optax.adamw(0.1), {0: 2, 1: 0}, osc.label_by_depth())
    params, state = train(tx, start, 0, 2)
    assert_same_bits(params["mlp/~/linear_0"], start["mlp/~/linear_0"])
    params, _ = train(tx, params, 2, 3, state)
    assert (params["mlp/~/linear_0"]["w"] != 1).all()


def test_sharded_over_eight_devices_gives_the_same():
    start = make_params()
    mesh = jax.make_mesh((8,), ("data",))

    def place(leaf):
        spec = PartitionSpec("data") if leaf.shape[0] == 8 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    tx = osc.gradual_unfreezing(optax.adamw(0.1), THAWS, by_path)
    expected, _ = train(tx, start, 0, 8)
    params, state = train(tx, jax.tree.map(place, start), 0, 8)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)
    kernels = [x for x in jax.tree.leaves(state) if x.shape == (8, 2)]
    assert len(kernels) == 6
    assert not any(x.sharding.is_fully_replicated for x in kernels)


def test_exports_for_all_platforms():
    params = make_params()
    tx = osc.gradual_unfreezing(optax.adamw(0.1), THAWS | {0: None}, by_path)
    exported = export.export(jax.jit(tx.update), platforms=("cpu", "cuda", "tpu"))(
        params, tx.init(params), params
    )
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}


# --- checkpoints ----------------------------------------------------------------------


def orbax_round_trip(path, tree, like):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", like)


def flax_round_trip(path, tree, like):
    del path
    return serialization.from_bytes(like, serialization.to_bytes(tree))


@pytest.mark.parametrize("thaws", [THAWS, THAWS | {0: None}], ids=["thaws", "never"])
@pytest.mark.parametrize("round_trip", [orbax_round_trip, flax_round_trip])
def test_a_checkpoint_from_before_the_thaw_continues_bit_for_bit(
    round_trip, thaws, tmp_path
):
    start = make_params()
    tx = osc.gradual_unfreezing(osc.onecycle_adamw(0.1, 10), thaws, by_path)
    update = jax.jit(tx.update)
    expected, expected_state = train(tx, start, 0, 9, update=update)
    saved = train(tx, start, 0, 2, update=update)
    params, state = round_trip(tmp_path, saved, (start, tx.init(start)))
    assert jax.tree.structure(state) == jax.tree.structure(saved[1])
    assert osc.frozen_labels(state) == osc.frozen_labels(saved[1])
    params, state = train(tx, params, 2, 9, state, update)
    assert_same_bits(params, expected)
    assert_same_bits(state, expected_state)


def test_a_checkpoint_of_an_nnx_optimizer_continues_bit_for_bit(tmp_path):
    net, optimizer = nnx_optimizer()
    for _ in range(2):
        nnx_step(net, optimizer)
    saved = as_arrays(nnx.state((net, optimizer)))
    fresh = nnx_optimizer()
    like = as_arrays(nnx.state(fresh))
    restored = orbax_round_trip(tmp_path, saved, like)
    nnx.update(fresh, restored)
    assert osc.frozen_labels(fresh[1]) == {0, 1}
    for _ in range(6):
        nnx_step(net, optimizer)
        nnx_step(*fresh)
    assert_same_bits(nnx_params(fresh[0]), nnx_params(net))
    assert osc.frozen_labels(fresh[1]) == set()


# --- bad input ------------------------------------------------------------------------


STEPS = {
    "missing": ({0: 1, 1: 1}, "`thaw_steps` must have every label, got none for 2"),
    "idle": (THAWS | {7: 1}, "`thaw_steps` must each have a parameter, got 7"),
    "names": ({"body": 1}, "`thaw_steps` must have every label, got none for 0, 1, 2"),
}


@pytest.mark.parametrize(("steps", "message"), STEPS.values(), ids=STEPS)
def test_thaw_steps_that_do_not_fit_the_labels_are_refused(steps, message):
    tx = osc.gradual_unfreezing(optax.sgd(0.1), steps, by_path)
    with pytest.raises(ValueError, match=f"^{message}"):
        tx.init(make_params())


def test_thaw_steps_without_parameters_are_fine_where_masked_hides_some():
    params = make_params()
    tx = osc.gradual_unfreezing(optax.sgd(0.1), THAWS, by_path)
    for wrapped in (
        optax.masked(tx, {"body": False, "neck": True, "head": True}),
        optax.partition(
            {"on": tx, "off": optax.set_to_zero()},
            {"body": "off", "neck": "on", "head": "on"},
        ),
    ):
        updates, _ = wrapped.update(noise(params, 0), wrapped.init(params), params)
        assert not updates["neck"]["kernel"].any()
        assert updates["head"]["kernel"].all()


def test_updates_that_are_masked_otherwise_than_at_init_are_refused():
    params = make_params()
    tx = osc.gradual_unfreezing(optax.sgd(0.1), THAWS, lambda _: LABELS)
    hidden = params | {"head": optax.MaskedNode()}
    with pytest.raises(ValueError, match=r"^`updates` must have .*head/bias"):
        tx.update(hidden, tx.init(params), params)
