"""How near does one cycle without dials come to the best of a grid, and at what cost?

On the tasks of ``suite``, AdamW on all and SGD on ten, everything from the first three
seeds of the grid that ``peaks_and_probes`` stored. The reference is that grid of 21
peaks, and 5 around its best at another weight decay: the best by the mean of two seeds,
judged by the third, in turn. An arm's regret is its held-out loss over the reference's,
both means over the seeds; a run that ends worse than it began, or not at all, counts as
untrained. A second figure is the share of the reference's fall that is lost. On the
Poisson equation the pick by two seeds is several times worse than the grid's best, and
many arms are ahead of it; so means are also told without that task.

All arms train for as many steps as the grid did, those of their probes included, unless
a row says "on top". The constants of ``auto_onecycle`` were chosen on one half of the
tasks (that none forgets within 400 steps also on those of ``examples/05_no_dials``);
the other half reports. Its decay is not among the grid's, so a last row tells how much
better the reference would be with 5 more peaks at that.

- ``auto_onecycle`` at budgets 0, 0.05, 0.25, 0.5, and 0.5 on top; with AdamW also
  what it takes with the grid's decay, and at a third of its peak (so thrice the decay),
  to see what does it; where a budget is too small for probes, that is 0;
- one cycle at what a range test of 200 steps (a quarter of the run at most) suggests,
  and at one peak for all;
- a schedule refined by the gradient norms of a first run (Defazio et al., 2023), which
  is on top, as the probes are, at the peak of ``auto_onecycle`` at a budget of 0.25;
- AdamW at 1e-3 and 1e-2, warm-up of 5 % and a cosine; NadamW as submitted to
  AlgoPerf; and from Optax: Prodigy with a cosine, DoG with averaging, MoMo-Adam,
  Schedule-Free AdamW.

    python benchmarks/no_dials.py [--smoke] [--data CIFAR10] [--out FOLDER]

About half an hour on two cores with CIFAR-10, of which two tasks are made; what an
interruption leaves is not run again.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import harness
import jax.numpy as jnp
import numpy as np
import optax
import rules
import suite
import tasks
from optax import contrib
from peaks_and_probes import REPORTING, TUNING
from scipy import stats

import optax_superconv as osc
from optax_superconv.finders import _auto_probes

OPTIMIZERS = ("adamw", "sgd")
PEAKS: Mapping[str, float] = {**_auto_probes.USUAL}  # Of all tasks that choose, as one.
DECAYS = {"adamw": 0.01, "sgd": 0.0}  # of the stored grid
OTHER_DECAYS = {"adamw": 0.1, "sgd": 5e-4}
OURS, DEFAULT = "auto_onecycle", "auto_onecycle, 0.25"
FACTS = ("others", "cost", "lost", "rank")  # in columns, beside the regret
OUTLIER = "poisson"  # not among the others
GRID_RUNS = 2 * (21 + 5)


@dataclasses.dataclass(frozen=True, eq=False)  # Hashable: trainings are cached.
class Cell:
    """A task with an optimizer, and what is known of it."""

    task: tasks.Task
    optimizer: str
    stored: rules.Cell
    seeds: tuple[int, ...]


# --- training -------------------------------------------------------------------------

Dials = np.ndarray  # (3, steps): rate, momentum, weight decay


def one_cycle(peak: float, num_steps: int, decay: float) -> Dials:
    count = np.arange(num_steps)
    cycle = [np.asarray(path(count)) for path in osc.onecycle(peak, num_steps)]
    return np.stack([*cycle, np.full(num_steps, decay)])


@functools.cache
def training_of(cell: Cell) -> tasks.Training:
    return tasks.Training(
        cell.task, functools.partial(tasks.with_dials, cell.optimizer)
    )


def finish(
    cell: Cell, training: tasks.Training, dials: Any, seed: int, evaluate: Any = None
) -> tuple[float, Any]:
    """The held-out loss after a run, or before it, if that is lower; and its state."""
    params, other = training.network.start(seed)
    state = start = params, other, training.make_tx(dials).init(params)
    indices = tasks.batch_indices(cell.task, cell.task.num_steps, seed)
    state, _ = training.run(state, dials, indices, seed)
    params = evaluate(state[2], state[0]) if evaluate else state[0]
    loss = training.held_out_loss((params, *state[1:]))
    return float(jnp.fmin(loss, training.held_out_loss(start))), state


def run(cell: Cell, dials: Dials, seed: int) -> float:
    """What SGD or AdamW reach; the state stands still once the dials end."""
    missing = cell.task.num_steps - dials.shape[1]
    padded = jnp.asarray(np.pad(dials, ((0, 0), (0, missing))), jnp.float32)
    return finish(cell, training_of(cell), padded, seed)[0]


# --- arms -----------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Of one seed."""

    loss: float
    steps: int = 0  # of probes
    peak: float = np.nan
    decay: float = np.nan
    said: str = ""  # an error


@functools.cache
def probe_training(cell: Cell) -> tasks.Training:
    tx = {"adamw": osc.adamw(1e-3), "sgd": osc.sgd(0.1, weight_decay=1e-4)}
    return tasks.Training(cell.task, lambda _: tx[cell.optimizer])


def probing(cell: Cell, seed: int, count: int) -> tuple[Any, Any, Any]:
    """Step, start and batches, in an order of their own."""
    training = probe_training(cell)
    batches = training.batches(1000 + seed, count)
    start = training.start(seed)
    return lambda state, batch: training.step(state, 1.0, batch), start, batches


def auto(
    cell: Cell,
    seed: int,
    budget: float,
    on_top: bool = False,
    decay: float | None = None,
    factor: float = 1.0,
) -> Outcome:
    """The run takes what the probes leave; an error is a run that was not made.

    Peak x decay x steps stays as it was found. Peak and decay may be others, to see
    what each does.
    """
    steps = cell.task.num_steps
    length = steps if on_top else int(steps / (1 + budget))
    if int(budget * length) < _auto_probes.LEAST_RANGE_STEPS:
        budget = 0.0  # As the error advises that it would raise.
    probe = probing(cell, seed, max(1, int(budget * length)))
    try:
        found = osc.auto_onecycle(*probe, length, budget=budget)
    except ValueError as error:
        untrained = float(cell.stored.untrained.mean())
        return Outcome(untrained, int(budget * length), said=str(error))
    left = steps if on_top else steps - found.steps_used
    peak = factor * found.hyperparams["peak_learning_rate"]
    if decay is None:
        decay = found.hyperparams["weight_decay"] * length / (factor * left)
    loss = run(cell, one_cycle(peak, left, decay), seed)
    return Outcome(loss, found.steps_used, peak, decay)


def range_test(cell: Cell, seed: int) -> Outcome:
    """Of 200 steps, or of a quarter of the run; the usual peak if it suggests none."""
    num_steps = min(200, cell.task.num_steps // 4)
    step_fn, start, batches = probing(cell, seed, num_steps)
    test = osc.range_test(step_fn, start, batches, num_steps=num_steps)
    peak = rules.read_or_nan(osc.suggest_learning_rate, test)
    peak = peak if np.isfinite(peak) else PEAKS[cell.optimizer]
    decay, used = DECAYS[cell.optimizer], len(test.losses)
    left = cell.task.num_steps - used
    return Outcome(run(cell, one_cycle(peak, left, decay), seed), used, peak, decay)


def one_peak(cell: Cell, seed: int) -> Outcome:
    peak, decay = PEAKS[cell.optimizer], DECAYS[cell.optimizer]
    return Outcome(run(cell, one_cycle(peak, cell.task.num_steps, decay), seed))


def refined(cell: Cell, seed: int) -> Outcome:
    """One cycle, whose norms shape the rate of a second run; its momentum stays."""
    steps, adam = cell.task.num_steps, cell.optimizer == "adamw"
    first = auto(cell, seed, 0.25, on_top=True)
    if first.said:
        return first
    dials = one_cycle(first.peak, steps, first.decay)
    record = osc.record_gradient_norms(steps, ord=1 if adam else 2)
    training = tasks.Training(
        cell.task,
        lambda dials: optax.chain(record, tasks.with_dials(cell.optimizer, dials)),
    )
    _, state = finish(cell, training, jnp.asarray(dials, jnp.float32), seed)
    norms = np.asarray(optax.tree.get(state[2], "gradient_norms"))
    if not np.all(np.isfinite(norms) & (norms > 0)):  # The first run diverged.
        return first._replace(steps=first.steps + steps)
    kind: Any = "adam" if adam else "sgd"
    schedule = osc.refined_schedule(norms, first.peak, steps, optimizer=kind)
    count = np.arange(steps)
    warmup = np.minimum(1.0, (count + 1) / (0.1 * steps))
    rate = np.asarray(schedule(count)) * warmup
    loss = run(cell, np.stack([rate, *dials[1:]]), seed)
    return Outcome(loss, first.steps + steps, first.peak, first.decay)


def adamw(steps: int, peak: float) -> Any:
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 20, steps)
    return osc.adamw(rate, b2=0.999)


def nadamw(steps: int) -> Any:
    """The submission to AlgoPerf's self-tuning track (Kasimbeg et al., 2025)."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.0019083, steps // 10, steps)
    return osc.adamw(
        rate, 0.909093, 0.998898, weight_decay=0.081216, mask=None, nesterov=True
    )


def prodigy(steps: int) -> Any:
    return contrib.prodigy(optax.cosine_decay_schedule(1.0, steps))


def dog(steps: int) -> Any:
    """The paper averages with weights that grow as the power 8 of the step."""
    return optax.chain(contrib.dog(), osc.average_params(power=8.0))


def momo_adam(steps: int) -> Any:
    return contrib.momo_adam()


def schedule_free(steps: int) -> Any:
    """The submission to AlgoPerf's self-tuning track, version 2."""
    return contrib.schedule_free_adamw(
        0.0025,
        warmup_steps=max(1, round(0.02 * 0.75 * steps)),
        b1=0.9,
        b2=0.995516,
        weight_decay=0.0812,
    )


def peer(cell: Cell, seed: int, make_tx: Callable[[int], Any]) -> Outcome:
    training = peer_training(cell, make_tx)
    return Outcome(finish(cell, training, 1.0, seed, EVALUATE.get(make_tx))[0])


@functools.cache
def peer_training(cell: Cell, make_tx: Callable[[int], Any]) -> tasks.Training:
    return tasks.Training(cell.task, lambda _: make_tx(cell.task.num_steps))


# Where the weights to evaluate are others.
EVALUATE: dict[Any, Callable[..., Any]] = {
    dog: osc.eval_params,
    schedule_free: contrib.schedule_free_eval_params,
}
Arm = Callable[[Cell, int], Outcome]
ARMS: dict[str, Arm] = {
    f"{OURS}, 0": functools.partial(auto, budget=0.0),
    f"{OURS}, 0.05": functools.partial(auto, budget=0.05),
    DEFAULT: functools.partial(auto, budget=0.25),
    f"{OURS}, 0.5": functools.partial(auto, budget=0.5),
    f"{OURS}, 0.5 on top": functools.partial(auto, budget=0.5, on_top=True),
    "refined, on top": refined,
    "range test, one cycle": range_test,
    "one peak for all, one cycle": one_peak,
}
PARTS: dict[str, Arm] = {
    f"{OURS}, 0.25, decay 0.01": functools.partial(auto, budget=0.25, decay=0.01),
    f"{OURS}, 0.25, third of peak": functools.partial(auto, budget=0.25, factor=1 / 3),
}
PEERS: dict[str, Arm] = {
    name: functools.partial(peer, make_tx=make_tx)
    for name, make_tx in {
        "AdamW 1e-3, cosine": functools.partial(adamw, peak=1e-3),
        "AdamW 1e-2, cosine": functools.partial(adamw, peak=1e-2),
        "NadamW, AlgoPerf": nadamw,
        "Prodigy, cosine": prodigy,
        "DoG, averaged": dog,
        "MoMo-Adam": momo_adam,
        "Schedule-Free AdamW": schedule_free,
    }.items()
}


def arms_of(optimizer: str) -> dict[str, Arm]:
    return ARMS | PARTS | PEERS if optimizer == "adamw" else ARMS


# --- the grid -------------------------------------------------------------------------


def peaks_around(cell: Cell, factor: float = 1.0) -> np.ndarray:
    """Five, a quarter of a decade apart, around the best by the mean of the seeds."""
    stored = cell.stored
    best = stored.losses[:, : len(cell.seeds)].mean(axis=1).argmin()
    best = int(np.clip(best, 2, len(stored.peaks) - 3))
    return factor * stored.peaks[best - 2 : best + 3]


def with_decays(cell: Cell, peaks: Any, decays: Any) -> list[list[float]]:
    """(peaks, seeds) held-out losses."""
    steps = cell.task.num_steps
    return [
        [run(cell, one_cycle(peak, steps, decay), seed) for seed in cell.seeds]
        for peak, decay in zip(peaks, decays, strict=True)
    ]


def other_decay(cell: Cell) -> list[list[float]]:
    return with_decays(cell, peaks_around(cell), [OTHER_DECAYS[cell.optimizer]] * 5)


def own_decay(cell: Cell) -> list[list[float]]:
    """At the decays of ``auto_onecycle``, which go best with higher peaks."""
    kind: Any = cell.optimizer
    peaks = peaks_around(cell, 10**0.5 if kind == "adamw" else 1.0)
    steps, kappas = cell.task.num_steps, _auto_probes.KAPPAS
    return with_decays(cell, peaks, _auto_probes.decay_for(peaks, steps, kind, kappas))


GRIDS = {"other decay": other_decay, "own decay": own_decay}


def judged(losses: np.ndarray) -> np.ndarray:
    """(seeds,) what the best of (recipes, seeds) by the mean of the others reaches."""
    seeds = range(losses.shape[1])
    if len(seeds) == 1:
        return losses.min(axis=0)
    picked = [np.delete(losses, k, axis=1).mean(axis=1).argmin() for k in seeds]
    return losses[picked, seeds]


# --- what comes out -------------------------------------------------------------------


class Score(NamedTuple):
    """Of an arm on a task."""

    regret: float
    lost: float  # % of the reference's fall
    cost: float  # of the probes, in runs


def score(cell: Cell, reference: np.ndarray, outcomes: Any) -> Score:
    """``outcomes``: those of each seed."""
    losses = np.array([outcome[0] for outcome in outcomes], float)
    fall = cell.stored.untrained[: len(losses)].mean() - reference.mean()
    lost = 100 * (losses.mean() - reference.mean()) / fall
    cost = np.mean([outcome[1] for outcome in outcomes]) / cell.task.num_steps
    return Score(float(losses.mean() / reference.mean()), float(lost), float(cost))


def show(values: Any) -> str:
    """``geometric mean, median, worst``."""
    found = [rules.geometric_mean(values), np.median(values), max(values)]
    return ", ".join(f"{x:.2f}" if x < 99.5 else f"{x:.3g}" for x in found)


def mean_of_others(scores: Mapping[Any, Score], keys: Any) -> str:
    kept = [key for key in keys if key in scores and key[0] != OUTLIER]
    return f"{rules.geometric_mean([scores[key].regret for key in kept]):.2f}"


def mean_ranks(
    scores: Mapping[str, Mapping[Any, Score]], keys: Any
) -> dict[str, float]:
    """Among the default and the arms that are not ours."""
    names = [n for n in scores if n == DEFAULT or not n.startswith((OURS, "refined"))]
    names = [n for n in names if all(key in scores[n] for key in keys)]
    table = np.array([[scores[n][key].regret for key in keys] for n in names])
    ranks = stats.rankdata(table, axis=0).mean(axis=1)
    return dict(zip(names, ranks.tolist(), strict=True))


def draw(rows: Mapping[str, Mapping[str, list[Score]]], path) -> None:
    """Regret over cost, of the tasks that report."""
    with harness.figure(path, [list(OPTIMIZERS)], (10, 4.5)) as (_, axes):
        for optimizer, ax in axes.items():
            for k, (name, by_part) in enumerate(rows.items()):
                found = by_part.get(f"{optimizer}: report")
                if not found:
                    continue
                regret = rules.geometric_mean([s.regret for s in found])
                cost = float(np.mean([s.cost for s in found]))
                marker = "o" if name.startswith(OURS) else "s"
                ax.plot(cost, regret, marker, color=f"C{k % 10}", label=name)
            ax.plot(GRID_RUNS, 1.0, "k*", markersize=10, label="the grid")
            ax.set_xscale("symlog", linthresh=0.1)
            ax.set_yscale("log", subs=[])
            ax.set_yticks(ticks := [1.0, 1.5, 2.0, 3.0], [f"{y:g}" for y in ticks])
            ax.set(
                title=f"{optimizer}, tasks that report",
                xlabel="cost of the probes, in runs",
                ylabel="loss over the grid's, geometric mean",
            )
        shown = axes["adamw"].get_legend_handles_labels()
        axes["sgd"].legend(*shown, fontsize=7, loc="upper right")  # It has room.


def main() -> None:
    args = harness.parse_args(__doc__, takes_data=True)
    members = suite.members(with_cifar10=args.data is not None)
    count, arms = 3, {o: arms_of(o) for o in OPTIMIZERS}
    if args.smoke:
        members, count = {("noisy_cancer", "adamw"): True}, 1
        few = (DEFAULT, "Prodigy, cosine")
        arms["adamw"] = {name: arms["adamw"][name] for name in few}
    # The first seeds of the stored grid.
    firsts = {key: TUNING if chooses else REPORTING for key, chooses in members.items()}
    stored = {(c.task, c.optimizer): c for c in rules.load(harness.RESULTS)}
    cells = {
        key: Cell(
            suite.task_of(key[0], args.data),
            key[1],
            stored[key],
            tuple(range(first, first + count)),
        )
        for key, first in firsts.items()
    }

    def compute(name: str, optimizer: str, arm: str) -> Any:
        cell = cells[name, optimizer]
        if arm in GRIDS:
            return GRIDS[arm](cell)
        return [[*arms[optimizer][arm](cell, seed)] for seed in cell.seeds]

    todo = [(*key, arm) for key in cells for arm in [*GRIDS, *arms[key[1]]]]
    found = harness.sweep(compute, todo, args.parts)

    references, hindsight, larger = {}, {}, {}
    for key, cell in cells.items():
        added = [np.array(found[*key, name], float) for name in GRIDS]
        grid = np.concatenate([cell.stored.losses[:, :count], added[0]])
        references[key] = judged(grid)
        mean = references[key].mean()
        hindsight[key] = grid.mean(axis=1).min() / mean
        larger[key] = judged(np.concatenate([grid, added[1]])).mean() / mean
    names = dict.fromkeys(arm for _, optimizer in cells for arm in arms[optimizer])
    scores = {
        name: {
            key: score(cell, references[key], found[*key, name])
            for key, cell in cells.items()
            if name in arms[key[1]]
        }
        for name in names
    }
    halves = {True: "chose", False: "report"}
    parts: dict[str, list[Any]] = {}
    for key, chooses in members.items():
        parts.setdefault(f"{key[1]}: {halves[chooses]}", []).append(key)
    by_part = {
        name: {
            part: [scores[name][key] for key in keys if key in scores[name]]
            for part, keys in parts.items()
        }
        for name in names
    }
    ranks = {part: mean_ranks(scores, keys) for part, keys in parts.items()}
    rows = []
    for name, of in by_part.items():
        failed = [o for k in scores[name] for o in found[*k, name] if o[4] and not o[2]]
        row: dict[str, Any] = {"arm": name, "errors": len(failed)}
        for part, each in of.items():
            row |= dict.fromkeys([part, *(f"{part}, {x}" for x in FACTS)], "")
            if each:
                lost = [s.lost for s in each]
                row[part] = show([s.regret for s in each])
                row[f"{part}, others"] = mean_of_others(scores[name], parts[part])
                row[f"{part}, cost"] = f"{np.mean([s.cost for s in each]):.2f}"
                row[f"{part}, lost"] = f"{np.median(lost):.1f}, {max(lost):.0f}"
            if name in ranks[part]:
                row[f"{part}, rank"] = f"{ranks[part][name]:.1f}"
        rows.append(row)
    for name, regrets, cost in (
        ("the grid in hindsight", hindsight, GRID_RUNS),
        ("the grid, own decay too", larger, GRID_RUNS + 10),
    ):
        row = dict.fromkeys(rows[0], "") | {"arm": name}
        for part, keys in parts.items():
            row[part] = show([regrets[key] for key in keys])
            row[f"{part}, cost"] = str(cost)
        rows.append(row)
    evidence = {
        "profiles": {
            name: {part: sorted(s.regret for s in each) for part, each in of.items()}
            for name, of in by_part.items()
        },
        "outcomes": {", ".join(key): value for key, value in found.items()},
        "references": {", ".join(key): value for key, value in references.items()},
        "larger": {", ".join(key): value for key, value in larger.items()},
        "regrets": {
            name: {", ".join(key): s._asdict() for key, s in of.items()}
            for name, of in scores.items()
        },
    }
    default = next(row for row in rows if row["arm"] == DEFAULT)
    harness.report(
        args,
        "no_dials",
        f"Held-out loss over that of the best of a grid (n={count}): geometric mean, "
        f"median, worst task; the mean without {OUTLIER}; cost of the probes in runs; "
        "median and worst % of its fall that is lost; mean rank among the default and "
        "what is not ours",
        rows,
        evidence,
        "How near does one cycle without dials come to the best of a grid?",
        f"{DEFAULT} / a grid of 21 peaks, and 5 at another weight decay",
        "as `peaks_and_probes`, probes included",
        "; ".join(f"{part} {default[part]}" for part in parts),
        "; ".join(f"{part} {default[f'{part}, cost']}" for part in parts)
        + f" of a run, where the grid takes {GRID_RUNS}",
    )
    draw(by_part, harness.evidence_file(args.out, "no_dials.png"))


if __name__ == "__main__":
    main()
