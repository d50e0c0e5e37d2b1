"""How far does noise move what is read off a range test?

On six families of curves, none of which chose a constant of the package, the 5 to 95 %
range of what a rule suggests over 200 draws of noise, high over low; and on the range
tests that ``peaks_and_probes`` repeated with other orders of the batches, the highest
suggestion over the lowest of five. Median and worst of each.

    python benchmarks/range_test_spread.py [--smoke] [--out FOLDER]

About a minute; nothing is trained.
"""

from collections.abc import Callable, Iterator

import harness
import numpy as np
import rules

X = np.linspace(-6, 1, 100)  # log10 of the rates, as in a range test


def _falls(at: float, by: float = 1.8, slope: float = 3.0) -> np.ndarray:
    return -by / (1 + np.exp(-slope * (X - at)))


def _explodes(at: float) -> np.ndarray:
    return 0.05 * np.exp(np.minimum(5 * (X - at), 50))


FAMILIES: dict[str, np.ndarray] = {
    "explosion": 2.3 + _falls(-3) + _explodes(-1.3),
    "plateau, no explosion": 2.3 + _falls(-2.5),
    "slow fall": 2.3 + _falls(-3, slope=0.9) + _explodes(0),
    "two falls": 2.3 + _falls(-4, 0.6, 5) + _falls(-1.8, 1.2, 5) + _explodes(0),
    "catapult": 2.3 + _falls(-2.5) + 1.2 * np.exp(-20 * (X + 1) ** 2) + _explodes(0.3),
    "crosses 0": 1.0 + _falls(-2.5, 3.0) + _explodes(-0.5),
}
NOISE = (0.02, 0.05, 0.1)  # of the fall


def read_all(
    rule: Callable[..., float], smooth, noise: float, draws: int
) -> np.ndarray:
    """(draws,) suggestions; a curve ends where it is far above its start."""
    fall = smooth[0] - smooth.min()
    losses = smooth + noise * fall * np.random.default_rng(0).normal(
        size=(draws, len(X))
    )
    end = int(np.argmax(smooth > smooth[0] + 3 * fall)) or len(X)
    losses[:, end:] = np.nan
    diverged = end < len(X)
    low = 10 ** X[0]
    return np.array(
        [rules.read_or_nan(rule, rules.as_result(x, low, diverged)) for x in losses]
    )


def high_over_low(found: np.ndarray, outside: float) -> float:
    found = found[np.isfinite(found)]
    if not found.size:
        return np.nan
    low, high = np.percentile(found, [100 * outside, 100 * (1 - outside)])
    return float(high / low)


def every_rule() -> Iterator[tuple[str, Callable[..., float], str]]:
    for method in rules.METHODS:
        yield method, rules.suggested(method), "curves"
    for name, rule in rules.FASTAI.items():
        yield name, rule, "fastai"


def median_and_worst(values) -> str:
    return f"{np.nanmedian(values):.1f}, {np.nanmax(values):.1f}"


def main() -> None:
    args = harness.parse_args(__doc__)
    draws = 10 if args.smoke else 200
    cells = rules.load(args.out)[: 1 if args.smoke else None]
    rows, evidence, told = [], {}, []
    for name, rule, kind in every_rule():
        drawn = {
            family: {noise: read_all(rule, smooth, noise, draws) for noise in NOISE}
            for family, smooth in FAMILIES.items()
        }
        spreads = {
            family: {noise: high_over_low(found, 0.05) for noise, found in by.items()}
            for family, by in drawn.items()
        }
        every = np.array([found for by in drawn.values() for found in by.values()])
        repeated = {
            f"{cell.task} {cell.optimizer}": [
                high_over_low(
                    np.array([rules.read_or_nan(rule, x) for x in p[kind]]), 0
                )
                for p in cell.probes
            ]
            for cell in cells
        }
        columns = {f"noise {n:g}": [by[n] for by in spreads.values()] for n in NOISE}
        shown = {column: median_and_worst(values) for column, values in columns.items()}
        real = median_and_worst([v for values in repeated.values() for v in values])
        none = f"{np.isnan(every).mean():.0%}"
        rows.append({"rule": name} | shown | {"without": none, "repeats": real})
        evidence[name] = {"drawn": spreads, "repeats": repeated}
        told.append(f"{name} {real}")
    harness.report(
        args,
        "range_test_spread",
        "5 to 95 % of a suggestion over 200 draws, high over low: median and worst of "
        "six families; highest over lowest of real range tests, made five times",
        rows,
        {"rules": evidence},
        "How far does noise move a suggestion?",
        ", ".join(row["rule"] for row in rows),
        "100",
        "median and worst of real repeats: " + "; ".join(told),
        "none",
    )


if __name__ == "__main__":
    main()
