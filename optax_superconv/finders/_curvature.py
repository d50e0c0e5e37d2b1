r"""How sharp? Which rate does the curvature of the loss allow?

On a quadratic of curvature :math:`\lambda`, gradient descent multiplies the error by
:math:`1 - \eta \lambda` each step, so it is stable below :math:`\eta = 2 / \lambda`.
Momentum moves that limit, and Adam first changes the units: it descends on
:math:`P^{-1/2} H P^{-1/2}`, where the diagonal :math:`P` is what it divides by. So
:func:`sharpness` measures the sharpest direction, from Hessian-vector products alone,
and :func:`stability_limit` says what the optimizer makes of it.

The limit holds here and now: training makes the loss as sharp as the rate permits (the
edge of stability), and a rate up to twice the limit of gradient descent may throw the
parameters to a flatter place rather than away (the catapult). So log it along a run; it
is no bound on the rate to train at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._numerics import is_array, widen
from optax_superconv.finders._runs import check_alike, summary

Optimizer = Literal["gd", "heavy_ball", "nesterov", "adam"]

# A vector over the parameters: one array for each of their floating-point leaves.
Vector = list[jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SharpnessResult:
    """Top of the Hessian's spectrum, of :func:`sharpness`; a pytree.

    Attributes:
      value: (), at least float32, the largest eigenvalue.
      residual: (), at least float32; an eigenvalue lies this near.
    """

    value: jax.Array
    residual: jax.Array

    def __repr__(self) -> str:
        with np.printoptions(precision=4, threshold=4, edgeitems=1):
            lines = f"value {self.value!s}", f"residual {self.residual!s}"
        return summary(self, *lines)


def _parameters(tree: Any) -> dict[str, Any]:
    """The floating-point arrays of a tree by their paths."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if _is_parameter(leaf)
    }


def _is_parameter(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


# Elementwise products and sums, rather than matrix products: those need to know how a
# result is sharded, and round to bfloat16 on accelerators.
def _dot(x: Vector, y: Vector) -> jax.Array:
    return sum((jnp.sum(a * b) for a, b in zip(x, y, strict=True)), jnp.float32(0))


def _scale(scalar: ArrayLike, x: Vector) -> Vector:
    return [jnp.asarray(scalar, a.dtype) * a for a in x]


def _unit(x: Vector) -> Vector:
    """The vector at length 1; zeros stay zeros."""
    norm = jnp.sqrt(_dot(x, x))
    return _scale(1 / jnp.where(norm == 0, 1, norm), x)


def _remove(basis: Vector, x: Vector) -> Vector:
    """What of ``x`` is orthogonal to the ``basis``, whose first axis counts."""
    inner = jax.vmap(_dot, (0, None))(basis, x)
    parts = jax.vmap(_scale)(inner, basis)
    return [a - jnp.sum(part, axis=0) for a, part in zip(x, parts, strict=True)]


def _lanczos(
    loss: Callable[[Vector], jax.Array],
    start: Vector,
    divisors: Vector,
    key: jax.Array,
    num_iterations: int,
) -> SharpnessResult:
    """Of the top eigenvalue of the loss at ``start``."""
    roots = [jnp.sqrt(widen(divisor)) for divisor in divisors]
    gradient = jax.grad(loss)

    def rescale(x: Vector) -> Vector:
        return [a / root.astype(a.dtype) for a, root in zip(x, roots, strict=True)]

    def times_hessian(x: Vector) -> Vector:
        return rescale(jax.jvp(gradient, (start,), (rescale(x),))[1])

    def iterate(carry: Any, j: jax.Array) -> tuple[Any, Any]:
        basis, v, largest = carry
        basis = [b.at[j].set(a) for b, a in zip(basis, v, strict=True)]
        w = times_hessian(v)
        alpha = _dot(v, w)
        # Twice is enough for orthogonality to rounding (Parlett, section 6.9).
        w = _remove(basis, _remove(basis, w))
        beta = jnp.sqrt(_dot(w, w))
        largest = jnp.maximum(largest, jnp.abs(alpha) + beta)
        # What remains is rounding: the space is at its end. (Not-a-number goes on.)
        done = beta <= jnp.finfo(beta.dtype).eps * largest
        v = _scale(jnp.where(done, 0, 1 / jnp.where(done, 1, beta)), w)
        return (basis, v, largest), (alpha, beta, done)

    # Half gradient, half noise. The gradient lowers the mean error after 20 products
    # from 1.1 to 0.8 % on a semicircle of 2000 eigenvalues and is even with noise
    # elsewhere; noise is what is left at a minimum, where the gradient is 0.
    keys = jax.random.split(key, len(start))
    noise = [
        jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, start, strict=True)
    ]
    halves = [*zip(_unit(rescale(gradient(start))), _unit(noise), strict=True)]
    both = [a + b for a, b in halves]
    keep = jnp.where(_dot(both, both) < 1e-6, 0, 1)  # Two opposite numbers cancel.
    v = _unit([keep.astype(a.dtype) * a + b for a, b in halves])
    basis = [jnp.stack([jnp.zeros_like(a)] * num_iterations) for a in v]
    carry = basis, v, jnp.zeros_like(_dot(v, v))
    _, (alphas, betas, done) = jax.lax.scan(iterate, carry, jnp.arange(num_iterations))

    # Rows after the end of the space get the least value that an eigenvalue can have.
    ended = jnp.cumsum(done) - done > 0
    least = -jnp.max(jnp.abs(alphas) + 2 * betas)
    beside = jnp.diag(betas[:-1], 1)
    tridiagonal = jnp.diag(jnp.where(ended, least, alphas)) + beside + beside.T
    values, vectors = jnp.linalg.eigh(tridiagonal)
    return SharpnessResult(values[-1], betas[-1] * jnp.abs(vectors[-1, -1]))


def sharpness(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    num_iterations: int = 20,
    key: jax.Array | None = None,
    preconditioner: Any = None,
) -> SharpnessResult:
    r"""The largest eigenvalue of the Hessian of ``loss_fn(params, *args)``.

    Lanczos' method on Hessian-vector products: each costs about two gradients, and the
    Hessian is never formed. It converges from below. Twenty products find the top of a
    small network to a millionth; where eigenvalues crowd up to the top, as in random
    matrices, they leave below 1 % on average and at times 3 %; more products help.

    It may be called inside ``jit`` and ``vmap``, and on sharded parameters. Outside,
    each call compiles anew, with whatever ``loss_fn`` closes over at that time, and
    keeps nothing: to log it along a run, call it in a function of your own under
    ``jit``, with the batch as an argument. It holds ``num_iterations`` copies of the
    parameters, in float32.

    Adam's steps see :math:`P^{-1/2} H P^{-1/2}`, with :math:`P` what it divides by::

        # Of any state with scale_by_scheduled_adam in it, such as onecycle_adamw's:
        adam = optax.tree.get(state, "ScaleByScheduledAdamState")
        nu_hat = jax.tree.map(lambda nu: nu / adam.nu_weight, adam.nu)
        # Or, of any state with optax.scale_by_adam in it:
        adam = optax.tree.get(state, "ScaleByAdamState")
        nu_hat = optax.tree.bias_correction(adam.nu, b2, adam.count)
        # And then:
        preconditioner = jax.tree.map(lambda nu: jnp.sqrt(nu) + eps, nu_hat)

    Args:
      loss_fn: ``(params, *args) -> loss``, twice differentiable. The loss is a real
        number, an array of shape (). The larger its batch, the less noise.
      params: Any pytree. Its floating-point arrays, at least one, are the parameters.
        Other leaves, Python numbers among them, are held fixed.
      args: Passed on to ``loss_fn``, as ``params`` are.
      num_iterations: Number of Hessian-vector products, at least 1.
      key: Key of the random half of the start vector. None is a fixed key.
      preconditioner: The diagonal of :math:`P`, a pytree like ``params`` of values
        above 0. None is 1 everywhere.

    Returns:
      The eigenvalue, largest in the algebraic sense, and the norm of
      :math:`H v - \lambda v` at its unit vector: an eigenvalue lies within that
      distance, up to the rounding of the products, and it is almost surely the largest.
      Where the products are not finite, both are not-a-number.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> def loss_fn(params, curvature):
      ...     return 0.5 * jnp.sum(curvature * params["w"] ** 2)
      >>> params, curvature = {"w": jnp.ones(3)}, jnp.array([1.0, 2.0, 5.0])
      >>> result = osc.sharpness(loss_fn, params, curvature)
      >>> print(f"{result.value:.3f}")
      5.000
      >>> print(f"{osc.stability_limit(result):.3f}")
      0.400
      >>> P = {"w": 2 * curvature}
      >>> result = osc.sharpness(loss_fn, params, curvature, preconditioner=P)
      >>> print(f"{osc.stability_limit(result, optimizer='adam'):.1f}")
      76.0

    References:
      Ghorbani et al., `An investigation into neural net optimization via Hessian
      eigenvalue density <https://arxiv.org/abs/1901.10159>`_, 2019 (Lanczos);
      Cohen et al., `Adaptive gradient methods at the edge of stability
      <https://arxiv.org/abs/2207.14484>`_, 2022 (the preconditioned Hessian).
    """
    _checks.function("loss_fn", loss_fn)
    num_iterations = _checks.steps("num_iterations", num_iterations, at_least=1)
    found = _parameters(params)
    with_arrays = "a pytree with floating-point arrays"
    _checks.require(bool(found), "params", with_arrays, repr(params))
    divisors: list[Any] = [jnp.float32(1)] * len(found)
    if preconditioner is not None:
        given = _parameters(preconditioner)
        shapes = (
            {path: f"shape {leaf.shape}" for path, leaf in tree.items()}
            for tree in (found, given)
        )
        check_alike("preconditioner", "a pytree like `params`", *shapes)
        divisors = [given[path] for path in found]
        for divisor in divisors:
            if not isinstance(divisor, jax.core.Tracer):
                least = float(jnp.min(divisor, initial=jnp.inf))
                _checks.require(least > 0, "preconditioner", "positive", least)
    leaves, treedef = jax.tree.flatten((params, args))
    num_leaves = len(jax.tree.leaves(params))
    where = [k for k in range(num_leaves) if _is_parameter(leaves[k])]

    # Compiled for this call alone: what the loss closes over may change.
    @jax.jit
    def run(arrays: dict[int, Any], divisors: Vector, key: jax.Array) -> Any:
        def loss(theta: Vector) -> jax.Array:
            new = dict(enumerate(leaves)) | arrays
            for k, leaf in zip(where, theta, strict=True):
                new[k] = leaf.astype(arrays[k].dtype)
            params, args = treedef.unflatten(new.values())
            value = loss_fn(params, *args)
            _checks.require(
                _is_parameter(value) and value.shape == (),
                "loss_fn",
                "a function that returns one real number, an array of shape ()",
                f"{value.dtype}{value.shape}" if is_array(value) else type(value),
            )
            return value

        start = [widen(arrays[k]) for k in where]
        return _lanczos(loss, start, divisors, key, num_iterations)

    arrays = {k: leaf for k, leaf in enumerate(leaves) if is_array(leaf)}
    return run(arrays, divisors, jax.random.key(0) if key is None else key)


def stability_limit(
    sharpness: ArrayLike | SharpnessResult,
    *,
    optimizer: Optimizer = "gd",
    momentum: ArrayLike = 0.9,
) -> Any:
    r"""The learning rate above which an optimizer diverges on this curvature.

    On a quadratic of curvature :math:`\lambda`, with momentum :math:`\beta`:

    ================  ===============================================  ==============
    ``optimizer``     :math:`\eta \lambda` is less than                at 0.9
    ================  ===============================================  ==============
    ``"gd"``          :math:`2`                                        2
    ``"heavy_ball"``  :math:`2 + 2 \beta`                              3.8
    ``"nesterov"``    :math:`(2 + 2 \beta) / (1 + 2 \beta)`            1.357
    ``"adam"``        :math:`(2 + 2 \beta) / (1 - \beta)`              38
    ================  ===============================================  ==============

    ``"heavy_ball"`` and ``"nesterov"`` are those of Optax, PyTorch and
    :func:`scheduled_trace`. ``"adam"`` is a running mean of gradients: Adam on the
    preconditioned :func:`sharpness`, its second moment at rest, or SGD with as much
    dampening as momentum on the plain one. Beyond the limit, the parameters leave
    along the sharpest direction, perhaps to a flatter place.

    Args:
      sharpness: The largest curvature, a number or an array, or the result of
        :func:`sharpness`. It may be 0 or less. The limit is then infinite.
      optimizer: One of the four in the table.
      momentum: Momentum in [0, 1); for ``"adam"`` it is ``b1``. ``"gd"`` does not use
        it.

    Returns:
      The rate: a float if both arguments are Python numbers, else an array that
      broadcasts over them. Infinity where curvature is 0 or less.

    Examples:
      >>> import optax_superconv as osc
      >>> osc.stability_limit(10.0)
      0.2
      >>> osc.stability_limit(10.0, optimizer="adam", momentum=0.5)
      0.6

    References:
      Cohen et al., `Gradient descent on neural networks typically occurs at the edge of
      stability <https://arxiv.org/abs/2103.00065>`_, 2021, and `Adaptive gradient
      methods at the edge of stability <https://arxiv.org/abs/2207.14484>`_, 2022;
      Lewkowycz et al., `The large learning rate phase of deep learning
      <https://arxiv.org/abs/2003.02218>`_, 2020 (the catapult).
    """
    _checks.choice("optimizer", optimizer, get_args(Optimizer))
    _checks.number("momentum", momentum, _checks.DECAY)
    top: Any = sharpness.value if isinstance(sharpness, SharpnessResult) else sharpness
    if isinstance(top, bool) or not (isinstance(top, int | float) or is_array(top)):
        rule = "a number, an array or a SharpnessResult"
        raise TypeError(f"`sharpness` must be {rule}, got {top!r}.")
    b: Any = momentum
    limit = {
        "gd": 2.0,
        "heavy_ball": 2 + 2 * b,
        "nesterov": (2 + 2 * b) / (1 + 2 * b),
        "adam": (2 + 2 * b) / (1 - b),
    }[optimizer]
    if not is_array(top) and not is_array(limit):
        return math.inf if top <= 0 else limit / top
    return jnp.where(top <= 0, jnp.inf, limit / jnp.where(top <= 0, 1, top))
