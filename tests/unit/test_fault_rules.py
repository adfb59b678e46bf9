"""Fault expressions: what they mean, and what is said of one that cannot be."""

import errno
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsd.errors import ConfigError
from vfsd.faults import catalogue
from vfsd.faults.grammar import MAX_EXPRESSION, parse_rule
from vfsd.faults.matrix import MATRIX
from vfsd.faults.rule import chance, own_seed
from vfsd.faults.rule_file import parse_rule_file

MS = 10**6


def hit_numbers(text, matches=20, seed=1):
    """Which of so many matches are hits."""
    rule, hits = parse_rule(text), []
    for number in range(1, matches + 1):
        if rule.hits(number, len(hits), seed):
            hits.append(number)
    return hits


@pytest.mark.parametrize(
    ("when", "hits"),
    [
        ("when=3", [3]),
        ("when=3+", list(range(3, 21))),
        ("when=3+5", [3, 8, 13, 18]),
        ("when=3..5", [3, 4, 5]),
        ("when=3..12+4", [3, 7, 11]),
        ("nth=4", [4]),
        ("every=6", [6, 12, 18]),
        ("after=17", [18, 19, 20]),
        ("times=2", [1, 2]),
        ("every=3:times=2", [3, 6]),
        ("after=0:times=1", [1]),
    ],
)
def test_which_matches_are_hits(when, hits):
    assert hit_numbers(f"READ:error=EIO:{when}") == hits


def test_chance_is_the_same_for_a_seed_and_about_as_often_as_it_says():
    rule = "READ:error=EIO:prob=0.25"
    assert hit_numbers(rule, 4000, seed=5) == hit_numbers(rule, 4000, seed=5) != hit_numbers(rule, 4000, seed=6)
    assert 800 < len(hit_numbers(rule, 4000, seed=5)) < 1200
    assert len({own_seed(42, rule, place) for rule in range(20) for place in range(20)}) == 400
    assert all(0 <= chance(seed, number) < 1 for seed in (0, 2**64 - 1) for number in range(100))


def test_a_delay_lies_in_its_range():
    rule = parse_rule("READ:delay=10ms..50ms")
    delays = [rule.delay_ns(number, 3) for number in range(1000)]
    assert 10 * MS <= min(delays) < 14 * MS
    assert 46 * MS < max(delays) <= 50 * MS
    assert {parse_rule("READ:delay=1.5s").delay_ns(number, 3) for number in range(9)} == {1500 * MS}


def test_what_the_parts_of_an_expression_mean():
    rule = parse_rule(
        r"READ,WRITE:error=enospc".replace("enospc", "ENOSPC") + r":path=/a\:b\\*:nodeid=7:uid=1000:queue=2:during=1s..2min:seed=9"
    )
    assert (rule.kind, rule.role, rule.subjects) == ("operation", "worker", {"READ", "WRITE"})
    assert (rule.action.name, rule.action.number) == ("error", errno.ENOSPC)
    assert rule.path == rb"/a:b\*"
    assert (rule.nodeid, rule.uid, rule.queue, rule.seed) == (7, 1000, 2, 9)
    assert rule.window_ns == (1000 * MS, 120_000 * MS)
    assert rule.in_window(1000 * MS)
    assert not rule.in_window(999 * MS)
    assert not rule.in_window(120_000 * MS)
    assert rule.fits(nodeid=7, uid=1000, queue=2)
    assert not any([rule.fits(nodeid=8, uid=1000, queue=2), rule.fits(nodeid=7, uid=0, queue=2), rule.fits(nodeid=7, uid=1000, queue=1)])
    assert parse_rule("*:hang").subjects == set(catalogue.OPERATIONS)
    assert parse_rule("broker.open_by_handle:error=5").subjects == {"broker.open_by_handle_at"}
    assert parse_rule("worker:kill:at=after-pop").point == "after-pop"
    assert parse_rule("send_fds:truncate").role == "worker"
    assert parse_rule("send_fds:error=ENOBUFS").role == "broker"
    assert parse_rule("control:hang:at=before-message:message=SET_MEM_TABLE").message == "SET_MEM_TABLE"


@pytest.mark.parametrize(
    ("path", "fits"),
    [(b"/db/x", True), (b"/db/sub/y", True), (b"/db", False), (b"/dbx/y", False), (b"/db/\xff", True)],
)
def test_a_path_is_matched_as_a_whole(path, fits):
    assert parse_rule("READ:error=EIO:path=/db/*").fits_path(path) == fits


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("", 1, "a target is missing"),
        ("RAED:error=EIO", 1, "'RAED' is nothing that can fail"),
        ("READ,WRIET:error=EIO", 6, "'WRIET'"),
        ("read:error=EIO", 1, "write READ"),
        ("READ", 5, "an action is missing; add one of error, delay"),
        ("READ:eror=EIO", 6, "use one of error, delay, hang"),
        ("READ:error", 12, "an error is missing"),
        ("READ:error=EFOO", 12, "'EFOO' is no error"),
        ("READ:error=0", 12, "'0' is no error"),
        ("READ:hang=1", 11, "takes no value"),
        ("READ:delay=50", 12, "'50' is no time"),
        ("READ:delay=50ms..5", 18, "'5' is no time"),
        ("READ:delay=50ms..5ms", 12, "is no range"),
        ("READ:delay=2000min", 12, "up to an hour"),
        ("LOOKUP:short", 8, "only READ and WRITE"),
        ("READ:error=EIO:", 16, "'' is no selector"),
        ("READ:error=EIO:whn=3", 16, "use one of path, nodeid"),
        ("READ:error=EIO:when", 21, "when needs a value; as in when=3+2"),
        ("READ:error=EIO:when=0", 21, "3+2 the third, fifth"),
        ("READ:error=EIO:when=5..3", 21, "is no FIRST"),
        ("READ:error=EIO:when=3+0", 21, "is no FIRST"),
        ("READ:error=EIO:when=3:nth=2", 23, "contradict each other"),
        ("READ:error=EIO:uid=1:uid=2", 22, "stands twice"),
        ("READ:error=EIO:prob=1.5", 21, "is no probability"),
        ("READ:error=EIO:prob=0", 21, "is no probability"),
        ("READ:error=EIO:queue=x", 22, "is no number from 0 to 255"),
        ("READ:error=EIO:during=2s..2s", 23, "is no range of times"),
        ("worker:kill", 12, "add at= one of after-pop"),
        ("worker:kill:at=lunch", 16, "'lunch' is no point of worker"),
        ("broker:kill:at=before-request:message=Creat", 39, "Create"),
        ("worker:kill:queue=1:at=before-ask", 13, "leave queue out"),
        ("control:kill:at=now:message=SET_OWNER", 21, "leave message out"),
        ("kick:drop", 6, "use one of lose"),
        ("supervisor.open:error=EIO", 1, "use one of worker, broker"),
        ("broker.frob:error=EIO", 8, "openat"),
        ("send_fds:error=EIO", 16, "ETOOMANYREFS"),
        ("READ:error=EIO\x1b", 1, "cannot be printed"),
        ("READ:error=" + "E" * MAX_EXPRESSION, MAX_EXPRESSION + 1, "too long"),
    ],
)
def test_a_mistake_is_shown_where_it_is_with_what_to_do(text, column, says):
    with pytest.raises(ConfigError) as refused:
        parse_rule(text)
    assert f"column {column}: " in str(refused.value)
    assert says in str(refused.value)
    assert "; " in str(refused.value).partition("column")[2]
    assert str(refused.value).isprintable()


@given(st.text(alphabet="READ:,=.error\\EIOwhn3+*dlaymsk\x00é", max_size=40))
def test_any_text_is_a_rule_or_a_mistake(text):
    try:
        assert parse_rule(text).text == text
    except ConfigError as error:
        column = int(re.search(r"column (\d+)", str(error))[1])
        assert 1 <= column <= len(text) + 2


def test_a_file_has_expressions_and_tables_that_say_the_same():
    found = parse_rule_file(
        """
        seed = 42
        rules = [
            "READ:error=EIO:when=3+2",
            { target = "FSYNC", delay = "50ms", prob = 0.1, path = "/a:b/*" },
            { target = "worker", kill = true, at = "after-pop", when = 100 },
        ]
        """,
        "FILE",
    )
    assert found.seed == 42
    assert [rule.text for rule in found.rules] == [
        "READ:error=EIO:when=3+2", r"FSYNC:delay=50ms:prob=0.1:path=/a\:b/*", "worker:kill:at=after-pop:when=100",
    ]  # fmt: skip
    assert parse_rule_file("", "FILE") == (None, [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rules = [", "FILE: "),
        ("rule = []", "'rule' is not known"),
        ("seed = -1", "seed is -1"),
        ("seed = true", "seed is True"),
        ("rules = {}", "must be a list"),
        ("rules = [3]", "rule 1: a rule is an expression"),
        ('rules = ["READ:hang", "READ:hnag"]', "FILE: rule 2: fault rule 'READ:hnag', column 6"),
        ('rules = [{ target = "READ", error = [] }]', "error is []"),
        ('rules = ["control:kill:at=now"]', "vfsdctl fault add"),
        ("rules = [" + '"READ:hang",' * 65 + "]", "at most 64"),
    ],
)
def test_a_mistake_in_a_file_is_named(text, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse_rule_file(text, "FILE")


def test_every_action_at_every_point_has_a_row_in_the_matrix():
    names = {cell.name for cell in MATRIX}
    wanted = {f"operation:{action}" for action in catalogue.OF_OPERATIONS}
    wanted |= {f"{role}.call:{action}" for role in catalogue.CALLS for action in catalogue.OF_CALLS}
    wanted |= {f"{point.role}:kill:{point.name}" for point in catalogue.POINTS}
    wanted |= {f"{role}:{action}" for role in catalogue.ROLES for action in ("hang", "delay")}
    wanted |= {f"{target}:{action}" for target in ("kick", "call", "send_fds") for action in catalogue.ACTIONS[target]}
    wanted |= {f"frontend:close:{point}" for point in catalogue.CLOSING_POINTS}
    assert names == wanted
    assert len(names) == len(MATRIX)


@pytest.mark.parametrize("cell", MATRIX, ids=lambda cell: cell.name)
def test_the_examples_of_the_matrix_are_rules(cell):
    rule = parse_rule(cell.example)
    kind = {"syscall": f"{rule.role}.call"}.get(rule.kind, rule.kind)
    assert cell.name.startswith(f"{kind}:{rule.action.name}")
    if ":kill:" in cell.name or ":close:" in cell.name:
        assert cell.name.endswith(f":{rule.point}")
