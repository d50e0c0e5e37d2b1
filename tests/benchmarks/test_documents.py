"""What documents quote is what the evidence says, to the digit."""

import json
import re

import documents
import pytest
from common import ROOT

README = documents.DOCUMENTS[0].read_text()
by_name = {"ids": lambda path: path.name}


def test_the_table_of_claims_is_what_the_evidence_says():
    written = (ROOT / "benchmarks" / "README.md").read_text()
    assert written == documents.table_of_claims(documents.RESULTS)


@pytest.mark.parametrize("path", documents.DOCUMENTS, **by_name)
def test_tables_and_figures_are_what_the_evidence_says(path):
    text = path.read_text()
    assert documents.rendered(text) == text


@pytest.mark.parametrize("path", documents.DOCUMENTS, **by_name)
def test_a_changed_digit_is_seen(path):
    """In a table, a figure, or a number that was not measured."""
    text = path.read_text()
    stated = json.loads(documents.STATED.read_text())[path.name].split()
    assert documents.stated(text) == stated
    prose = documents.masked(text, r"(?s)<!-- .*? -->")
    for found in re.finditer(r"\d+", prose):
        digit = str((int(found[0][-1]) + 1) % 10)
        changed = text[: found.end() - 1] + digit + text[found.end() :]
        same = documents.rendered(changed) == changed
        assert not same or documents.stated(changed) != stated, found[0]


@pytest.mark.parametrize("path", documents.DOCUMENTS, **by_name)
def test_no_spread_stands_outside_of_markers(path):
    assert not re.search(r"\d\s?±", documents.unmeasured(path.read_text()))


def test_readme_states_no_measurement_without_evidence():
    """Outside of markers it has versions, and whole numbers without a unit."""
    prose = documents.unmeasured(README)
    prose = re.sub(r"(Python|JAX|Optax|Flax|Apache-)\s?[\d.]+\d", "", prose)
    units = r"\d\s?(%|(x|ms|s|times|fold|points?|minutes?|hours?)\b)"
    assert not re.search(rf"\d\.\d|{units}", prose)


MARKED = "<!-- groups_step | adamw | step ratio | 0 -->{}<!-- end -->"


@pytest.mark.parametrize(
    "text",
    [
        MARKED.replace(" | step", " | < step"),
        MARKED.replace("<!-- end -->", ""),
        MARKED.replace("<!-- end -->", "")
        + '\n<!-- table {"of": "x"} -->\n<!-- end -->',
        '<!-- table {"of": "x"} -->\nprose\n' + MARKED,
    ],
)
def test_a_comment_that_is_no_marker_is_refused(text):
    with pytest.raises(ValueError, match="a marker with its end"):
        documents.rendered(text.replace("{}", "1"))


def test_a_name_of_several_rows_is_refused():
    with pytest.raises(KeyError):
        documents.rendered(MARKED.replace("groups_step | adamw", "transfer | 20"))


@pytest.mark.parametrize(
    ("cell", "digits", "expected"),
    [
        ("51.47 ± 0.43 (n=5)", 1, "51.5 ± 0.4"),
        ("1,234.567, +0.04, -0.04", 1, "1234.6, +0.0, 0.0"),
        ("39, 0 of 40; 1.5e-05", 1, "39, 0 of 40; 1.5e-05"),
        ("0.86 (n=3)", None, "0.86 (n=3)"),
    ],
)
def test_numbers_of_a_cell_are_rounded(cell, digits, expected):
    assert documents.rounded(cell, digits) == expected
