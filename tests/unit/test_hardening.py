"""docs/hardening.md names tests that exist, for every threat one."""

import re

from tests.support.documents import NAMED_TEST, TREE, missing_tests
from vfsd.sandbox.landlock import _RIGHTS_OF_VERSION

TEXT = (TREE / "docs" / "hardening.md").read_text(encoding="utf-8")
_LINK = re.compile(r"\]\(([\w./-]+?)(?:#[\w-]+)?\)")


def test_every_test_that_is_named_exists():
    assert len(set(NAMED_TEST.findall(TEXT))) > 30
    assert missing_tests(TEXT) == []


def test_every_row_of_a_threat_names_a_test():
    lines = TEXT.partition("## Which kernel")[0].splitlines()
    threats = [line for line in lines if line.startswith("| ") and not line.startswith(("| threat |", "| --- |"))]
    assert len(threats) > 15
    assert [row for row in threats if not NAMED_TEST.search(row)] == []


def test_links_lead_somewhere():
    assert [link for link in _LINK.findall(TEXT) if not (TREE / "docs" / link).exists()] == []


def test_the_landlock_versions_are_those_that_are_used():
    assert f"version 1 to {_RIGHTS_OF_VERSION[-1][0]}" in " ".join(TEXT.split())
