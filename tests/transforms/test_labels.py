"""Which group does a parameter belong to, in every container and under every name?"""

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import optax_superconv as osc

LEAF = jnp.ones(2)


def as_arrays(state):
    """The state without its Variables."""
    return jax.tree.map(
        lambda variable: variable[...],
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def nested(paths, leaf=LEAF):
    """Nested dicts with these paths."""
    tree: dict = {}
    for path in paths:
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def flat(labels):
    """Path to label, by the names that JAX gives."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(labels)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): label
        for path, label in pairs
    }


def seen_paths(tree):
    """The paths that the rules get to see, by a rule for each."""
    with pytest.raises(ValueError, match="`rules` must cover") as error:
        osc.label_by_path([("no such path", 0)])(tree)
    listed = str(error.value).split("got none for ")[1]
    listed = re.split(r" \(rules that|\. A rule", listed)[0]
    return set(re.findall(r"'([^']*)'", listed))


class Net(nnx.Module):
    """Three layers, one of them without a bias."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Linear(2, 2, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs)])
        self.head = nnx.Linear(2, 2, use_bias=False, rngs=rngs)

    def __call__(self, x):  # noqa: D102
        x = self.embed(x)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


class LinenNet(nn.Module):
    """Two layers, their kernels boxed with axis names."""

    @nn.compact
    def __call__(self, x):  # noqa: D102
        kernel_init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
        x = nn.Dense(3, kernel_init=kernel_init, name="embed")(x)
        return nn.Dense(1, kernel_init=kernel_init, name="head")(x)


class EquinoxNet(eqx.Module):
    """A field is called `value`, as the array in a Flax box is."""

    embed: eqx.nn.Linear
    layers: list
    value: jax.Array
    activation: Callable = jax.nn.relu
    name: str = eqx.field(static=True, default="net")

    def __call__(self, x):  # noqa: D102
        return self.activation(x)


def equinox_net():
    key = jax.random.key(0)
    net = EquinoxNet(eqx.nn.Linear(2, 2, key=key), [eqx.nn.Linear(2, 2, key=key)], LEAF)
    return eqx.filter(net, eqx.is_array)


class Pair(NamedTuple):
    """A container with names."""

    body: Any
    head: Any


def linen_params():
    return jax.jit(LinenNet().init)(jax.random.key(0), jnp.ones((1, 2)))["params"]


NNX_PATHS = {
    "embed/bias", "embed/kernel", "layers/0/bias", "layers/0/kernel", "head/kernel",
}  # fmt: skip
LINEN_PATHS = {"embed/bias", "embed/kernel", "head/bias", "head/kernel"}
HAIKU = {f"mlp/~/linear_{k}": {"w": LEAF, "b": LEAF} for k in range(2)}

CONTAINERS = {
    "dict": (lambda: {"a": {"b": LEAF}, "c": LEAF}, {"a/b", "c"}),
    "frozen_dict": (lambda: FrozenDict({"a": {"b": LEAF}, "c": LEAF}), {"a/b", "c"}),
    "nnx_variables": (lambda: nnx.state(Net(), nnx.Param), NNX_PATHS),
    "nnx_arrays": (lambda: as_arrays(nnx.state(Net(), nnx.Param)), NNX_PATHS),
    "linen_boxed": (linen_params, LINEN_PATHS),
    "linen_unboxed": (lambda: nn.unbox(linen_params()), LINEN_PATHS),
    "equinox": (
        equinox_net,
        {"embed/weight", "embed/bias", "layers/0/weight", "layers/0/bias", "value"},
    ),
    "haiku_shaped": (
        lambda: HAIKU,
        {f"mlp/~/linear_{k}/{name}" for k in range(2) for name in "wb"},
    ),
    "named_tuple": (lambda: Pair({"w": LEAF}, LEAF), {"body/w", "head"}),
    "list_and_tuple": (lambda: [LEAF, (LEAF, LEAF)], {"0", "1/0", "1/1"}),
    "none_leaf": (lambda: {"a": None, "b": LEAF}, {"b"}),
    "masked_leaf": (lambda: {"a": optax.MaskedNode(), "b": LEAF}, {"b"}),
    "named_value": (
        lambda: {"a": {"value": LEAF}, "value": LEAF},
        {"a/value", "value"},
    ),
    "single_array": (lambda: LEAF, {""}),
}
every_container = pytest.mark.parametrize(
    ("make", "paths"), CONTAINERS.values(), ids=CONTAINERS
)


# --- label_by_path --------------------------------------------------------------------


@every_container
def test_paths_are_the_names_from_root_to_leaf(make, paths):
    assert seen_paths(make()) == paths


@every_container
def test_each_leaf_gets_the_label_of_its_own_path(make, paths):
    rules = [(re.escape(path), f"<{path}>") for path in sorted(paths)]
    assert flat(osc.label_by_path(rules)(make())) == {p: f"<{p}>" for p in paths}


@every_container
def test_labels_are_in_the_containers_of_the_parameters(make, paths):
    labels = osc.label_by_path([(".*", "all")])(make())
    # Boxes of one array are leaves; as_arrays and nn.unbox take them away.
    plain = nn.unbox(make())
    plain = as_arrays(plain) if isinstance(plain, nnx.State) else plain
    assert jax.tree.structure(labels) == jax.tree.structure(plain)


def recording(rules, seen):
    label = osc.label_by_path(rules)

    def record(params):
        labels = label(params)
        seen.append(flat(labels))
        return labels

    return record


@every_container
def test_labels_at_init_and_update_are_the_same(make, paths):
    seen: list[dict] = []
    rules = [(re.escape(path), f"<{path}>") for path in sorted(paths)]
    multipliers = {f"<{path}>": 1.0 for path in paths}
    tx = osc.scale_by_group(multipliers, recording(rules, seen))
    state = tx.init(make())
    pure = nn.unbox(make())
    pure = as_arrays(pure) if isinstance(pure, nnx.State) else pure
    tx.update(pure, state, pure)
    assert len(seen) == 2
    assert seen[0] == seen[1] == {path: f"<{path}>" for path in paths}


def train_nnx(tx, steps=2):
    net = Net()
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        grads = nnx.grad(lambda net: (net(jnp.ones((4, 2))) ** 2).sum())(net)
        optimizer.update(net, grads)

    for _ in range(steps):
        step(net, optimizer)
    return net, optimizer


def test_nnx_optimizer_gives_the_same_paths_at_init_and_update():
    seen: list[dict] = []
    rules = [("head/.*", "head"), (".*", "body")]
    train_nnx(osc.scale_by_group({"head": 1.0, "body": 0.5}, recording(rules, seen)))
    expected = {p: "head" if p == "head/kernel" else "body" for p in NNX_PATHS}
    assert len(seen) >= 2
    assert all(labels == expected for labels in seen)


@pytest.mark.parametrize("rules", [[("head/.*", "on"), (".*", "off")]])
def test_label_functions_work_in_partition_in_nnx_training(rules):
    tx = optax.partition(
        {"on": optax.sgd(0.01), "off": optax.set_to_zero()}, osc.label_by_path(rules)
    )
    net, _ = train_nnx(tx)
    start = Net()
    assert (net.embed.kernel[...] == start.embed.kernel[...]).all()
    assert (net.head.kernel[...] != start.head.kernel[...]).any()


def test_depth_labels_work_in_partition_in_nnx_training():
    tx = optax.partition(
        {0: optax.set_to_zero(), 1: optax.set_to_zero(), 2: optax.sgd(0.01)},
        osc.label_by_depth(),
    )
    net, _ = train_nnx(tx)
    start = Net()
    assert (net.layers[0].kernel[...] == start.layers[0].kernel[...]).all()
    assert (net.head.kernel[...] != start.head.kernel[...]).any()


def test_partition_sees_the_labels_of_boxed_linen_parameters():
    tx = optax.partition(
        {"on": optax.sgd(1.0), "off": optax.set_to_zero()},
        osc.label_by_path([("head/.*", "on"), (".*", "off")]),
    )
    params = linen_params()
    updates, _ = tx.update(params, tx.init(params), params)
    updates = nn.unbox(updates)
    assert not updates["embed"]["kernel"].any()
    assert (updates["head"]["kernel"] == -1).all()


def test_haiku_networks_have_paths_of_modules_and_names():
    network = hk.transform(lambda x: hk.nets.MLP([3, 2])(x))
    params = jax.eval_shape(network.init, jax.random.key(0), jnp.ones((1, 4)))
    label = osc.label_by_path([("mlp/~/linear_1/.*", "head"), (".*", "body")])
    assert label(params) == {
        "mlp/~/linear_0": {"w": "body", "b": "body"},
        "mlp/~/linear_1": {"w": "head", "b": "head"},
    }


def test_haiku_shaped_networks_have_depths():
    assert osc.label_by_depth()(HAIKU) == {
        "mlp/~/linear_0": {"w": 0, "b": 0},
        "mlp/~/linear_1": {"w": 1, "b": 1},
    }


def test_the_first_rule_that_matches_wins():
    params = nested(["a/kernel", "a/bias", "b/bias"])
    label = osc.label_by_path([("a/bias", 0), (".*/bias", 1), (".*", 2)])
    assert flat(label(params)) == {"a/kernel": 2, "a/bias": 0, "b/bias": 1}


@pytest.mark.parametrize("rule", ["head", "ead/kernel", "head/kerne"])
def test_a_rule_must_match_the_whole_path(rule):
    label = osc.label_by_path([(rule, 0), (".*", 1)], unmatched_rules="warn")
    with pytest.warns(UserWarning, match=rule):
        assert label(nested(["head/kernel"])) == {"head": {"kernel": 1}}


def test_compiled_expressions_are_rules_too():
    label = osc.label_by_path([(re.compile("HEAD", re.IGNORECASE), 1), (".*", 0)])
    assert label({"head": LEAF, "body": LEAF}) == {"head": 1, "body": 0}


def test_uncovered_leaves_are_listed_with_the_rules_that_match_nothing():
    params = nested(["body/kernel", "body/bias", "head/kernel"])
    with pytest.raises(ValueError, match="`rules` must cover") as error:
        osc.label_by_path([("head/.*", 1), ("boddy/.*", 0)])(params)
    message = str(error.value)
    assert "'body/bias', 'body/kernel'" in message
    assert "match nothing: 'boddy/.*'" in message
    assert "head" not in message


def test_a_long_list_of_uncovered_leaves_is_cut():
    params = nested([f"layer_{k}" for k in range(30)])
    with pytest.raises(ValueError, match="and 22 more"):
        osc.label_by_path([("head", 1)])(params)


def test_an_idle_rule_is_an_error_with_the_paths():
    label = osc.label_by_path([("haed", 1), (".*", 0)])
    with pytest.raises(ValueError, match=r"`rules` must each label.*'haed'.*'head'"):
        label({"head": LEAF})


def test_a_rule_behind_one_that_takes_all_is_idle():
    label = osc.label_by_path([(".*", 0), ("head", 1)])
    with pytest.raises(ValueError, match=r"`rules` must each label.*'head'"):
        label({"head": LEAF})


def test_an_idle_rule_is_a_warning_where_that_is_wanted():
    label = osc.label_by_path([("haed", 1), (".*", 0)], unmatched_rules="warn")
    with pytest.warns(UserWarning, match="'haed'"):
        assert label({"head": LEAF}) == {"head": 0}


def test_a_rule_that_matches_only_none_or_masked_leaves_is_not_idle():
    label = osc.label_by_path([("a", 0), ("b", 1), (".*", 2)])
    labels = label({"a": None, "b": optax.MaskedNode(), "c": LEAF})
    assert labels == {"a": None, "b": optax.MaskedNode(), "c": 2}


@pytest.mark.parametrize("unmatched_rules", ["error", "warn"])
def test_idle_rules_are_fine_under_masked_and_partition(unmatched_rules):
    label = osc.label_by_path([("a/.*", 0), ("b", 1)], unmatched_rules=unmatched_rules)
    tx = osc.scale_by_group({0: 2.0, 1: 3.0}, label)
    params = {"a": {"x": LEAF}, "b": LEAF}
    wrappers = (
        optax.masked(tx, {"a": False, "b": True}),
        optax.masked(tx, {"a": {"x": False}, "b": True}),
        optax.partition({"on": tx, "off": optax.identity()}, {"a": "off", "b": "on"}),
    )
    for wrapped in wrappers:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            updates, _ = wrapped.update(params, wrapped.init(params), params)
        assert (updates["a"]["x"] == 1).all()
        assert (updates["b"] == 3).all()


def test_an_empty_tree_gets_no_labels_and_no_error():
    assert osc.label_by_path([("a", 0)])({}) == {}
    assert osc.label_by_depth()({}) == {}


# --- labels given as they are ---------------------------------------------------------


def scaled(params, labels, multipliers):
    tx = osc.scale_by_group(multipliers, labels)
    updates, _ = tx.update(params, tx.init(params), params)
    return updates


def test_labels_may_be_a_prefix_of_the_parameters():
    params = nested(["body/a/kernel", "body/bias", "head/kernel"])
    updates = scaled(params, {"body": 0, "head": 1}, {0: 2.0, 1: 3.0})
    assert {path: float(u[0]) for path, u in flat(updates).items()} == {
        "body/a/kernel": 2.0, "body/bias": 2.0, "head/kernel": 3.0,
    }  # fmt: skip


@pytest.mark.parametrize("label", [0, "all"])
def test_a_single_label_is_a_prefix_of_everything(label):
    updates = scaled({"a": LEAF, "b": [LEAF]}, label, {label: 3.0})
    assert all((u == 3).all() for u in jax.tree.leaves(updates))


def test_labels_may_have_kept_the_variables_of_nnx():
    variables = nnx.state(Net(), nnx.Param)

    def label(path, leaf):
        return "head" if "head" in jax.tree_util.keystr(path) else "body"

    labels = jax.tree_util.tree_map_with_path(label, variables)
    kept = jax.tree.leaves(labels, is_leaf=lambda x: isinstance(x, nnx.Param))
    assert all(isinstance(node, nnx.Param) for node in kept)
    start = Net()
    net, _ = train_nnx(
        optax.chain(
            osc.scale_by_group({"head": 1.0, "body": 0.0}, labels), optax.sgd(0.01)
        )
    )
    assert (net.embed.kernel[...] == start.embed.kernel[...]).all()
    assert (net.head.kernel[...] != start.head.kernel[...]).any()


def test_labels_may_have_kept_the_boxes_of_linen():
    params = linen_params()
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: int("head" in jax.tree_util.keystr(path)), params
    )
    updates = nn.unbox(scaled(params, labels, {0: 2.0, 1: 3.0}))
    assert (updates["embed"]["kernel"] == 2).all()
    assert (updates["head"]["kernel"] == 3).all()


def test_labels_of_arrays_serve_boxed_parameters():
    params = linen_params()
    labels = jax.tree.map(lambda _: 0, nn.unbox(params))
    updates = nn.unbox(scaled(params, labels, {0: 2.0}))
    assert (updates["embed"]["kernel"] == 2).all()


def test_an_equinox_module_of_labels_is_a_tree_and_not_called():
    params = equinox_net()
    labels = osc.label_by_path([("layers/.*", 1), (".*", 0)])(params)
    assert callable(labels)
    updates = scaled(params, labels, {0: 2.0, 1: 3.0})
    assert (updates.value == 2).all()
    assert (updates.layers[0].weight == 3 * params.layers[0].weight).all()


def test_labels_under_masked_may_keep_the_hidden_leaves():
    tx = osc.scale_by_group({0: 2.0, 1: 3.0}, {"a": 0, "b": 1})
    wrapped = optax.masked(tx, {"a": True, "b": False})
    params = {"a": LEAF, "b": LEAF}
    updates, _ = wrapped.update(params, wrapped.init(params), params)
    assert (updates["a"] == 2).all()
    assert (updates["b"] == 1).all()


def test_a_leaf_that_is_none_needs_no_label_and_may_have_one():
    params = {"a": LEAF, "b": None}
    for label in (None, 0):
        updates = scaled(params, {"a": 0, "b": label}, {0: 2.0})
        assert updates["b"] is None
        assert (updates["a"] == 2).all()


EMPTY = {
    "dict": ({"a": LEAF, "b": {}, "c": LEAF}, {"a": 0, "b": 0, "c": 1}),
    "tuple": ([(LEAF, LEAF), (), (LEAF,)], [0, 0, 1]),  # A layer without parameters.
}


@pytest.mark.parametrize(("params", "labels"), EMPTY.values(), ids=EMPTY)
def test_what_is_empty_may_have_a_label(params, labels):
    params = jax.tree.map(jnp.ones_like, params)
    updates = scaled(params, labels, {0: 2.0, 1: 3.0})
    sums = [float(leaf.sum() / leaf.size) for leaf in jax.tree.leaves(updates)]
    assert sums == sorted(sums)
    assert {*sums} == {2.0, 3.0}


BAD_LABELS = {
    "missing": ({"a": 0}, "no label for 'b/x', 'b/y'"),
    "missing_in_subtree": ({"a": 0, "b": {"x": 0}}, "no label for 'b/y'"),
    "unknown": ({"a": 0, "b": 0, "c": 0}, "no parameter at 'c'"),
    "below_a_leaf": ({"a": {"z": 0}, "b": 0}, "no parameter at 'a/z'"),
    "misspelt": ({"a": 0, "bb": 0}, "no label for 'b/x', 'b/y' and no parameter"),
    "list": ([0, 0], "no label for 'a', 'b/x', 'b/y'"),
}


@pytest.mark.parametrize(("labels", "reason"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_do_not_fit_name_the_paths(labels, reason):
    params = nested(["a", "b/x", "b/y"])
    for build in (
        osc.scale_by_group({0: 1.0}, labels).init,
        osc.gradual_unfreezing(optax.sgd(1.0), {0: 1}, labels).init,
        functools.partial(osc.describe_groups, param_labels=labels),
    ):
        with pytest.raises(ValueError, match="`param_labels` must have") as error:
            build(params)
        assert reason in str(error.value)


def test_a_function_that_gives_labels_that_do_not_fit_is_named_too():
    with pytest.raises(ValueError, match=r"^`param_labels`.*no label for 'b'"):
        scaled({"a": LEAF, "b": LEAF}, lambda params: {"a": 0}, {0: 1.0})


PLAIN = {
    "frozen_dict": (FrozenDict({"a": {"b": LEAF}, "c": LEAF}), {"a": 1, "c": 0}),
    "nnx_variables": (
        nnx.state(Net(), nnx.Param),
        {"embed": 1, "layers": 0, "head": 0},
    ),
    "named_tuple": (Pair({"w": LEAF}, LEAF), {"body": 1, "head": 0}),
    "paths": ({"a": {"b": LEAF}, "c": LEAF}, {"a/b": 1, "c": 0}),
    "haiku": (HAIKU, {"mlp/~/linear_0": 1, "mlp": {"~": {"linear_1": 0}}}),
}


@pytest.mark.parametrize(("params", "labels"), PLAIN.values(), ids=PLAIN)
def test_a_plain_dict_labels_any_container_by_its_paths(params, labels):
    params = jax.tree.map(jnp.ones_like, params)
    updates = scaled(params, labels, {0: 0.0, 1: 1.0})
    lines = osc.describe_groups(params, labels, leaves=True).splitlines()[1:]
    for line, leaf in zip(lines, jax.tree.leaves(updates), strict=True):
        assert bool(leaf.any()) == line.startswith("1")
    assert {line[0] for line in lines} == {"0", "1"}


def test_leaves_with_one_path_may_have_labels_of_their_own():
    params = {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}
    updates = scaled(params, {"a/b": 0, "a": {"b": 1}}, {0: 2.0, 1: 3.0})
    assert (updates["a/b"], updates["a"]["b"]) == (2, 3)


def test_two_labels_for_one_path_are_refused():
    with pytest.raises(ValueError, match=r"^`param_labels` must be .* several"):
        scaled({"a": {"b": LEAF}}, {"a/b": 0, "a": {"b": 1}}, {0: 0.0, 1: 1.0})


MIXED = {
    "string_and_integer": ["a", 0],
    "float": [0.5, 1.5],
    "bool": [True, False],
    "bool_and_integer": [True, 3],
}


@pytest.mark.parametrize("labels", MIXED.values(), ids=MIXED)
def test_labels_of_several_kinds_are_refused(labels):
    with pytest.raises(TypeError, match=r"^`param_labels` must have labels"):
        scaled([LEAF, LEAF], labels, {0: 1.0})


BAD_RULES = {
    "none": ([], ValueError, "`rules` must be at least one pair"),
    "no_pair": ([("a", 0, 1)], TypeError, "`rules` must be pairs"),
    "string": (["ab"], TypeError, "`rules` must be pairs"),
    "number": ([(3, 0)], TypeError, "`rules` must be a regular expression, got 3"),
    "no_list": (3, TypeError, "`rules` must be"),
    "unhashable": ([("a", [0])], TypeError, "`rules` must"),
    "mixed": ([("a", 0), ("b", "b")], TypeError, "`rules` must"),
    "unclosed": ([("(", 0)], ValueError, "`rules` must be a regular expression.*'\\('"),
}


@pytest.mark.parametrize(
    ("rules", "kind", "message"), BAD_RULES.values(), ids=BAD_RULES
)
def test_a_bad_rule_is_refused_when_it_is_given(rules, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        osc.label_by_path(rules)


# --- label_by_depth -------------------------------------------------------------------


def depths(paths, **options):
    return flat(osc.label_by_depth(**options)(nested(paths)))


def timm_vit(blocks=12):
    outside = {
        "cls_token": 0, "pos_embed": 0, "patch_embed/proj/kernel": 0,
        "patch_embed/proj/bias": 0, "norm/scale": blocks, "norm/bias": blocks,
        "head/kernel": blocks + 1, "head/bias": blocks + 1,
    }  # fmt: skip
    names = ["norm1/scale", "norm1/bias", "attn/qkv/kernel", "attn/proj/kernel"]
    names += ["norm2/scale", "mlp/fc1/kernel", "mlp/fc1/bias", "mlp/fc2/kernel"]
    inside = {f"blocks/{k}/{n}": k + 1 for k in range(blocks) for n in names}
    return outside | inside


def flax_vit(blocks=12):
    outside = {
        "embedding/kernel": 0, "embedding/bias": 0, "cls": 0,
        "Transformer/posembed_input/pos_embedding": 0,
        "Transformer/encoder_norm/scale": blocks,
        "Transformer/encoder_norm/bias": blocks,
        "head/kernel": blocks + 1, "head/bias": blocks + 1,
    }  # fmt: skip
    names = ["LayerNorm_0/scale", "LayerNorm_2/scale"]
    names += [
        f"MultiHeadDotProductAttention_{j}/{n}/kernel"
        for j in (0, 1)
        for n in ("query", "key", "value", "out")
    ]
    names += ["MlpBlock_3/Dense_0/kernel", "MlpBlock_3/Dense_1/kernel"]
    inside = {
        f"Transformer/encoderblock_{k}/{n}": k + 1 for k in range(blocks) for n in names
    }
    return outside | inside


def hugging_face_vit(blocks=12):
    outside = {
        "vit/embeddings/cls_token": 0, "vit/embeddings/position_embeddings": 0,
        "vit/embeddings/patch_embeddings/projection/kernel": 0,
        "vit/layernorm/scale": blocks, "classifier/kernel": blocks + 1,
    }  # fmt: skip
    names = ["attention/attention/query/kernel", "attention/output/dense/kernel"]
    names += ["intermediate/dense/kernel", "output/dense/kernel"]
    names += ["layernorm_before/scale", "layernorm_after/scale"]
    inside = {f"vit/encoder/layer/{k}/{n}": k + 1 for k in range(blocks) for n in names}
    return outside | inside


def bert(blocks=12):
    outside = {
        "bert/embeddings/word_embeddings/embedding": 0,
        "bert/embeddings/LayerNorm/scale": 0,
        "bert/pooler/dense/kernel": blocks + 1, "classifier/kernel": blocks + 1,
    }  # fmt: skip
    names = ["attention/self/query/kernel", "attention/output/LayerNorm/scale"]
    inside = {
        f"bert/encoder/layer/{k}/{n}": k + 1 for k in range(blocks) for n in names
    }
    return outside | inside


def gpt2(blocks=12):
    outside = {"wte/embedding": 0, "wpe/embedding": 0, "ln_f/scale": blocks}
    names = ["ln_1/scale", "attn/c_attn/kernel", "ln_2/scale", "mlp/c_fc/kernel"]
    inside = {f"h/{k}/{n}": k + 1 for k in range(blocks) for n in names}
    return {f"transformer/{p}": depth for p, depth in (outside | inside).items()}


def llama(blocks=4):
    outside = {
        "model/embed_tokens/embedding": 0, "model/norm/kernel": blocks,
        "lm_head/kernel": blocks + 1,
    }  # fmt: skip
    names = ["self_attn/q_proj/kernel", "mlp/gate_proj/kernel"]
    names += ["input_layernorm/kernel", "post_attention_layernorm/kernel"]
    inside = {f"model/layers/{k}/{n}": k + 1 for k in range(blocks) for n in names}
    return outside | inside


NETWORKS = {
    "timm_vit": (timm_vit(), 14),
    "flax_vit": (flax_vit(), 14),
    "hugging_face_vit": (hugging_face_vit(), 14),
    "bert": (bert(), 14),
    "gpt2": (gpt2(), 13),
    "llama": (llama(), 6),
}


@pytest.mark.parametrize(("expected", "groups"), NETWORKS.values(), ids=NETWORKS)
def test_published_networks_have_the_depths_of_timm(expected, groups):
    found = depths(expected)
    assert found == expected
    assert sorted(set(found.values())) == list(range(groups))


@pytest.mark.parametrize("name", ["timm_vit", "flax_vit", "hugging_face_vit", "llama"])
def test_the_final_norm_goes_with_the_head_where_that_is_wanted(name):
    expected, groups = NETWORKS[name]
    moved = {
        path: groups - 1
        if depth == groups - 2 and re.search(r"(^|/)((encoder_|layer)?norm)/", path)
        and not re.search(r"\d", path)
        else depth
        for path, depth in expected.items()
    }  # fmt: skip
    assert moved != expected
    assert depths(expected, final_norm="head") == moved


# paths and their depths, with the options that make them
CASES = {
    "no_stem": ({"layers/0/w": 0, "layers/1/w": 1, "head/w": 2}, {}),
    "no_head": ({"embed/w": 0, "layers/0/w": 1, "layers/1/w": 2}, {}),
    "only_blocks": ({"0": 0, "1": 1}, {}),
    "only_stem_and_head": ({"embed": 0, "head": 1}, {}),
    "only_a_head": ({"head/w": 0, "head/b": 0}, {}),
    "numbers_from_one": ({"embed": 0, "block_1/w": 1, "block_2/w": 2, "head": 3}, {}),
    "gaps": ({"embed": 0, "layers/2/w": 1, "layers/7/w": 2, "layers/11/w": 3}, {}),
    "ten_follows_nine": ({f"b{k}/w": k for k in range(12)}, {}),
    "norm_in_block": ({"blocks/0/norm/scale": 0, "blocks/3/norm/scale": 1}, {}),
    "head_in_block": ({"embed": 0, "blocks/3/attn/head/w": 1, "head/w": 2}, {}),
    "number_in_stem": ({"stem/0/w": 0, "stem/1/w": 0, "layers/0/w": 1}, {}),
    "number_of_stem": ({"embed_0/w": 0, "stem_1/w": 0, "layers/0/w": 1}, {}),
    "number_in_head": ({"layers/0/w": 0, "layers/1/w": 1, "head/layers/1/w": 2}, {}),
    "norm_without_blocks": ({"norm": 0, "head": 0}, {}),
    "norm_and_stem": ({"embed": 0, "norm": 0, "head": 1}, {}),
    "shared_parent": ({"backbone/embed": 0, "backbone/layers/0": 1, "fc": 2}, {}),
    "names_in_capitals": ({"Embed_0/w": 0, "Block_0/w": 1, "Head/w": 2}, {}),
    "lists_of_equal_length": (
        {"convs/0": 0, "convs/1": 1, "norms/0": 0, "norms/1": 1, "head": 2}, {},
    ),
    "pattern": (
        {"stage1/layers/0": 0, "stage1/layers/1": 0, "stage2/layers/0": 1, "head": 2},
        {"pattern": r"stage(\d+)"},
    ),
    "pattern_takes_the_group_with_digits": (
        {"a0_x": 0, "b1_x": 1, "head": 2}, {"pattern": r"a(\d)|b(\d)"},
    ),
    "pattern_of_a_later_number": (
        {"part1/block_0": 0, "part1/block_1": 1, "head/x2": 2},
        {"pattern": r"block_(\d+)"},
    ),
    "stem_whole_path": (
        {"conv1/w": 0, "bn1/w": 1, "layer2/w": 2}, {"stem": "conv1/w"},
    ),
    "stem_beginning": (
        {"net/conv1/w": 0, "net/conv1/b": 0, "net/layer1/w": 1, "net/layer2/w": 2},
        {"stem": "net/conv1"},
    ),
    "stem_several": (
        {"conv1/w": 0, "bn1/b": 0, "layer1/w": 1, "layer2/w": 2},
        {"stem": ("conv1", re.compile("bn1"))},
    ),
    "stem_no_part_of_a_name": (
        {"conv1/w": 0, "conv11/w": 2, "layer1/w": 1}, {"stem": "conv1"},
    ),
    "head_several": (
        {"layer1/w": 0, "proj/w": 1, "Dense_0/w": 1}, {"head": ["proj", "Dense_0"]},
    ),
    "head_before_names": (
        {"layer1/w": 0, "layer2/w": 1, "embed/w": 2}, {"head": "embed"},
    ),
    "head_goes_before_pattern": (
        {"x_0/w": 0, "x_1/w": 1, "x_2/w": 2}, {"pattern": r"x_(\d)", "head": "x_2"},
    ),
    "stem_goes_before_head": (
        {"a": 0, "layers/0": 1, "b": 2}, {"stem": "a", "head": ["a", "b"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("expected", "options"), CASES.values(), ids=CASES)
def test_depths_follow_numbers_and_names(expected, options):
    assert depths(expected, **options) == expected


def test_a_digit_inside_a_name_is_no_number():
    with pytest.raises(ValueError, match="'conv2d/w'"):
        depths(["conv2d/w", "layers/0/w"])


def test_paths_with_neither_number_nor_name_are_listed():
    with pytest.raises(ValueError, match=r"^`params` must have a number") as error:
        depths(["mystery/kernel", "riddle", "layers/0/w", "head/w"])
    assert "got 'mystery/kernel', 'riddle'." in str(error.value)


def vision_transformer(blocks=2):
    """Flax's scan over layers, and the same unrolled."""
    inside = ["LayerNorm_0/scale", "Attention_0/query/kernel", "MlpBlock_0/Dense_1/w"]
    return {f"encoderblock_{k}/{name}": k for k in range(blocks) for name in inside}


def under(prefix, paths):
    return [f"{prefix}/{path}" for path in paths]


def numbered(name, count):
    return [f"{name}{k}/kernel" for k in range(count)]


T5 = [
    "shared/embedding",
    *under("encoder", numbered("block/", 3)),
    *under("decoder", numbered("block/", 3)),
    "lm_head/kernel",
]
TORCH_RESNET = [
    "conv1/kernel", "bn1/scale", "fc/kernel",
    *(f"layer{k}/{j}/conv1/kernel" for k in (1, 2, 3, 4) for j in (0, 1, 2, 3)),
]  # fmt: skip
FLAX_RESNET = [
    "conv_init/kernel", "bn_init/scale", "Dense_0/kernel",
    *(f"ResNetBlock_{k}/Conv_{c}/kernel" for k in range(4) for c in (0, 1)),
]  # fmt: skip
CLIP = [
    *under("text_model", ["embeddings/token_embedding/embedding"]),
    *under("text_model/encoder", numbered("layers/", 2)),
    *under("vision_model", ["embeddings/class_embedding"]),
    *under("vision_model/encoder", numbered("layers/", 3)),
    "logit_scale",
]
# Paths of several stacks, what the error shows of them, and options that follow it.
SEVERAL = {
    "convolutions and a dense layer": (
        ["Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel"],
        "'Conv_' with 0, 1, 'Dense_' with 0.",
        {"pattern": r"Conv_(\d+)", "head": "Dense_0"},
        [0, 1, 2],
    ),
    "of equal length": (
        [*numbered("Conv_", 2), *numbered("Dense_", 2)],
        "'Conv_' with 0, 1, 'Dense_' with 0, 1.",
        {"pattern": r"Conv_(\d+)", "head": r"Dense_\d"},
        [0, 1, 2, 2],
    ),
    "T5": (
        T5,
        "'decoder/block/' with 0, 1, 2, 'encoder/block/' with 0, 1, 2.",
        {"pattern": r"decoder/block/(\d+)", "stem": ["shared", "encoder"]},
        [0, *3 * [0], 1, 2, 3, 4],
    ),
    "T5, the encoder": (
        T5,
        "'decoder/block/' with 0, 1, 2",
        {"pattern": r"encoder/block/(\d+)", "stem": "shared", "head": "decoder"},
        [0, 1, 2, 3, *3 * [4], 4],
    ),
    "one layer each": (
        ["Encoder_0/Dense_0/kernel", "Decoder_0/Dense_0/kernel"],
        "'Decoder_' with 0, 'Encoder_' with 0.",
        {"stem": "Encoder_0", "head": "Decoder_0"},
        [0, 1],
    ),
    "two towers": (
        CLIP,
        "'text_model/encoder/layers/' with 0, 1, "
        "'vision_model/encoder/layers/' with 0, 1, 2.",
        {
            "pattern": r"vision_model/encoder/layers/(\d+)",
            "stem": "text_model",
            "head": "logit_scale",
        },
        [0, 0, 0, 0, 1, 2, 3, 4],
    ),
    "torchvision's ResNet": (
        TORCH_RESNET,
        "'bn' with 1, 'conv' with 1, 'layer' with 1, 2, 3, 4.",
        {"pattern": r"layer(\d)", "stem": ["conv1", "bn1"]},
        [0, 0, 5, *4 * [1], *4 * [2], *4 * [3], *4 * [4]],
    ),
    "Flax's ResNet": (
        [p for p in FLAX_RESNET if "init" not in p],
        "'Dense_' with 0, 'ResNetBlock_' with 0, 1, 2, 3.",
        {"pattern": r"ResNetBlock_(\d+)", "head": "Dense_0"},
        [4, 0, 0, 1, 1, 2, 2, 3, 3],
    ),
    "a final norm that is numbered": (
        [*numbered("Block_", 2), "LayerNorm_0/scale"],
        "'Block_' with 0, 1, 'LayerNorm_' with 0.",
        {"pattern": r"Block_(\d+)"},
        [0, 1, 1],
    ),
    "norms of another tower": (
        ["a/layers/0/w", "a/layers/1/w", "b/norms/0/w", "b/norms/1/w"],
        "'a/layers/' with 0, 1, 'b/norms/' with 0, 1.",
        {"pattern": r"a/layers/(\d+)", "head": "b"},
        [0, 1, 2, 2],
    ),
    "names with norm in them": (
        ["online/layers/0/w", "online/layers/1/w", "target/layers/0/w",
         "target/layers/1/w"],
        "'online/layers/' with 0, 1, 'target/layers/' with 0, 1.",
        {"pattern": r"layers/(\d+)"},
        [0, 1, 0, 1],
    ),
    "Haiku's MLPs": (
        ["mlp/~/linear_0/w", "mlp/~/linear_1/w", "mlp_1/~/linear_0/w"],
        "'mlp/~/linear_' with 0, 1, 'mlp_' with 1.",
        {"pattern": r"mlp/~/linear_(\d+)", "head": "mlp_1"},
        [0, 1, 2],
    ),
    "leaves of two lists": (
        ["encoder/w_0", "encoder/w_1", "decoder/w_0", "decoder/w_1"],
        "'decoder/w_' with 0, 1, 'encoder/w_' with 0, 1.",
        {"pattern": r"encoder/w_(\d)", "head": "decoder"},
        [0, 1, 2, 2],
    ),
    "leaves that count apart": (
        ["conv_0", "conv_1", "dense_0"],
        "'conv_' with 0, 1, 'dense_' with 0.",
        {"pattern": r"conv_(\d)", "head": "dense_0"},
        [0, 1, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "shown", "options", "wanted"), SEVERAL.values(), ids=SEVERAL
)
def test_several_stacks_are_listed_and_the_advice_works(paths, shown, options, wanted):
    with pytest.raises(ValueError, match="`params` must have one numbered") as error:
        depths(paths)
    assert f"got several that count on their own: {shown}" in str(error.value)
    assert depths(paths, **options) == dict(zip(paths, wanted, strict=True))


def test_the_pattern_that_is_proposed_is_one():
    with pytest.raises(ValueError, match="such as ") as error:
        depths(CLIP)
    (pattern,) = re.findall(r"such as (.*?), and", str(error.value))
    found = depths(CLIP, pattern=pattern, head="vision_model|logit_scale")
    assert found["text_model/encoder/layers/1/kernel"] == 2


ONE_STACK = {
    "layers and their norms": [
        "Conv_0/w", "BatchNorm_0/w", "Conv_1/w", "BatchNorm_1/w",
    ],
    "norms in a list": ["convs/0/w", "convs/1/w", "bns/0/w", "bns/1/w"],
    "weights and biases": ["w_0", "b_0", "w_1", "b_1"],
    "inside of blocks": list(vision_transformer()),
    "one numbering over two kinds": ["conv_0/w", "conv_1/w", "dense_2/w", "dense_3/w"],
    "a number in the name of a network": ["resnet50/stem/w", "resnet50/head/w"],
}  # fmt: skip


@pytest.mark.parametrize("paths", ONE_STACK.values(), ids=ONE_STACK)
def test_what_lies_side_by_side_is_one_stack(paths):
    depths(paths)


ONE_NUMBER = {
    "network": ["resnet50/layers/0", "resnet50/layers/1", "head/w"],
    "module": ["MLP_0/Dense_0/w", "MLP_0/Dense_1/w"],
}


@pytest.mark.parametrize("paths", ONE_NUMBER.values(), ids=ONE_NUMBER)
def test_a_number_before_all_others_counts_no_blocks(paths):
    with pytest.raises(
        ValueError, match=r"before all others in every path.* 0, 1 deep"
    ):
        depths(paths)
    pattern = r"(?:layers/|Dense_)(\d+)"
    found = depths(paths, pattern=pattern)
    assert [found[path] for path in paths[:2]] == [0, 1]


def test_layers_in_one_leaf_are_pointed_to_arrays():
    with pytest.raises(ValueError, match=r"'layers/kernel'.*multiplier is an array"):
        depths(["embed/w", "layers/kernel", "head/w"])


def test_depths_do_not_change_where_partition_hides_a_part():
    params = nested(["embed/w", "layers/0/w", "layers/1/w", "head/w"])
    whole = osc.label_by_depth()(params)
    tx = osc.scale_by_group({k: 10.0**k for k in range(4)}, osc.label_by_depth())
    labels = {"embed": "on", "layers": "on", "head": "off"}
    wrapped = optax.partition({"on": tx, "off": optax.identity()}, labels)
    updates, _ = wrapped.update(params, wrapped.init(params), params)
    for name in ("embed", "layers"):
        for depth, update in zip(
            jax.tree.leaves(whole[name]), jax.tree.leaves(updates[name]), strict=True
        ):
            assert (update == 10.0**depth).all()
    assert (updates["head"]["w"] == 1).all()


BAD_OPTIONS = {
    "final_norm": ({"final_norm": "stem"}, ValueError, "`final_norm` must be one of"),
    "no_group": ({"pattern": r"\d+"}, ValueError, "`pattern` must be .* group"),
    "pattern": ({"pattern": "("}, ValueError, "`pattern` must be a regular expression"),
    "pattern_type": ({"pattern": 3}, TypeError, "`pattern` must be a regular"),
    "stem": ({"stem": "*"}, ValueError, "`stem` must be a regular expression"),
    "stem_type": ({"stem": [3]}, TypeError, "`stem` must be a regular expression"),
    "head": ({"head": ["a", ")"]}, ValueError, "`head` must be a regular expression"),
    "stem_no_list": ({"stem": 3}, TypeError, "`stem` must be"),
    "head_no_list": ({"head": None}, TypeError, "`head` must be"),
}


@pytest.mark.parametrize(
    ("options", "kind", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS
)
def test_a_bad_option_is_refused_when_it_is_given(options, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        osc.label_by_depth(**options)


def test_a_subtree_that_is_hidden_as_a_whole_is_an_error():
    """Its numbers are hidden too, and the depths of the others would change."""
    leaf = jnp.ones(1)
    params = {"embed": leaf, "blocks": [leaf] * 4, "head": leaf}
    label = osc.label_by_depth()
    tx = osc.scale_by_group(osc.layerwise_multipliers(label(params), 0.5), label)
    whole = {"embed": False, "blocks": False, "head": True}
    with pytest.raises(ValueError, match="hidden as a whole"):
        optax.masked(tx, whole).init(params)
    one_by_one = optax.masked(tx, whole | {"blocks": [False] * 4})
    updates, _ = one_by_one.update(params, one_by_one.init(params), params)
    assert updates["head"] == 1


def test_depths_have_no_gaps_where_a_number_has_no_array():
    params = {"layers": [jnp.ones(1), None, None, jnp.ones(1)]}
    assert osc.label_by_depth()(params) == {"layers": [0, None, None, 1]}
