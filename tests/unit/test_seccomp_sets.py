"""Sets of arguments: every answer about them is checked against what single values say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfsd.sandbox.seccomp_conditions import Comparison
from vfsd.sandbox.seccomp_policy import parse_policy
from vfsd.sandbox.seccomp_sets import EVERYTHING, Cube, Region, allowed_arguments, cubes_of, find_new, find_uncovered, intersection

NUMBERS = st.one_of(st.integers(0, 15), st.integers(0, 2**64 - 1))
REPEATABLE = settings(derandomize=True, deadline=None, max_examples=100)


@st.composite
def comparisons(draw, most_argument=1):
    argument, operator = draw(st.integers(0, most_argument)), draw(st.sampled_from(["masked", "!=", "<", "<=", ">", ">="]))
    value = draw(NUMBERS)
    return Comparison(argument, operator, value, draw(NUMBERS) & value if operator == "masked" else 0)


def contains(cube, arguments):
    joined = sum(value << 64 * index for index, value in enumerate(arguments))
    return joined & cube.mask == cube.value


def is_in(region, arguments):
    return any(contains(cube, arguments) for cube in region.inside) and not any(contains(cube, arguments) for cube in region.outside)


@given(st.lists(comparisons(), max_size=3), NUMBERS, NUMBERS)
@REPEATABLE
def test_cubes_hold_what_comparisons_hold(found, first, second):
    arguments = (first, second, 0, 0, 0, 0)
    expected = all(each.holds(arguments[each.argument]) for each in found)
    assert any(contains(cube, arguments) for cube in cubes_of(found)) == expected


@given(comparisons(most_argument=0))
@REPEATABLE
def test_cubes_end_exactly_where_a_comparison_does(found):
    edges = {(edge + step) % 2**64 for edge in (found.value, found.operand, 0) for step in (-1, 0, 1)}
    for value in edges:
        assert any(contains(cube, (value,)) for cube in cubes_of([found])) == found.holds(value)


# Of four bits in two arguments, so that sets meet and cover each other, and every value can be tried.
SMALL_MASKS = st.integers(0, 3).flatmap(lambda low: st.integers(0, 3).map(lambda high: low | high << 64))
SMALL_CUBES = SMALL_MASKS.flatmap(lambda mask: SMALL_MASKS.map(lambda value: Cube(mask, value & mask)))
REGIONS = st.builds(lambda inside, outside: Region(tuple(inside), tuple(outside)), *[st.lists(SMALL_CUBES, max_size=3)] * 2)
SMALL_ARGUMENTS = [(first, second, 0, 0, 0, 0) for first in range(4) for second in range(4)]


@given(st.lists(SMALL_CUBES, max_size=3), st.lists(SMALL_CUBES, max_size=4))
@REPEATABLE
def test_what_is_uncovered_is_found_exactly_where_there_is_some(cubes, covers):
    uncovered = [one for one in SMALL_ARGUMENTS if is_in(Region(tuple(cubes), tuple(covers)), one)]
    found = find_uncovered(cubes, covers)
    assert (found is not None) == bool(uncovered)
    assert found is None or found.example() in uncovered


@given(REGIONS, REGIONS)
@REPEATABLE
def test_what_is_new_is_found_exactly_where_there_is_some(old, new):
    fresh = [one for one in SMALL_ARGUMENTS if is_in(new, one) and not is_in(old, one)]
    found = find_new(old, new)
    assert (found is not None) == bool(fresh)
    assert found is None or found.example() in fresh


def test_cubes_that_contradict_each_other_do_not_meet():
    assert intersection(Cube(1, 0), Cube(1, 1)) is None
    assert intersection(Cube(1, 1), Cube(2, 2)) == Cube(3, 3)
    assert intersection(EVERYTHING, Cube(1, 1)) == Cube(1, 1)


def test_the_example_is_split_into_arguments():
    assert Cube(0, 1 | 2 << 64 | 6 << 320).example() == (1, 2, 0, 0, 0, 6)


@pytest.mark.parametrize(("default", "expected"), [("kill", [4, 5]), ("allow", [0, 1, 2, 3, 6, 7])])
def test_what_a_role_may_pass(default, expected):
    rules = [{"syscall": "fcntl", "when": [f"arg1 & 0xffffffff == {each}"], "reason": "a test", "used_by": "a test"} for each in (4, 5)]
    rules.append(
        {"syscall": "fcntl", "when": ["arg1 & 0xffffffff == 6"], "action": "errno(EPERM)", "reason": "a test", "used_by": "a test"}
    )
    role = parse_policy({"version": 1, "role": {"worker": {"default": default, "rules": rules}}})["worker"]
    allowed = allowed_arguments(role, "fcntl", "x86_64")
    assert [each for each in range(8) if is_in(allowed, (0, each))] == [each for each in expected if each != 6]
