"""The dials are free, and so are rates per group: they cost what ``optax.adamw`` costs.

On a tree of 576 leaves, 48 blocks of 12, a step takes at most 1.10 times that of
``optax.adamw``, and the state is at most 4 KiB larger:

- of ``onecycle_adamw``, and of ``late_decay_adamw`` with its trigger;
  ``inject_hyperparams`` with the same schedules is there for comparison. An average is
  not free: it reads and writes a copy of the parameters.
- of Adam with weight decay and ``scale_by_group`` for 48 groups, of ``onecycle_adamw``
  with it, and of ``fine_tune_adamw``. These take at most 1.5 times as long to trace and
  compile, too, which the last one misses. From 1 to 200 groups this hardly grows;
  ``optax.partition`` of an optimizer per group is there for comparison.

A range test of 100 steps takes at most 1.05 times the same 100 jitted steps run bare.

    python benchmarks/overhead.py [--smoke] [--out FOLDER]

All arms of a table are interleaved in one process, in random order, but for
``partition``, which has fewer rounds, with an ``optax.adamw`` of its own; a ratio is
the median over rounds of the ratio within a round, with quartiles. The arm that repeats
another shows how far from 1 noise alone takes a ratio.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_superconv as osc

Optimizers = Mapping[str, optax.GradientTransformation]

BASE = "optax.adamw"
TOTAL_STEPS, FREEZE_STEPS = 1000, 100
PEAK = 1e-3
multipliers_of = functools.partial(osc.layerwise_multipliers, decay=0.9)


def make_params(blocks: int, width: int, only: Iterable[str] = ()) -> dict[str, Any]:
    """Blocks of 12 leaves each, in the shapes of a small transformer, or some of them.

    The values of a leaf do not depend on which others are there.
    """
    matrix, vector = (width, width), (width,)
    shapes = {
        **{f"attention_{k}": matrix for k in ("query", "key", "value", "out")},
        **{f"attention_bias_{k}": vector for k in ("query", "key", "value")},
        "mlp_up": matrix,
        "mlp_down": matrix,
        "mlp_bias": vector,
        "norm_scale": vector,
        "norm_bias": vector,
    }
    rng = np.random.default_rng(0)
    params = {
        f"block_{b}": {
            name: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, shape in shapes.items()
        }
        for b in range(blocks)
    }
    keep = [*only] or [*shapes]
    return {block: {k: leaves[k] for k in keep} for block, leaves in params.items()}


THREE = ("mlp_up", "mlp_down", "mlp_bias")  # Of 200 blocks these are 600 leaves.


# --- optimizers, all with the same decay of the same leaves ---------------------------


def matrices_only(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def adamw(rate: Any = PEAK) -> optax.GradientTransformation:
    return optax.adamw(rate, b2=0.99, weight_decay=1e-2, mask=matrices_only)


def injected_adamw(peak: float = PEAK) -> optax.GradientTransformation:
    return optax.inject_hyperparams(optax.adamw, static_args=("mask",))(
        osc.onecycle_schedule(peak, TOTAL_STEPS),
        b1=osc.onecycle_momentum_schedule(TOTAL_STEPS),
        b2=0.99,
        weight_decay=1e-2,
        mask=matrices_only,
    )


def grouped_adamw(labels: Any) -> optax.GradientTransformation:
    """``optax.adamw`` in its parts, with a factor per group."""
    return optax.chain(
        optax.scale_by_adam(b2=0.99),
        optax.add_decayed_weights(1e-2, matrices_only),
        osc.scale_by_group(multipliers_of, labels),
        osc.scale_by_learning_rate(PEAK),
    )


def partitioned(make_tx: Callable[[float], Any], labels: Any) -> Any:
    """An optimizer per group."""
    multipliers = multipliers_of(labels)
    return optax.partition(
        {k: make_tx(PEAK * m) for k, m in multipliers.items()}, labels
    )


def dials() -> Optimizers:
    late_decay = functools.partial(osc.late_decay_adamw, PEAK, None)
    return {
        BASE: adamw(),
        "optax.adamw again": adamw(),
        "inject_hyperparams(optax.adamw)": injected_adamw(),
        "onecycle_adamw": osc.onecycle_adamw(PEAK, TOTAL_STEPS),
        "late_decay_adamw": late_decay(),
        "late_decay_adamw with EMA": late_decay(average=osc.ema_params(0.999)),
        "late_decay_adamw with LAWA of 3": late_decay(
            average=osc.lawa_params(3, every=10)
        ),
    }


def groups() -> Optimizers:
    labels = osc.label_by_depth()
    return {
        BASE: adamw(),
        "optax.adamw again": adamw(),
        "optax.adamw with scale_by_group": grouped_adamw(labels),
        "fine_tune_adamw": osc.fine_tune_adamw(
            PEAK, TOTAL_STEPS, labels, decay=0.9, freeze_steps=FREEZE_STEPS
        ),
        "onecycle_adamw with scale_by_group": optax.chain(
            osc.onecycle_adamw(PEAK, TOTAL_STEPS),
            osc.scale_by_group(multipliers_of, labels),
        ),
    }


# --- what is timed --------------------------------------------------------------------


def update_arm(
    tx: optax.GradientTransformation, params: Any, steps: int
) -> Callable[[], Any]:
    """Runs ``steps`` jitted updates on from where it stopped, all buffers donated."""
    grads = jax.tree.map(lambda p: 0.1 * p + 0.01, params)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    carry = jax.tree.map(jnp.copy, params), tx.init(params)

    def run() -> Any:
        nonlocal carry
        for _ in range(steps):
            carry = update(carry, grads)
        return carry

    return run


def compile_arm(tx: optax.GradientTransformation, params: Any) -> Callable[[], Any]:
    """Traces and compiles one update afresh."""

    def run() -> Any:
        state = jax.eval_shape(tx.init, params)
        jax.clear_caches()
        jax.jit(tx.update).lower(params, state, params).compile()
        return ()

    return run


def state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    state = jax.eval_shape(tx.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


class Budget(NamedTuple):
    steps: int  # in a round
    rounds: int
    compiles: int


def measure(optimizers: Optimizers, params: Any, budget: Budget) -> dict[str, Any]:
    """Of each arm, all timed together: seconds, and ratios to the first arm."""
    steps, rounds, compiles = budget
    arms = {name: update_arm(tx, params, steps) for name, tx in optimizers.items()}
    seconds = harness.interleave(arms, rounds)
    compile_arms = {name: compile_arm(tx, params) for name, tx in optimizers.items()}
    compile_seconds = harness.interleave(compile_arms, compiles)
    base = next(iter(optimizers))
    step_ratios = harness.ratios(seconds, base)
    compile_ratios = harness.ratios(compile_seconds, base)
    base_bytes = state_bytes(optimizers[base], params)
    return {
        name: {
            "step": statistics.median(seconds[name]) / steps,
            "compile": statistics.median(compile_seconds[name]),
            "step ratios": step_ratios[name],
            "compile ratios": compile_ratios[name],
            "extra bytes": state_bytes(tx, params) - base_bytes,
            "seconds": seconds[name],
            "compile seconds": compile_seconds[name],
        }
        for name, tx in optimizers.items()
    }


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per arm."""
    return [
        {
            "arm": name,
            "step (ms)": f"{arm['step'] * 1e3:.2f}",
            "step ratio": harness.median_and_quartiles(arm["step ratios"]),
            "compile (s)": f"{arm['compile']:.2f}",
            "compile ratio": harness.median_and_quartiles(arm["compile ratios"]),
            "state": f"{arm['extra bytes']:+d} bytes",
        }
        for name, arm in found.items()
    ]


def range_test_arms(num_steps: int) -> dict[str, Callable[[], Any]]:
    """A range test, and the same steps on the same ladder run bare."""
    rng = np.random.default_rng(0)
    sizes = (784, 512, 10)
    params = [
        jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32)
        for s in itertools.pairwise(sizes)
    ]
    batch = (
        jnp.asarray(rng.normal(size=(512, sizes[0])), jnp.float32),
        jnp.asarray(rng.integers(sizes[-1], size=512)),
    )
    low, high = 1e-6, 1e-2  # No divergence: every step is run.

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        inputs, labels = batch
        logits = jax.nn.relu(inputs @ params[0]) @ params[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step_fn(params: Any, learning_rate: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads), loss

    def bare() -> Any:
        state, losses = params, []
        rates = np.geomspace(low, high, num_steps, dtype=np.float32)
        for rate in jax.device_put(list(rates)):
            state, loss = step_fn(state, rate, batch)
            losses.append(loss)
        return losses

    def tested() -> Any:
        options: Any = {"min_value": low, "max_value": high, "num_steps": num_steps}
        result = osc.range_test(step_fn, params, [batch], **options)
        assert len(result.losses) == num_steps
        return ()

    return {"bare": bare, "bare again": bare, "range_test": tested}


# --- what comes out -------------------------------------------------------------------


def report_arms(
    args: Any,
    name: str,
    title: str,
    found: Mapping[str, Any],
    budget: Budget,
    question: str,
    told: Iterable[str],
    bytes_of: str,
) -> None:
    """``told`` are the arms that the claim names."""
    named = [arm for arm in told if arm in found]
    harness.report(
        args,
        name,
        title,
        table(found),
        {"arms": found},
        question,
        ", ".join(named) + f" / {BASE}",
        f"{budget.steps} x {budget.rounds}",
        harness.mean_and_std(*[found[a]["step ratios"] for a in named]) + " of a step",
        f"{found[bytes_of]['extra bytes']:+d} bytes of state",
    )


def report_growth(args: Any, width: int, counts: Iterable[int], budget: Budget) -> None:
    """Over the number of groups that the same leaves are cut into."""
    params = make_params(max(counts), width, THREE)
    depths = osc.label_by_depth()(params)
    deepest = 1 + max(jax.tree.leaves(depths))
    labels = {
        str(n): jax.tree.map(lambda depth, n=n: depth * n // deepest, depths)
        for n in counts
    }
    few = Budget(max(1, budget.steps // 5), max(1, budget.rounds // 10), 1)
    grouped = {count: grouped_adamw(tree) for count, tree in labels.items()}
    per_group = {count: partitioned(adamw, tree) for count, tree in labels.items()}
    ours = measure({BASE: adamw(), "again": adamw()} | grouped, params, budget)
    theirs = measure({BASE: adamw()} | per_group, params, few)

    def column(arms: Mapping[str, Any], name: str, key: str) -> str:
        return harness.median_and_quartiles(arms[name][key]) if name in arms else ""

    rows = [
        {
            "groups": name if name.isdecimal() else f"optax.adamw {name}",
            "scale_by_group: step": column(ours, name, "step ratios"),
            "trace + compile": column(ours, name, "compile ratios"),
            "state": f"{ours[name]['extra bytes']:+d} bytes",
            "partition: step": column(theirs, name, "step ratios"),
            "trace + compile ": column(theirs, name, "compile ratios"),
        }
        for name in list(ours)[1:]
    ]
    fewest, *_, most = [*labels] * 2
    growth = np.divide(ours[most]["seconds"], ours[fewest]["seconds"])
    harness.report(
        args,
        "groups_growth",
        f"Growth with the groups: {len(jax.tree.leaves(params))} leaves, ratios to "
        f"optax.adamw ({ours[BASE]['step'] * 1e3:.2f} ms, {ours[BASE]['compile']:.2f} "
        f"s); {most} groups take {np.median(growth):.2f} times a step of {fewest}",
        rows,
        {"scale_by_group": ours, "partition": theirs},
        f"Does the cost grow from {fewest} to {most} groups?",
        f"scale_by_group with {most} groups / with {fewest}",
        f"{budget.steps} x {budget.rounds}",
        harness.mean_and_std(growth) + " of a step",
        f"{ours[most]['extra bytes']:+d} bytes of state",
    )


def report_range_test(args: Any, num_steps: int, rounds: int) -> None:
    seconds = harness.interleave(range_test_arms(num_steps), rounds)
    ratios = harness.ratios(seconds, "bare")
    times = {name: f"{statistics.median(seconds[name]) * 1e3:.1f}" for name in seconds}
    harness.report(
        args,
        "overhead_range_test",
        f"Range test against the same {num_steps} steps run bare, {rounds} rounds",
        [
            {
                "arm": name,
                f"{num_steps} steps (ms)": times[name],
                "ratio": harness.median_and_quartiles(ratios[name]),
            }
            for name in seconds
        ],
        {"ratios": ratios, "seconds": seconds},
        "Does a range test wait for the device?",
        "range_test / the same steps run bare",
        f"{num_steps} x {rounds}",
        harness.mean_and_std(ratios["range_test"]) + " of the bare steps",
        f"{times['range_test']} ms",
    )


def main() -> None:
    args = harness.parse_args(__doc__)
    blocks, width, counts, num_steps = 48, 64, (1, 8, 48, 200), 100
    budget, few, half = Budget(10, 100, 5), Budget(10, 10, 3), Budget(10, 50, 3)
    params = make_params(blocks, width)
    if args.smoke:
        blocks, width, counts, num_steps = 1, 8, (1,), 5
        budget = few = half = Budget(2, 2, 1)
        params = make_params(blocks, width, THREE)
    labels = osc.label_by_depth()(params)
    per_group = {BASE: adamw, "inject_hyperparams(optax.adamw)": injected_adamw}
    partitions = {
        f"partition({k})": partitioned(v, labels) for k, v in per_group.items()
    }
    first, second = dials(), groups()
    if args.smoke:  # Less to compile.
        first, second = ({k: arms[k] for k in [*arms][::3]} for arms in (first, second))
        del partitions["partition(inject_hyperparams(optax.adamw))"]

    tree = f"{len(jax.tree.leaves(params))} leaves of width {width}"
    rounds = f"{budget.rounds} rounds of {budget.steps} steps"
    report_arms(
        args,
        "overhead_step",
        f"The dials against optax.adamw: {tree}, {rounds}",
        measure(first, params, budget),
        budget,
        "Do the dials cost anything?",
        (
            "onecycle_adamw",
            "late_decay_adamw",
            "late_decay_adamw with EMA",
            "inject_hyperparams(optax.adamw)",
        ),
        "onecycle_adamw",
    )
    found = measure(second, params, budget)
    slow = measure({BASE: adamw()} | partitions, params, few)
    del slow[BASE]
    report_arms(
        args,
        "groups_step",
        f"{blocks} groups against optax.adamw: {tree}, {rounds} ({few.rounds} of "
        "partition); limits: 1.10 for a step, 1.5 for trace + compile",
        found | slow,
        budget,
        f"What do {blocks} groups cost?",
        (
            "optax.adamw with scale_by_group",
            "fine_tune_adamw",
            "partition(optax.adamw)",
        ),
        "fine_tune_adamw",
    )
    report_growth(args, width, counts, half)
    report_range_test(args, num_steps, max(2, budget.rounds // 2))


if __name__ == "__main__":
    main()
