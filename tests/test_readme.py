"""The README's claims: every row of the feature table names a test that exists, and every link leads to a file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FEATURES = re.findall(r"^\| (.+?) \|.*\| \[`(\w+)`\]\((tests/\w+\.py)\) \|$", README, re.MULTILINE)


def test_every_feature_has_a_proof():
    table = README.partition("## Feature by feature")[2].partition("\n\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(FEATURES) == len(rows) - 1 > 20  # the head has none


@pytest.mark.parametrize(("feature", "test", "file"), FEATURES)
def test_the_proof_of_a_feature_is_a_test(feature, test, file):
    assert f"def {test}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_a_link_leads_to_a_file(link):
    assert (ROOT / link).exists()
