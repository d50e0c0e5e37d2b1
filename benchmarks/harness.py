"""How are numbers measured, compared, shown and kept? Shared by all benchmarks.

What is trained stands in ``tasks``, ``suite``, ``networks`` and ``data``; ``documents``
writes what is quoted.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import hashlib
import itertools
import json
import math
import os
import pathlib
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

import optax_superconv

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


# --- what is run ----------------------------------------------------------------------


def parse_args(
    claim: str | None, *, takes_data: bool = False, tables: Sequence[str] = ()
) -> argparse.Namespace:
    """The arguments of every benchmark, whose docstring is the description.

    Adds ``command``, which goes into the evidence, and ``parts``, the folder for what
    an interruption leaves. A smoke run compiles faster and runs slower.
    """
    parser = argparse.ArgumentParser(
        description=claim, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="at most 10 s, no claim")
    what = "folder for the evidence (%(default)s; benchmarks/results has the README's)"
    out = ROOT / "out" / "benchmarks"
    parser.add_argument("--out", type=pathlib.Path, default=out, help=what)
    if takes_data:
        what = "CIFAR-10: an .npz of JPEGs or the archive"
        parser.add_argument("--data", type=pathlib.Path, help=what)
    if tables:
        options: Any = {"nargs": "+", "choices": tables, "default": tables}
        parser.add_argument("--only", **options, help="these tables (all)")
    args = parser.parse_args()
    with_data = takes_data and args.data is not None
    kind = "smoke" if args.smoke else "cifar10" if with_data else "full"
    script = pathlib.Path(sys.argv[0])
    args.parts = args.out / "parts" / script.stem / kind
    args.command = f"python benchmarks/{script.name}" + " --data CIFAR10" * with_data
    kept = [path.read_text() for path in args.out.glob("*.json")]
    claims = [json.loads(text).get("claim", {}) for text in kept]
    if args.smoke and args.out.resolve() == RESULTS:
        parser.error("--smoke runs are no evidence: give another --out")
    made = [claim.get("command", "") for claim in claims]
    if takes_data and any(c.startswith(f"{args.command} --data CIFAR10") for c in made):
        parser.error(f"{args.out} holds evidence made with --data: give it, or --out")
    if tables and list(args.only) != list(tables):
        args.command += f" --only {' '.join(args.only)}"
    if args.smoke:
        jax.config.update("jax_disable_most_optimizations", True)
    return args


def in_threads(function, items: Iterable[Any], workers: int | None = None) -> list[Any]:
    """``function`` of each item, as many at a time as there are cores.

    Small programs use one core each, and run without Python's lock.
    """
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(function, items))


def sweep(run, members: Iterable[tuple[Any, ...]], parts, workers=None) -> dict:
    """What ``run(*member)`` gives, by member.

    What is done is kept in ``parts`` (see ``resumable``); a bar shows what remains.
    """
    members = list(members)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True)) as bar:
        task = bar.add_task("", total=len(members))

        def run_one(member) -> Any:
            words = [*map(str, jax.tree.leaves(member))]
            bar.update(task, description=", ".join(words))
            path = parts / f"{'-'.join(words).replace(' ', '_')}.json"
            value = resumable(path, lambda: run(*member))
            bar.advance(task)
            return value

        return dict(zip(members, in_threads(run_one, members, workers), strict=True))


def tune(run, arms, rates, seeds, parts) -> tuple[dict[Any, float], dict[Any, Any]]:
    """The rate of each arm with the highest mean over the seeds: the rule for all.

    ``run(arm, rate, seed)`` gives an accuracy and what else is kept; the second result
    is (rates, seeds, ...) of each arm.
    """
    # Neighbours, which run together, are of different arms.
    members = [(arm, *pair) for *pair, arm in itertools.product(rates, seeds, arms)]
    done = sweep(run, members, parts / "tuning")
    grids = {
        arm: np.array([[done[arm, r, s] for s in seeds] for r in rates], float)
        for arm in arms
    }
    best = {arm: int(grid[..., 0].mean(1).argmax()) for arm, grid in grids.items()}
    return {arm: rates[k] for arm, k in best.items()}, grids


def resumable(path: pathlib.Path, compute: Callable[[], Any]) -> Any:
    """What ``compute`` gives, kept at ``path``; not computed again by the same source.

    Numbers that are not finite come back as None, as JSON has it.
    """
    source = source_hash()
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["source"] == source:
            return kept["value"]
    value = to_json(compute())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")  # An interruption leaves nothing half done.
    partial.write_text(json.dumps({"source": source, "value": value}))
    partial.replace(path)
    return value


def source_hash() -> str:
    """Of the modules of the package and the benchmarks that this program imports."""
    digest = hashlib.sha256(jax.__version__.encode())
    ours = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    for name in sorted([*sys.modules]):
        file = getattr(sys.modules[name], "__file__", None)
        if file and name.split(".")[0] in ours | {"__main__", "optax_superconv"}:
            digest.update(name.encode() + pathlib.Path(file).read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict[str, Any]:
    """What a figure depends on."""
    commit = ""
    if shutil.which("git"):  # Not on every machine that has a GPU.
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "source": source_hash(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "optax_superconv": optax_superconv.__version__,
    }


def to_json(value) -> Any:
    """Arrays as lists, and what is not finite as None."""
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | jax.Array | np.generic):
        return to_json(np.asarray(value).tolist())
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def interleave(arms: Mapping[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round, in an order drawn anew for each round.

    A first round of every arm warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    shuffle = random.Random(0)
    for round_number in range(-1, rounds):
        for name in shuffle.sample(list(arms), len(arms)):
            begin = time.perf_counter()
            jax.block_until_ready(arms[name]())
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


# --- statistics -----------------------------------------------------------------------


def quartiles(values: Any) -> np.ndarray:
    """Lower, median, upper, of what is finite."""
    return np.nanpercentile(np.asarray(values, np.float64), [25, 50, 75])


def median_and_quartiles(values: Any, digits: int = 2) -> str:
    """``median (lower to upper)``."""
    low, median, high = (f"{value:.{digits}f}" for value in quartiles(values))
    return f"{median} ({low} to {high})"


def mean_and_std(*samples, digits: int = 2) -> str:
    """``mean ± standard deviation (n=...)`` of each sample."""

    def show(values) -> str:
        array = np.asarray(values, np.float64)
        std = array.std(ddof=1) if array.size > 1 else 0.0
        return f"{array.mean():.{digits}f} ± {std:.{digits}f} (n={array.size})"

    return ", ".join(map(show, samples))


class Difference(NamedTuple):
    """Of pairs, one of each seed: mean, its standard error, how many above and below 0.

    Shown as ``mean ± error (n=..., won:lost)``.
    """

    mean: float
    error: float
    won: int
    lost: int
    n: int

    def short(self, digits: int = 2) -> str:
        return f"{self.mean:+.{digits}f} ± {self.error:.{digits}f}"

    def __str__(self) -> str:
        return f"{self.short()} (n={self.n}, {self.won}:{self.lost})"


def paired(ours: Any, theirs: Any = 0.0) -> Difference:
    """Ours less theirs, seed by seed."""
    apart = np.subtract(ours, theirs)
    n, won, lost = len(apart), int((apart > 0).sum()), int((apart < 0).sum())
    error = apart.std(ddof=1) / math.sqrt(n) if n > 1 else np.nan
    return Difference(float(apart.mean()), float(error), won, lost, n)


def show_rate(rate: float, rates: Sequence[float]) -> str:
    """A rate that was chosen of a grid, and whether a larger grid may have a better."""
    return f"{rate:g}" + " (edge)" * (rate in (rates[0], rates[-1]))


# --- what comes out -------------------------------------------------------------------


@contextlib.contextmanager
def figure(path, layout, size) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A picture and its axes by name, all in one style; written when it is done."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 9}
    with matplotlib.rc_context(style | {"errorbar.capsize": 2}):
        picture = Figure(figsize=size, dpi=150, layout="constrained")
        yield picture, picture.subplot_mosaic(layout)
        picture.savefig(path)


def curve(axes, x, samples: Iterable[Any], style: str, label: str) -> None:
    """Mean and standard error of each sample."""
    found = [paired(sample) for sample in samples]
    means, errors = [d.mean for d in found], [d.error for d in found]
    axes.errorbar(x, means, errors, fmt=style, markersize=5, label=label)


COLUMNS = ["question", "arms", "steps", "result", "cost"]  # of a claim
COLUMNS += ["device", "commit", "command"]


def evidence_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Where evidence is kept; what another backend than the CPU gave has its name."""
    folder.mkdir(parents=True, exist_ok=True)
    backend, file = jax.default_backend(), pathlib.Path(name)
    return folder / (file.stem + f"_{backend}" * (backend != "cpu") + file.suffix)


def report(args, name, title, rows, evidence, *claim: str) -> None:
    """Prints the rows as a table, and stores them with evidence and environment.

    The file of another backend than the CPU is named after it: ``<name>_gpu.json``.
    ``claim`` is a row of ``benchmarks/README.md`` up to its device: question, arms,
    steps, result, cost.
    """
    console = Console(width=150)
    where = environment()
    table = Table(title=title, caption=", ".join(f"{k} {v}" for k, v in where.items()))
    for column in rows[0]:
        left = column in ("arm", "task", "rule")
        table.add_column(column, justify="left" if left else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    claims = dict(zip(COLUMNS[:5], claim, strict=True)) | {"command": args.command}
    record = {
        "title": title,
        "claim": claims,
        "environment": where,
        "rows": rows,
        "evidence": to_json(evidence),
    }
    path = evidence_file(args.out, f"{name}.json")
    path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"evidence: {os.path.relpath(path)}")
