"""Rates per group cost what one optimizer costs, however many groups there are.

On 48 groups of 12 leaves, a step of Adam with weight decay and ``scale_by_group``
takes at most 1.10 times that of ``optax.adamw``, and to trace and compile it takes at
most 1.5 times as long; the same is asked of ``onecycle_adamw`` with it and of
``fine_tune_adamw``, which misses the second. The state is at most 4 KiB larger. From 1
to 200 groups this hardly grows. ``optax.partition`` of an optimizer per group is there
for comparison.

    python benchmarks/groups.py [--smoke] [--out FOLDER]

All arms of a table are interleaved in one process, in random order, but for
``partition``, which has fewer rounds, with an ``optax.adamw`` of its own; a ratio is
the median over rounds of the ratio within a round, with quartiles. The arm that repeats
another shows how far from 1 noise alone takes a ratio.
"""

import functools
import statistics
from collections.abc import Mapping
from typing import Any

import harness
import jax
import numpy as np
import optax
from overhead import (
    PEAK,
    TOTAL_STEPS,
    compile_arm,
    make_params,
    matrices_only,
    state_bytes,
    update_arm,
)

import optax_superconv as osc

Optimizers = Mapping[str, optax.GradientTransformation]

BASE = "optax.adamw"
FREEZE_STEPS = 100
multipliers_of = functools.partial(osc.layerwise_multipliers, decay=0.9)


# --- optimizers, all with the same decay of the same leaves --------------------------


def adamw(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, b2=0.99, weight_decay=1e-2, mask=matrices_only)


def injected_adamw(multiplier: float) -> optax.GradientTransformation:
    peak = multiplier * PEAK
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


def partitioned_adamw(labels: Any) -> optax.GradientTransformation:
    """An ``optax.adamw`` per group."""
    multipliers = multipliers_of(labels)
    return optax.partition({k: adamw(PEAK * m) for k, m in multipliers.items()}, labels)


def partitioned_injected_adamw(labels: Any) -> optax.GradientTransformation:
    """An ``inject_hyperparams(optax.adamw)`` per group, with schedules of its own."""
    multipliers = multipliers_of(labels)
    return optax.partition(
        {k: injected_adamw(m) for k, m in multipliers.items()}, labels
    )


# --- measurements --------------------------------------------------------------------


def measure(
    optimizers: Optimizers, params: Any, steps: int, rounds: int, compiles: int
) -> dict[str, dict[str, Any]]:
    """Seconds, and ratios to the first arm, of a step and of a compilation."""
    arms = {name: update_arm(tx, params, steps) for name, tx in optimizers.items()}
    seconds = harness.interleave(arms, rounds)
    compile_arms = {name: compile_arm(tx, params) for name, tx in optimizers.items()}
    compile_seconds = harness.interleave(compile_arms, compiles)
    base = next(iter(optimizers))
    ratios = harness.ratios(seconds, base)
    compile_ratios = harness.ratios(compile_seconds, base)
    return {
        name: {
            "step": statistics.median(seconds[name]) / steps,
            "step_ratio": ratios[name],
            "compile": statistics.median(compile_seconds[name]),
            "compile_ratio": compile_ratios[name],
            "extra_bytes": state_bytes(tx, params)
            - state_bytes(optimizers[base], params),
            "seconds": seconds[name],
            "compile_seconds": compile_seconds[name],
            "ratio_per_round": np.divide(seconds[name], seconds[base]),
        }
        for name, tx in optimizers.items()
    }


def blocks_of_three(count: int, width: int) -> dict[str, dict[str, jax.Array]]:
    """Blocks of two matrices and a vector, so that 200 of them have 600 leaves."""
    names = ("mlp_up", "mlp_down", "mlp_bias")
    return {
        block: {name: leaves[name] for name in names}
        for block, leaves in make_params(count, width).items()
    }


def cut(depths: Any, groups: int) -> Any:
    """Labels of as many groups, each of neighbouring depths."""
    depth_count = 1 + max(jax.tree.leaves(depths))
    return jax.tree.map(lambda depth: depth * groups // depth_count, depths)


def main() -> None:
    args = harness.parse_args(__doc__)
    blocks, width, steps, rounds, few, compiles, group_counts = (
        (1, 8, 2, 2, 1, 1, (1,))
        if args.smoke
        else (48, 64, 10, 100, 10, 5, (1, 8, 48, 200))
    )
    if args.smoke:
        jax.config.update("jax_disable_most_optimizations", True)  # Compiles faster.
    command = "python benchmarks/groups.py"
    limits = "limits: 1.10 for a step, 1.5 for trace + compile"

    params = (blocks_of_three if args.smoke else make_params)(blocks, width)
    label_fn = osc.label_by_depth()
    labels = label_fn(params)
    found = measure(
        {
            BASE: adamw(PEAK),
            "optax.adamw again": adamw(PEAK),
            "optax.adamw, scale_by_group": grouped_adamw(label_fn),
            "onecycle_adamw, scale_by_group": optax.chain(
                osc.onecycle_adamw(PEAK, TOTAL_STEPS),
                osc.scale_by_group(multipliers_of, label_fn),
            ),
            "fine_tune_adamw": osc.fine_tune_adamw(
                PEAK, TOTAL_STEPS, label_fn, decay=0.9, freeze_steps=FREEZE_STEPS
            ),
        },
        params,
        steps,
        rounds,
        compiles,
    )
    slow = measure(
        {
            BASE: adamw(PEAK),
            "partition(optax.adamw)": partitioned_adamw(labels),
            "partition(inject_hyperparams(optax.adamw))": partitioned_injected_adamw(
                labels
            ),
        },
        params,
        steps,
        few,
        min(compiles, 3),
    )
    found |= {name: slow[name] for name in list(slow)[1:]}
    rows = [
        {
            "arm": name,
            "step (ms)": f"{arm['step'] * 1e3:.2f}",
            "step ratio": harness.show(arm["step_ratio"]),
            "compile (s)": f"{arm['compile']:.2f}",
            "compile ratio": harness.show(arm["compile_ratio"]),
            "state": f"{arm['extra_bytes']:+d} bytes",
        }
        for name, arm in found.items()
    ]
    leaves = len(jax.tree.leaves(params))
    harness.report(
        "groups_step",
        f"{blocks} groups against optax.adamw: {leaves} leaves of width {width}, "
        f"{rounds} rounds of {steps} steps ({few} of partition); {limits}",
        rows,
        {"arms": found},
        args.out,
        {
            "question": f"What do {blocks} groups cost?",
            "arms": "scale_by_group, fine_tune_adamw, partition(adamw) / adamw",
            "steps": f"{steps} x {rounds}",
            "mean ± std (n)": ", ".join(
                harness.mean_and_std(found[name]["ratio_per_round"])
                for name in (
                    "optax.adamw, scale_by_group",
                    "fine_tune_adamw",
                    "partition(optax.adamw)",
                )
            )
            + " of a step",
            "cost": f"{found['fine_tune_adamw']['extra_bytes']:+d} bytes of state",
            "command": command,
        },
    )

    params = blocks_of_three(max(group_counts), width)
    depths = label_fn(params)
    labels_by_count = {count: cut(depths, count) for count in group_counts}
    ours = measure(
        {
            BASE: adamw(PEAK),
            "again": adamw(PEAK),
            **{str(k): grouped_adamw(tree) for k, tree in labels_by_count.items()},
        },
        params,
        steps,
        rounds // 2,
        min(compiles, 3),
    )
    theirs = measure(
        {
            BASE: adamw(PEAK),
            **{str(k): partitioned_adamw(tree) for k, tree in labels_by_count.items()},
        },
        params,
        max(1, steps // 5),
        max(1, few // 2),
        1,
    )

    def column(arms: Mapping[str, Any], name: str, key: str) -> str:
        return harness.show(arms[name][key]) if name in arms else ""

    growth_rows = [
        {
            "groups": name if name.isdecimal() else f"optax.adamw {name}",
            "scale_by_group: step": column(ours, name, "step_ratio"),
            "trace + compile": column(ours, name, "compile_ratio"),
            "state": f"{ours[name]['extra_bytes']:+d} bytes",
            "partition: step": column(theirs, name, "step_ratio"),
            "trace + compile ": column(theirs, name, "compile_ratio"),
        }
        for name in list(ours)[1:]
    ]
    most = str(group_counts[-1])
    growth = np.divide(ours[most]["seconds"], ours["1"]["seconds"])
    harness.report(
        "groups_growth",
        f"Growth with the groups: {len(jax.tree.leaves(params))} leaves, ratios to "
        f"optax.adamw ({ours[BASE]['step'] * 1e3:.2f} ms, {ours[BASE]['compile']:.2f} "
        f"s); {most} groups take {statistics.median(growth):.2f} times a step of 1",
        growth_rows,
        {"scale_by_group": ours, "partition": theirs},
        args.out,
        {
            "question": f"Does the cost grow from 1 to {most} groups?",
            "arms": f"scale_by_group with {most} groups / with 1",
            "steps": f"{steps} x {rounds // 2}",
            "mean ± std (n)": harness.mean_and_std(growth) + " of a step",
            "cost": f"{ours[most]['extra_bytes']:+d} bytes of state",
            "command": command,
        },
    )


if __name__ == "__main__":
    main()
