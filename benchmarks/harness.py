"""How are numbers measured, shown and kept? Shared by all benchmarks."""

import argparse
import datetime
import json
import os
import pathlib
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import optax_superconv

ROOT = pathlib.Path(__file__).resolve().parents[1]


def parse_args(claim: str | None) -> argparse.Namespace:
    """The arguments that every benchmark takes; its docstring is the description."""
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
    return parser.parse_args()


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "optax_superconv": optax_superconv.__version__,
    }


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


def report(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    evidence: Mapping[str, Any],
    out: pathlib.Path,
) -> None:
    """Prints the rows as a table, and stores them with evidence and environment."""
    console = Console(width=120)
    where = environment()
    table = Table(title=title, caption=", ".join(f"{k} {v}" for k, v in where.items()))
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "arm" else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    record = {"title": title, "environment": where, "rows": rows, "evidence": evidence}
    path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"evidence: {os.path.relpath(path)}")
