"""Scenarios about what is in files: reading, writing, sizes, holes, mappings, times, locks."""

from itertools import product

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE_RANGE = 1, 2, 8, 16, 32, 64
LARGE = 1 << 40
OPEN_MODES = ("RDONLY", "WRONLY", "RDWR")


def scenarios():
    yield from reads_and_writes()
    yield from sizes_and_holes()
    yield from mappings()
    yield from times()
    yield from locks()


def reads_and_writes():
    for mode, more in product(OPEN_MODES, ("", "APPEND", "TRUNC", "CREAT EXCL", "SYNC", "DSYNC APPEND", "NONBLOCK", "NOATIME")):
        name = "new" if "EXCL" in more else "file"
        yield (
            f"open {mode} {more}",
            [
                ("root", "save", "file", "0123456789"),
                ("root", "open", "f", name, f"{mode} {more}"),
                ("root", "read", "f", 4),
                ("root", "write", "f", "abc"),
                ("root", "seek", "f", 0, "CUR"),
                ("root", "read", "f", 4),
                ("root", "write", "f", "XY", 6),
                ("root", "writev", "f", ["p", "", "qr"], 30),
                ("root", "write", "f", ""),
                ("root", "seek", "f", 0, "CUR"),
                ("root", "seek", "f", 0, "END"),
                ("root", "seek", "f", -100, "CUR"),
                ("root", "seek", "f", LARGE),
                ("root", "read", "f", 4),
                ("root", "read", "f", 100, 0),
                ("root", "read", "f", 4, 3),
                ("root", "ftruncate", "f", 5),
                ("root", "fsync", "f"),
                ("root", "fdatasync", "f"),
                ("root", "fallocate", "f", 0, 0, 100),
                ("root", "map_write", "f", 0, "m"),
                ("root", "map_read", "f", 3),
                ("root", "fchmod", "f", 0o600),
                ("root", "fstat", "f"),
                ("root", "unlink", name),
                ("root", "write", "f", "gone"),
                ("root", "fstat", "f"),
                ("root", "close", "f"),
            ],
        )
    yield "two descriptors of one file", [
        ("root", "open", "a", "file", "RDWR CREAT"), ("root", "open", "b", "file", "RDWR APPEND"), ("root", "write", "a", "one"),
        ("root", "write", "b", "two"), ("root", "read", "b", 10, 0), ("root", "write", "a", "THREE"), ("root", "read", "b", 20, 0),
        ("root", "ftruncate", "a", 2), ("root", "write", "b", "end"), ("root", "read", "a", 20, 0), ("root", "seek", "a", 0, "END"),
        ("root", "open", "c", "file", "WRONLY TRUNC"), ("root", "read", "a", 20, 0), ("root", "write", "a", "late"), ("root", "fstat", "b"),
        ("root", "close", "a"), ("root", "truncate", "file", 3), ("root", "read", "b", 20, 0),
    ]  # fmt: skip
    yield "a directory as a file", [
        ("root", "mkdir", "d"), ("root", "open", "f", "d", "RDONLY"), ("root", "read", "f", 10), ("root", "write", "f", "x"),
        ("root", "ftruncate", "f", 0), ("root", "fsync", "f"), ("root", "fdatasync", "f"), ("root", "seek", "f", 0), ("root", "fallocate", "f", 0, 0, 10),
        ("root", "fchmod", "f", 0o700), ("root", "fchown", "f", 3, 4), ("root", "futimens", "f", 1, 2), ("root", "map_read", "f", 1), ("root", "truncate", "d", 0),
    ]  # fmt: skip
    # A write between ext4's largest offset and the kernel's is left out: with write-back it fails long after the call.
    yield "no room for such an offset", [
        ("root", "open", "f", "file", "RDWR CREAT"), ("root", "write", "f", "x", (1 << 63) - 1), ("root", "ftruncate", "f", (1 << 63) - 1),
        ("root", "truncate", "file", (1 << 63) - 1), ("root", "fallocate", "f", 0, 0, (1 << 63) - 1), ("root", "fallocate", "f", 0, -1, 5),
        ("root", "fallocate", "f", 0, 0, 0), ("root", "seek", "f", -1), ("root", "seek", "f", (1 << 63) - 1), ("root", "read", "f", 1, 1 << 62),
    ]  # fmt: skip
    for source, target, count in product((0, 3, 100), (0, 50), (0, 7, 1 << 20)):
        yield f"copy_file_range {source} {target} {count}", [
            ("root", "save", "from", "0123456789" * 10), ("root", "save", "to", "abc"), ("root", "open", "a", "from", "RDWR"), ("root", "open", "b", "to", "RDWR"),
            ("root", "copy_range", "a", "b", count, source, target), ("root", "read", "b", 200, 0), ("root", "copy_range", "a", "a", count, source, target),
            ("root", "open", "b", "to", "RDWR APPEND"), ("root", "copy_range", "a", "b", count, source, target),
            ("root", "open", "b", "to", "RDONLY"), ("root", "copy_range", "a", "b", count, source, target),
        ]  # fmt: skip


def sizes_and_holes():
    for mode in (
        0,
        KEEP_SIZE,
        PUNCH_HOLE,
        PUNCH_HOLE | KEEP_SIZE,
        ZERO_RANGE,
        ZERO_RANGE | KEEP_SIZE,
        COLLAPSE_RANGE,
        INSERT_RANGE,
        UNSHARE_RANGE,
        0x80,
    ):
        steps = [("root", "open", "f", "file", "RDWR CREAT"), ("root", "write", "f", "z" * 20000, 0)]
        for offset, length in ((0, 4096), (4096, 8192), (16384, 16384), (100, 50), (1 << 20, 4096), (0, 0), (-1, 1)):
            steps += [("root", "fallocate", "f", mode, offset, length), ("root", "fstat", "f"), ("root", "read", "f", 16, max(offset, 0)),
                      ("root", "seek", "f", 0, "HOLE"), ("root", "seek", "f", 5000, "DATA"), ("root", "seek", "f", 0, "END")]  # fmt: skip
        yield f"fallocate with mode {mode}", steps
    for size in (0, 1, 4095, 4096, 4097, 1 << 20, LARGE):
        steps = [
            ("root", "save", "file", "text"),
            ("root", "truncate", "file", size),
            ("root", "open", "f", "file", "RDWR"),
            ("root", "read", "f", 10),
        ]
        for whence, offset in product(("DATA", "HOLE"), (0, 1, 4096, size, size + 1)):
            steps.append(("root", "seek", "f", offset, whence))
        steps += [("root", "write", "f", "end", size + 8192), ("root", "seek", "f", 4096, "DATA"), ("root", "seek", "f", 0, "HOLE")]
        steps += [("root", "ftruncate", "f", 2), ("root", "ftruncate", "f", 10), ("root", "read", "f", 20, 0)]
        yield f"a size of {size}", steps


def mappings():
    yield "shared and private mappings", [
        ("root", "save", "file", "0" * 5000), ("root", "open", "f", "file", "RDWR"), ("root", "map_write", "f", 3, "shared"),
        ("root", "read", "f", 12, 0), ("root", "map_write", "f", 20, "private", False), ("root", "read", "f", 30, 0), ("root", "write", "f", "written", 40),
        ("root", "map_read", "f", 50), ("root", "in_other", "open", "g", "file", "RDONLY"), ("root", "in_other", "map_read", "g", 50),
        ("root", "map_write", "f", 1, "again"), ("root", "in_other", "map_read", "g", 50), ("root", "fstat", "f"), ("root", "truncate", "file", 4100),
        ("root", "map_read", "f", 50), ("root", "fsync", "f"), ("root", "lstat", "file"), ("root", "unlink", "file"), ("root", "map_write", "f", 0, "gone"),
        ("root", "read", "f", 10, 0),
    ]  # fmt: skip


def times():
    values = (
        0,
        1,
        999_999_999,
        10**9,
        10**18 + 123_456_789,
        -1,
        -(10**9),
        -(10**9) + 1,
        (1 << 31) * 10**9,
        (1 << 34) * 10**9,
        "now",
        "omit",
    )
    for actor, link in product(("root", "owner"), (False, True)):
        call = "utimens_link" if link else "utimens"
        steps = [
            ("root", "save", "f", "x"),
            ("root", "chown", "f", 1000, 1000),
            ("root", "symlink", "f", "s"),
            ("root", "lchown", "s", 1000, 1000),
        ]
        steps += [("root", "utimens", "f", 5, 6), ("root", "utimens_link", "s", 7, 8)]
        for atime, mtime in product(values, values):
            steps.append((actor, call, "s", atime, mtime))
        yield f"{call}, {actor}", steps
    yield "times move with the calls that move them", [
        ("root", "mkdir", "d"), ("root", "utimens", "d", 1, 2), ("root", "save", "d/f", "x"), ("root", "utimens", "d", 3, 4), ("root", "chmod", "d/f", 0o600),
        ("root", "utimens", "d/f", 5, 6), ("root", "open", "f", "d/f", "RDWR"), ("root", "write", "f", ""), ("root", "write", "f", "y"), ("root", "read", "f", 5, 0),
        ("root", "utimens", "d/f", 7, 8), ("root", "truncate", "d/f", 1), ("root", "utimens", "d/f", 9, 10), ("root", "ftruncate", "f", 1),
        ("root", "utimens", "d/f", 11, 12), ("root", "rename", "d/f", "d/g"), ("root", "utimens", "d", 13, 14), ("root", "link", "d/g", "d/h"),
        ("root", "utimens", "d", 15, 16), ("root", "unlink", "d/h"), ("root", "utimens", "d", 17, 18), ("root", "mkdir", "d/e"), ("root", "utimens", "d/e", 19, 20),
        ("root", "rename", "d/g", "d/e/g"), ("root", "utimens", "d", 21, 22), ("root", "symlink", "x", "d/s"), ("root", "utimens", "d", 23, 24),
        ("root", "mknod", "d/p", "IFO"), ("root", "open", "t", "d/e/g", "WRONLY TRUNC"), ("root", "utimens", "d/e/g", 25, 26), ("root", "chown", "d/e/g", 1, 1),
        ("root", "futimens", "f", 27, "omit"), ("root", "futimens", "f", "omit", 28), ("root", "fallocate", "f", 0, 0, 50), ("root", "fsync", "f"),
        ("root", "utimens", "d/e/g", 29, 30), ("root", "open", "t", "d/e/g", "RDONLY"), ("root", "read", "t", 3), ("root", "utimens", "d", 31, 32), ("root", "list", "d"),
    ]  # fmt: skip


def locks():
    """Between two processes: who is refused, who waits, and what ends a lock."""
    opened = [("root", "save", "file", "x" * 100), ("root", "open", "f", "file", "RDWR"), ("root", "in_other", "open", "g", "file", "RDWR")]
    for mine, theirs in product(("read", "write"), ("read", "write")):
        for start, length in ((0, 0), (0, 10), (5, 5), (10, 10), (90, 0)):
            for command in ("F_SETLK", "F_OFD_SETLK"):
                yield (
                    f"{command} {mine} 0-10, then {theirs} {start}+{length}",
                    [
                        *opened,
                        ("root", "lock", "f", mine, 0, 10, command),
                        ("root", "in_other", "who_locks", "g", theirs, start, length, command.replace("SETLK", "GETLK")),
                        ("root", "in_other", "lock", "g", theirs, start, length, command),
                        ("root", "lock", "f", "unlock", 3, 4, command),
                        ("root", "in_other", "lock", "g", "write", 3, 4, command),
                        ("root", "who_locks", "f", "write", 0, 0, command.replace("SETLK", "GETLK")),
                    ],
                )
    yield "a lock that waits", [
        *opened, ("root", "lock", "f", "write"), ("root", "begin_in_other", "lock", "g", "write", 0, 0, "F_SETLKW"), ("root", "other_waits"),
        ("root", "lock", "f", "unlock"), ("root", "end_in_other"), ("root", "lock", "f", "read"), ("root", "end_other"), ("root", "lock", "f", "write"),
    ]  # fmt: skip
    yield "closing any descriptor ends POSIX locks", [
        *opened, ("root", "open", "h", "file", "RDONLY"), ("root", "lock", "f", "write"), ("root", "in_other", "lock", "g", "write"),
        ("root", "close", "h"), ("root", "in_other", "lock", "g", "write"), ("root", "lock", "f", "read"), ("root", "in_other", "close", "g"),
        ("root", "lock", "f", "read"), ("root", "open", "r", "file", "RDONLY"), ("root", "lock", "r", "write"), ("root", "lock", "r", "read"),
    ]  # fmt: skip
    for mine, theirs in product(("SH", "EX"), ("SH", "EX")):
        yield f"flock {mine}, then {theirs}", [
            *opened, ("root", "flock", "f", f"{mine} NB"), ("root", "in_other", "flock", "g", f"{theirs} NB"), ("root", "flock", "f", "EX NB"),
            ("root", "in_other", "lock", "g", "write"), ("root", "close", "f"), ("root", "in_other", "flock", "g", "EX NB"),
            ("root", "open", "f", "file", "RDONLY"), ("root", "flock", "f", "SH NB"), ("root", "begin_in_other", "flock", "g", "UN"), ("root", "end_in_other"),
            ("root", "flock", "f", "EX NB"), ("root", "begin_in_other", "flock", "g", "EX"), ("root", "other_waits"), ("root", "close", "f"), ("root", "end_in_other"),
        ]  # fmt: skip
