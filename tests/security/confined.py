"""A process that confines itself as one role of vfsd does, then tries one thing. Run by `sandbox.py`, as its own program.

argv: SPEC (JSON, see `sandbox.Spec`) and the descriptor that the outcome is written to. Everything is imported before the
filter is loaded; afterwards it only makes the calls that the test is about, write(2) and exit_group(2).
"""

import ctypes
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

from vfsd import role
from vfsd.errors import ConfigError
from vfsd.sandbox import capabilities, census, lockdown, memory, namespaces, syscalls, user_namespace
from vfsd.sandbox.seccomp_load import load_filter

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
PAGE = 4096
PAGES = 4
_may_end = threading.Semaphore(0)  # what the threads of attempt_end_thread wait for
STATUS_FD = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)  # what it says is of the moment of reading


def main() -> None:
    spec = json.loads(sys.argv[1])
    result_fd = int(sys.argv[2])
    try:
        outcome = {"value": confine_and_attempt(spec, result_fd)}
    except ConfigError as error:
        outcome = {"config_error": str(error)}
    except OSError as error:
        outcome = {"errno": error.errno}
    except MemoryError:
        outcome = {"memory_error": True}
    os.write(result_fd, json.dumps(outcome).encode())
    os._exit(0)


def confine_and_attempt(spec, result_fd):
    for name in spec["lacking"]:
        capabilities.limit_to(capabilities.permitted() & ~capabilities.mask_of([name]))
    if spec["start_uid"] is not None:
        os.setgroups([])
        os.setresgid(*[spec["start_uid"]] * 3)
        os.setresuid(*[spec["start_uid"]] * 3)
    if spec["user_namespace"]:
        syscalls.prctl(4, 1)  # PR_SET_DUMPABLE, which the change of uid cleared: /proc/self would be root's
        user_namespace.enter_user_namespace((), ())
    before = census.open_fds(os.getpid()) if spec["count_fds"] else None
    share = None
    if spec["enter"] == "share":
        share = namespaces.enter_share(spec["sandbox"], os.fsencode(spec["share"]), spec["readonly"])
    elif spec["enter"] == "empty":
        namespaces.enter_empty_root(spec["sandbox"])
    if spec["attempt"] == "each":
        lockdown._allow_nothing_more = lambda: None  # each attempt is made in a child
    if spec["lock"]:
        lock(spec)
    if before is not None:  # not confined by a filter then
        after = [each for each in range(1024) if is_open(each)]
        return {"before": sorted(before), "after": after}
    return ATTEMPTS[spec["attempt"]](spec, share, result_fd)


def lock(spec) -> None:
    if spec["settle"]:
        memory.settle_allocator()
    program = os.pread(spec["filter_fd"], 1 << 20, 0) if spec["filter_fd"] is not None else b""
    lockdown.lock_down(
        lockdown.Confinement(
            role=spec["role"],
            sandbox=spec["sandbox"],
            seccomp_filter=program,
            uid=spec["uid"],
            gid=spec["uid"],
            capabilities=tuple(spec["capabilities"]),
            landlock=spec["landlock"],
            nofile=spec["nofile"],
            supervisor_pidfd=spec["supervisor_pidfd"],
            may_drop_groups=not spec["user_namespace"],
        ),
        start_threads=lambda: start_threads(spec),
    )


def start_threads(spec) -> None:
    for _ in range(spec["threads"]):
        waits = _may_end.acquire if spec["attempt"] == "end_thread" else select.epoll().poll
        threading.Thread(target=waits, daemon=True).start()


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# --- attempts -----------------------------------------------------------------------------------------------------------------


def attempt_syscall(spec, share, result_fd):
    """Raw system calls, one after another; the result of the last, or its errno. Texts are passed by address."""
    result = None
    for number, *arguments in spec["calls"]:
        converted = [ctypes.c_char_p(os.fsencode(each)) if isinstance(each, str) else ctypes.c_long(each) for each in arguments]
        result = _libc.syscall(ctypes.c_long(number), *converted)
        if result == -1:
            raise OSError(ctypes.get_errno(), "")
    return result


def attempt_each(spec, share, result_fd):
    """Many attempts, each in a child of its own, which loads the role's filter and makes the calls of one attempt.

    They come by a memfd, as JSON: a list of lists of calls. Of each: [signal, exit status, result of the last call, errno].
    """
    batch_fd, filter_fd = spec["fds"][:2]
    attempts = json.loads(os.pread(batch_fd, os.fstat(batch_fd).st_size, 0))
    program = os.pread(filter_fd, 1 << 20, 0)
    signal.signal(signal.SIGPIPE, lambda *_: None)
    page = mmap.mmap(-1, PAGES * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    found = []
    for calls in attempts:
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            attempt_alone(calls, program, address, write_fd)
        os.close(write_fd)
        said = os.read(read_fd, PAGE).decode()
        os.close(read_fd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        result, number = (int(word) for word in said.split()) if said else (None, None)
        found.append([-code if code < 0 else None, code if code >= 0 else None, result, number])
    os.pwrite(batch_fd, json.dumps(found).encode(), 0)
    return len(json.dumps(found))


def attempt_alone(calls, program, address, write_fd):
    """Texts: see rule_cases. The alarm is for a call that waits, which none should."""
    signal.alarm(10)
    buffers: dict[str, object] = {}
    converted = [[ctypes.c_long(call[0])] + [argument_of(each, buffers, address) for each in call[1:]] for call in calls]
    load_filter(program)
    result = number = 0
    for call in converted:
        ctypes.set_errno(0)
        result = _libc.syscall(*call)
        number = ctypes.get_errno()
    os.write(write_fd, b"%d %d" % (result, number))
    os._exit(0)


def argument_of(argument, buffers, address):
    if isinstance(argument, int):
        return ctypes.c_ulong(argument & (1 << 64) - 1)
    kind, _, value = argument.partition(":")
    if kind == "page":
        return ctypes.c_ulong(address + int(value) * PAGE)
    if kind == "text":
        return ctypes.c_char_p(value.encode())
    name, _, initial = value.partition("=")
    if name not in buffers:
        buffers[name] = ctypes.create_string_buffer(bytes.fromhex(initial), PAGE)
    return buffers[name]


def attempt_hold(spec, share, result_fd):
    """Say that all is done and stay as we are, for the census."""
    os.write(result_fd, b"confined")
    if spec["role"] == "control":  # which may not read, while a worker may not poll
        poller = select.poll()
        poller.register(spec["hold_fd"], select.POLLIN)
        poller.poll()
    else:
        os.read(spec["hold_fd"], 1)
    os._exit(0)


def attempt_large_allocation(spec, share, result_fd):
    return len(bytearray(1 << 30))


def attempt_churn(spec, share, result_fd):
    """Allocate and free within the heap, small and large, for a while."""
    for size in (100, 10_000, 1_000_000, 20_000_000):
        for _ in range(50):
            kept = [bytearray(size // 10) for _ in range(10)]
            del kept
    return len([{"n": number} for number in range(20_000)])


def attempt_end_thread(spec, share, result_fd):
    """Let the only other thread end, and wait for it; with a filter for ever: Python is done with a thread before the kernel is."""
    _may_end.release()
    threading.enumerate()[1].join()
    if spec["filter_fd"] is not None:
        _may_end.acquire()
    return "the thread has ended"


def attempt_use_up_memory(spec, share, result_fd):
    """Run a role, confined by itself, until no memory is left, not even for small objects. Its channel is the first descriptor."""

    def body(channel, log):
        lock({**spec, "lock": True})
        blocks, size = [], 1 << 24
        while True:
            try:
                blocks.append(bytearray(size))
            except MemoryError:
                if size < 32:
                    raise  # with all that was taken, as the traceback holds this frame
                size //= 2

    role.run_role(SimpleNamespace(channel_fd=spec["fds"][0], log_level=3), spec["role"], body)


def attempt_map_shared(spec, share, result_fd):
    """What guest memory does: map a memfd by Python's mmap, write, unmap."""
    mapped = mmap.mmap(spec["fds"][0], PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    mapped[:5] = b"guest"
    mapped.close()
    return PAGE


def attempt_evaluate(spec, share, result_fd):
    """Python, for what is no single call; `share` and the descriptors passed are at hand."""
    names = {"os": os, "share": share, "fds": spec["fds"], "census": census, "errno_of": errno_of, "libc": _libc}
    if "proc_status" in spec["expression"]:
        names["proc_status"] = os.read(STATUS_FD, PAGE).decode()
    return eval(spec["expression"], names)


def errno_of(function, *arguments, **keywords):
    """The errno that a call fails with, 0 if it does not."""
    try:
        function(*arguments, **keywords)
    except OSError as error:
        return error.errno
    return 0


def attempt_start_child(spec, share, result_fd):
    """As the supervisor does: start the interpreter anew, to confine itself as another role."""
    child = spec["child"]
    read_fd, write_fd = os.pipe()
    fds = [fd for fd in (child["filter_fd"], write_fd) if fd is not None]
    ended = subprocess.run([sys.executable, "-m", "tests.security.confined", json.dumps(child), str(write_fd)], pass_fds=fds, check=False)
    os.close(write_fd)
    return {"status": ended.returncode, "outcome": os.read(read_fd, 1 << 16).decode()}


def attempt_supervise(spec, share, result_fd):
    """Start a child that is bound to this process, tell its pid, and wait to be killed."""
    child = spec["child"]
    pidfd = os.pidfd_open(os.getpid())
    child["supervisor_pidfd"] = pidfd
    read_fd, write_fd = os.pipe()
    pid = syscalls.fork_into(syscalls.CLONE_NEWPID)
    if pid == 0:
        for fd in (child["filter_fd"], child["hold_fd"], write_fd, pidfd):
            if fd is not None:
                os.set_inheritable(fd, True)
        os.execv(sys.executable, [sys.executable, "-m", "tests.security.confined", json.dumps(child), str(write_fd)])
    os.close(write_fd)
    confined = os.read(read_fd, 1 << 16).decode()
    os.write(result_fd, json.dumps({"value": {"pid": pid, "said": confined}}).encode())
    os.waitpid(pid, 0)
    os._exit(0)


ATTEMPTS = {name.removeprefix("attempt_"): function for name, function in list(globals().items()) if name.startswith("attempt_")}

if __name__ == "__main__":
    main()
