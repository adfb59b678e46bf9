"""docs/hardening.md names tests that exist, and what the census expects; docs/census.md is what the expectations say now."""

import ast
import importlib.machinery
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from vfsd.sandbox.landlock import _RIGHTS_OF_VERSION
from vfsd.tools.expectations import EXPECTATIONS
from vfsd.tools.fd_purposes import TOLD_BY

TESTS = Path(__file__).parents[1]
TREE = TESTS.parent
TEXT = (TREE / "docs" / "hardening.md").read_text(encoding="utf-8")
_TEST = re.compile(r"`([a-z]+/test_\w+\.py)::(test_\w+)`")
_LINK = re.compile(r"\]\(([\w./-]+?)(?:#[\w-]+)?\)")


@pytest.fixture(scope="module")
def census_doc():
    loader = importlib.machinery.SourceFileLoader("census_doc", str(TREE / "tools" / "census_doc"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


@cache
def functions_of(path):
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_exists():
    named = set(_TEST.findall(TEXT))
    assert len(named) > 30
    assert sorted(f"{path}::{name}" for path, name in named if not (TESTS / path).exists() or name not in functions_of(path)) == []


def test_every_row_of_a_threat_names_a_test():
    lines = TEXT.partition("## Which kernel")[0].splitlines()
    threats = [line for line in lines if line.startswith("| ") and not line.startswith(("| threat |", "| --- |"))]
    assert len(threats) > 15
    assert [row for row in threats if not _TEST.search(row)] == []


def test_links_lead_somewhere():
    assert [link for link in _LINK.findall(TEXT) if not (TREE / "docs" / link).exists()] == []


def test_the_census_document_is_up_to_date(census_doc):
    assert census_doc.check(TREE / "docs" / "census.md") == ""


def test_a_changed_or_missing_census_is_noticed(census_doc, tmp_path):
    document = tmp_path / "census.md"
    assert "missing" in census_doc.check(document)
    document.write_text(census_doc.render().replace("| threads | /proc/PID/task | 1 | 22 |", "| threads | /proc/PID/task | 1 | 23 |"))
    assert "not what the expectations say" in census_doc.check(document)


def test_the_census_has_a_row_for_each_expectation_variant_and_purpose(census_doc):
    text = census_doc.render()
    for expectation in EXPECTATIONS:
        assert f"| {expectation.what} | {expectation.shown_by} |" in text
        for variant in expectation.variants:
            assert f"| {variant.condition.name} | {expectation.what} |" in text
    assert all(f"| {purpose} |" in text for _, purpose, _ in TOLD_BY)


def test_the_landlock_versions_are_those_that_are_used():
    assert f"version 1 to {_RIGHTS_OF_VERSION[-1][0]}" in " ".join(TEXT.split())
