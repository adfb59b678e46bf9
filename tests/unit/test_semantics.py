"""docs/semantics.md names every property, every operation, and tests that exist."""

import re

import pytest

from tests.support.documents import NAMED_TEST, TESTS, functions_of, missing_tests
from vfsd.wire import fuse_abi as abi
from vfsd.worker.opcodes import HANDLERS

TEXT = (TESTS.parent / "docs" / "semantics.md").read_text(encoding="utf-8")
MEASURED = {49}  # speed is measured, not tested
_ROW = re.compile(r"^\| (?P<first>[A-Z0-9_]+) \|(?P<rest>.*)\|$", re.MULTILINE)

ROWS = {match["first"]: match["rest"] for match in _ROW.finditer(TEXT)}


def test_every_test_that_is_named_exists():
    assert missing_tests(TEXT) == []


def test_every_property_is_in_the_table():
    assert [number for number in range(1, 51) if str(number) not in ROWS] == []


@pytest.mark.parametrize("number", sorted(set(range(1, 51)) - MEASURED))
def test_every_property_has_a_test(number):
    assert NAMED_TEST.search(ROWS[str(number)])


def test_every_test_of_a_property_is_in_its_row():
    """Also the other way round: a test that is named after a property is found there."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for name in functions_of(str(path.relative_to(TESTS))):
            match = re.match(r"test_property_(\d+)_", name)
            if match:
                assert f"{path.relative_to(TESTS)}::{name}" in ROWS[str(int(match[1]))], name


def test_every_operation_is_in_the_table_and_has_a_test():
    operations = {name.removeprefix("FUSE_") for name, value in vars(abi).items() if name.startswith("FUSE_") and value in HANDLERS}
    names = {opcode: [name for name in operations if getattr(abi, f"FUSE_{name}") == opcode] for opcode in HANDLERS}
    for opcode, candidates in names.items():
        rows = [ROWS[name] for name in candidates if name in ROWS]
        assert rows, f"opcode {opcode}: {candidates}"
        assert all(NAMED_TEST.search(row) for row in rows)
