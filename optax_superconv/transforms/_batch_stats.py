"""Which batch statistics belong to these parameters?

The running statistics of batch norms belong to the weights that training passed
through, not to an average of them. :func:`recalibrate_batch_stats` reads those of any
weights off the network's own forward pass: a running average is an affine function of
its old value, and two values tell an affine function, whatever its momentum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optax_superconv import _batches, _checks
from optax_superconv._checks import listed
from optax_superconv._numerics import is_array, widen
from optax_superconv._trees import array_of, paths_of, placed_as

# So large an old value that the batch's own is lost beside it, and only m is seen.
_FAR = 2.0**60


def _compiled(update_fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The function, compiled for one call of ours: what it closes over may change.

    The arrays that it holds as a pytree are arguments of the program.
    """
    if hasattr(getattr(update_fn, "func", update_fn), "lower"):
        return update_fn  # The caller has compiled it, which lasts longer.
    leaves, structure = jax.tree.flatten(update_fn)
    arrays = {k: leaf for k, leaf in enumerate(leaves) if is_array(leaf)}

    @jax.jit
    def run(arrays: dict[int, Any], stats: Any, batch: Any) -> Any:
        held = dict(enumerate(leaves)) | arrays
        return structure.unflatten(held.values())(stats, batch)

    return functools.partial(run, arrays)


@jax.jit
def _solve(*leaves: list[jax.Array]) -> Any:
    """For each leaf what is held, 1 - m, and the old values to evaluate at.

    What the forward pass leaves alone is held, such as the statistics of frozen norms,
    which norms behind them depend on. Its m is 0 once it is evaluated at its old value.
    """

    def one(old: Any, near: Any, far: Any, at_near: Any, at_far: Any) -> Any:
        held = (at_near == near) & (at_far == far)
        slope = (at_far.astype(old.dtype) - at_near.astype(old.dtype)) / _FAR
        near, far = (jnp.where(held, old, jnp.full_like(old, x)) for x in (0, _FAR))
        return held, 1 - slope, near, far

    return tuple(zip(*map(one, *leaves), strict=True))


def _own(at_near: Any, rest: jax.Array) -> jax.Array:
    """The batch's own statistics, since ``at_near`` is m * 0 + (1 - m) * own."""
    return at_near.astype(rest.dtype) / rest


def _is_average(at_near: Any, rest: Any, own: Any, again: Any) -> bool:
    """Whether own statistics are a fixed point, and not lost in rounding."""
    eps = float(jnp.finfo(again.dtype).eps)
    at_near, *three = (np.asarray(x, np.float64) for x in (at_near, rest, own, again))
    # If these are not finite, the batch is at fault, which is found out later.
    rest, own, again = (x[np.isfinite(at_near)] for x in three)
    with np.errstate(invalid="ignore"):
        error, size = np.abs(again - own), np.max(np.abs(own), initial=0)
    return bool(np.all(error <= 32 * eps * size) and np.all(rest > 100 * eps))


def _check_averages(names: list[str], held: Any, *values: Any) -> None:
    """Raises unless ``update_fn`` updates the running averages as it should."""
    rule = "a forward pass in training mode, which updates `stats`"
    updates = not all(map(np.all, held))
    _checks.require(updates, "update_fn", rule, "one that returns them as they are")
    good = map(_is_average, *values)
    bad = [name for name, is_good in zip(names, good, strict=True) if not is_good]
    rule = (
        "a forward pass that sets each float leaf to m * old + (1 - m) * the batch's "
        "own, with m at most 0.9999"
    )
    advice = (
        ". Build the norm with a momentum of 0, which changes no result; close over "
        "what is no running average instead of having it in `stats`"
    )
    _checks.require(not bad, "update_fn", rule, f"others at {listed(bad)}{advice}")


@functools.partial(jax.jit, static_argnums=4)
def _join(
    total: Any, at_near: Any, rests: Any, weight: Any, means: tuple[int | None, ...]
) -> tuple[list[jax.Array], jax.Array]:
    """Adds a batch with ``weight`` of the examples so far; says what is finite in it.

    By the law of total variance (Chan et al., 1982), a variance also grows by what the
    batches' means differ by.
    """
    own = list(map(_own, at_near, rests))
    shifts = [x - t for x, t in zip(own, total, strict=True)]
    between = [
        0 if mean is None else (1 - weight) * jnp.square(shifts[mean]) for mean in means
    ]
    joined = [
        t + weight * (s + b) for t, s, b in zip(total, shifts, between, strict=True)
    ]
    return joined, jnp.stack([jnp.all(jnp.isfinite(x)) for x in own])


def _means_of(pairs: Any, names: list[str]) -> tuple[int | None, ...]:
    """For each leaf the position of its mean, if it is a variance."""
    means: dict[int, int] = {}
    where = {f"/{name}": k for k, name in enumerate(names)}
    for pair in _checks.items("pairs", pairs, "pairs of two names"):
        if not isinstance(pair, tuple | list) or [*map(type, pair)] != [str, str]:
            raise TypeError(f"`pairs` must hold pairs of two names, got {pair!r}.")
        mean, var = (f"/{name}" for name in pair)
        found = {
            k: where[partner]
            for name, k in where.items()
            if name.endswith(var)
            and (partner := name.removesuffix(var) + mean) in where
        }
        rule = "names of float leaves side by side in `stats`, () if it has no variance"
        got = f"{pair!r} and leaves {listed(names)}"
        _checks.require(bool(found), "pairs", rule, got)
        means |= found
    return tuple(means.get(k) for k in range(len(names)))


def _num_examples(batch: Any) -> int:
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)}
    rule = (
        "batches of arrays with one leading axis of examples, at least 1 (`update_fn` "
        "can close over what has none)"
    )
    good = len(sizes) == 1 and min(sizes) > 0
    _checks.require(good, "batches", rule, f"lengths {sorted(sizes)}")
    return sizes.pop()


def _by_path(tree: Any) -> dict[str, Any]:
    return dict(zip(paths_of(tree), jax.tree.leaves(tree), strict=True))


def _stored_as(value: jax.Array, stored: Any, leaf: jax.Array) -> jax.Array:
    """In the dtype of a leaf, and where that is stored unless devices compute there."""
    value = jnp.copy(value) if value is leaf else value.astype(leaf.dtype)
    return value if leaf is stored else placed_as(value, stored)


def _is_traced(leaves: Iterable[Any]) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def recalibrate_batch_stats(
    update_fn: Callable[[Any, Any], Any],
    stats: Any,
    batches: Any,
    *,
    pairs: Sequence[tuple[str, str]] = (("mean", "var"),),
) -> Any:
    r"""Computes the statistics that a network's batch norms need at given weights.

    Averaged weights must not be evaluated with the running statistics of the training
    run, which belong to other weights. This gives every norm the mean and the variance
    of its inputs over ``batches``, each batch normalised by its own statistics as in
    training. ``update_fn`` is the network's forward pass, whatever the framework. A
    running average is :math:`f(x) = m x + (1 - m) s` in its old value :math:`x`, so
    two evaluations of the first batch give the momentum :math:`m`, and one of each
    batch its own :math:`s = f(0) / (1 - m)`. A batch of :math:`b` examples joins the
    :math:`n` before it as

    .. math::

        w = \frac{b}{n + b}, \quad \sigma^2 \leftarrow \sigma^2 + w (v - \sigma^2)
        + w (1 - w) (s - \mu)^2, \quad \mu \leftarrow \mu + w (s - \mu),

    where :math:`s` and :math:`v` are its mean and variance. So batches of unequal sizes
    count as they should, and the variance holds what the batches' means differ by.

    This is exact for the first norm, however the examples are cut into batches. Those
    behind it see inputs that are a little off, the more the smaller the batches. Take
    shuffled batches as large as in training or larger; one batch of all examples is
    exact for every norm. It is one pass, as PyTorch's ``update_bn``, which differs in
    that it leaves out what the means differ by and counts a small last batch in full.

    Args:
      update_fn: ``(stats, batch) -> stats``, the forward pass in training mode at the
        weights in question, pure: it returns the new running statistics. Dropout is
        best off, as in evaluation. It is compiled once per shape of a batch in every
        call, with what it closes over at that time. A function that is compiled
        already, such as ``jax.tree_util.Partial(jax.jit(forward), weights)``, is not
        compiled again; it must not donate its arguments. The momentum has no effect on
        the result; its relative error is about 3e-8 / (1 - m), and m must be at most
        0.9999.
      stats: The running statistics, a pytree with float leaves: an ``nnx.State`` of
        ``nnx.BatchStat``, Linen's collection ``batch_stats``, any dict. ``update_fn``
        gets those of low precision in float32. Leaves that are no floats (counters,
        keys) always go in as they came, and so do those that it does not change, as
        the statistics of a frozen norm. Whatever else ``update_fn`` does to a float
        leaf than average is an error. Equinox: the ``State`` of a new model, and
        ``pairs=[("0", "1")]``; after training, ``mode="ema"`` normalises with the
        running averages and ``mode="batch"`` divides them by what its counter says.
        Haiku: a ``BatchNorm`` with ``decay_rate=0``, and the pairs
        ``("mean_ema/hidden", "var_ema/hidden")`` and the same of ``average``.
      batches: A sequence, an iterable or an iterator of batches; each is seen once. A
        single batch goes in a list. Its leaves have one leading axis of examples,
        except for scalars and keys. Sizes may differ, and each compiles on its own.
      pairs: Names (mean, variance) of leaves side by side, a name being the end of a
        path such as ``var`` in ``norm/var``. Each must occur. All other leaves get the
        mean of the batches, weighted by their examples.

    Returns:
      The statistics, in the structure and the dtypes of ``stats``, which stay as they
      are and share no buffer with these. Variances are the norms' own kind, biased or
      not. A norm that is called several times gets a mean of its calls.

    Raises:
      ValueError: If there is no batch; if the forward pass updates nothing, or other
        than as a running average, or a result is not finite (this is not noticed
        inside ``jit`` or ``vmap``).

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> from jax.tree_util import Partial
      >>> batches = [jnp.array([[0.0], [3.0], [3.0]]), jnp.array([[6.0]])]

      In NNX:

      >>> from flax import nnx
      >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
      >>> def update_fn(params, stats, batch):
      ...     model = nnx.merge(graph, params, stats, copy=True)
      ...     model(batch)
      ...     return nnx.state(model, nnx.BatchStat)
      >>> forward = Partial(update_fn, params)  # Or the averaged parameters.
      >>> stats = osc.recalibrate_batch_stats(forward, stats, batches)
      >>> nnx.update(model, stats)
      >>> print(model.mean.round(4), model.var.round(4))  # of 0, 3, 3 and 6
      [3.] [4.5]

      In Linen:

      >>> import flax.linen as nn
      >>> model = nn.BatchNorm(use_running_average=False)
      >>> variables = model.init(jax.random.key(0), batches[0])
      >>> def update_fn(params, stats, batch):
      ...     variables = {"params": params, "batch_stats": stats}
      ...     _, new = model.apply(variables, batch, mutable=["batch_stats"])
      ...     return new["batch_stats"]
      >>> forward = Partial(update_fn, variables["params"])
      >>> stats = variables["batch_stats"]
      >>> stats = osc.recalibrate_batch_stats(forward, stats, batches)
      >>> print(stats["mean"].round(4), stats["var"].round(4))
      [3.] [4.5]

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
      Generalization <https://arxiv.org/abs/1803.05407>`_, 2018, section 3; Chan, Golub
      and LeVeque, `Updating Formulae and a Pairwise Algorithm for Computing Sample
      Variances <https://doi.org/10.1007/978-3-642-51461-6_3>`_, 1982.
    """
    _checks.function("update_fn", update_fn)
    run = _compiled(update_fn)
    stored, structure = jax.tree.flatten(stats)
    rule = "a pytree with float leaves"
    if not all(isinstance(x, float | int) or is_array(x) for x in stored):
        raise TypeError(f"`stats` must be {rule}, got {stats!r}.")
    leaves, paths = list(map(array_of, stored)), paths_of(stats)
    one_each = len(set(paths)) == len(paths)
    _checks.require(one_each, "stats", "a pytree with a path per leaf", listed(paths))
    places = [k for k, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    _checks.require(bool(places), "stats", rule, listed(paths) or "no leaves")
    shapes = dict(zip(paths, map(np.shape, leaves), strict=True))
    names = [paths[k] for k in places]
    means = _means_of(pairs, names)
    old = [widen(leaves[k]) for k in places]

    def filled(values: Iterable[jax.Array]) -> Any:
        new = dict(enumerate(leaves)) | dict(zip(places, values, strict=True))
        return structure.unflatten(new.values())

    def evaluate(values: Iterable[jax.Array], batch: Any) -> list[jax.Array]:
        new = _by_path(run(filled(values), batch))
        found = {path: np.shape(leaf) for path, leaf in new.items()}
        changed = [p for p in shapes | found if shapes.get(p) != found.get(p)]
        rule = "a function that returns `stats` with the same names and shapes"
        _checks.require(not changed, "update_fn", rule, f"others at {listed(changed)}")
        return [new[name] for name in names]

    def probe(near: Any, far: Any, batch: Any) -> Any:
        at_near, at_far = evaluate(near, batch), evaluate(far, batch)
        return at_near, *_solve(old, near, far, at_near, at_far)

    near, far = ([jnp.full_like(x, end) for x in old] for end in (0, _FAR))
    total, rests, seen, finite = near, [], 0, []
    one = _batches.single(batches)
    if one or not isinstance(batches, Iterable):
        one = one or f"a single {type(batches).__name__}"
        raise TypeError(
            "`batches` must be a sequence, an iterable or an iterator of batches (a "
            f"single batch goes in a list), got {one}."
        )
    for batch in batches:
        num_examples = _num_examples(batch)
        if seen:
            at_near = evaluate(near, batch)
        else:
            at_near, held, rests, near, far = probe(near, far, batch)
            if _is_traced(held) or any(map(np.any, held)):
                at_near, held, rests, near, far = probe(near, far, batch)
            if not _is_traced(held):
                own = list(map(_own, at_near, rests))
                again = evaluate(own, batch)
                _check_averages(names, held, at_near, rests, own, again)
        seen += num_examples
        total, is_finite = _join(total, at_near, rests, num_examples / seen, means)
        finite.append(is_finite)
        jax.block_until_ready(finite[-2:-1])  # So that few batches are on their way.
    _checks.require(seen > 0, "batches", "at least one batch", "none")
    if not _is_traced(finite):
        rule = "batches whose statistics are finite"
        for index, leaf in np.argwhere(~np.asarray(finite)):
            got = f"others at {names[leaf]!r} in batch {index} (from 0)"
            _checks.require(False, "batches", rule, got)
    joined = dict(enumerate(leaves)) | dict(zip(places, total, strict=True))
    return structure.unflatten(map(_stored_as, joined.values(), stored, leaves))
