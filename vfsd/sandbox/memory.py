"""The C allocator and Python's collector, settled so that a confined process asks the kernel for no memory any more.

Control and workers lose mmap and brk with their filter. What they will ever allocate is therefore taken before: malloc's
only heap is grown once by `HEAP_BYTES` and never trimmed. An allocation beyond it is a clean MemoryError.
"""

from __future__ import annotations

import ctypes
import gc

HEAP_BYTES = 64 << 20  # address space, not memory: pages that are never touched cost nothing

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_NEVER = 2**31 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.malloc.argtypes = (ctypes.c_size_t,)
_libc.malloc.restype = ctypes.c_void_p
_libc.free.argtypes = (ctypes.c_void_p,)
_libc.free.restype = None


def settle_allocator() -> None:
    """Take the heap now, and stop the automatic garbage collector. Call it once all is imported, before threads start.

    gc: the daemon makes no cycles per request (see errors.drop_traceback), and a collection would touch every object; what exists now is never looked at again.
    """
    settings = (
        (_M_MMAP_MAX, 0),  # large blocks come from the heap, not from mmap
        (_M_ARENA_MAX, 1),  # threads share the one heap: another would need mmap and mprotect
        (_M_TRIM_THRESHOLD, _NEVER),  # what was freed is not given back
    )
    for parameter, value in settings:
        _mallopt(parameter, value)
    # One block of that size makes the heap grow; given back, it is room for everything to come.
    _libc.free(_libc.malloc(HEAP_BYTES))
    gc.collect()
    gc.freeze()
    gc.disable()


def share_one_heap() -> None:
    """For the broker, whose heap may grow: let all threads use the one that brk moves. Call it before threads start.

    glibc gives threads heaps of their own, and before it shrinks one of those it reads /proc/sys/vm/overcommit_memory: a
    file that is not in the share, by a call that the filter does not allow.
    """
    _mallopt(_M_ARENA_MAX, 1)


def _mallopt(parameter: int, value: int) -> None:
    if _libc.mallopt(parameter, value) != 1:
        raise OSError(f"mallopt({parameter}, {value}) was refused by the C library")
