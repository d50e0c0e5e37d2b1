"""Which batch statistics belong to these parameters?

The running statistics of batch norms belong to the weights that training passed
through, not to an average of them. :func:`recalibrate_batch_stats` computes the mean
and the variance of the population at any weights: every norm of the network is watched
while batches go through it, and what it has seen is kept beside its statistics, in the
network's own variables, so that every lifted transformation carries it along.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optax_superconv import _batches, _checks

# What a norm has seen so far: how many elements of each feature, and their moments.
_TOTALS = ("observed_count", "observed_mean", "observed_var")
# Variances of norms whose statistics are not known yet: these normalise with the
# batch's own moments, or with others, to find out which norms feel the difference.
_OWN, _OTHERS = -1.0, -2.0
_RTOL = 1e-6  # Of a standard deviation: a difference that is felt.

# One per norm: (mean, variance), and (count, mean, variance).
Statistics = list[tuple[jax.Array, jax.Array]]
Totals = list[tuple[jax.Array, jax.Array, jax.Array]]


class Network(NamedTuple):
    """What a framework's model and parameters come down to."""

    step: Callable[..., Totals]  # (forward, state, stats, totals, batch) -> totals
    state: Any
    stats: Statistics
    depth: int  # norms in it
    finish: Callable[[Statistics], Any]  # puts statistics where the model has them


def _wide(array: jax.Array) -> Any:
    return jnp.float64 if array.dtype == jnp.float64 else jnp.float32


def _moments(
    norm: Any, x: jax.Array, mask: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Count, mean and variance of what a norm is given, for each of its features."""
    features = {axis % x.ndim for axis in np.atleast_1d(norm.axis)}
    axes = tuple(axis for axis in range(x.ndim) if axis not in features)
    # Squares of half-precision activations overflow, and their sums round.
    x = x.astype(_wide(x))

    def total(values: jax.Array) -> jax.Array:
        here = jnp.sum(values, axes, where=mask)
        if norm.axis_name is None:
            return here
        groups = norm.axis_index_groups
        try:
            return jax.lax.psum(here, norm.axis_name, axis_index_groups=groups)
        except NameError:  # No such axis: under `jit` the batch is whole already.
            return here

    count = total(jnp.ones_like(x))
    at_least_1 = jnp.maximum(count, 1)
    mean = total(x) / at_least_1
    # From the deviations: the mean square less the squared mean would cancel.
    var = total(jnp.square(x - jnp.expand_dims(mean, axes))) / at_least_1
    return count, mean, var


def _observe(
    norm: Any, x: jax.Array, mask: Any, variables: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The variables of a norm after it has seen ``x``.

    Its mean and variance become those to normalise with, and the law of total variance
    adds the batch to what was observed.
    """
    n, mean, var = (variables[name] for name in _TOTALS)
    b, batch_mean, batch_var = (m.astype(mean.dtype) for m in _moments(norm, x, mask))
    weight = b / jnp.maximum(n + b, 1)
    shift = batch_mean - mean
    spread = (batch_var - var) + (1 - weight) * shift * shift

    mode = variables["var"]
    # To both sides, so that no activation function hides it all.
    side = jnp.where(jnp.arange(mean.shape[-1]) % 2, 1, -1).astype(mean.dtype)
    other_mean = batch_mean + side * (1 + jnp.sqrt(batch_var))
    other_var = 1 + 4 * batch_var

    def choose(known: jax.Array, own: jax.Array, other: jax.Array) -> jax.Array:
        unknown = jnp.where(mode == _OTHERS, other, own).astype(known.dtype)
        return jnp.where(mode >= 0, known, unknown)

    return {
        "mean": choose(variables["mean"], batch_mean, other_mean),
        "var": choose(mode, batch_var, other_var),
        "observed_count": n + b,
        "observed_mean": mean + weight * shift,
        "observed_var": var + weight * spread,
    }


@functools.cache
def _watched(kind: Any) -> Any:
    """The NNX class that observes for a batch norm's and drops nothing for dropout's.

    It stands right above Flax's own class, so that subclasses call it as their super.
    """
    from flax import nnx

    if kind is nnx.BatchNorm:

        class BatchNorm(nnx.BatchNorm):
            def __call__(
                self, x: Any, use_running_average: Any = None, *, mask: Any = None
            ) -> Any:
                names = ("mean", "var", *_TOTALS)
                before = {name: getattr(self, name)[...] for name in names}
                for name, value in _observe(self, x, mask, before).items():
                    getattr(self, name)[...] = value
                return super().__call__(x, use_running_average=True)

        return BatchNorm
    if kind is nnx.Dropout:

        class Dropout(nnx.Dropout):
            def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                return inputs

        return Dropout
    base = nnx.BatchNorm if issubclass(kind, nnx.BatchNorm) else nnx.Dropout
    return types.new_class(kind.__name__, (kind, _watched(base)))


def _nnx_layers(model: Any, kinds: Any) -> list[Any]:
    from flax import nnx

    return [node for _, node in nnx.iter_graph(model) if isinstance(node, kinds)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nnx_step(
    graph: Any,
    forward: Callable[[Any, Any], Any],
    state: Any,
    stats: Statistics,
    totals: Totals,
    batch: Any,
) -> Totals:
    from flax import nnx

    model = nnx.merge(graph, state)
    for layer in _nnx_layers(model, nnx.BatchNorm | nnx.Dropout):
        object.__setattr__(layer, "__class__", _watched(layer.__class__))
    norms = _nnx_layers(model, nnx.BatchNorm)
    for norm, (mean, var), seen in zip(norms, stats, totals, strict=True):
        norm.mean[...], norm.var[...] = mean, var
        for name, value in zip(_TOTALS, seen, strict=True):
            setattr(norm, name, nnx.BatchStat(value))
    forward(model, batch)
    return [tuple(getattr(norm, name)[...] for name in _TOTALS) for norm in norms]


def _keys(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(entry.key for entry in path)


def _linen_norms(collection: Any) -> dict[tuple[Any, ...], tuple[Any, Any]]:
    """(mean, variance) by the path of each norm."""
    leaves = {
        _keys(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(collection)
    }
    return {
        (*at,): (leaf, leaves[(*at, "var")])
        for (*at, name), leaf in leaves.items()
        if name == "mean" and (*at, "var") in leaves
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _linen_step(
    model: Any,
    forward: Callable[[Any, Any], Any],
    state: Any,
    stats: Statistics,
    totals: Totals,
    batch: Any,
) -> Totals:
    from flax import linen, traverse_util

    own_call = inspect.unwrap(linen.BatchNorm.__call__)

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.orig_method.func
        if isinstance(module, linen.Dropout) and context.method_name == "__call__":
            return args[0] if args else kwargs["inputs"]
        if method is not own_call:
            return call(*args, **kwargs)
        x = args[0] if args else kwargs["x"]
        names = ("mean", "var", *_TOTALS)
        before = {name: module.get_variable("batch_stats", name) for name in names}
        if any(value is None for value in before.values()):
            where = "/".join(module.path)
            raise ValueError(
                "`params['batch_stats']` must hold the mean and the variance of every "
                f"batch norm that `forward` calls, got none for {where}."
            )
        for name, value in _observe(module, x, kwargs.get("mask"), before).items():
            module.put_variable("batch_stats", name, value)
        # Linen refuses a flag that is given twice; the module is a copy of this call's.
        flag = module.use_running_average
        object.__setattr__(module, "use_running_average", None)
        try:
            return call(x, use_running_average=True)
        finally:
            object.__setattr__(module, "use_running_average", flag)

    leaves = jax.tree_util.tree_leaves_with_path(state["batch_stats"])
    flat = {_keys(path): leaf for path, leaf in leaves}
    paths = list(_linen_norms(state["batch_stats"]))
    for path, norm, seen in zip(paths, stats, totals, strict=True):
        named = zip(("mean", "var", *_TOTALS), (*norm, *seen), strict=True)
        flat.update({(*path, name): value for name, value in named})
    collection = traverse_util.unflatten_dict(flat)
    with linen.intercept_methods(watch):
        run = linen.apply(forward, model, mutable=["batch_stats"])
        _, changed = run({**state, "batch_stats": collection}, batch)
    after = traverse_util.flatten_dict(changed["batch_stats"])
    found = [tuple(after[(*path, name)] for name in _TOTALS) for path in paths]
    return cast(Totals, found)  # Flax's trees may hold anything.


def _nnx_network(model: Any, params: Any) -> Network:
    from flax import nnx, traverse_util

    if not isinstance(params, nnx.State | Mapping):
        raise TypeError(
            "`params` must be an nnx.State or a dict of an NNX `model`'s parameters, "
            f"got a {type(params).__name__}."
        )
    layers = {type(layer).__name__ for layer in _nnx_layers(model, nnx.Module)}
    layers.discard(type(model).__name__)
    _checks.require(
        len(_nnx_layers(model, nnx.BatchNorm)) > 0,
        "model",
        "a network with batch norms (nnx.BatchNorm)",
        f"a {type(model).__name__} of {', '.join(sorted(layers)) or 'no layers'}",
    )
    copy = nnx.clone(model)
    copy.eval()

    def shapes(state: Any) -> dict[tuple[Any, ...], tuple[int, ...]]:
        state = state if isinstance(state, nnx.State) else nnx.State(state)
        flat = traverse_util.flatten_dict(nnx.to_pure_dict(state))
        # Flax's trees may hold anything; a State holds arrays.
        return {path: np.shape(cast(jax.Array, leaf)) for path, leaf in flat.items()}

    # Flax's update would take them as they are.
    own = shapes(nnx.state(copy))
    for path, shape in shapes(params).items():
        _checks.require(
            own.get(path) == shape,
            "params",
            f"parameters of `model`, which has {own.get(path, 'nothing')} at {path}",
            f"an array of shape {shape}",
        )
    nnx.update(copy, params)
    graph, state = nnx.split(copy)
    norms = _nnx_layers(copy, nnx.BatchNorm)

    def finish(stats: Statistics) -> Any:
        for norm, (mean, var) in zip(norms, stats, strict=True):
            norm.mean[...], norm.var[...] = mean, var
        return nnx.state(copy, nnx.BatchStat)

    return Network(
        functools.partial(_nnx_step, graph),
        state,
        [(norm.mean[...], norm.var[...]) for norm in norms],
        sum(norm.mean[...].size // norm.num_features for norm in norms),
        finish,
    )


def _linen_network(model: Any, params: Any) -> Network:
    if not isinstance(params, Mapping):
        raise TypeError(
            "`params` must be the dict of variables of a Linen `model`, got a "
            f"{type(params).__name__}."
        )
    collection = params.get("batch_stats", {})
    norms = _linen_norms(collection)
    _checks.require(
        len(norms) > 0,
        "params",
        "Linen variables with a collection 'batch_stats' of means and variances",
        f"collections {sorted(params)}",
    )

    def finish(stats: Statistics) -> Any:
        found = {
            (*path, name): value
            for path, norm in zip(norms, stats, strict=True)
            for name, value in zip(("mean", "var"), norm, strict=True)
        }
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: found.get(_keys(path), leaf), collection
        )

    return Network(
        functools.partial(_linen_step, model),
        params,
        list(norms.values()),
        # Lifted layers are stacked along their leading axes.
        sum(int(np.prod(np.shape(mean)[:-1])) for mean, _ in norms.values()),
        finish,
    )


def _call(model: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        raise ValueError(
            "`forward` must be given for batches that are neither arrays nor tuples, "
            f"got None and a batch of {sorted(batch)}."
        )
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _each(batches: Any) -> Iterable[Any]:
    """The batches of one pass."""
    if _batches.is_stacked(batches):
        return itertools.islice(_batches.draw(batches), _batches.num_stacked(batches))
    if not isinstance(batches, Iterable):
        _batches.draw(batches)  # Raises.
    return batches


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _unmoved(totals: Totals, others: Totals) -> list[jax.Array]:
    """Which features do not feel what the unknown norms normalise with."""
    return [
        (jnp.abs(mean - other_mean) <= _RTOL * jnp.sqrt(var))
        & (jnp.abs(var - other_var) <= _RTOL * var)
        for (_, mean, var), (_, other_mean, other_var) in zip(
            totals, others, strict=True
        )
    ]


def _unless_known(stats: Statistics, known: list[jax.Array], mode: float) -> Statistics:
    """What to normalise with: the population's statistics where they are exact."""
    return [
        (mean, jnp.where(is_known, var, jnp.asarray(mode, var.dtype)))
        for (mean, var), is_known in zip(stats, known, strict=True)
    ]


def _found(totals: Totals, stats: Statistics) -> Statistics:
    """The statistics observed, and the old ones of norms that saw nothing."""
    return [
        (
            jnp.where(count > 0, mean.astype(old_mean.dtype), old_mean),
            jnp.where(count > 0, var.astype(old_var.dtype), old_var),
        )
        for (count, mean, var), (old_mean, old_var) in zip(totals, stats, strict=True)
    ]


def recalibrate_batch_stats(
    model: Any,
    params: Any,
    batches: Any,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    num_passes: int | None = None,
) -> Any:
    r"""Computes the statistics that a network's batch norms need at given parameters.

    Averaged weights must not be evaluated with the running statistics of the training
    run, which belong to other weights. This computes the mean and the (biased) variance
    of the population at ``params``, for every Flax ``BatchNorm``. The network runs as
    for evaluation, with dropout off whatever its flags; only its batch norms watch, in
    at least float32 and with their masks. A batch of :math:`b` values with mean
    :math:`m` and variance :math:`v` joins the :math:`n` before it as

    .. math::

        w = \frac{b}{n + b}, \quad \sigma^2 \leftarrow \sigma^2 + w (v - \sigma^2)
        + w (1 - w) (m - \mu)^2, \quad \mu \leftarrow \mu + w (m - \mu),

    so batches of unequal sizes count as they should, and the variance holds what the
    batches' means differ by.

    In the first pass each batch is normalised by its own statistics, as in training.
    That is exact for the first norm alone: those behind it see batches that are a
    little off, the more the smaller the batches. So every further pass normalises with
    the population's statistics wherever they are exact, and takes exactness one norm
    deeper. After as many passes as there are norms in a row, all are those of the whole
    data set computed at once, however it is cut into batches. A pass costs an
    evaluation of ``batches``. ``num_passes=1`` is what averaging in training mode gives
    (PreciseBN): take shuffled batches as large as in training then.

    Args:
      model: A Flax NNX module, which stays as it is, or a Linen module.
      params: NNX: the parameters, as ``nnx.state(model, nnx.Param)`` or
        :func:`eval_params` returns them, or a part of them. The rest is the model's.
        Linen: the variables ``{"params": ..., "batch_stats": ...}`` and all other
        collections that the model reads.
      batches: A sequence, an iterable, an iterator or a stacked pytree of batches, as
        for :func:`range_test`, but each is seen once a pass, and in a sequence or an
        iterable they may differ in size. The step compiles once per shape.
      forward: ``(model, batch) -> anything``, calls the network on a batch as for
        evaluation: ``lambda model, batch: model(batch["image"], train=False)``. A Linen
        model comes bound to its variables. None calls ``model(batch[0])`` if the batch
        is a tuple or a list and ``model(batch)`` if not. Give the same function again,
        not a new lambda, and nothing compiles again.
      num_passes: Number of passes over the batches, at least 1. An iterator allows only
        1, since it can be read only once; that is exact for the first norm alone. None
        is 1 for an iterator. For anything else it is as many as it takes until all
        norms are exact, at most one pass per norm.

    Returns:
      The statistics with their structure and dtypes. NNX: an ``nnx.State`` of the
      ``nnx.BatchStat`` variables, for ``nnx.update(model, stats)``; Linen: the
      collection ``batch_stats``. What ``forward`` does not use, and what belongs to
      other layers than ``BatchNorm``, is as before. A norm that is called several times
      gets the statistics of all its calls; it, and those behind it, stay as after one
      pass. With an ``axis_name`` bound by ``pmap``, ``shard_map`` or ``vmap``,
      statistics are those of all devices; under ``jit`` they always are.

    Raises:
      ValueError: If the model has no batch norm, a pass yields no batch, or
        ``forward`` calls no batch norm (this is not noticed inside ``jit`` or
        ``vmap``).

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> from flax import nnx
      >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> params = nnx.state(model, nnx.Param)
      >>> batches = [jnp.array([[0.0], [3.0], [3.0]]), jnp.array([[6.0]])]
      >>> stats = osc.recalibrate_batch_stats(model, params, batches)
      >>> nnx.update(model, stats)
      >>> print(model.mean[...], model.var[...])  # of 0, 3, 3 and 6
      [3.] [4.5]

      With averaged parameters, in NNX:

      >>> import optax
      >>> optimizer = optax.chain(optax.sgd(0.1), osc.ema_params(0.99))
      >>> opt_state = optimizer.init(params)  # ... and train
      >>> averaged = osc.eval_params(opt_state, params)
      >>> stats = osc.recalibrate_batch_stats(model, averaged, batches)
      >>> nnx.update(model, averaged, stats)

      and in Linen:

      >>> import flax.linen as nn
      >>> model = nn.BatchNorm(use_running_average=True)
      >>> variables = model.init(jax.random.key(0), batches[0])
      >>> opt_state = optimizer.init(variables["params"])  # ... and train
      >>> averaged = osc.eval_params(opt_state, variables["params"])
      >>> variables = {**variables, "params": averaged}
      >>> variables["batch_stats"] = osc.recalibrate_batch_stats(
      ...     model, variables, batches)

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
      Generalization <https://arxiv.org/abs/1803.05407>`_, 2018, section 3; Wu and
      Johnson, `Rethinking "Batch" in BatchNorm <https://arxiv.org/abs/2105.07576>`_,
      2021, section 3; Chan, Golub and LeVeque, `Updating Formulae and a Pairwise
      Algorithm for Computing Sample Variances
      <https://doi.org/10.1007/978-3-642-51461-6_3>`_, 1982.
    """
    forward = _call if forward is None else forward
    _checks.function("forward", forward)
    nnx, linen = (sys.modules.get(f"flax.{name}") for name in ("nnx", "linen"))
    if nnx is not None and isinstance(model, nnx.Module):
        network = _nnx_network(model, params)
    elif linen is not None and isinstance(model, linen.Module):
        network = _linen_network(model, params)
    else:
        raise TypeError(
            f"`model` must be a Flax module, NNX or Linen, got {model!r} of type "
            f"{type(model).__name__}."
        )
    once = isinstance(batches, Iterator)
    passes = 1 if once else network.depth
    if num_passes is not None:
        passes = _checks.steps("num_passes", num_passes, at_least=1)
        rule = "1 for an iterator, which cannot start again (a sequence can)"
        _checks.require(passes == 1 or not once, "num_passes", rule, passes)

    step = functools.partial(network.step, forward, network.state)
    zeros: Totals = [
        (zero, zero, zero)
        for zero in (jnp.zeros_like(m, dtype=_wide(m)) for m, _ in network.stats)
    ]
    stats = network.stats
    known = [jnp.zeros_like(mean, dtype=bool) for mean, _ in stats]
    for index in range(passes):
        own, totals, seen = _unless_known(stats, known, _OWN), zeros, 0
        first, once_observed = None, zeros
        for batch in _each(batches):
            totals, seen = step(own, totals, batch), seen + 1
            if seen == 1:
                first, once_observed = batch, totals
        if not seen:
            raise ValueError(
                "`batches` must hold at least one batch in every pass, got none in "
                f"pass {index + 1}."
            )
        concrete = not _is_traced(totals)
        if concrete:
            called = any(np.any(count) for count, *_ in totals)
            rule = "a function that calls a batch norm of `model`"
            _checks.require(called, "forward", rule, forward)
        used, stats = stats, _found(totals, network.stats)
        if index + 1 == passes or seen == 1:
            break  # A single batch is the population.
        settled = concrete and all(map(np.all, known))
        if settled and all(
            map(np.array_equal, jax.tree.leaves(used), jax.tree.leaves(stats))
        ):
            break
        others = step(_unless_known(stats, known, _OTHERS), zeros, first)
        exact = _unmoved(once_observed, others)
        before, known = known, [a | b for a, b in zip(known, exact, strict=True)]
        stuck = concrete and all(map(np.array_equal, before, known))
        if stuck and not all(map(np.all, known)):
            break  # Norms that are called several times: no pass would change it.
    return network.finish(stats)
