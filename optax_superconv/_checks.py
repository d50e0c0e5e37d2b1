"""When is an argument bad, and what does the message say?

Arguments are checked where an object is built. A traced value has no number yet. So its
range is not checked, and ``jit`` and ``vmap`` work. A traced value raises only where a
Python number is needed, for instance as a duration. Every message names the argument,
the rule and the value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

# Optax counts steps in int32 and saturates there.
MAX_STEPS = int(np.iinfo(np.int32).max)


class Rule(NamedTuple):
    """What a finite number must be: for the message, and as a test of an array."""

    text: str
    holds: Callable[[np.ndarray], Any]


FINITE = Rule("finite", np.isfinite)
NON_NEGATIVE = Rule("finite and at least 0", lambda x: x >= 0)
POSITIVE = Rule("above 0", lambda x: x > 0)
FRACTION = Rule("above 0 and at most 1", lambda x: (x > 0) & (x <= 1))
DECAY = Rule("at least 0 and less than 1", lambda x: (x >= 0) & (x < 1))


def require(holds: bool | np.bool_, name: str, rule: str, value: Any) -> None:
    """Raises a ``ValueError`` with argument, rule and value unless ``holds``."""
    if not holds:
        raise ValueError(f"`{name}` must be {rule}, got {value}.")


def listed(items: Iterable[Any], most: int = 8) -> str:
    """For a message: the first few, and how many more."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(repr(item) for item in items[:most]) + more


def steps(
    name: str,
    value: Any,
    *,
    at_least: int = 0,
    below: tuple[str, int] | None = None,
    at_most: tuple[str, int] | None = None,
) -> int:
    """Returns ``value`` as a Python int of at least ``at_least`` steps.

    Another argument, given by its name and its value, may be the upper limit.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        whole = operator.index(value)
    except TypeError:
        traced = isinstance(value, jax.core.Tracer)
        advice = (
            " Durations are fixed when the program is compiled: under `jit` or `vmap`"
            " close over them, under `optax.inject_hyperparams` name them in"
            " `static_args`."
            if traced
            else ""
        )
        raise TypeError(
            f"`{name}` must be a whole number of steps (a Python int), got "
            f"{'a traced value' if traced else repr(value)} of type "
            f"{type(value).__name__}.{advice}"
        ) from None
    rule, most = f"at least {at_least}", MAX_STEPS
    if below is not None:
        rule, most = f"{rule} and less than `{below[0]}` ({below[1]})", below[1] - 1
    if at_most is not None:
        rule, most = f"{rule} and at most `{at_most[0]}` ({at_most[1]})", at_most[1]
    if whole > MAX_STEPS:
        rule, most = f"at most {MAX_STEPS} (int32 counts)", MAX_STEPS
    require(at_least <= whole <= most, name, rule, whole)
    return whole


def number(
    name: str,
    value: Any,
    rule: Rule = FINITE,
) -> np.ndarray | None:
    """Checks a number or an array of numbers. Returns it, or None if it is traced.

    The rule has to hold as the number is given, and as it is applied, in float32.
    """
    if isinstance(value, jax.core.Tracer):
        return None
    array = None
    if not isinstance(value, str | bytes | bool | list | tuple) and value is not None:
        try:
            array = np.asarray(value)
        except (TypeError, ValueError):
            array = None
    if array is None or not (
        jnp.issubdtype(array.dtype, jnp.floating)
        or jnp.issubdtype(array.dtype, jnp.integer)
    ):
        raise TypeError(
            f"`{name}` must be a number or an array of numbers, got {value!r} of type "
            f"{type(value).__name__}."
        )
    array = array.astype(np.float64)
    with np.errstate(over="ignore"):
        applied = array.astype(np.float32)
    # Compiled programs take what is smaller than any normal number for 0.
    applied = np.where(np.abs(applied) < np.finfo(np.float32).tiny, 0, applied)
    both = rule.text if "finite" in rule.text else f"{rule.text} and finite"
    require(np.all(np.isfinite(array)), name, both, value)
    require(np.all(rule.holds(array)), name, rule.text, value)
    good = np.isfinite(applied) & rule.holds(applied)
    require(np.all(good), name, f"{both} in float32", value)
    return array


def scalar(
    name: str,
    value: Any,
    rule: Rule = FINITE,
) -> float:
    """Checks a single concrete number and returns it as a float."""
    array = number(name, value, rule)
    if array is None or array.ndim:
        kind = "a traced value" if array is None else f"an array {value}"
        raise TypeError(f"`{name}` must be a single concrete number, got {kind}.")
    return float(array)


def single_number(name: str, value: Any, rule: Rule = FINITE) -> None:
    """Checks a number without axes, which may be traced."""
    number(name, value, rule)
    if np.ndim(value):
        shape = np.shape(value)
        raise TypeError(
            f"`{name}` must be a single number, got an array of shape {shape}."
        )


def number_or_schedule(
    name: str,
    value: Any,
    rule: Rule = FINITE,
) -> None:
    """Checks a constant. A schedule passes: its values are known only at run time."""
    if not callable(value):
        single_number(name, value, rule)


def float_dtype(name: str, value: Any) -> np.dtype | None:
    """Returns a floating-point dtype; None stays None."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = np.dtype(object)
    good = jnp.issubdtype(dtype, jnp.floating)
    require(good, name, "a floating-point type", repr(value))
    return dtype


def items(name: str, value: Any, rule: str) -> list[Any]:
    """What can be iterated, as a list."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return list(value)
    except TypeError:
        raise TypeError(f"`{name}` must be {rule}, got {value!r}.") from None


def flag(name: str, value: Any) -> None:
    """Raises ``TypeError`` unless ``value`` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def function(name: str, value: Any) -> None:
    """Raises ``TypeError`` unless ``value`` can be called."""
    if not callable(value):
        raise TypeError(
            f"`{name}` must be callable, got {value!r} of type {type(value).__name__}."
        )


def choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises unless ``value`` is one of the ``known`` names. The message lists them."""
    known = tuple(known)
    if not isinstance(value, str):
        raise TypeError(
            f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r} of "
            f"type {type(value).__name__}."
        )
    require(value in known, name, f"one of {', '.join(map(repr, known))}", repr(value))


def is_zero(value: Any) -> bool:
    """Whether a constant is known to be 0. A traced value is not known."""
    return not isinstance(value, jax.core.Tracer) and not np.any(np.asarray(value))


def is_function(value: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether this is to be called: an Equinox module of labels can be, and is not.

    Some libraries make pytrees of functions, whose leaves are not all labels.
    """
    if not callable(value):
        return False
    labels = str | int | np.integer | np.bool_  # A bool is a label of a mask.
    leaves = jax.tree.leaves(value)
    return not leaves or not all(isinstance(leaf, labels) for leaf in leaves)
