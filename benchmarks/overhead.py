"""The dials are free, and so are rates per group: they cost what ``optax.adamw`` costs.

On a tree of 576 leaves, 48 blocks of 12, a step takes at most 1.10 times that of
``optax.adamw``, to trace and to compile at most 1.5 times, and the state is at most
4 KiB larger:

- of ``adamw``, also while a rate is held, and of ``onecycle_adamw``;
  ``inject_hyperparams`` with the same schedules is there for comparison. An average is
  not free: it reads and writes a copy of the parameters.
- of both with ``multipliers`` for 48 groups. Optax's Adam with ``scale_by_group``
  before Optax's rate is there too, and ``optax.partition`` of an optimizer per group; 1
  to 200 groups show how it grows.

``fine_tune_adamw`` with frozen steps has two optimizers, ``gradual_unfreezing`` a state
per label, and they are not free: 2, 4 and 12 labels are compared with one. To read or
to set a dial between two steps takes milliseconds of the host and waits for no step. A
range test of 100 steps takes at most 1.05 times the same 100 jitted steps run bare.

    python benchmarks/overhead.py [--smoke] [--only TABLE ...] [--out FOLDER]

All arms of a table are interleaved in one process, in random order, but for
``partition``, which has fewer rounds, with an ``optax.adamw`` of its own; a ratio is
the median over rounds of the ratio within a round, with quartiles. The arm that repeats
another shows how far from 1 noise alone takes a ratio.
"""

import functools
import itertools
import math
import re
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_superconv as osc

BASE, AGAIN = "optax.adamw", "optax.adamw again"
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
        optax.scale_by_learning_rate(PEAK),
    )


def partitioned_adamw(labels) -> Any:
    """An ``optax.adamw`` per group."""
    each = {k: adamw(PEAK * m) for k, m in multipliers_of(labels).items()}
    return optax.partition(each, labels)


def unfreezing_adamw(labels) -> Any:
    """A group joins every so many steps, the last one first."""
    *others, head = sorted(set(jax.tree.leaves(labels)))
    thaws = {k: (head - k) * FREEZE_STEPS for k in (*others, head)}
    moments = osc.scale_by_scheduled_adam(0.9, 0.99)
    inner = optax.chain(moments, osc.add_decayed_weights(1e-2))
    return optax.chain(
        osc.gradual_unfreezing(inner, thaws, labels), osc.scale_by_learning_rate(PEAK)
    )


def with_held_rate(tx) -> Any:
    def init_fn(params) -> Any:
        return osc.set_hyperparams(tx.init(params), {"learning_rate": PEAK / 2})

    return tx._replace(init=init_fn)


def in_groups(params, num_groups) -> Any:
    """Labels of as many groups, of neighbouring blocks."""
    depths = osc.label_by_depth()(params)
    num_blocks = 1 + max(jax.tree.leaves(depths))
    return jax.tree.map(lambda depth: depth * num_groups // num_blocks, depths)


def dials() -> dict[str, Any]:
    injected = optax.inject_hyperparams(optax.adamw, static_args=("mask",))
    ours = osc.adamw(PEAK)
    return {
        BASE: adamw(),
        AGAIN: adamw(),
        "adamw": ours,
        "adamw, rate held": with_held_rate(ours),
        "onecycle_adamw": osc.onecycle_adamw(PEAK, TOTAL_STEPS),
        "inject_hyperparams(optax.adamw)": injected(
            osc.onecycle_schedule(PEAK, TOTAL_STEPS),
            b1=osc.onecycle_momentum_schedule(TOTAL_STEPS),
            b2=0.99,
            weight_decay=1e-2,
            mask=matrices_only,
        ),
        "adamw with EMA": optax.chain(ours, osc.ema_params(0.999)),
        "adamw with LAWA of 3": optax.chain(ours, osc.lawa_params(3, every=10)),
    }


def groups(labels) -> dict[str, Any]:
    of: Any = {"multipliers": multipliers_of, "param_labels": labels}
    freezing: Any = {"decay": 0.9, "freeze_steps": FREEZE_STEPS}
    return {
        BASE: adamw(),
        AGAIN: adamw(),
        "onecycle_adamw": osc.onecycle_adamw(PEAK, TOTAL_STEPS, **of),
        "adamw": osc.adamw(PEAK, **of),
        "scale_by_group before Optax's rate": grouped_adamw(labels),
        "fine_tune_adamw": osc.fine_tune_adamw(PEAK, TOTAL_STEPS, labels, **freezing),
    }


# --- what is timed --------------------------------------------------------------------


def jitted_step(tx) -> Any:
    """An update of the parameters, all buffers donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry, grads) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def update_arms(optimizers, params, steps, copies=1) -> dict[str, Any]:
    """Each runs ``steps`` jitted updates on from where it stopped.

    Where a program and its arrays lie in memory moves its time by some per cent for as
    long as it lives, so there may be several; and what is made later may be slower, so
    they are made in turn, there and back.
    """
    grads = jax.tree.map(lambda p: 0.1 * p + 0.01, params)
    made: dict[str, list[Any]] = {arm: [] for arm in optimizers}
    for copy in range(copies):
        for arm, tx in list(optimizers.items())[:: -1 if copy % 2 else 1]:
            carry = jax.tree.map(jnp.copy, params), tx.init(params)
            step = jitted_step(tx)
            made[arm].append([step, step(carry, grads)])

    def runner(programs) -> Any:
        def run() -> Any:
            for program in programs:
                for _ in range(steps):
                    program[1] = program[0](program[1], grads)
            return [carry for _, carry in programs]

        return run

    return {arm: runner(programs) for arm, programs in made.items()}


def compile_arm(tx, params) -> Any:
    """Traces and compiles one update afresh."""

    def run() -> None:
        state = jax.eval_shape(tx.init, params)
        jax.clear_caches()
        jax.jit(tx.update).lower(params, state, params).compile()

    return run


def kernels_of(tx, params) -> int:
    """How many kernels a step launches."""
    carry = jax.eval_shape(lambda params: (params, tx.init(params)), params)
    return kernels_in(jitted_step(tx).lower(carry, params).compile().as_text())


def kernels_in(program: str) -> int:
    """Fusions, custom calls and copies: on a GPU nothing else is left to launch."""
    return len(re.findall(r" = .*? (?:fusion|custom-call|copy)\(", program))


def call_arms(state, calls) -> dict[str, Any]:
    """What a log line and a decision take between two steps."""

    def repeated(function, *args) -> Any:
        return lambda: [function(state, *args) for _ in range(calls)]

    return {
        "read_hyperparams": repeated(osc.read_hyperparams),
        "set_hyperparams": repeated(osc.set_hyperparams, {"learning_rate": PEAK / 2}),
        "start_cooldown": repeated(osc.start_cooldown, 100),
        "restart_schedules": repeated(osc.restart_schedules),
    }


def state_bytes(tx, params) -> int:
    state = jax.eval_shape(tx.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def range_test_arms(num_steps) -> dict[str, Any]:
    """Range tests, and the same steps run bare: by name, and then its base."""
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
    tx = osc.sgd(0.1)

    def loss_fn(params, batch) -> jax.Array:
        inputs, labels = batch
        logits = jax.nn.relu(inputs @ params[0]) @ params[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def passed_step(params, learning_rate, batch) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads), loss

    @jax.jit
    def own_step(state, batch) -> Any:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def bare_passed() -> list[jax.Array]:
        state, losses = params, []
        rates = np.geomspace(low, high, num_steps, dtype=np.float32)
        for rate in jax.device_put(list(rates)):
            state, loss = passed_step(state, rate, batch)
            losses.append(loss)
        return losses

    def bare_own() -> list[jax.Array]:
        state, losses = (params, tx.init(params)), []
        for _ in range(num_steps):
            state, loss = own_step(state, batch)
            losses.append(loss)
        return losses

    def test(step_fn, state, **options) -> None:
        options |= {"min_learning_rate": low, "max_learning_rate": high}
        result = osc.range_test(step_fn, state, [batch], num_steps=num_steps, **options)
        assert len(result.losses) == num_steps

    return {
        "range_test": lambda: test(own_step, (params, tx.init(params))),
        "its steps": bare_own,
        "its steps again": bare_own,
        "range_test, rate passed": lambda: test(
            passed_step, params, pass_hyperparams=True
        ),
        "its steps, rate passed": bare_passed,
    }


class Budget(NamedTuple):
    steps: int  # in a round, of each copy
    copies: int
    rounds: int
    compiles: int


def measure(optimizers, params, budget) -> dict[str, dict[str, Any]]:
    """Of each arm, all timed together: seconds, and ratios to the first arm."""
    base, *_ = optimizers
    *of_arm, rounds, compiles = budget
    step = harness.interleave(update_arms(optimizers, params, *of_arm), rounds)
    arms = {k: compile_arm(tx, params) for k, tx in optimizers.items()}
    compilation = harness.interleave(arms, compiles)
    return {
        name: {
            "step": statistics.median(step[name]) / math.prod(of_arm),
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


def medians(samples: Iterable[Any]) -> str:
    """Of each sample, with quartiles: as in the table that goes with it."""
    return ", ".join(map(harness.median_and_quartiles, samples))


def report_arms(args, name, title, found, budget, question, told=(), base=BASE) -> None:
    """``told``: the arms that the claim names, over the base. The first one's cost."""
    told = told or [arm for arm in found if arm not in (BASE, AGAIN)]
    over = 1.0 if base == BASE else found[base]["step ratios"]
    ratios = [found[arm]["step ratios"] / over for arm in told]
    rows = [
        {
            "arm": arm,
            "step (ms)": f"{of['step'] * 1e3:.2f}",
            "step ratio": harness.median_and_quartiles(of["step ratios"]),
            "compile (s)": f"{of['compile']:.2f}",
            "compile ratio": harness.median_and_quartiles(of["compile ratios"]),
            "state": f"{of['extra bytes']:+,d} bytes",
        }
        for arm, of in found.items()
    ]
    harness.report(
        args,
        name,
        f"{title}, {budget.rounds} rounds of {budget.copies} x {budget.steps} steps",
        rows,
        {"arms": found},
        question,
        ", ".join(told) + f" / {base}",
        f"{budget.steps} x {budget.copies} x {budget.rounds}",
        medians(ratios) + " of a step",
        f"{found[told[0]]['extra bytes']:+,d} bytes of state",
    )


def report_kernels(args, optimizers, params, title) -> None:
    counts = {arm: kernels_of(tx, params) for arm, tx in optimizers.items()}
    harness.report(
        args,
        "overhead_kernels",
        f"Kernels of a step: {title}; on a CPU, fusions",
        [{"arm": arm, "kernels": count} for arm, count in counts.items()],
        {"kernels": counts},
        "How many kernels has a step?",
        ", ".join(counts),
        "1",
        ", ".join(map(str, counts.values())),
        f"{max(counts.values()) - counts[BASE]:+d} kernels at most",
    )


def report_calls(args, optimizers, params, title, calls, rounds) -> None:
    arms = {
        f"{call}, {name}": arm
        for name, tx in optimizers.items()
        for call, arm in call_arms(tx.init(params), calls).items()
    }
    seconds = harness.interleave(arms, rounds)
    times = {arm: 1e3 * np.array(seconds[arm]) / calls for arm in arms}
    told = [arm for arm in arms if arm.startswith(("read", "set"))]
    harness.report(
        args,
        "overhead_calls",
        f"Between two steps: {title}, {rounds} rounds of {calls} calls",
        [
            {"arm": arm, "call (ms)": harness.median_and_quartiles(times[arm])}
            for arm in arms
        ],
        {"milliseconds": times},
        "What does it take to read and to set a dial?",
        "; ".join(told),
        f"{calls} x {rounds}",
        medians(times[arm] for arm in told) + " ms",
        "none to a step",
    )


def report_range_test(args, num_steps, rounds) -> None:
    seconds = harness.interleave(range_test_arms(num_steps), rounds)
    bases = {arm: "its steps" + arm[10:] * ("passed" in arm) for arm in seconds}
    bases |= {arm: arm for arm in bases.values()}
    ratios = {arm: np.divide(seconds[arm], seconds[bases[arm]]) for arm in seconds}
    times = {arm: f"{statistics.median(seconds[arm]) * 1e3:.1f}" for arm in seconds}
    told = [arm for arm in seconds if arm.startswith("range_test")]
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
        "; ".join(told) + " / the same steps run bare",
        f"{num_steps} x {rounds}",
        medians(ratios[arm] for arm in told) + " of the bare steps",
        f"{times[told[0]]} ms",
    )


TABLES = ("kernels", "calls", "step", "groups", "unfreezing", "growth", "range_test")


def main() -> None:
    args = harness.parse_args(__doc__, tables=TABLES)
    blocks, width, rounds, num_steps = 48, 64, 50, 100
    counts, label_counts = (1, 8, 48, 200), (1, 2, 4, 12)
    # What compiles kernels for an accelerator takes longer.
    compiles, few = (5, 3) if jax.default_backend() == "cpu" else (1, 1)
    budget, slow = Budget(4, 3, 2 * rounds, compiles), Budget(10, 1, 10, few)
    of_growth, slow_growth = Budget(4, 3, rounds, few), Budget(2, 1, 5, 1)
    params = make_params(blocks, width)
    if args.smoke:
        blocks, width, rounds, num_steps = 2, 8, 2, 5
        counts, label_counts = (1,), (2,)
        budget = slow = of_growth = slow_growth = Budget(2, 1, 2, 1)
        params = mlps_of(make_params(blocks, width))
    leaves = f"{len(jax.tree.leaves(params))} leaves of width {width}"
    labels = osc.label_by_depth()(params)
    of_dials, of_groups = dials(), groups(labels)
    if args.smoke:  # Less to compile.
        of_dials = {arm: of_dials[arm] for arm in (BASE, "adamw, rate held")}
        of_groups = {arm: of_groups[arm] for arm in (BASE, "fine_tune_adamw")}
    in_all = of_dials | {
        f"{arm}, {blocks} groups": tx
        for arm, tx in of_groups.items()
        if arm not in (BASE, AGAIN)
    }

    if "kernels" in args.only:
        report_kernels(args, in_all, params, leaves)
    if "calls" in args.only:
        ours = {"adamw": osc.adamw(PEAK), f"{blocks} groups": groups(labels)["adamw"]}
        report_calls(args, ours, params, leaves, budget.steps, rounds)
    if "step" in args.only:
        title = f"The dials against optax.adamw: {leaves}"
        found = measure(of_dials, params, budget)
        question = "Do the dials cost anything?"
        report_arms(args, "overhead_step", title, found, budget, question)
    if "groups" in args.only:
        per_group = {"partition(optax.adamw)": partitioned_adamw(labels)}
        theirs = measure({BASE: adamw()} | per_group, params, slow)
        found = measure(of_groups, params, budget)
        report_arms(
            args,
            "groups_step",
            f"{blocks} groups against optax.adamw: {leaves}; limits: 1.10 for a step, "
            f"1.5 for trace + compile; {slow.rounds} rounds of partition",
            found | theirs | found,
            budget,
            f"What do {blocks} groups cost?",
        )
    if "unfreezing" in args.only:
        by_count = {
            f"gradual_unfreezing, {n}": unfreezing_adamw(in_groups(params, n))
            for n in label_counts
        }
        one, *more = by_count
        title = f"A state for each label that thaws: {leaves}"
        found = measure(by_count, params, of_growth)
        question = "What does it cost to thaw group after group?"
        name = "groups_unfreezing"
        report_arms(args, name, title, found, of_growth, question, more, one)
    if "growth" in args.only:
        params = mlps_of(make_params(max(counts), width))
        ours, theirs = {BASE: adamw(), AGAIN: adamw()}, {BASE: adamw()}
        for n in counts:
            labels = in_groups(params, n)
            ours[f"adamw, {n}"] = groups(labels)["adamw"]
            theirs[f"partition, {n}"] = partitioned_adamw(labels)
        theirs = measure(theirs, params, slow_growth)
        report_arms(
            args,
            "groups_growth",
            f"Growth with the groups: {len(jax.tree.leaves(params))} leaves",
            theirs | measure(ours, params, of_growth),
            of_growth,
            f"Does the cost grow from 1 to {counts[-1]} groups?",
            [f"adamw, {counts[-1]}"],
            base=f"adamw, {counts[0]}",
        )
    if "range_test" in args.only:
        report_range_test(args, num_steps, rounds)


if __name__ == "__main__":
    main()
