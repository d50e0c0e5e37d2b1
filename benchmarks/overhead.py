"""The dials are free: one-cycle costs what ``optax.adamw`` with a constant rate costs.

On a tree of 576 leaves, a step of ``onecycle_adamw``, or of ``late_decay_adamw`` with
its trigger, takes at most 1.10 times that of ``optax.adamw`` and its state is at most
4 KiB larger; ``inject_hyperparams`` with the same schedules is there for comparison. An
average is not free: it reads and writes a copy of the parameters. A range test of 100
steps takes at most 1.05 times the same 100 jitted steps run bare.

    python benchmarks/overhead.py [--smoke] [--out FOLDER]

All arms are interleaved in one process, in random order; a ratio is the median over
rounds of the ratio within a round, with quartiles. The arm that repeats another shows
how far from 1 noise alone takes a ratio.
"""

# Its arms take whatever the others take.
# pyright: reportMissingParameterType=false

import functools
import itertools
import statistics

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_superconv as osc

TOTAL_STEPS = 1000
PEAK = 1e-3


def make_params(blocks: int, width: int) -> dict:
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


def matrices_only(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def make_optimizers() -> dict[str, optax.GradientTransformation]:
    """Three that decay the same leaves by the same amount."""
    adamw = functools.partial(
        optax.adamw, b2=0.99, weight_decay=1e-2, mask=matrices_only
    )
    injected = optax.inject_hyperparams(optax.adamw, static_args=("mask",))
    return {
        "optax.adamw": adamw(PEAK, b1=0.9),
        "optax.adamw again": adamw(PEAK, b1=0.9),
        "inject_hyperparams(optax.adamw)": injected(
            osc.onecycle_schedule(PEAK, TOTAL_STEPS),
            b1=osc.onecycle_momentum_schedule(TOTAL_STEPS),
            b2=0.99,
            weight_decay=1e-2,
            mask=matrices_only,
        ),
        "onecycle_adamw": osc.onecycle_adamw(PEAK, TOTAL_STEPS),
        "late_decay_adamw, open-ended": osc.late_decay_adamw(PEAK, None),
        "late_decay_adamw, EMA": osc.late_decay_adamw(
            PEAK, None, average=osc.ema_params(0.999)
        ),
        "late_decay_adamw, LAWA of 3": osc.late_decay_adamw(
            PEAK, None, average=osc.lawa_params(3, every=10)
        ),
    }


def update_arm(tx, params, steps):
    """Runs ``steps`` jitted updates on from where it stopped, all buffers donated."""
    grads = jax.tree.map(lambda p: 0.1 * p + 0.01, params)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    carry = jax.tree.map(jnp.copy, params), tx.init(params)

    def run():
        nonlocal carry
        for _ in range(steps):
            carry = update(carry, grads)
        return carry

    return run


def compile_arm(tx, params):
    """Traces and compiles one update afresh."""

    def run():
        state = jax.eval_shape(tx.init, params)
        jax.clear_caches()
        jax.jit(tx.update).lower(params, state, params).compile()
        return ()

    return run


def state_bytes(tx, params):
    state = jax.eval_shape(tx.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def range_test_arms(num_steps):
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

    def loss_fn(params, batch):
        inputs, labels = batch
        logits = jax.nn.relu(inputs @ params[0]) @ params[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step_fn(params, learning_rate, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads), loss

    def bare():
        state, losses = params, []
        rates = np.geomspace(low, high, num_steps, dtype=np.float32)
        for rate in jax.device_put(list(rates)):
            state, loss = step_fn(state, rate, batch)
            losses.append(loss)
        return losses

    def tested():
        result = osc.range_test(
            step_fn,
            params,
            [batch],
            min_value=low,
            max_value=high,
            num_steps=num_steps,
        )
        assert len(result.losses) == num_steps
        return ()

    return {"bare": bare, "bare again": bare, "range_test": tested}


def main() -> None:
    args = harness.parse_args(__doc__)
    blocks, width, steps, rounds, compiles, num_steps = (
        (4, 8, 2, 2, 1, 20) if args.smoke else (48, 64, 10, 100, 5, 100)
    )
    params = make_params(blocks, width)
    optimizers = make_optimizers()
    if args.smoke:
        for name in ("optax.adamw again", "late_decay_adamw, LAWA of 3"):
            del optimizers[name]
        jax.config.update("jax_disable_most_optimizations", True)  # Compiles faster.
    arms = {name: update_arm(tx, params, steps) for name, tx in optimizers.items()}
    seconds = harness.interleave(arms, rounds)
    compile_arms = {name: compile_arm(tx, params) for name, tx in optimizers.items()}
    compile_seconds = harness.interleave(compile_arms, compiles)
    extra_bytes = {name: state_bytes(tx, params) for name, tx in optimizers.items()}
    extra_bytes = {k: v - extra_bytes["optax.adamw"] for k, v in extra_bytes.items()}
    ratios = harness.ratios(seconds, "optax.adamw")
    compile_ratios = harness.ratios(compile_seconds, "optax.adamw")
    rows = [
        {
            "arm": name,
            "step (ms)": f"{statistics.median(seconds[name]) / steps * 1e3:.2f}",
            "step ratio": harness.show(ratios[name]),
            "compile (s)": f"{statistics.median(compile_seconds[name]):.2f}",
            "compile ratio": harness.show(compile_ratios[name]),
            "state": f"{extra_bytes[name]:+d} bytes",
        }
        for name in optimizers
    ]
    leaves = len(jax.tree.leaves(params))
    harness.report(
        "overhead_step",
        f"The dials against optax.adamw: {leaves} leaves of width {width}, {rounds} "
        f"rounds of {steps} steps",
        rows,
        {
            "ratios": ratios,
            "compile_ratios": compile_ratios,
            "extra_bytes": extra_bytes,
            "seconds": seconds,
            "compile_seconds": compile_seconds,
        },
        args.out,
        {
            "question": "Do the dials cost anything?",
            "arms": "onecycle_adamw, late_decay_adamw, the same with an EMA, "
            "inject_hyperparams(adamw) / adamw",
            "steps": f"{steps} x {rounds}",
            "mean ± std (n)": ", ".join(
                harness.mean_and_std(np.divide(seconds[name], seconds["optax.adamw"]))
                for name in (
                    "onecycle_adamw",
                    "late_decay_adamw, open-ended",
                    "late_decay_adamw, EMA",
                    "inject_hyperparams(optax.adamw)",
                )
            )
            + " of a step",
            "cost": f"{extra_bytes['onecycle_adamw']:+d} bytes of state",
            "command": "python benchmarks/overhead.py",
        },
    )

    rounds = max(2, rounds // 2)
    seconds = harness.interleave(range_test_arms(num_steps), rounds)
    ratios = harness.ratios(seconds, "bare")
    rows = [
        {
            "arm": name,
            f"{num_steps} steps (ms)": f"{statistics.median(seconds[name]) * 1e3:.1f}",
            "ratio": harness.show(ratios[name]),
        }
        for name in seconds
    ]
    harness.report(
        "overhead_range_test",
        f"Range test against the same {num_steps} steps run bare, {rounds} rounds",
        rows,
        {"ratios": ratios, "seconds": seconds},
        args.out,
        {
            "question": "Does a range test wait for the device?",
            "arms": "range_test / the same steps run bare",
            "steps": f"{num_steps} x {rounds}",
            "mean ± std (n)": harness.mean_and_std(
                np.divide(seconds["range_test"], seconds["bare"])
            )
            + " of the bare steps",
            "cost": f"{statistics.median(seconds['range_test']) * 1e3:.0f} ms",
            "command": "python benchmarks/overhead.py",
        },
    )


if __name__ == "__main__":
    main()
