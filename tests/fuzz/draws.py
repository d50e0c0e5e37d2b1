"""Random calls of every public function, then used for three steps.

A call is an error that names an argument, or what it makes works: finite, of one
structure, readable. As a script, ``draws.py NUMBER SEED`` shows the faults of so many.
"""

import collections
import inspect
import re
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_superconv as osc

PARAMS = {
    "embed": jnp.ones((4, 2)),
    "layers": [{"kernel": jnp.ones((4, 2, 2)), "bias": jnp.ones((4,), jnp.bfloat16)}],
    "head": {"kernel": jnp.full((4, 3), 0.5)},
}
LABELS = {"embed": 0, "layers": 1, "head": 2}
NAMES = {"embed": "a", "layers": "b", "head": "c"}
FACTORS = {0: 0.5, 1: 0.7, 2: 1.0}
STATES = [
    tx.init(PARAMS)
    for tx in (
        osc.adamw(0.1),
        osc.fine_tune_adamw(0.1, 10, LABELS, freeze_steps=2),
        optax.chain(osc.sgd(0.1), osc.ema_params(0.9), osc.lawa_params(2)),
        optax.MultiSteps(osc.onecycle_sgd(0.1, 10), 2),
    )
]
BATCHES = [jnp.ones((2, 3)), jnp.full((2, 3), 2.0)]


def falling(count):
    return 0.1 / (1.0 + jnp.asarray(count, jnp.float32))


def stats_after(stats, batch):
    new = {"mean": batch.mean(0), "var": batch.var(0)}
    return jax.tree.map(lambda old, own: 0.9 * old + 0.1 * own, stats, new)


def trained(state, rate, batch):
    return jax.tree.map(lambda w: w - rate * w, state), jnp.sum(state["w"] ** 2)


def trained_on_grid(state, hyperparams, batch):
    return trained(state, hyperparams["learning_rate"], batch)


def range_result():
    rates = np.geomspace(1e-4, 10, 40).astype(np.float32)
    losses = np.where(rates < 1, 1 - 0.5 * np.sqrt(rates), rates**2)
    return osc.range_test(
        lambda state, rate, batch: (
            (state[0] + 1, rate),
            jnp.asarray(losses)[state[0]],
        ),
        (jnp.int32(0), jnp.float32(0)),
        [0.0],
        min_learning_rate=1e-4,
        max_learning_rate=10.0,
        num_steps=40,
        pass_hyperparams=True,
    )


RESULT = range_result()
NUMBERS = [0.0, 0.1, 0.5, 1.0, np.float32(0.3), jnp.float32(0.2), np.float64(1e-3), 2]
RATES = [*NUMBERS, falling]
DECAYS = [0.0, 0.5, 0.9, np.float32(0.99), jnp.float32(0.7)]
LENGTHS = [1, 2, 3, 5, 8, 10, np.int64(6)]
COUNTS = [0, 1, 2, 3, None]
SHAPES = ["linear", "cosine", "exponential", "1-sqrt"]
DTYPES = [None, jnp.float32, "bfloat16", np.float16, np.dtype("float32")]
MASKS = ["matrices", None, True, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)]
MULTIPLIERS = [
    None, FACTORS, {**FACTORS, 1: np.linspace(0.1, 1, 4)}, {**FACTORS, 0: falling},
    lambda labels: dict.fromkeys(labels, 0.5), {0: 1.0},
]  # fmt: skip
PARAM_LABELS = [
    LABELS, NAMES, osc.label_by_depth(), osc.label_by_path([(".*", 0)]), 0,
    {"embed": 0}, lambda params: LABELS, None,
]  # fmt: skip
GOOD = {
    "rate": RATES, "decay": DECAYS, "decay or schedule": [*DECAYS, falling],
    "number": NUMBERS, "length": LENGTHS, "count": COUNTS, "shape": SHAPES,
    "dtype": DTYPES, "flag": [False, True],
    "mask": MASKS, "multipliers": MULTIPLIERS, "param_labels": PARAM_LABELS,
    "name": ["average", "ema", "x", None], "opt_state": STATES, "params": [PARAMS],
    "labels": [LABELS, range(3), ["a", "b"], [0, 1, 1], {"a", "b"}, {"x": "a"}],
    "patterns": [(), "head", ["embed", "h.*"], r"x(\d+)"],
    "pattern": [None, r"(\d+)", r"layers/(\d+)", r"\d+", "("],
}  # fmt: skip
# By name; what is not here is a length, a count or a number by the end of its name.
KINDS = {
    **dict.fromkeys(["learning_rate", "weight_decay", "eps", "weight"], "rate"),
    **dict.fromkeys(["b1", "b2", "momentum", "decay"], "decay or schedule"),
    **dict.fromkeys(["max_momentum", "base_momentum", "smoothing"], "decay"),
    **dict.fromkeys(["total_steps", "window", "every", "steps_up"], "length"),
    **dict.fromkeys(["cooldown_steps", "num_iterations", "patience"], "length"),
    **dict.fromkeys(["shape", "cooldown_shape"], "shape"),
    **dict.fromkeys(["accumulator_dtype", "mu_dtype"], "dtype"),
    **dict.fromkeys(["nesterov", "flip_sign", "leaves", "vectorize"], "flag"),
    **dict.fromkeys(["stem", "head"], "patterns"),
}
VALUES = {
    "step_fn": [trained], "state": [{"w": jnp.ones(3)}],
    "loss_fn": [lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))],
    "update_fn": [stats_after], "stats": [{"mean": jnp.zeros(3), "var": jnp.ones(3)}],
    "pairs": [(("mean", "var"),), (), [("a", "b")]],
    "batches": [BATCHES, tuple(BATCHES), iter(BATCHES), []],
    "grid": [{"learning_rate": [0.1, 0.2], "a": [1.0]}, {"learning_rate": [0.1]}, {}],
    "target_loss": [None, 0.1, 5.0],
    "num_rates": [4, 6], "rtol": [0.1, 0.5], "num_steps": [2, 10, 12],
    "progress": [False], "devices": [None], "eval_fn": [None],
    "min_learning_rate": [1e-4, 1e-2], "max_learning_rate": [1.0, 10.0],
    "pass_hyperparams": [True], "accumulation_steps": [1, 2], "stacked": [False],
    "divergence_factor": [1.5, 4.0], "level": [0.5, 0.9],
    "mode": ["range", "constant", "triangular", "triangular2", "exp_range"],
    "optimizer": ["adam", "adamw", "sgd", "gd", "nesterov", None],
    "method": [None, "knee", "middle", "divergence", "steep"],
    "final_norm": ["head", "last_block"], "unmatched_rules": ["error", "warn"],
    "rules": [[(".*", 0)], [("head/.*", "a"), (".*", "b")], [("x", 1), (".*", 0)], []],
    "thaw_steps": [{0: 2, 1: 1, 2: 0}, {"a": 1, "b": None, "c": 0}, {0: 1}],
    "inner": [osc.sgd(0.1), optax.adam(0.1), lambda step: osc.adamw(0.1)],
    "phases": [[(3, 0.2)], [osc.Phase(2, 0.1, "exponential"), (2, 0.0)], []],
    "schedule": [0.1, falling, osc.onecycle_schedule(0.1, 10)],
    "from_schedule": [0.1, falling], "to_schedule": [0.1, osc.onecycle_schedule(1, 8)],
    "gradient_norms": [np.linspace(1, 2, 8), jnp.ones(10), np.zeros(8)],
    "values": [{"learning_rate": 0.1}, {"b1": 0.5}, {"b1": None}, {}, {"momentum": 2}],
    "result": [RESULT, [RESULT, RESULT]], "results": [[RESULT, RESULT], [RESULT]],
    "sharpness": [2.0, jnp.ones(2)], "ord": [1, 2, 3], "key": [None],
    "preconditioner": [None], "weight": [None, 0.5, 1.0, falling],
    "blend": [1.0, 0.5, 0.0, jnp.float32(0.3)], "power": [None, 0.0, 2.0],
}  # fmt: skip
BAD = [
    -1, -0.5, 1.5, np.nan, np.inf, 1e39, 1e-46, 10**30, "x", "", None, True, [1.0],
    {}, [(1,)], np.ones(2), np.ones((2, 2)), object(), 1 + 1j, jnp.float32(np.nan),
    b"x",
]  # fmt: skip
FUNCTIONS = [
    getattr(osc, name) for name in osc.__all__ if inspect.isfunction(getattr(osc, name))
]


def pool(function, name):
    if function is osc.grid_test and name == "step_fn":
        return [trained_on_grid]
    if name in VALUES:
        return VALUES[name]
    kind = KINDS.get(name, name)
    if kind in GOOD:
        return GOOD[kind]
    if name.endswith("_steps") or name in ("start_step", "num_samples", "steps_down"):
        return [*COUNTS, *LENGTHS]
    return GOOD["number"]


def draw(rng, function):
    """Keyword arguments, most of them good."""
    call = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.default is parameter.empty or rng.random() < 0.4:
            # What belongs to the caller's own functions is theirs.
            theirs = name in (
                "state",
                "stats",
                "key",
                "step_fn",
                "loss_fn",
                "update_fn",
            )
            is_bad = not theirs and rng.random() < 0.12
            values = BAD if is_bad else pool(function, name)
            call[name] = values[rng.integers(len(values))]
    return call


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            assert np.isfinite(np.asarray(leaf, np.complex128)).all(), "not finite"


def form(tree):
    leaves = [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


def use(made, jitted):
    """Three steps of a transformation, the values of a schedule; else a look."""
    if isinstance(made, tuple) and hasattr(made, "update"):
        update = jax.jit(made.update) if jitted else made.update
        params, state = PARAMS, made.init(PARAMS)
        before = form(state)
        for _ in range(3):
            updates, state = update(params, state, params)
            assert form(updates) == form(params), "updates of another form"
            assert form(state) == before, "a state of another form"
            params = optax.apply_updates(params, updates)
        assert_finite((updates, state, osc.read_hyperparams(state)))
    elif isinstance(made, tuple) and made and all(map(callable, made)):
        for schedule in made:
            use(schedule, jitted)
    elif callable(made) and "params" in inspect.signature(made).parameters:
        made(PARAMS)
    elif callable(made):
        assert_finite([made(count) for count in (0, 1, 7, jnp.int32(10**6))])
    else:
        repr(made)


def fault(function, call, jitted=False):
    """What is wrong with a call, or None."""
    try:
        use(function(**call), jitted)
    except (ValueError, TypeError) as error:
        named = re.search(r"`[^`]+`|hyperparameter must be", str(error))
        own = "optax_superconv" in "".join(
            traceback.format_tb(error.__traceback__)[-2:]
        )
        return None if named and own else f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def faults(number, seed=0, jitted_every=200):
    """Of so many calls, the faulty ones with what is wrong, and how many worked."""
    rng, found, outcomes = np.random.default_rng(seed), [], collections.Counter()
    for k in range(number):
        function = FUNCTIONS[k % len(FUNCTIONS)]
        call = draw(rng, function)
        wrong = fault(function, call, jitted=k % jitted_every == 0)
        outcomes[function.__name__] += 1
        if wrong:
            shown = ", ".join(f"{k}={v!r:.80}" for k, v in call.items())
            found.append(f"{function.__name__}({shown}): {wrong}")
    return found, outcomes


if __name__ == "__main__":
    found, _ = faults(*map(int, sys.argv[1:]))
    print(*found, f"{len(found)} faults", sep="\n")
