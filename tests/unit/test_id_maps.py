"""The text of --uid-map and --gid-map, and what follows from a map."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsd.sandbox.id_maps import (
    MOST_IDS,
    OVERFLOW_ID,
    IdRange,
    choose_own_id,
    choose_powerless_id,
    decode_id_range,
    find_overlap,
    is_mapped,
    parse_id_map,
)

LIBVIRT = (IdRange(0, 1000, 1), IdRange(1, 100000, 65536))
OWN = (IdRange(1000, 1000, 1),)
HOST = (IdRange(0, 0, MOST_IDS),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":0:1000:1:", (0, 1000, 1)),
        (",1,100000,65536,", (1, 100000, 65536)),
        ("/0/0/4294967295/", (0, 0, MOST_IDS)),
        (" 5 6 7 ", (5, 6, 7)),
        ("→1→2→3→", (1, 2, 3)),
    ],
)
def test_any_delimiter_that_is_no_letter_or_digit_will_do(text, expected):
    assert decode_id_range(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not begin with a delimiter"),
        ("0:1000:1", "does not begin with a delimiter"),
        ("a0a1000a1a", "does not begin with a delimiter"),
        (":0:1000:1", "is not three numbers"),
        (":0:1000:", "is not three numbers"),
        (":0:1000:1:1:", "is not three numbers"),
        (":0:1000:1:x", "is not three numbers"),
        (":0:1000,1:", "is not three numbers"),
        (":0::1:", "is not a number"),
        (":0:-1:1:", "is not a number"),
        (":0:1_0:1:", "is not a number"),
        (":0:٣:1:", "is not a number"),
        (":0:1000:0:", "maps no id"),
        (":0:4294967295:1:", "goes beyond 4294967294"),
        (":4294967294:0:2:", "goes beyond 4294967294"),
        (":0:0:4294967296:", "goes beyond 4294967294"),
    ],
)
def test_what_is_no_range_is_refused_with_the_text_and_the_reason(text, reason):
    with pytest.raises(ValueError) as refused:
        decode_id_range(text)
    assert reason in str(refused.value)
    assert repr(text) in str(refused.value)


@given(st.text())
def test_any_text_is_a_range_or_a_value_error(text):
    try:
        inside, outside, size = decode_id_range(text)
    except ValueError:
        return
    assert size > 0
    assert max(inside, outside) + size <= MOST_IDS


@pytest.mark.parametrize(
    ("id_map", "expected"),
    [
        (LIBVIRT, None),
        ((IdRange(0, 0, 2), IdRange(1, 100, 1)), ((0, 0, 2), (1, 100, 1))),
        ((IdRange(50, 105, 1), IdRange(0, 100, 6)), ((0, 100, 6), (50, 105, 1))),
        ((IdRange(5, 5, 5), IdRange(0, 0, 5)), None),
        (OWN, None),
        ((), None),
    ],
)
def test_an_id_that_is_mapped_twice_is_found_inside_and_outside(id_map, expected):
    assert find_overlap(id_map) == expected


def test_the_kernels_form_is_understood():
    assert parse_id_map("         0       1000          1\n         1     100000      65536\n") == LIBVIRT


def test_is_mapped_at_the_ends_of_a_range():
    assert [is_mapped(LIBVIRT, each) for each in (0, 1, 65536, 65537)] == [True, True, True, False]
    assert not is_mapped((), 0)


@pytest.mark.parametrize(
    ("id_map", "now", "own"),
    [
        (HOST, 0, 0),
        (OWN, 1000, 1000),
        (LIBVIRT, 0, 0),
        ((*OWN, IdRange(0, 100000, 10)), 1000, 0),
        ((IdRange(7, 100000, 9),), OVERFLOW_ID, 7),
        ((), 5, 5),
    ],
)
def test_the_broker_is_root_of_the_namespace_if_there_is_one(id_map, now, own):
    assert choose_own_id(id_map, now) == own


@pytest.mark.parametrize(
    ("id_map", "own", "powerless"),
    [
        (HOST, 0, OVERFLOW_ID),
        (LIBVIRT, 0, OVERFLOW_ID),
        (OWN, 1000, None),
        ((IdRange(0, 1000, 1), IdRange(1, 100000, 500)), 0, 500),
        ((IdRange(10, 100000, 2),), 11, 10),
        ((), 1000, None),
    ],
)
def test_control_and_workers_are_nobody_or_another_one_that_is_mapped(id_map, own, powerless):
    assert choose_powerless_id(id_map, own) == powerless
