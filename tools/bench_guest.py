"""Workloads that run inside the benchmark's guests. Sent over as source: Python's standard library only.

Each takes the mounted directory and gives [operations, seconds]. The tree below `data` is made by bench.py on the host.
"""

import mmap
import os
import random
import time
from collections.abc import Callable

CHUNK = 1 << 20


def timed(operations: int, action: Callable[[], object]) -> list[float]:
    start = time.monotonic()
    action()
    return [operations, time.monotonic() - start]


def drop_caches() -> None:
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as control:
        control.write("3")


def stat_cold(root: str) -> list[float]:
    """LOOKUP of names the guest has forgotten."""
    names = [f"{root}/data/small/{number:04d}" for number in range(2000)]
    drop_caches()
    os.stat(f"{root}/data/small")
    return timed(len(names), lambda: [os.stat(name) for name in names])


def stat_missing(root: str) -> list[float]:
    """LOOKUP of names that are not there."""
    names = [f"{root}/data/small/missing-{number}-{random.random()}" for number in range(2000)]
    return timed(len(names), lambda: [os.path.lexists(name) for name in names])


def list_cold(root: str) -> list[float]:
    """A directory of 2000 entries, listed with attributes: READDIRPLUS."""
    drop_caches()
    return timed(2000, lambda: [entry.stat(follow_symlinks=False) for entry in os.scandir(f"{root}/data/small")])


def read_small_cold(root: str) -> list[float]:
    """Open, read and close 2000 files of 2 KB that the guest has forgotten."""
    drop_caches()

    def work() -> None:
        for number in range(2000):
            descriptor = os.open(f"{root}/data/small/{number:04d}", os.O_RDONLY)
            os.read(descriptor, 4096)
            os.close(descriptor)

    return timed(2000, work)


def create_small(root: str) -> list[float]:
    """Create, write and close 1000 files."""
    folder = f"{root}/made"
    os.mkdir(folder)

    def work() -> None:
        for number in range(1000):
            descriptor = os.open(f"{folder}/{number}", os.O_CREAT | os.O_WRONLY, 0o644)
            os.write(descriptor, b"x" * 2000)
            os.close(descriptor)

    return timed(1000, work)


def remove_small(root: str) -> list[float]:
    """Remove what create_small made."""
    folder = f"{root}/made"
    result = timed(1000, lambda: [os.unlink(f"{folder}/{number}") for number in range(1000)])
    os.rmdir(folder)
    return result


def read_4k_direct(root: str) -> list[float]:
    """Random reads of 4 KiB past the guest's cache, one at a time."""
    descriptor = os.open(f"{root}/data/large", os.O_RDONLY | os.O_DIRECT)
    offsets = [random.randrange(os.fstat(descriptor).st_size // 4096) * 4096 for _ in range(3000)]
    with mmap.mmap(-1, 4096) as buffer:
        result = timed(len(offsets), lambda: [os.preadv(descriptor, [buffer], offset) for offset in offsets])
    os.close(descriptor)
    return result


def read_large_cold(root: str) -> list[float]:
    """A file of 64 MiB through the guest's cache, per MiB."""
    drop_caches()
    with open(f"{root}/data/large", "rb", buffering=0) as file, mmap.mmap(-1, CHUNK) as buffer:

        def work() -> None:
            while file.readinto(buffer):
                pass

        return timed(os.fstat(file.fileno()).st_size // CHUNK, work)


def write_large(root: str) -> list[float]:
    """A file of 64 MiB, per MiB."""
    name = f"{root}/written"
    data = bytes(CHUNK)
    descriptor = os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    result = timed(64, lambda: [os.write(descriptor, data) for _ in range(64)])
    os.close(descriptor)
    os.unlink(name)
    return result
