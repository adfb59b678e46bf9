"""Scenarios about names: what every call makes of every kind of path, and what creating, moving and removing leaves behind."""

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
AT_SYMLINK_FOLLOW = 0x400
LONG = "n" * 255

EVERY_TYPE = [
    ("root", "mkdir", "dir"),
    ("root", "save", "dir/file", "inner"),
    ("root", "save", "file", "contents"),
    ("root", "mkdir", "empty"),
    ("root", "mkdir", "private", 0o700),
    ("root", "save", "private/file", "hidden"),
    ("root", "mknod", "fifo", "IFO"),
    ("root", "mknod", "sock", "SOCK"),
    ("root", "mknod", "char", "CHR"),
    ("root", "mknod", "block", "BLK"),
    ("root", "symlink", "file", "to-file"),
    ("root", "symlink", "dir", "to-dir"),
    ("root", "symlink", "private/file", "to-private"),
    ("root", "symlink", "nowhere", "dangling"),
    ("root", "symlink", "loop", "loop"),
    ("root", "symlink", "pong", "ping"),
    ("root", "symlink", "ping", "pong"),
    ("root", "symlink", "dir/../dir/./file", "winding"),
    ("root", "symlink", "no-such-dir/x", "into-missing"),
]
CHAIN = [("root", "symlink", f"chain{number - 1}" if number else "file", f"chain{number}") for number in range(42)]
ODD_PATHS = [
    "missing",
    "missing/",
    "missing/below",
    "file/",
    "file/below",
    "file/.",
    "fifo/below",
    "to-file/",
    "to-file/below",
    "to-private",
    "dangling",
    "dangling/",
    "into-missing",
    "loop",
    "loop/",
    "ping/below",
    "private/file",
    "private/missing",
    "private/.",
    "winding",
    "dir/",
    "dir/.",
    "dir/..",
    "to-dir/",
    "to-dir/missing",
    "empty/..",
    ".",
    "..",
    "",
    "n" * 256,
    f"dir/{'n' * 256}/below",
    "é" * 128,
    "./" * 2040 + "dir/./missing",  # 4093 bytes: a path may have 4095
    "./" * 2040 + "dir/././././missing",
    "bad-\udcff\udc80-utf8",
]
TYPES = ["file", "dir", "empty", "fifo", "sock", "char", "block", "to-file", "to-dir"]
READING = [
    ("stat",),
    ("lstat",),
    ("readlink",),
    ("list",),
    ("access", 4),
    ("access", 2),
    ("access", 1),
    ("chdir_and_back",),
    ("run_file",),
    *(
        ("opened", flags)
        for flags in (
            "RDONLY NONBLOCK",
            "WRONLY NONBLOCK",
            "RDWR NONBLOCK",
            "RDONLY NONBLOCK DIRECTORY",
            "RDONLY NONBLOCK NOFOLLOW",
            "RDWR NONBLOCK DIRECTORY",
            "PATH",
            "PATH NOFOLLOW",
            "PATH DIRECTORY",
            "RDONLY NONBLOCK NOATIME",
            "WRONLY NONBLOCK APPEND",
            "RDONLY NONBLOCK SYNC",
            "RDONLY NONBLOCK CREAT DIRECTORY",
        )
    ),
]
CHANGING = [
    *(
        ("opened", flags)
        for flags in (
            "RDONLY NONBLOCK TRUNC",
            "WRONLY NONBLOCK TRUNC",
            "WRONLY NONBLOCK CREAT",
            "RDONLY NONBLOCK CREAT",
            "RDWR NONBLOCK CREAT EXCL",
            "WRONLY NONBLOCK CREAT TRUNC NOFOLLOW",
            "WRONLY NONBLOCK CREAT APPEND DSYNC",
        )
    ),
    ("mkdir",),
    ("rmdir",),
    ("unlink",),
    ("mknod", "IFO"),
    ("mknod", "REG"),
    ("mknod", "SOCK"),
    ("mknod", "CHR"),
    ("chmod", 0o700),
    ("chown", 1000, 2000),
    ("lchown", 2000, 1000),
    ("truncate", 5),
    ("truncate", -1),
    ("utimens", 10**18, 10**18 + 1),
    ("utimens_link", 10**18 + 2, 10**18 + 3),
]
# (operation, arguments before the path, arguments after it)
TWO_NAMES = [
    *(("rename", [other], []) for other in ("file", "dir", "empty", "to-file", "fifo")),
    *(("rename", [], [other]) for other in ("missing2", "file2", "empty2", "dir/moved", "missing/x", "file/x")),
    ("rename", [], ["missing3", RENAME_NOREPLACE]),
    ("rename", [], ["file", RENAME_NOREPLACE]),
    ("rename", [], ["file", RENAME_EXCHANGE]),
    ("rename", [], ["dir", RENAME_EXCHANGE]),
    ("rename", [], ["missing4", RENAME_EXCHANGE]),
    ("rename", [], ["missing5", 0x80]),
    ("rename", [], ["missing6", RENAME_NOREPLACE | RENAME_EXCHANGE]),
    ("rename", [], ["white", RENAME_WHITEOUT]),
    ("link", [], ["link2"]),
    ("link", [], ["link3", AT_SYMLINK_FOLLOW]),
    ("link", ["file"], []),
    ("link", ["dir"], []),
    ("link", ["to-file"], []),
    ("symlink", ["target"], []),
    ("symlink", ["t" * 4095], []),
    ("symlink", ["t" * 4096], []),
    ("symlink", [""], []),
]


def on_path(actor, operation, path, before=(), after=()):
    if operation == "opened":
        return [(actor, "open", "slot", path, *after), (actor, "fstat", "slot"), (actor, "close", "slot")]
    if operation == "chdir_and_back":
        return [(actor, "chdir", path), ("root", "chdir_home")]
    return [(actor, operation, *before, path, *after)]


def scenarios():
    yield from every_call_on_every_path()
    yield from renames()
    yield from long_names()
    yield from odd_cases()


def every_call_on_every_path():
    """The files change as calls succeed, on both sides alike: later calls of a scenario find what earlier ones left."""
    for actor in ("root", "user"):
        every = [
            step
            for operation, *after in READING
            for path in [*ODD_PATHS, *TYPES, "chain39", "chain40"]
            for step in on_path(actor, operation, path, (), after)
        ]
        yield f"reading calls, {actor}", EVERY_TYPE + CHAIN + every
        opening = [] if actor == "root" else [("root", "chmod", ".", 0o777)]
        for operation, *after in CHANGING:
            steps = [step for path in ODD_PATHS + TYPES for step in on_path(actor, operation, path, (), after)]
            yield f"{operation} {after}, {actor}", EVERY_TYPE + opening + steps
        for operation, before, after in TWO_NAMES:
            steps = [step for path in ODD_PATHS + TYPES for step in on_path(actor, operation, path, before, after)]
            names = [("root", "save", "file2", "2"), ("root", "mkdir", "empty2")]
            yield f"{operation} {str(before)[:30]} {after}, {actor}", EVERY_TYPE + names + opening + steps


def renames():
    """Every type over every type, with every flag; within a directory and from one to another."""
    makers = {
        "file": [("root", "save", "{}", "x")],
        "full": [("root", "mkdir", "{}"), ("root", "save", "{}/in", "y")],
        "empty": [("root", "mkdir", "{}")],
        "link": [("root", "symlink", "a/target", "{}")],
        "fifo": [("root", "mknod", "{}", "IFO")],
        "nothing": [],
    }

    def made(kind, path):
        return [(actor, operation, *(word.replace("{}", path) if isinstance(word, str) else word for word in words))
                for actor, operation, *words in makers[kind]]  # fmt: skip

    for flags in (0, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT):
        for target in ("a/new", "b/new"):
            steps = [("root", "mkdir", "a"), ("root", "mkdir", "b")]
            for number, (old, new) in enumerate((old, new) for old in makers for new in makers):
                source, destination = f"a/old{number}", f"{target}{number}"
                steps += [*made(old, source), *made(new, destination), ("root", "rename", source, destination, flags)]
                steps += [("root", "lstat", "a"), ("root", "lstat", "b")]
            yield f"rename to {target} with flags {flags}", steps
    yield "rename into itself", [
        ("root", "mkdir", "a"), ("root", "mkdir", "a/b"), ("root", "mkdir", "a/b/c"), ("root", "save", "f", "x"), ("root", "link", "f", "g"),
        ("root", "rename", "a", "a/b/c/d"), ("root", "rename", "a", "a"), ("root", "rename", "a/b", "a"), ("root", "rename", "f", "g"),
        ("root", "rename", "f", "f"), ("root", "rename", "a", "a/b/c", RENAME_EXCHANGE), ("root", "rename", "a/b/c", "a", RENAME_EXCHANGE),
        ("root", "rename", ".", "x"), ("root", "rename", "a/..", "x"), ("root", "rename", "a/b", "a/b/."), ("root", "rename", "a/b", "../work"),
        ("root", "rename", "f", "g", RENAME_NOREPLACE), ("root", "rename", "a", "f"), ("root", "rename", "f", "a"), ("root", "list", "."),
    ]  # fmt: skip


def long_names():
    """Names of 255 bytes, at the end of paths and inside, in every call that takes one."""
    steps = [("root", "mkdir", LONG), ("root", "save", f"{LONG}/{LONG[:-1]}x", "deep"), ("root", "list", LONG)]
    steps += [
        ("root", "lstat", f"{LONG}/{LONG[:-1]}x"),
        ("root", "rename", f"{LONG}/{LONG[:-1]}x", "é" * 127),
        ("root", "unlink", "é" * 127),
    ]
    steps += [("root", "symlink", LONG, "link"), ("root", "stat", "link"), ("root", "mknod", LONG[:-1] + "f", "IFO"), ("root", "list", ".")]
    for name in (LONG, LONG + "n"):
        steps += [("root", "mkdir", name), ("root", "symlink", "x", name[1:] + "s"), ("root", "link", "link", name[1:] + "l")]
        steps += [("root", "rename", "link", name[1:] + "r"), ("root", "rmdir", name), ("root", "list", ".")]
    yield "long names", steps
    odd = [" ", "-rf", "...", "new\nline", "back\\slash", "\x01\x7f", "\udcff\udcfe", "".join(map(chr, range(48, 127))), "Ünï", "ünï"]
    for name in odd:
        yield f"odd name {name!a}", [
            ("root", "mkdir", name), ("root", "save", f"{name}/{name}", "x"), ("root", "list", name), ("root", "symlink", name, f"{name}/s"),
            ("root", "readlink", f"{name}/s"), ("root", "link", f"{name}/{name}", f"{name}l"), ("root", "rename", f"{name}l", f"{name}m"),
            ("root", "list", "."), ("root", "mknod", f"{name}n", "IFO"), ("root", "unlink", f"{name}/{name}"), ("root", "rmdir", name),
        ]  # fmt: skip


def odd_cases():
    yield "link counts", [
        ("root", "mkdir", "d"), ("root", "mkdir", "d/e"), ("root", "mkdir", "d/f"), ("root", "lstat", "d"), ("root", "rename", "d/e", "e"),
        ("root", "rmdir", "d/f"), ("root", "lstat", "d"), ("root", "save", "one", "x"), ("root", "link", "one", "d/two"),
        ("root", "link", "one", "three"), ("root", "unlink", "one"), ("root", "rename", "three", "d/two"), ("root", "unlink", "three"),
        ("root", "lstat", "d/two"), ("root", "mkdir", "g"), ("root", "rename", "e", "g"), ("root", "rename", "d", "g/h"), ("root", "rmdir", "g"),
    ]  # fmt: skip
    yield "an open file without a name", [
        ("root", "open", "f", "gone", "RDWR CREAT EXCL", 0o640), ("root", "open", "again", "gone", "RDONLY"), ("root", "unlink", "gone"),
        ("root", "fstat", "f"), ("root", "write", "f", "after"), ("root", "read", "again", 10), ("root", "fchmod", "f", 0o600),
        ("root", "fchown", "f", 1000, 2000), ("root", "ftruncate", "f", 3), ("root", "futimens", "f", 5, 6), ("root", "fstat", "again"),
        ("root", "save", "gone", "another"), ("root", "fstat", "f"), ("root", "fsync", "f"), ("root", "close", "f"), ("root", "fstat", "again"),
    ]  # fmt: skip
    yield "an open file that is replaced", [
        ("root", "save", "old", "old"), ("root", "save", "new", "new"), ("root", "open", "f", "old", "RDWR"), ("root", "rename", "new", "old"),
        ("root", "fstat", "f"), ("root", "read", "f", 10), ("root", "write", "f", "more"), ("root", "fstat", "f"), ("root", "lstat", "old"),
    ]  # fmt: skip
    yield "an open directory without a name", [
        ("root", "mkdir", "d"), ("root", "chdir", "d"), ("root", "rmdir", "../d"), ("root", "lstat", "."), ("root", "list", "."),
        ("root", "mkdir", "x"), ("root", "open", "f", "x", "WRONLY CREAT"), ("root", "lstat", ".."), ("root", "symlink", "a", "b"),
        ("root", "chmod", ".", 0o700), ("root", "rename", "../e", "x"), ("root", "chdir_home"), ("root", "mkdir", "d"), ("root", "list", "d"),
    ]  # fmt: skip
    yield "a directory is emptied while it is listed", [
        ("root", "mkdir", "d"), *(("root", "save", f"d/{number}", "") for number in range(150)), ("root", "empty_while_listing", "d"), ("root", "rmdir", "d"),
    ]  # fmt: skip
    for target in ("x" * 255, "y" * 1000, "z/" * 2047, "\udcff/\udc80", " ", "./" * 20):
        yield f"symlink to {target[:12]!a} of {len(target)}", [
            ("root", "symlink", target, "s"), ("root", "readlink", "s"), ("root", "lstat", "s"), ("root", "stat", "s"), ("root", "link", "s", "t"),
            ("root", "rename", "s", "u"), ("root", "readlink", "t"), ("root", "lchown", "t", 5, 6), ("root", "chmod", "t", 0o600), ("root", "unlink", "t"),
        ]  # fmt: skip
