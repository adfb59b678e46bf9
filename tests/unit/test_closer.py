import os
from queue import SimpleQueue

from vfsd.broker.closer import Closer, _DeferredFd


def test_closing_is_left_to_the_other_thread():
    queue = SimpleQueue()
    read, write = os.pipe()
    deferred = _DeferredFd(write, queue)
    deferred.close()
    assert deferred.closed
    os.write(write, b"still open")
    assert queue.get() == write
    assert queue.empty()
    deferred.close()
    assert queue.empty(), "closed once"
    os.close(read)
    os.close(write)


def test_the_thread_closes_what_it_is_given_and_goes_on_after_an_error():
    closer = Closer()
    closer.start()
    not_open = 1 << 20
    closer.own(not_open).close()
    read, write = os.pipe()
    closer.own(write).close()
    assert os.read(read, 1) == b"", "the end of the pipe: its only writer was closed"
    os.close(read)
