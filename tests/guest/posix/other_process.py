"""A second process of a scenario, for locks, and programs that a scenario runs. Standard library only: guests run it too."""

import errno
import json
import os
import select
import signal
import socket
from contextlib import suppress

ANSWER_SECONDS = 20


class OtherProcess:
    """A fork of the scenario's process that answers steps one at a time, until it is closed."""

    def __init__(self, begin, answer):
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            self.ours.close()
            begin()
            while request := theirs.recv(1 << 16):
                theirs.send(json.dumps(answer(*json.loads(request))).encode())
            os._exit(0)
        theirs.close()

    def send(self, step):
        self.ours.send(json.dumps(step).encode())

    def answers_within(self, seconds):
        return bool(select.select([self.ours], [], [], seconds)[0])

    def receive(self):
        return json.loads(self.ours.recv(1 << 16)) if self.answers_within(ANSWER_SECONDS) else "no answer"

    def ask(self, step):
        self.send(step)
        return self.receive()

    def close(self):
        """The process ends without closing anything itself, as one does that crashes."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.ours.close()


def start_program(path):
    """execve(2) in a child: its process id, once the program runs; OSError if it does not."""
    failed_read, failed_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(path, [path])
        except OSError as error:
            os.write(failed_write, error.errno.to_bytes(2, "little"))
        finally:
            os._exit(127)
    os.close(failed_write)
    try:
        if failed := os.read(failed_read, 2):
            os.waitpid(pid, 0)
            number = int.from_bytes(failed, "little")
            raise OSError(number, errno.errorcode[number])
    finally:
        os.close(failed_read)
    return pid


def end_program(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
