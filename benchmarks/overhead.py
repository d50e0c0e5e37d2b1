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
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_superconv as osc

BASE = "optax.adamw"
TOTAL_STEPS, FREEZE_STEPS = 1000, 100
PEAK = 1e-3
multipliers_of = functools.partial(osc.layerwise_multipliers, decay=0.9)


def make_params(blocks, width) -> dict[str, dict[str, jax.Array]]:
    """Blocks of 12 leaves each, in the shapes of a small transformer."""
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
    return {
        f"block_{b}": {
            name: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, shape in shapes.items()
        }
        for b in range(blocks)
    }


def mlps_of(params) -> dict[str, dict[str, jax.Array]]:
    """Two matrices and a vector of each block, so that 200 of them have 600 leaves."""
    names = ("mlp_up", "mlp_down", "mlp_bias")
    return {block: {k: leaves[k] for k in names} for block, leaves in params.items()}


# --- optimizers, all with the same decay of the same leaves ---------------------------


def matrices_only(params) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def adamw(rate=PEAK) -> Any:
    return optax.adamw(rate, b2=0.99, weight_decay=1e-2, mask=matrices_only)


def grouped_adamw(labels) -> Any:
    """``optax.adamw`` in its parts, with a factor per group."""
    return optax.chain(
        optax.scale_by_adam(b2=0.99),
        optax.add_decayed_weights(1e-2, matrices_only),
        osc.scale_by_group(multipliers_of, labels),
        osc.scale_by_learning_rate(PEAK),
    )


def partitioned_adamw(labels) -> Any:
    """An ``optax.adamw`` per group."""
    each = {k: adamw(PEAK * m) for k, m in multipliers_of(labels).items()}
    return optax.partition(each, labels)


def dials() -> dict[str, Any]:
    late_decay = functools.partial(osc.late_decay_adamw, PEAK, None)
    ema, lawa = osc.ema_params(0.999), osc.lawa_params(3, every=10)
    injected = optax.inject_hyperparams(optax.adamw, static_args=("mask",))
    return {
        BASE: adamw(),
        "optax.adamw again": adamw(),
        "inject_hyperparams(optax.adamw)": injected(
            osc.onecycle_schedule(PEAK, TOTAL_STEPS),
            b1=osc.onecycle_momentum_schedule(TOTAL_STEPS),
            b2=0.99,
            weight_decay=1e-2,
            mask=matrices_only,
        ),
        "onecycle_adamw": osc.onecycle_adamw(PEAK, TOTAL_STEPS),
        "late_decay_adamw": late_decay(),
        "late_decay_adamw with EMA": late_decay(average=ema),
        "late_decay_adamw with LAWA of 3": late_decay(average=lawa),
    }


def groups(labels) -> dict[str, Any]:
    one_cycle = osc.onecycle_adamw(PEAK, TOTAL_STEPS)
    return {
        BASE: adamw(),
        "optax.adamw again": adamw(),
        "optax.adamw with scale_by_group": grouped_adamw(labels),
        "fine_tune_adamw": osc.fine_tune_adamw(
            PEAK, TOTAL_STEPS, labels, decay=0.9, freeze_steps=FREEZE_STEPS
        ),
        "onecycle_adamw with scale_by_group": optax.chain(
            one_cycle, osc.scale_by_group(multipliers_of, labels)
        ),
    }


# --- what is timed --------------------------------------------------------------------


def update_arm(tx, params, steps) -> Any:
    """Runs ``steps`` jitted updates on from where it stopped, all buffers donated."""
    grads = jax.tree.map(lambda p: 0.1 * p + 0.01, params)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(carry, grads) -> Any:
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


def compile_arm(tx, params) -> Any:
    """Traces and compiles one update afresh."""

    def run() -> None:
        state = jax.eval_shape(tx.init, params)
        jax.clear_caches()
        jax.jit(tx.update).lower(params, state, params).compile()

    return run


def state_bytes(tx, params) -> int:
    state = jax.eval_shape(tx.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def range_test_arms(num_steps) -> dict[str, Any]:
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

    def loss_fn(params, batch) -> jax.Array:
        inputs, labels = batch
        logits = jax.nn.relu(inputs @ params[0]) @ params[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step_fn(params, learning_rate, batch) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads), loss

    def bare() -> list[jax.Array]:
        state, losses = params, []
        rates = np.geomspace(low, high, num_steps, dtype=np.float32)
        for rate in jax.device_put(list(rates)):
            state, loss = step_fn(state, rate, batch)
            losses.append(loss)
        return losses

    def tested() -> None:
        options: Any = {"min_value": low, "max_value": high, "num_steps": num_steps}
        result = osc.range_test(step_fn, params, [batch], **options)
        assert len(result.losses) == num_steps

    return {"bare": bare, "bare again": bare, "range_test": tested}


class Budget(NamedTuple):
    steps: int  # in a round
    rounds: int
    compiles: int


def measure(optimizers, params, budget) -> dict[str, dict[str, Any]]:
    """Of each arm, all timed together: seconds, and ratios to the first arm."""
    base, *_ = optimizers
    arms = {k: update_arm(tx, params, budget.steps) for k, tx in optimizers.items()}
    step = harness.interleave(arms, budget.rounds)
    arms = {k: compile_arm(tx, params) for k, tx in optimizers.items()}
    compilation = harness.interleave(arms, budget.compiles)
    return {
        name: {
            "step": statistics.median(step[name]) / budget.steps,
            "compile": statistics.median(compilation[name]),
            "step ratios": np.divide(step[name], step[base]),
            "compile ratios": np.divide(compilation[name], compilation[base]),
            "extra bytes": state_bytes(tx, params)
            - state_bytes(optimizers[base], params),
            "seconds": step[name],
            "compile seconds": compilation[name],
        }
        for name, tx in optimizers.items()
    }


# --- what comes out -------------------------------------------------------------------


def report_arms(args, name, title, found, budget, question, told, base=BASE) -> None:
    """``told``: the arms that the claim names, over the base. The first one's cost."""
    told = [arm for arm in told if arm in found]
    over = 1.0 if base == BASE else found[base]["step ratios"]
    ratios = [found[arm]["step ratios"] / over for arm in told]
    rows = [
        {
            "arm": arm,
            "step (ms)": f"{of['step'] * 1e3:.2f}",
            "step ratio": harness.median_and_quartiles(of["step ratios"]),
            "compile (s)": f"{of['compile']:.2f}",
            "compile ratio": harness.median_and_quartiles(of["compile ratios"]),
            "state": f"{of['extra bytes']:+d} bytes",
        }
        for arm, of in found.items()
    ]
    harness.report(
        args,
        name,
        f"{title}, {budget.rounds} rounds of {budget.steps} steps",
        rows,
        {"arms": found},
        question,
        ", ".join(told) + f" / {base}",
        f"{budget.steps} x {budget.rounds}",
        harness.mean_and_std(*ratios) + " of a step",
        f"{found[told[0]]['extra bytes']:+d} bytes of state",
    )


def report_range_test(args, num_steps, rounds) -> None:
    seconds = harness.interleave(range_test_arms(num_steps), rounds)
    ratios = {arm: np.divide(seconds[arm], seconds["bare"]) for arm in seconds}
    times = {arm: f"{statistics.median(seconds[arm]) * 1e3:.1f}" for arm in seconds}
    harness.report(
        args,
        "overhead_range_test",
        f"Range test against the same {num_steps} steps run bare, {rounds} rounds",
        [
            {
                "arm": arm,
                f"{num_steps} steps (ms)": times[arm],
                "ratio": harness.median_and_quartiles(ratios[arm]),
            }
            for arm in seconds
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
    budget, slow = Budget(10, 100, 5), Budget(10, 10, 3)
    of_growth, slow_growth = Budget(10, 50, 3), Budget(2, 5, 1)
    params = make_params(blocks, width)
    of_dials, of_groups = dials(), groups(osc.label_by_depth())
    if args.smoke:
        blocks, width, counts, num_steps = 1, 8, (1,), 5
        budget = slow = of_growth = slow_growth = Budget(2, 2, 1)
        params = mlps_of(make_params(blocks, width))
        # Less to compile.
        of_dials = {arm: of_dials[arm] for arm in [*of_dials][::3]}
        of_groups = {arm: of_groups[arm] for arm in [*of_groups][::3]}
    leaves = f"{len(jax.tree.leaves(params))} leaves of width {width}"

    report_arms(
        args,
        "overhead_step",
        f"The dials against optax.adamw: {leaves}",
        measure(of_dials, params, budget),
        budget,
        "Do the dials cost anything?",
        [
            "onecycle_adamw",
            "late_decay_adamw",
            "late_decay_adamw with EMA",
            "inject_hyperparams(optax.adamw)",
        ],
    )

    found = measure(of_groups, params, budget)
    per_group = {
        "partition(optax.adamw)": partitioned_adamw(osc.label_by_depth()(params))
    }
    theirs = measure({BASE: adamw()} | per_group, params, slow)
    report_arms(
        args,
        "groups_step",
        f"{blocks} groups against optax.adamw: {leaves}; limits: 1.10 for a step, 1.5 "
        f"for trace + compile; {slow.rounds} rounds of partition",
        theirs | found,
        budget,
        f"What do {blocks} groups cost?",
        ["fine_tune_adamw", "optax.adamw with scale_by_group", *per_group],
    )

    params = mlps_of(make_params(max(counts), width))
    depths = osc.label_by_depth()(params)
    deepest = 1 + max(jax.tree.leaves(depths))
    ours, theirs = {BASE: adamw(), "optax.adamw again": adamw()}, {BASE: adamw()}
    for n in counts:
        labels = jax.tree.map(lambda depth, n=n: depth * n // deepest, depths)
        ours[f"scale_by_group, {n}"] = grouped_adamw(labels)
        theirs[f"partition, {n}"] = partitioned_adamw(labels)
    theirs = measure(theirs, params, slow_growth)
    report_arms(
        args,
        "groups_growth",
        f"Growth with the groups: {len(jax.tree.leaves(params))} leaves",
        theirs | measure(ours, params, of_growth),
        of_growth,
        f"Does the cost grow from 1 to {counts[-1]} groups?",
        [f"scale_by_group, {counts[-1]}"],
        base="scale_by_group, 1",
    )
    report_range_test(args, num_steps, max(2, budget.rounds // 2))


if __name__ == "__main__":
    main()
