"""Which figures do the documents quote? Written into them from the evidence.

``README.md`` and ``docs`` hold tables and figures between comments that say where they
come from, and ``benchmarks/README.md`` is the table of all claims. This writes all of
them anew::

    python benchmarks/documents.py

A table::

    <!-- table {"of": "transfer", "columns": {"arm": "arm", "gain": "less full"}} -->
    <!-- end -->

``of`` names a file of results of ``benchmarks`` or ``examples``; ``columns`` gives its
columns by their headings; ``rows``, a list of names or a name for each name, which rows
are shown (all). The name of a row is its first cell, or its first two, with a comma.
Where a column is a pair, ``["20", "less full"]``, the name of a row is what follows the
first of the pair. ``digits`` are how many are kept after the point, in all columns or,
by heading, in some; how often it was measured is then left out.

A figure: ``<!-- transfer | 20, full | accuracy (%) | 0 .1 -->80.9<!-- end -->``: file,
row, column, and of a cell that holds several numbers which one (0 is the first; without
it, the cell as it is) and with how many digits.

Numbers that were not measured (settings, steps, years) are written to ``STATED`` in the
order of the document, so that none changes unseen: look at what changes there.
"""

import functools
import json
import pathlib
import re
from typing import Any

import harness

RESULTS = harness.RESULTS
FOLDERS = (RESULTS, harness.ROOT / "examples" / "results")
DOCUMENTS = (
    harness.ROOT / "README.md",
    *sorted((harness.ROOT / "docs").glob("*.md")),
)
STATED = harness.ROOT / "benchmarks" / "stated_numbers.json"
NUMBER = r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"


def table_of_claims(results: pathlib.Path) -> str:
    """``benchmarks/README.md``, from the JSON files of ``results``."""
    columns = harness.COLUMNS
    lines = [
        "# Benchmarks\n",
        "What was measured, by which command, on what. Written by "
        "`python benchmarks/documents.py` from the evidence in `results/`, one file "
        "per claim, with the results of each seed.\n",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text())
        where = record["environment"]
        row = record["claim"] | {
            "device": f"{where['device']}, {where['cores']} cores, jax {where['jax']}",
            "commit": where["commit"],
            "command": f"`{record['claim']['command']}`",
        }
        lines.append("| " + " | ".join(row[column] for column in columns) + " |")
    return "\n".join(lines) + "\n"


# --- tables and figures ---------------------------------------------------------------


@functools.cache
def rows_of(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a file of results, by name."""
    (path,) = (f / f"{name}.json" for f in FOLDERS if (f / f"{name}.json").exists())
    named: dict[str, dict[str, Any]] = {}
    for row in json.loads(path.read_text())["rows"]:
        first, *others = (str(cell).strip() for cell in row.values())
        for key in {first, f"{first}, {(others or [''])[0]}"}:
            # A name of several rows is no name.
            named[key] = {} if key in named else row
    return named


def rounded(cell: str, digits: int | None) -> str:
    """With so many digits after each point, and without ``(n=...)``."""
    if digits is None:
        return cell

    def shorter(found: re.Match[str]) -> str:
        text = found[0].replace(",", "")
        if len(text.partition(".")[2]) <= digits or "e" in text:
            return found[0]
        return f"{float(text):{'+' * (text[0] == '+')}z.{digits}f}"

    return re.sub(NUMBER, shorter, re.sub(r" \(n=[^)]*\)", "", cell))


_TABLE = re.compile(
    r"(<!-- table (\{.*?\}) -->\n)(?:(?!<!--).)*(<!-- end -->)", flags=re.DOTALL
)
_FIGURE = re.compile(r"(<!-- ([^|{}<>]+(?: \| [^|{}<>]+){2,3}) -->)[^<]*(<!-- end -->)")


def _table(found: re.Match[str]) -> str:
    wanted = json.loads(found[2])
    rows, columns = rows_of(wanted["of"]), wanted["columns"]
    names = wanted.get("rows") or [
        str(next(iter(r.values()))).strip() for r in rows.values()
    ]
    labels = names if isinstance(names, dict) else {name: None for name in names}
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    digits = wanted.get("digits")
    for name, label in labels.items():
        cells = []
        for heading, column in columns.items():
            pair = column if isinstance(column, list) else [None, column]
            row = rows[name if pair[0] is None else f"{pair[0]}, {name}"]
            kept = digits.get(heading) if isinstance(digits, dict) else digits
            cells.append(rounded(str(row[pair[1]]), kept))
        lines.append("| " + " | ".join([label or cells[0], *cells[1:]]) + " |")
    return found[1] + "\n".join(lines) + "\n" + found[3]


def _figure(found: re.Match[str]) -> str:
    name, row, column, *pick = found[2].split(" | ")
    cell = str(rows_of(name)[row][column])
    which, _, digits = (pick or [""])[0].partition(".")
    if which.strip():
        cell = re.findall(NUMBER, cell)[int(which)]
    return found[1] + rounded(cell, int(digits) if digits else None) + found[3]


def rendered(text: str) -> str:
    """A document with its tables and figures written anew from the evidence."""
    comments = re.findall(r"<!-- (?!end)", text), re.findall("<!-- end -->", text)
    known = sum(len(pattern.findall(text)) for pattern in (_TABLE, _FIGURE))
    if {*map(len, comments)} != {known}:
        raise ValueError(
            f"Each comment must be a marker with its end; got {len(comments[0])} "
            f"comments, {len(comments[1])} ends, {known} markers."
        )
    return _FIGURE.sub(_figure, _TABLE.sub(_table, text))


# --- what was not measured ------------------------------------------------------------


_CODE = (r"(?s)```.*?```", r"(?s)`[^`]*`", r"\]\([^)]*\)")


def masked(text: str, *patterns: str | re.Pattern[str]) -> str:
    """With spaces for code, addresses, and what else is to be left out."""
    for pattern in (*patterns, *_CODE):
        text = re.sub(pattern, lambda found: " " * len(found[0]), text)
    return text


def unmeasured(text: str) -> str:
    """What of a document stands outside of markers, code and addresses."""
    return masked(text, _TABLE, _FIGURE)


def stated(text: str) -> list[str]:
    return re.findall(r"\d[\d,.]*\d|\d", unmeasured(text))


if __name__ == "__main__":
    claims = harness.ROOT / "benchmarks" / "README.md"
    claims.write_text(table_of_claims(RESULTS))
    for document in DOCUMENTS:
        document.write_text(rendered(document.read_text()))
    numbers = {path.name: " ".join(stated(path.read_text())) for path in DOCUMENTS}
    known = json.loads(STATED.read_text())
    for name in numbers:
        if numbers[name] != known.get(name):
            print(f"{name}: other numbers that were not measured; see {STATED.name}")
    STATED.write_text(json.dumps(numbers, indent=1) + "\n")
