"""Leader and followers with real threads; the watchdog's clock is the test's own, so nothing here waits for time."""

import queue
import threading
import time
from collections import deque
from contextlib import suppress

import pytest

from vfsd.broker.pool import STUCK_SECONDS, Pool
from vfsd.broker.whereabouts import Place, Whereabouts

PATIENCE = 20.0  # seconds until a test that hangs fails
LATER = 1e12  # a watchdog's "now" at which every running task is late


def until(condition):
    """For the moment between a delivery and what the thread does next, of which it tells nobody."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Task:
    """Runs until `finish` is set; a free one at once. `at`: the name it looks up in the directory `nodeid`."""

    def __init__(self, name, mount=0, *, stuck=False, nodeid=0, at=None, found=False):
        self.name = name
        self.place = Place(mount, nodeid, at)
        self.found = found
        self.steps = []  # of a listing: names, each held until its event is set
        self.ended_early = False
        self.outdated = False
        self.refused = threading.Event()
        self.started = threading.Event()
        self.finish = threading.Event()
        self.delivered = threading.Event()
        self.late = None
        self.thread = None
        if not stuck:
            self.finish.set()

    def __repr__(self):
        return self.name

    def wait_started(self):
        assert self.started.wait(PATIENCE), f"{self} was never run"

    def wait_delivered(self):
        assert self.delivered.wait(PATIENCE), f"{self} was never delivered"


class Step:
    """One name of a listing."""

    def __init__(self, name):
        self.name = name
        self.started = threading.Event()
        self.finish = threading.Event()

    def run(self):
        self.started.set()
        assert self.finish.wait(PATIENCE)


class Turns:
    """pool.Work: packets come from the test."""

    def __init__(self):
        self.packets = queue.SimpleQueue()
        self.finished = queue.SimpleQueue()
        self.order = []
        self.leaders = []
        self.generation = 0
        self.whereabouts = Whereabouts()

    def next_turn(self):
        packet = self.packets.get()
        if packet is None:
            raise SystemExit
        self.leaders.append(threading.current_thread().name)
        return packet

    def place_of(self, task):
        return task.place

    def is_outdated(self, task):
        return task.outdated

    def refuse(self, task):
        task.refused.set()

    def run(self, task):
        task.thread = threading.current_thread().name
        if task.found:
            self.whereabouts.found_it()
        task.started.set()
        for step in task.steps:
            if not self.whereabouts.go_on_to(step.name):
                task.ended_early = True
                break
            step.run()
        assert task.finish.wait(PATIENCE)

        def deliver(late):
            task.late = late
            self.order.append(task.name)
            task.delivered.set()

        return deliver

    def finish_turn(self):
        self.finished.put(True)


class EndingPool(Pool):
    """The daemon's threads never end; a test's do."""

    def _live(self, member, prepare_thread, ready):
        with suppress(SystemExit):
            super()._live(member, prepare_thread, ready)


def _raise(error):
    raise error


class Bench:
    def __init__(self, threads, released):
        self.work = Turns()
        self.woken = queue.SimpleQueue()
        self.pool = EndingPool(self.work, threads, self.work.whereabouts, lambda: self.woken.put(True), _raise)
        if released is not None:
            self.pool._released = released
        self.prepared = []
        before = set(threading.enumerate())
        self.pool.start(lambda: self.prepared.append(threading.current_thread().name))
        self.threads = set(threading.enumerate()) - before
        self.tasks = []

    def release(self):
        self.pool.release()
        assert self.work.finished.get(timeout=PATIENCE)  # the leader's empty first turn

    def send(self, *tasks):
        self.tasks += tasks
        self.work.packets.put(deque(tasks))

    def wait_turn(self):
        """Until a packet is in no more hands but those of late threads."""
        assert self.work.finished.get(timeout=PATIENCE)

    def promote(self):
        assert self.pool.promote_if_stuck(LATER)

    def hang(self, *tasks):
        """Send each and see it late."""
        for task in tasks:
            self.send(task)
            task.wait_started()
            self.promote()
            self.wait_turn()

    def passes(self, *tasks):
        """These run at once, whatever hangs; none is left behind."""
        self.send(*tasks)
        for task in tasks:
            task.wait_delivered()
        self.wait_turn()

    def waits(self, *tasks):
        """These are put aside."""
        self.send(*tasks)
        self.wait_turn()
        assert not any(task.started.is_set() for task in tasks)

    def close(self):
        for task in self.tasks:
            task.finish.set()
            for step in task.steps:
                step.finish.set()
        self.pool.release()
        for _ in self.threads:
            self.work.packets.put(None)
        for member in self.pool._members:
            member.wake.release()
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture
def make_bench():
    made = []

    def make_bench(threads=4, *, release=True, released=None):
        made.append(Bench(threads, released))
        if release:
            made[-1].release()
        return made[-1]

    yield make_bench
    for bench in made:
        bench.close()


@pytest.fixture
def bench(make_bench):
    return make_bench()


def test_every_thread_is_prepared_before_start_returns_and_serves_after_release(make_bench):
    bench = make_bench(6, release=False)
    assert sorted(bench.prepared) == [f"pool{index}" for index in range(6)]
    task = Task("early")
    bench.send(task)
    assert not task.started.is_set()
    bench.release()
    task.wait_delivered()


def test_a_thread_promoted_before_it_was_quite_there_is_promoted_once(make_bench):
    """On a busy machine the first leader may be stuck before a follower has seen that it may serve: two must not lead after that."""
    may_see = threading.Event()

    class SlowToSee(threading.Event):
        def wait(self, timeout=None):
            super().wait(timeout)
            if threading.current_thread().name == "pool1":
                assert may_see.wait(PATIENCE)

    bench = make_bench(2, released=SlowToSee())
    stuck, after = Task("stuck", 1, stuck=True), Task("after", 2)
    bench.send(stuck, after)
    stuck.wait_started()
    bench.promote()
    may_see.set()
    after.wait_delivered()
    assert after.thread == "pool1"
    assert bench.pool._members[1].wake._value == 0, "it would lead again without having been promoted"


def test_one_thread_serves_while_nothing_is_stuck(bench):
    tasks = [Task(str(number), mount=number % 3) for number in range(30)]
    for start in range(0, 30, 10):
        bench.send(*tasks[start : start + 10])
        bench.wait_turn()
    assert {task.thread for task in tasks} == {"pool0"}
    assert {task.late for task in tasks} == {False}
    assert bench.work.order == [str(number) for number in range(30)]


def test_a_stuck_leader_is_replaced_and_its_answer_comes_late(bench):
    stuck, rest, next_packet = Task("stuck", 1, stuck=True), Task("rest", 1), Task("next", 1)
    bench.send(stuck, rest)
    stuck.wait_started()
    assert not rest.started.is_set()
    bench.promote()
    rest.wait_delivered()
    bench.wait_turn()
    bench.send(next_packet)
    next_packet.wait_delivered()
    assert (rest.late, next_packet.late) == (False, False)
    assert not stuck.delivered.is_set()
    assert "pool0" not in {rest.thread, next_packet.thread}
    stuck.finish.set()
    stuck.wait_delivered()
    assert stuck.late is True


def test_only_a_task_that_runs_for_too_long_is_stuck(bench):
    assert bench.pool.promote_if_stuck(LATER) is False, "nothing runs"
    stuck, rest = Task("stuck", stuck=True), Task("rest")
    bench.send(stuck, rest)
    stuck.wait_started()
    since = bench.pool._leader.busy_since
    assert bench.pool.promote_if_stuck(since + STUCK_SECONDS * 0.99) is True
    assert bench.pool._leader.name == "pool0"
    assert not rest.started.is_set()
    assert bench.pool.promote_if_stuck(since + STUCK_SECONDS * 1.01) is True
    rest.wait_delivered()
    assert STUCK_SECONDS <= 0.01


def test_a_late_thread_leads_again_when_its_turn_comes(make_bench):
    bench = make_bench(2)
    leaders = []
    for number in range(5):
        stuck, after = Task(f"stuck{number}", 1, stuck=True), Task(f"after{number}", 2)
        bench.send(stuck, after)
        stuck.wait_started()
        leaders.append(stuck.thread)
        bench.promote()
        after.wait_delivered()
        bench.wait_turn()
        stuck.finish.set()
        stuck.wait_delivered()
        until(lambda: bench.pool._followers)  # the late thread parks just after it has delivered
    assert leaders == ["pool0", "pool1", "pool0", "pool1", "pool0"]


def test_a_dead_mount_takes_at_most_half_of_the_threads(make_bench):
    bench = make_bench(8)
    dead = [Task(f"dead{number}", 1, stuck=True) for number in range(4)]
    waiting = [Task(f"waiting{number}", 1) for number in range(5)]
    elsewhere = [Task(f"elsewhere{number}", 2) for number in range(5)]
    for task in dead:
        bench.send(task)
        task.wait_started()
        bench.promote()
        bench.wait_turn()
    for task, other in zip(waiting, elsewhere, strict=True):
        bench.send(task, other)
        other.wait_delivered()
        bench.wait_turn()
    assert not any(task.started.is_set() for task in waiting)
    assert len(bench.pool._followers) == 3
    assert {task.late for task in elsewhere} == {False}
    dead[2].finish.set()
    for task in [dead[2], *waiting]:
        task.wait_delivered()
        assert task.late is True
        assert task.thread == dead[2].thread
    assert bench.work.order[-5:] == [task.name for task in waiting], "in the order they came"
    for task in dead:
        task.finish.set()
        task.wait_delivered()
    alive = Task("alive again", 1)
    until(lambda: not bench.pool._late)
    bench.send(alive)
    alive.wait_delivered()
    assert alive.late is False


def test_two_dead_mounts_leave_a_quarter_of_the_threads(make_bench):
    bench = make_bench(8)
    dead = [Task(f"dead{number}", 1 + number % 2, stuck=True) for number in range(6)]
    bench.hang(*dead)
    more = [Task("more1", 1), Task("more2", 2)]
    bench.waits(*more)
    assert len(bench.pool._followers) == 1
    bench.passes(*(Task(f"elsewhere{number}", 3) for number in range(5)))
    slow = Task("slow", 3, stuck=True)
    bench.hang(slow)
    slow.finish.set()
    slow.wait_delivered()
    dead[1].finish.set()
    more[1].wait_delivered()
    assert not more[0].started.is_set(), "it waits for its own mount"
    for task in dead:
        task.finish.set()
    more[0].wait_delivered()
    until(lambda: not bench.pool._late and not bench.pool._late_threads)
    bench.passes(Task("again1", 1), Task("again2", 2))


def test_the_last_thread_cannot_be_replaced_and_goes_on_by_itself(make_bench):
    bench = make_bench(2)
    first, last = Task("first", 1, stuck=True), Task("last", 2, stuck=True)
    bench.hang(first)
    bench.send(last)
    last.wait_started()
    bench.promote()
    assert bench.pool._leader.name == last.thread
    assert bench.pool.all_hang()
    after = Task("after", 3)
    bench.send(after)
    last.finish.set()
    after.wait_delivered()
    assert last.late is False
    until(lambda: not bench.pool.all_hang())


def test_a_name_that_hangs_costs_one_thread_and_nothing_else_waits(make_bench):
    bench = make_bench(8)
    dead = Task("dead", 1, nodeid=5, at=b"dead", stuck=True, found=True)
    bench.hang(dead)
    same = [Task(f"same{number}", 1, nodeid=5, at=b"dead") for number in range(20)]
    bench.waits(*same)
    bench.passes(Task("sibling", 1, nodeid=5, at=b"alive"), Task("elsewhere", 1, nodeid=6, at=b"dead"), Task("itself", 1, nodeid=5))
    assert len(bench.pool._followers) == 6
    dead.finish.set()
    for task in [dead, *same]:
        task.wait_delivered()
        assert (task.late, task.thread) == (True, dead.thread)
    assert bench.work.order[-20:] == [task.name for task in same]


def test_a_name_that_hangs_again_is_waited_for_again(make_bench):
    bench = make_bench(4)
    first, second, third = (Task(f"{number}", 1, nodeid=5, at=b"dead", stuck=True) for number in range(3))
    bench.hang(first)
    bench.waits(second)
    first.finish.set()
    second.wait_started()
    bench.waits(third)
    second.finish.set()
    third.finish.set()
    third.wait_delivered()
    until(lambda: len(bench.pool._followers) == 3)


def test_names_that_hang_are_not_on_the_account_of_the_mount_they_were_found_in(make_bench):
    bench = make_bench(8)
    bench.hang(*(Task(f"dead{number}", 1, nodeid=5, at=b"%d" % number, stuck=True, found=True) for number in range(4)))
    bench.passes(Task("file", 1, nodeid=9), Task("other directory", 1, nodeid=6, at=b"name"), Task("listing", 1, nodeid=6, at=b""))
    bench.waits(Task("fifth name", 1, nodeid=5, at=b"x"), Task("listing of the names", 1, nodeid=5, at=b""))


def test_a_mount_that_answers_is_not_charged_for_what_hangs_at_its_names(make_bench):
    """Opening the root of a dead NFS mount hangs before it is found; whatever else its parent's mount answers tells them apart."""
    bench = make_bench(8)
    dead = [Task(f"dead{number}", 1, nodeid=5, at=b"%d" % number, stuck=True) for number in range(4)]
    bench.hang(*dead[:3])
    bench.passes(Task("alive", 1, nodeid=9))
    bench.hang(dead[3])
    bench.passes(Task("alive still", 1, nodeid=9))
    bench.hang(Task("a slow file", 1, nodeid=9, stuck=True))
    bench.passes(Task("alive yet", 1, nodeid=9))
    for task in bench.tasks:
        task.finish.set()
    until(lambda: not bench.pool._late)


def test_what_waits_for_a_mount_goes_on_when_the_mount_turns_out_to_answer(make_bench):
    bench = make_bench(8)
    bench.hang(*(Task(f"dead{number}", 1, nodeid=5, at=b"%d" % number, stuck=True) for number in range(4)))
    elsewhere, same = Task("elsewhere", 1, nodeid=6, at=b"x"), Task("same directory", 1, nodeid=5, at=b"x")
    bench.waits(elsewhere, same)
    bench.passes(Task("probe", 1, nodeid=9))
    elsewhere.wait_delivered()
    assert elsewhere.late is True, "not with the packet of the probe, which may be another worker's"
    assert not same.started.is_set()
    bench.tasks[0].finish.set()
    same.wait_delivered()


def test_a_mount_that_does_not_answer_costs_one_thread_to_find_out(make_bench):
    bench = make_bench(8)
    bench.hang(*(Task(f"dead{number}", 1, nodeid=5, at=b"%d" % number, stuck=True) for number in range(4)))
    bench.hang(Task("probe", 1, nodeid=9, stuck=True))
    bench.waits(Task("file", 1, nodeid=9), Task("name", 1, nodeid=6, at=b"x"))
    bench.passes(Task("elsewhere", 2))
    for task in bench.tasks:
        task.finish.set()
        task.wait_delivered()
    until(lambda: not bench.pool._late)


def test_a_listing_that_goes_on_is_not_late(make_bench):
    bench = make_bench(4)
    listing = Task("listing", 1, nodeid=5, at=b"")
    listing.steps = [Step(b"%d" % number) for number in range(3)]
    bench.send(listing)
    begun = 0.0
    for step in listing.steps:
        assert step.started.wait(PATIENCE)
        since = bench.pool._leader.busy_since
        assert since > begun
        bench.pool.promote_if_stuck(since + STUCK_SECONDS * 0.9)
        begun = since
        step.finish.set()
    listing.wait_delivered()
    assert listing.late is False


def test_a_listing_hangs_at_the_name_it_is_at_and_ends_early_if_that_is_waited_for(make_bench):
    bench = make_bench(4)
    listing, lookup = Task("listing", 1, nodeid=5, at=b""), Task("lookup", 1, nodeid=5, at=b"1")
    listing.steps = [Step(b"%d" % number) for number in range(4)]
    bench.send(listing)
    listing.steps[0].finish.set()
    assert listing.steps[1].started.wait(PATIENCE)
    bench.promote()
    bench.wait_turn()
    assert bench.work.whereabouts.hanging_at(5, b"1")
    assert not bench.work.whereabouts.hanging_at(5, b"0")
    bench.passes(Task("other name", 1, nodeid=5, at=b"2"))
    bench.waits(lookup)
    listing.steps[1].finish.set()
    lookup.wait_delivered()
    assert listing.ended_early
    assert not listing.steps[2].started.is_set()


def test_what_nobody_needs_any_more_does_not_go_on_waiting(make_bench):
    bench = make_bench(4)
    dead = [Task("dead", 1, nodeid=5, at=b"x", stuck=True), Task("dead too", 1, nodeid=8, stuck=True)]
    bench.hang(*dead)
    old = [Task("old name", 1, nodeid=5, at=b"x"), Task("old", 1, nodeid=9)]
    new = [Task("new name", 1, nodeid=5, at=b"x"), Task("new", 1, nodeid=9)]
    bench.waits(*old, *new)
    for task in old:
        task.outdated = True
    bench.work.generation += 1
    bench.passes(Task("any", 2))
    for task in old:
        assert task.refused.wait(PATIENCE)
        assert not task.started.is_set()
    for task in dead:
        task.finish.set()
    for task in new:
        task.wait_delivered()
        assert not task.refused.is_set()


def test_tasks_of_no_mount_are_never_kept_waiting(make_bench):
    bench = make_bench(8)
    for number in range(6):
        stuck = Task(f"stuck{number}", 0, stuck=True)
        bench.send(stuck)
        stuck.wait_started()
        bench.promote()
        bench.wait_turn()
    free = Task("free", 0)
    bench.send(free)
    free.wait_delivered()


def test_a_sleeping_watchdog_is_woken_by_the_next_task_once(bench):
    assert bench.pool.let_watchdog_sleep() is True
    bench.send(Task("one"), Task("two"))
    bench.wait_turn()
    assert bench.woken.get(timeout=PATIENCE)
    assert bench.woken.empty()
    bench.send(Task("three"))
    bench.wait_turn()
    assert bench.woken.empty(), "it is awake"


def test_the_watchdog_does_not_sleep_while_a_task_runs(bench):
    stuck = Task("stuck", stuck=True)
    bench.send(stuck)
    stuck.wait_started()
    assert bench.pool.let_watchdog_sleep() is False
    stuck.finish.set()
    bench.wait_turn()
    assert bench.pool.let_watchdog_sleep() is True


def test_no_task_runs_unseen_by_a_watchdog_that_goes_to_sleep(bench):
    """However the two race: either the watchdog stays awake, or the task wakes it."""
    for number in range(300):
        task = Task(str(number), stuck=True)
        bench.send(task)
        slept = bench.pool.let_watchdog_sleep()
        task.wait_started()
        if slept:
            assert bench.woken.get(timeout=PATIENCE)
        assert bench.pool.promote_if_stuck(0.0) is True
        task.finish.set()
        bench.wait_turn()
        assert bench.woken.empty()


def test_many_stuck_tasks_and_promotions_lose_nothing(make_bench):
    bench = make_bench(4)
    names = (None, b"", b"a", b"b", b"c")
    tasks = [
        Task(str(number), number % 3, stuck=number % 4 == 0, nodeid=1 + number % 2, at=names[number % 5], found=number % 7 == 0)
        for number in range(400)
    ]
    for start in range(0, 400, 10):
        bench.send(*tasks[start : start + 10])

    def all_delivered():
        bench.pool.promote_if_stuck(LATER)
        for task in tasks:
            if task.started.is_set():
                task.finish.set()
        return all(task.delivered.is_set() for task in tasks)

    until(all_delivered)
    assert sorted(bench.work.order, key=int) == [task.name for task in tasks], "each exactly once"
    until(lambda: len(bench.pool._followers) == 3)
    assert (bench.pool._late, bench.pool._late_threads, bench.pool._waiting) == ({}, [], {})
