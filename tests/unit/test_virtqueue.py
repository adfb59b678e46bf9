"""The virtqueue against a driver in the same memory: what is popped, what is shown to the driver, who wakes whom."""

import gc
import os
import select
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.driver import AVAIL_AT, DATA_AT, DESC_AT, INDIRECT_AT, RAM_BYTES, USED_AT, UVA, Driver
from vfsd.errors import FrontendBreach, GuestBreach
from vfsd.wire.virtio_ring import VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, need_event
from vfsd.worker import virtqueue
from vfsd.worker.guest_memory import GuestMemory
from vfsd.worker.virtqueue import fence

NEXT, WRITE, INDIRECT = VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, VIRTQ_DESC_F_INDIRECT


@pytest.fixture(params=[True, False], ids=["event_idx", "flags"])
def any_driver(request):
    driver = Driver(event_idx=request.param)
    yield driver
    driver.close()


@pytest.fixture
def driver():
    driver = Driver()
    yield driver
    driver.close()


@pytest.fixture
def plain_driver():
    driver = Driver(event_idx=False)
    yield driver
    driver.close()


# Taking


def test_an_empty_ring_gives_nothing(any_driver):
    queue = any_driver.queue()
    assert queue.pop() is None
    assert (queue.last_avail, queue.in_flight) == (0, 0)


def test_a_request_is_popped_with_its_buffers(any_driver):
    queue = any_driver.queue()
    any_driver.describe(5, DATA_AT, 40, NEXT, 2)
    any_driver.describe(2, DATA_AT + 100, 8, NEXT, 0)
    any_driver.describe(0, DATA_AT + 200, 16, NEXT | WRITE, 1)
    any_driver.describe(1, DATA_AT + 4096, 4096, WRITE)
    any_driver.ram[DATA_AT : DATA_AT + 40] = bytes(range(40))
    any_driver.offer(5)
    chain = queue.pop()
    assert chain.head == 5
    assert [len(view) for view in chain.readable] == [40, 8]
    assert [len(view) for view in chain.writable] == [16, 4096]
    assert (chain.readable_bytes, chain.writable_bytes) == (48, 4112)
    assert chain.readable[0] == bytes(range(40))
    chain.writable[0][:] = b"answer__________"
    assert any_driver.ram[DATA_AT + 200 : DATA_AT + 216] == b"answer__________"
    assert queue.in_flight == 1
    assert queue.pop() is None


def test_an_indirect_chain_is_popped_with_its_buffers(driver):
    queue = driver.queue()
    for n in range(300):
        driver.describe(n, DATA_AT + 16 * n, 16, (NEXT if n < 299 else 0) | (WRITE if n else 0), n + 1, table=INDIRECT_AT)
    driver.describe(0, INDIRECT_AT, 300 * 16, INDIRECT)
    driver.offer(0)
    chain = queue.pop()
    assert (len(chain.readable), len(chain.writable)) == (1, 299)
    assert (chain.readable_bytes, chain.writable_bytes) == (16, 299 * 16)


def test_an_indirect_table_and_a_buffer_may_lie_in_two_regions(driver):
    memory = GuestMemory()
    memory.add(driver.ram_fd, 0, INDIRECT_AT + 16, UVA, 0)
    memory.add(driver.ram_fd, INDIRECT_AT + 16, RAM_BYTES - INDIRECT_AT - 16, UVA + 2 * RAM_BYTES, INDIRECT_AT + 16)
    queue = driver.queue(memory=memory)
    driver.describe(0, INDIRECT_AT + 8, 16, NEXT, 1, table=INDIRECT_AT)
    driver.describe(1, DATA_AT, 16, WRITE, table=INDIRECT_AT)
    driver.describe(0, INDIRECT_AT, 32, INDIRECT)
    driver.offer(0)
    chain = queue.pop()
    assert [len(view) for view in chain.readable] == [8, 8]
    assert chain.readable_bytes == 16
    queue.close()
    del chain
    memory.clear()


def test_several_requests_are_popped_in_the_order_offered(any_driver):
    queue = any_driver.queue()
    any_driver.offer_simple(3, 1, 7)
    assert [queue.pop().head for _ in range(3)] == [3, 1, 7]
    assert queue.pop() is None
    any_driver.offer_simple(0)
    assert queue.pop().head == 0
    assert queue.last_avail == 4


def test_the_indexes_wrap(any_driver):
    any_driver.set_avail_idx(0xFFFE)
    any_driver.set_used_idx(0xFFFE)
    queue = any_driver.queue(last_avail=0xFFFE)
    for n in range(5):
        any_driver.offer_simple(n)
        assert queue.pop().head == n
        queue.push(n, 0)
        queue.publish()
    assert (queue.last_avail, any_driver.used_idx) == (3, 3)
    assert [any_driver.used_entry(n) for n in (0xFFFE, 0xFFFF, 0x10000)] == [(0, 0), (1, 0), (2, 0)]


def test_a_started_queue_goes_on_from_the_used_index_in_memory(driver):
    driver.set_avail_idx(9)
    driver.set_used_idx(7)
    queue = driver.queue(last_avail=9)
    driver.offer_simple(4)
    queue.pop()
    queue.push(4, 0)
    queue.publish()
    assert driver.used_idx == 8
    assert driver.used_entry(7) == (4, 0)


def test_what_was_offered_before_the_start_is_found(driver):
    driver.offer_simple(1, 2)
    queue = driver.queue()
    assert [queue.pop().head, queue.pop().head] == [1, 2]


def test_a_full_ring_is_no_jump(driver):
    queue = driver.queue()
    driver.offer_simple(*range(8))
    assert [queue.pop().head for _ in range(8)] == list(range(8))
    assert queue.in_flight == 8


@pytest.mark.parametrize("idx", [9, 0x8000, 0xFFFF])
def test_a_jump_of_the_available_index_is_a_breach(driver, idx):
    queue = driver.queue()
    driver.set_avail_idx(idx)
    with pytest.raises(GuestBreach, match=f"queue 3: avail.idx jumped from 0 to {idx}"):
        queue.pop()


@pytest.mark.parametrize("head", [8, 0xFFFF])
def test_a_head_outside_the_table_is_a_breach(driver, head):
    queue = driver.queue()
    driver.offer(head)
    with pytest.raises(GuestBreach, match=f"queue 3: head {head} lies outside a table of 8"):
        queue.pop()


def test_a_head_in_flight_is_a_breach_until_its_completion_is_published(driver):
    queue = driver.queue()
    driver.offer_simple(6, 6)
    queue.pop()
    with pytest.raises(GuestBreach, match="head 6 was made available while it was in flight"):
        queue.pop()
    queue.push(6, 0)
    with pytest.raises(GuestBreach, match="in flight"):
        queue.pop()
    queue.publish()
    assert queue.pop().head == 6


def lay_out_loop(driver):
    driver.describe(0, DATA_AT, 8, NEXT, 1)
    driver.describe(1, DATA_AT, 8, NEXT, 0)


def lay_out_wrong_order(driver):
    driver.describe(0, DATA_AT, 8, NEXT | WRITE, 1)
    driver.describe(1, DATA_AT, 8)


def lay_out_outside_memory(driver):
    driver.describe(0, RAM_BYTES - 8, 9)


def lay_out_good_then_outside(driver):
    driver.describe(0, DATA_AT, 8, NEXT, 1)
    driver.describe(1, 2**64 - 8, 16, WRITE)


def lay_out_indirect_outside(driver):
    driver.describe(0, RAM_BYTES, 16, INDIRECT)


def lay_out_nested(driver):
    driver.describe(0, INDIRECT_AT, 16, INDIRECT)
    driver.describe(0, INDIRECT_AT, 16, INDIRECT, table=INDIRECT_AT)


def lay_out_indirect_next(driver):
    driver.describe(0, INDIRECT_AT, 16, INDIRECT | NEXT, 1)


def lay_out_zero_length(driver):
    driver.describe(0, DATA_AT, 0)


def lay_out_next_outside(driver):
    driver.describe(0, DATA_AT, 8, NEXT, 8)


def lay_out_odd_indirect(driver):
    driver.describe(0, INDIRECT_AT, 20, INDIRECT)


@pytest.mark.parametrize(
    ("lay_out", "message"),
    [
        (lay_out_loop, "loops or has more than 1024"),
        (lay_out_wrong_order, "device-readable descriptor after"),
        (lay_out_outside_memory, "9 bytes at guest address 0xffff8 are not in guest memory"),
        (lay_out_good_then_outside, "not in guest memory"),
        (lay_out_indirect_outside, "not in guest memory"),
        (lay_out_nested, "inside an indirect table"),
        (lay_out_indirect_next, "indirect descriptor with a next"),
        (lay_out_zero_length, "zero bytes"),
        (lay_out_next_outside, "descriptor 8 lies outside"),
        (lay_out_odd_indirect, "indirect table of 20 bytes"),
    ],
)
def test_a_chain_no_driver_makes_is_a_breach_that_names_queue_and_head(driver, lay_out, message):
    queue = driver.queue()
    lay_out(driver)
    driver.offer(0)
    with pytest.raises(GuestBreach, match=f"queue 3, head 0: .*{message}"):
        queue.pop()
    assert (queue.last_avail, queue.in_flight) == (0, 0)


def test_after_a_breach_the_memory_can_be_unmapped_at_once(driver):
    queue = driver.queue()
    lay_out_good_then_outside(driver)
    driver.offer(0)
    with pytest.raises(GuestBreach):
        queue.pop()
    queue.close()
    driver.ram.release()
    driver.memory.clear()


def test_a_chain_longer_than_4_gib_is_a_breach():
    ram = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(ram, 1 << 31)
    driver = Driver(size=4)
    driver.memory.add(ram, 1 << 32, 1 << 31, 0, 0)
    queue = driver.queue()
    for n in range(3):
        driver.describe(n, 1 << 32, 1 << 31, NEXT if n < 2 else 0, n + 1)
    driver.offer(1)
    assert queue.pop().readable_bytes == 1 << 32
    driver.offer(0)
    with pytest.raises(GuestBreach, match=r"more than 2\^32 bytes"):
        queue.pop()
    driver.close()
    os.close(ram)


def test_a_short_queue_has_the_least_budget_and_a_long_one_its_size():
    driver = Driver(size=2048, event_idx=True)
    queue = driver.queue()
    for n in range(2048):
        driver.describe(n, DATA_AT, 8, NEXT if n < 2047 else 0, n + 1)
    driver.offer(0)
    assert len(queue.pop().readable) == 2048
    driver.close()


# Completing


def test_completions_are_shown_all_at_once_by_publish(any_driver):
    queue = any_driver.queue()
    any_driver.describe(2, DATA_AT, 100, WRITE)
    any_driver.offer(2)
    any_driver.offer_simple(1)
    first, second = queue.pop(), queue.pop()
    queue.push(second.head, 0)
    queue.push(first.head, 100)
    assert any_driver.used_idx == 0
    assert queue.in_flight == 2
    queue.publish()
    assert any_driver.used_idx == 2
    assert queue.in_flight == 0
    assert [any_driver.used_entry(n) for n in (0, 1)] == [(1, 0), (2, 100)]


def test_a_pushed_chain_can_no_longer_be_written(driver):
    queue = driver.queue()
    driver.describe(0, DATA_AT, 16, WRITE)
    driver.offer(0)
    chain = queue.pop()
    queue.push(0, 16)
    with pytest.raises(ValueError, match="released memoryview"):
        chain.writable[0][0] = 1


def test_release_tells_of_a_view_that_a_call_is_using(driver):
    queue = driver.queue()
    driver.describe(0, DATA_AT, 16, NEXT, 1)
    driver.describe(1, DATA_AT, 16, WRITE)
    driver.offer(0)
    chain = queue.pop()
    in_a_call = struct.iter_unpack("B", chain.writable[0])  # holds the buffer, as a preadv in another thread does
    assert not chain.release()
    del in_a_call
    assert chain.release()


def test_pushing_what_is_not_in_flight_is_a_bug_that_shows(driver):
    queue = driver.queue()
    driver.offer_simple(0)
    with pytest.raises(KeyError):
        queue.push(0, 0)
    queue.pop()
    queue.push(0, 0)
    with pytest.raises(KeyError):
        queue.push(0, 0)
    queue.publish()
    with pytest.raises(KeyError):
        queue.push(0, 0)
    assert driver.used_idx == 1


@pytest.mark.parametrize("written", [-1, 17])
def test_claiming_more_than_the_chain_can_hold_is_a_bug_that_shows(driver, written):
    queue = driver.queue()
    driver.describe(0, DATA_AT, 16, WRITE)
    driver.offer(0)
    queue.pop()
    with pytest.raises(ValueError, match="bytes written into a chain of 16"):
        queue.push(0, written)
    queue.push(0, 16)


def test_publishing_nothing_wants_no_call(any_driver):
    queue = any_driver.queue()
    assert queue.publish() is False
    assert any_driver.used_idx == 0


# Who wakes whom


def complete(driver, queue, count=1):
    """Serve `count` requests as one batch; whether the driver is to be called."""
    driver.offer_simple(*range(count))
    for _ in range(count):
        queue.push(queue.pop().head, 0)
    return queue.publish()


def test_with_event_idx_the_first_batch_always_calls(driver):
    driver.set_used_event(100)
    assert complete(driver, driver.queue()) is True


def test_with_event_idx_a_call_is_made_iff_the_batch_passes_used_event(driver):
    queue = driver.queue()
    complete(driver, queue)  # used.idx 1
    driver.set_used_event(1)
    assert complete(driver, queue) is True  # 1 -> 2
    assert complete(driver, queue) is False  # 2 -> 3, the event stayed behind
    driver.set_used_event(5)
    assert complete(driver, queue, 2) is False  # 3 -> 5: the driver waits for the sixth
    assert complete(driver, queue) is True  # 5 -> 6
    driver.set_used_event(9)
    assert complete(driver, queue, 4) is True  # 6 -> 10
    driver.set_used_event(12)
    assert complete(driver, queue, 2) is False  # 10 -> 12


def test_with_event_idx_the_decision_wraps(driver):
    driver.set_avail_idx(0xFFFE)
    driver.set_used_idx(0xFFFE)
    queue = driver.queue(last_avail=0xFFFE)
    complete(driver, queue)  # 0xFFFF
    driver.set_used_event(0)
    assert complete(driver, queue) is False  # 0xFFFF -> 0
    assert complete(driver, queue) is True  # 0 -> 1


def test_with_event_idx_the_flag_of_the_available_ring_is_not_looked_at(driver):
    queue = driver.queue()
    driver.set_no_interrupt(1)
    driver.set_used_event(0)
    assert complete(driver, queue) is True


def test_without_event_idx_the_flag_decides(plain_driver):
    queue = plain_driver.queue()
    assert complete(plain_driver, queue) is True
    plain_driver.set_no_interrupt(1)
    assert complete(plain_driver, queue) is False
    plain_driver.set_no_interrupt(0xFFFE)  # other bits are reserved
    assert complete(plain_driver, queue) is True


def test_with_event_idx_arming_asks_for_a_kick_at_the_next_request(driver):
    queue = driver.queue()
    complete(driver, queue, 3)
    assert queue.arm() is False
    assert driver.avail_event == 3
    assert need_event(driver.avail_event, 4, 3)
    queue.disarm()
    assert driver.avail_event == 3
    assert not need_event(driver.avail_event, 5, 4), "the one kick is spent"
    assert driver.used_flags == 0


def test_without_event_idx_arming_clears_and_disarming_sets_the_flag(plain_driver):
    queue = plain_driver.queue()
    queue.disarm()
    assert plain_driver.used_flags == 1
    assert queue.arm() is False
    assert plain_driver.used_flags == 0


def test_arming_sees_what_came_in_between(any_driver):
    queue = any_driver.queue()
    assert queue.pop() is None
    any_driver.offer_simple(0)
    assert queue.arm() is True
    assert queue.pop().head == 0
    assert queue.arm() is False


@pytest.mark.parametrize(("event_idx", "wish_at"), [(True, USED_AT + 4 + 8 * 8), (False, USED_AT)])
def test_arm_fences_between_its_wish_and_its_look(monkeypatch, event_idx, wish_at):
    """A driver that stores avail.idx just when we fence must be seen."""
    driver = Driver(event_idx=event_idx)
    queue = driver.queue()
    driver.put(wish_at, "<H", 0x5555)
    seen_wish = []

    def offer_now():
        seen_wish.append(driver.get(wish_at))
        driver.offer_simple(0)

    monkeypatch.setattr(virtqueue, "fence", offer_now)
    assert queue.arm() is True
    assert seen_wish == [0]
    driver.close()


def test_publish_fences_between_the_used_index_and_its_look_at_used_event(monkeypatch, driver):
    queue = driver.queue()
    complete(driver, queue)
    driver.set_used_event(50)
    seen_idx = []

    def wish_now():
        seen_idx.append(driver.used_idx)
        driver.set_used_event(1)

    monkeypatch.setattr(virtqueue, "fence", wish_now)
    assert complete(driver, queue) is True
    assert seen_idx == [2]


def test_weakly_ordered_machines_get_more_fences(monkeypatch, driver):
    monkeypatch.setattr(virtqueue, "_TOTAL_STORE_ORDER", False)
    fence()
    fences = []
    monkeypatch.setattr(virtqueue, "fence", lambda: fences.append((driver.get(AVAIL_AT + 2), driver.used_idx)))
    complete(driver, driver.queue())
    assert fences == [(1, 0), (1, 0), (1, 1)], "after avail.idx is read, before and after used.idx is written"


def drive(driver, requests, kick_fd, call_fd):
    """The driver's process: one request at a time, sleeping whenever the device has not answered yet."""
    kicks = 0
    for n in range(requests):
        old = n & 0xFFFF
        driver.set_used_event(old)
        driver.put(AVAIL_AT + 4 + 2 * (n % driver.size), "<H", 0)
        driver.set_avail_idx((n + 1) & 0xFFFF)
        fence()
        if need_event(driver.avail_event, (n + 1) & 0xFFFF, old):
            os.eventfd_write(kick_fd, 1)
            kicks += 1
        for _ in range(n % 7):  # now and then the answer comes before we sleep
            fence()
        while driver.used_idx == old:
            if not select.select([call_fd], [], [], 20)[0]:
                return 1
            os.eventfd_read(call_fd)
    return 0 if kicks else 2


def test_no_wake_up_is_lost_between_two_processes():
    """Both sides sleep as often as they can; one lost kick or call and the other waits for ever."""
    requests = 5000
    driver = Driver()
    driver.describe(0, DATA_AT, 8)
    kick_fd, call_fd = os.eventfd(0), os.eventfd(0)
    queue = driver.queue()
    queue.arm()
    child = os.fork()
    if child == 0:
        outcome = 3
        try:
            outcome = drive(driver, requests, kick_fd, call_fd)
        finally:
            os._exit(outcome)
    served = 0
    while served < requests:
        chain = queue.pop()
        if chain is not None:
            queue.push(chain.head, 0)
            served += 1
            if queue.publish():
                os.eventfd_write(call_fd, 1)
        elif not queue.arm():
            if not select.select([kick_fd], [], [], 20)[0]:
                break
            os.eventfd_read(kick_fd)
    _, status = os.waitpid(child, 0)
    os.close(kick_fd)
    os.close(call_fd)
    driver.close()
    assert (served, os.waitstatus_to_exitcode(status)) == (requests, 0)


# Starting and ending


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 0}, "queue 3: size 0 is not a power of two up to 32768"),
        ({"size": 100}, "size 100 is not"),
        ({"size": 65536}, "size 65536 is not"),
        ({"last_avail": 65536}, "start index 65536"),
        ({"last_avail": -1}, "start index -1"),
        ({"avail_uva": UVA + AVAIL_AT + 1}, "is not aligned"),
        ({"used_uva": UVA + USED_AT + 2}, "is not aligned"),
        ({"desc_uva": UVA + RAM_BYTES - 16}, "a ring of 128 bytes"),
        ({"avail_uva": UVA - 2}, "a ring of 22 bytes"),
        ({"used_uva": UVA + RAM_BYTES - 68}, "a ring of 70 bytes"),
    ],
)
def test_a_start_no_frontend_asks_for_is_a_breach_and_leaves_no_view(driver, changed, message):
    with pytest.raises(FrontendBreach, match=message):
        driver.queue(**changed)
    driver.ram.release()
    driver.memory.clear()


def test_without_event_idx_the_rings_need_no_event_fields(plain_driver):
    plain_driver.queue(used_uva=UVA + RAM_BYTES - 68).close()


def test_closing_gives_all_memory_back_although_chains_are_in_flight(driver):
    queue = driver.queue()
    driver.offer_simple(0, 1, 2)
    chains = [queue.pop(), queue.pop(), queue.pop()]
    queue.push(1, 0)
    queue.close()
    queue.close()
    driver.ram.release()
    driver.memory.clear()
    assert queue.in_flight == 0
    with pytest.raises(ValueError, match="released memoryview"):
        bytes(chains[0].readable[0])


def test_serving_makes_no_garbage_that_only_the_collector_frees(driver):
    """Workers run with the automatic collector off."""
    queue = driver.queue()
    complete(driver, queue)
    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            complete(driver, queue, 3)
        assert gc.collect() == 0
    finally:
        gc.enable()


# Any driver at all

words = st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF))
descriptors = st.tuples(
    st.integers(0, 7),
    st.one_of(st.integers(0, RAM_BYTES + 64), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 64), st.integers(0, 2**32 - 1)),
    st.one_of(st.integers(0, 7), words),
    words,
    st.sampled_from([DESC_AT, INDIRECT_AT]),
)
steps = st.one_of(
    st.tuples(st.just("describe"), descriptors),
    st.tuples(st.just("offer"), words),
    st.tuples(st.just("set_avail_idx"), words),
    st.tuples(st.just("set_used_event"), words),
    st.tuples(st.just("set_used_idx"), words),
    st.tuples(st.just("pop"), st.none()),
    st.tuples(st.just("complete"), st.none()),
    st.tuples(st.just("arm"), st.none()),
)


@given(event_idx=st.booleans(), last_avail=words, program=st.lists(steps, max_size=40))
def test_whatever_the_guest_does_the_queue_gives_requests_or_a_breach(event_idx, last_avail, program):
    driver = Driver(event_idx=event_idx)
    for n in range(8):
        driver.describe(n, DATA_AT + n, n + 1, WRITE if n % 2 else 0)
    driver.set_avail_idx(last_avail)
    queue = driver.queue(last_avail=last_avail)
    popped = []
    for step, value in program:
        if step == "describe":
            number, address, length, flags, following, table = value
            driver.describe(number, address, length, flags, following, table=table)
        elif step == "pop":
            try:
                chain = queue.pop()
            except GuestBreach:
                continue
            if chain is not None:
                assert sum(map(len, chain.readable)) == chain.readable_bytes
                assert sum(map(len, chain.writable)) == chain.writable_bytes
                assert chain.head not in [other.head for other in popped]
                popped.append(chain)
        elif step == "complete":
            for chain in popped:
                queue.push(chain.head, min(chain.writable_bytes, 0xFFFFFFFF))
            queue.publish()
            popped.clear()
        elif step == "arm":
            queue.arm()
            queue.disarm()
        else:
            getattr(driver, step)(value)
        assert queue.in_flight == len(popped)
    driver.close()
