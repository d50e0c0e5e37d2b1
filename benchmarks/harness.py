"""How are numbers measured, shown and kept? Shared by all benchmarks.

What is trained stands in ``tasks``, ``networks`` and ``data``. Run as a script, this
writes the table of all claims that ``benchmarks/README.md`` is::

    python benchmarks/harness.py
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
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

import optax_superconv

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parse_args(claim: str | None, *, data: str = "") -> argparse.Namespace:
    """The arguments that every benchmark takes; its docstring is the description.

    ``data`` says what ``--data`` is for, where a benchmark takes it.
    """
    parser = argparse.ArgumentParser(
        description=claim, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="at most 10 s, no claim")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=ROOT / "out" / "benchmarks",
        help="folder for the evidence (default: %(default)s; benchmarks/results holds "
        "what the README quotes)",
    )
    if data:
        parser.add_argument("--data", type=pathlib.Path, help=data)
    return parser.parse_args()


def source_hash(without: Iterable[str] = ()) -> str:
    """Of the package and the benchmarks: what was run, whatever git says."""
    digest = hashlib.sha256(jax.__version__.encode())
    for folder in ("optax_superconv", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.stem not in without:
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict[str, Any]:
    """What a figure depends on."""
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


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar with the time that remains; yields what to call as each part begins."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True)) as bar:
        task = bar.add_task("", total=total)

        count = itertools.count()

        def begin(name: str) -> None:
            bar.update(task, description=name, completed=next(count))

        yield begin
        bar.update(task, completed=total)


def resumable(
    path: pathlib.Path, compute: Callable[[], Any], *, without: Iterable[str] = ()
) -> Any:
    """What ``compute`` gives, kept at ``path``; not computed again by the same source.

    Numbers that are not finite come back as None, as JSON has it. ``without`` names the
    modules that ``compute`` does not use.
    """
    source = source_hash(without)
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["source"] == source:
            return kept["value"]
    begin = time.perf_counter()
    value = to_json(compute())
    record = {"source": source, "seconds": time.perf_counter() - begin, "value": value}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(
        ".partial"
    )  # An interruption leaves nothing half-written.
    partial.write_text(json.dumps(record))
    partial.replace(path)
    return value


def to_json(value: Any) -> Any:
    """Arrays as lists, and what is not finite as None."""
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | jax.Array):
        return to_json(np.asarray(value).tolist())
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """``function`` of each item, as many at a time as there are cores.

    Small programs use one core each, and run without Python's lock.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, items))


def interleave(
    arms: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
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


def ratios(
    seconds: Mapping[str, Sequence[float]], base: str
) -> dict[str, tuple[float, float, float]]:
    """Each arm over the base arm: quartiles of the ratio within a round."""

    def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
        pairs = zip(values, seconds[base], strict=True)
        low, median, high = np.percentile([a / b for a, b in pairs], [25, 50, 75])
        return round(low, 4), round(median, 4), round(high, 4)

    return {name: quartiles(values) for name, values in seconds.items()}


def show(quartiles: tuple[float, float, float]) -> str:
    """A ratio with its quartiles."""
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def mean_and_std(values: Iterable[float], digits: int = 2) -> str:
    """``mean ± standard deviation (n=...)``."""
    array = np.asarray(list(values))
    std = array.std(ddof=1) if array.size > 1 else 0.0
    return f"{array.mean():.{digits}f} ± {std:.{digits}f} (n={array.size})"


def report(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    evidence: Mapping[str, Any],
    out: pathlib.Path,
    claim: Mapping[str, str],
) -> None:
    """Prints the rows as a table, and stores them with evidence and environment.

    ``claim`` is a row of ``benchmarks/README.md``: its question, arms, steps, mean ±
    std (n), cost and command.
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
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    assert [*claim] == COLUMNS[:5] + COLUMNS[-1:]
    record = {
        "title": title,
        "claim": claim,
        "environment": where,
        "rows": rows,
        "evidence": to_json(evidence),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"evidence: {os.path.relpath(path)}")


COLUMNS = [
    "question",
    "arms",
    "steps",
    "mean ± std (n)",
    "cost",
    "device",
    "commit",
    "command",
]


def table_of_claims(results: pathlib.Path) -> str:
    """``benchmarks/README.md``, from the JSON files of ``results``."""
    lines = [
        "# Benchmarks",
        "",
        "What was measured, by which command, on what. Written by "
        "`python benchmarks/harness.py` from the evidence in `results/`, one file per "
        "claim, with the results of each seed.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text())
        where = record["environment"]
        row = record["claim"] | {
            "device": f"{where['device']}, {where['cores']} cores, jax {where['jax']}",
            "commit": where["commit"],
            "command": f"`{record['claim']['command']}`",
        }
        lines.append("| " + " | ".join(row[column] for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "benchmarks" / "README.md").write_text(table_of_claims(RESULTS))
