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


def test_readme_states_no_measurement_without_evidence():
    """Outside of markers it has versions, and whole numbers."""
    prose = documents.unmeasured(README)
    prose = re.sub(r"(Python|JAX|Optax|Flax|Apache-)\s?[\d.]+\d", "", prose)
    assert not re.search(r"\d\.\d|\d\s?±|\d\s%|\d\stimes", prose)
