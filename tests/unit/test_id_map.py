"""--translate-uid and --translate-gid: the grammar, what each type does in each direction, and what cannot be."""

import errno
import random

import pytest

from vfsd.errors import ConfigError, ReplyErrno
from vfsd.wire.id_map import IdMap, make_id_maps

HIGHEST = 2**32 - 2


@pytest.mark.parametrize(
    ("rule", "to_host", "to_guest"),
    [
        ("map:10:5000:3", {9: 9, 10: 5000, 12: 5002, 13: 13, 5000: 5000}, {5000: 10, 5002: 12, 5003: 5003, 10: 10}),
        ("guest:10:5000:3", {10: 5000, 12: 5002, 13: 13}, {5000: 5000, 10: 10}),
        ("host:5000:10:3", {10: 10, 5000: 5000}, {5000: 10, 5002: 12, 5003: 5003}),
        ("squash-guest:10:5000:3", {9: 9, 10: 5000, 12: 5000, 13: 13}, {5000: 5000}),
        ("squash-host:5000:10:3", {10: 10}, {4999: 4999, 5000: 10, 5002: 10, 5003: 5003}),
        (f"squash-guest:0:{HIGHEST}:{HIGHEST}", {0: HIGHEST, HIGHEST - 1: HIGHEST}, {}),
        ("map:0:0:4294967295", {0: 0, HIGHEST: HIGHEST}, {0: 0, HIGHEST: HIGHEST}),
    ],
)
def test_each_type_translates_its_range_and_leaves_the_rest(rule, to_host, to_guest):
    ids = IdMap("--translate-uid", [rule])
    assert {number: ids.to_host(number) for number in to_host} == to_host
    assert {number: ids.to_guest(number) for number in to_guest} == to_guest


def test_a_forbidden_id_is_eperm_on_its_way_to_the_host_only():
    ids = IdMap("--translate-uid", ["forbid-guest:10:3"])
    for number in (10, 12):
        with pytest.raises(ReplyErrno) as refused:
            ids.to_host(number)
        assert refused.value.errno == errno.EPERM
        assert ids.to_guest(number) == number
    assert (ids.to_host(9), ids.to_host(13)) == (9, 13)


def test_no_id_stays_no_id():
    """(uid_t) -1 cannot be in a range."""
    ids = IdMap("--translate-uid", ["map:0:0:4294967295"])
    assert ids.to_host(2**32 - 1) == ids.to_guest(2**32 - 1) == 2**32 - 1


def test_many_ranges_in_any_order_agree_with_a_search_through_all_of_them():
    rng = random.Random(1)
    starts = rng.sample(range(0, 100_000, 10), 200)
    ranges = {start: (rng.randrange(1, 11), rng.randrange(2**31)) for start in starts}
    ids = IdMap("--translate-gid", [f"guest:{start}:{target}:{count}" for start, (count, target) in ranges.items()])
    for number in range(100_100):
        count, target = ranges.get(number // 10 * 10, (0, 0))
        inside = number % 10 < count
        assert ids.to_host(number) == (target + number % 10 if inside else number)


@pytest.mark.parametrize(
    "rules",
    [
        ["map:0:1000:10", "guest:9:5:1"],
        ["squash-guest:5:1:10", "forbid-guest:0:6"],
        ["map:0:1000:10", "host:1009:7:1"],
        ["host:0:1:10", "squash-host:5:0:1"],
        ["map:0:1000:10", "map:0:1000:10"],
    ],
)
def test_ranges_that_overlap_are_refused_by_name(rules):
    with pytest.raises(ConfigError) as refused:
        make_id_maps((), rules)
    for text in ("--translate-gid=", "overlaps", *rules):
        assert text in str(refused.value)


def test_the_two_directions_do_not_overlap_with_each_other():
    ids = IdMap("--translate-uid", ["guest:0:1000:10", "host:0:2000:10", "guest:10:0:1"])
    assert (ids.to_host(3), ids.to_guest(3)) == (1003, 2003)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("", "no kind of translation"), ("both:1:2:3", "no kind of translation"), ("MAP:1:2:3", "no kind of translation"),
        ("map", "takes 3 numbers"), ("map:1:2", "takes 3 numbers"), ("map:1:2:3:4", "takes 3 numbers"), ("forbid-guest:1:2:3", "takes 2 numbers"),
        ("map:1:2:x", "decimal"), ("map:1:-2:3", "decimal"), ("map:1: 2:3", "decimal"), ("map:1:+2:3", "decimal"), ("map:1::3", "decimal"),
        ("map:1:2:0x3", "decimal"), ("map:1:2:٣", "decimal"), ("map:1:2:0", "empty"),
        ("map:0:1:4294967295", "beyond"), ("guest:4294967295:0:1", "beyond"), ("forbid-guest:4294967294:2", "beyond"),
        ("squash-host:0:4294967295:1", "beyond"), ("map:1:2:99999999999999999999", "digits"), ("map:1:2:" + "9" * 5000, "digits"),
    ],
)  # fmt: skip
def test_what_is_not_in_the_grammar_is_refused_with_option_text_and_reason(rule, reason):
    with pytest.raises(ConfigError) as refused:
        make_id_maps([rule], ())
    assert str(refused.value).startswith(f"--translate-uid={rule}: ")
    assert reason in str(refused.value)


def test_without_rules_there_is_nothing_to_ask():
    assert make_id_maps((), ()) is None


def test_users_and_groups_are_translated_apart():
    ids = make_id_maps(["map:0:100:10"], ["map:0:200:10"])
    assert ids.to_host(1, 2) == (101, 202)
    assert ids.to_guest(101, 202) == (1, 2)
    assert make_id_maps((), ["map:0:200:10"]).to_host(1, 2) == (1, 202)
