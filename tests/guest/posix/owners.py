"""Scenarios about who may do what: modes, owners, groups, sticky and set-id bits, for root, an owner, a member and a stranger."""

from itertools import product

ACTORS = ("root", "owner", "user", "stranger")
OWNER, USER, SHARED_GROUP = 1000, 65534, 3000
DIRECTORIES = [  # mode, owner, group
    (0o755, 0, 0),
    (0o777, 0, 0),
    (0o1777, 0, 0),
    (0o2777, 0, SHARED_GROUP),
    (0o755, OWNER, OWNER),
    (0o1777, OWNER, OWNER),
    (0o770, 0, SHARED_GROUP),
    (0o700, USER, USER),
    (0o711, OWNER, OWNER),
    (0o733, 0, 0),
    (0o755 | 0o3000, USER, SHARED_GROUP),
]
FILES = [
    (0o644, 0, 0),
    (0o666, 0, 0),
    (0o600, OWNER, OWNER),
    (0o660, OWNER, SHARED_GROUP),
    (0o4755, OWNER, OWNER),
    (0o6777, 0, SHARED_GROUP),
    (0o2767, USER, USER),
    (0o2644, USER, SHARED_GROUP),
    (0o000, USER, USER),
    (0o107, OWNER, USER),
]
PROGRAM_MODES = (0o711, 0o100, 0o010, 0o001, 0o644, 0o4755)


def scenarios():
    yield from calls_on_files_of_others()
    yield from creations()
    yield from set_id_bits()
    yield from sticky_renames()
    yield from access_checks()


def with_owner(path, mode, owner, group):
    """chown(2) first: it takes set-id bits away."""
    return [("root", "chown", path, owner, group), ("root", "chmod", path, mode)]


def calls_on_files_of_others():
    for (mode, owner, group), actor in product(DIRECTORIES, ACTORS):
        steps = [("root", "mkdir", "d"), ("root", "mkdir", "open"), ("root", "chmod", "open", 0o777), *with_owner("d", mode, owner, group)]
        for number, file in enumerate(FILES):
            path = f"d/f{number}"
            steps += [("root", "save", path, "contents"), *with_owner(path, *file), *on_file(actor, path, number)]
        yield f"{actor} in a directory {mode:o} of {owner}:{group}", steps


def on_file(actor, path, number):
    """Calls that check permissions, from those that change least to those that remove the file."""
    return [
        *(
            step
            for flags in ("RDONLY", "WRONLY", "RDWR", "RDONLY TRUNC", "RDONLY NOATIME", "WRONLY CREAT")
            for step in [(actor, "open", "f", path, flags), ("root", "close", "f")]
        ),
        (actor, "utimens", path, None, None),
        (actor, "utimens", path, "now", "omit"),
        (actor, "utimens", path, 10**18, "omit"),
        (actor, "utimens", path, "omit", "omit"),
        (actor, "truncate", path, 4),
        (actor, "chmod", path, 0o640),
        (actor, "chmod", path, 0o7750),
        (actor, "chown", path, -1, SHARED_GROUP),
        (actor, "chown", path, -1, -1),
        (actor, "chmod", path, 0o6711),
        (actor, "chown", path, OWNER, -1),
        (actor, "chown", path, -1, 12345),
        (actor, "link", path, f"open/l{number}"),
        (actor, "rename", path, f"{path}r"),
        (actor, "rename", f"{path}r", f"open/r{number}"),
        (actor, "rename", f"open/r{number}", path),
        (actor, "unlink", path),
    ]


def creations():
    """Owner, group and mode of what each actor makes, in directories with and without the set-gid bit, under several umasks."""
    for actor, (mode, group), mask in product(ACTORS, ((0o777, 0), (0o2777, SHARED_GROUP), (0o2777, 4000)), (0o000, 0o027, 0o777)):
        steps = [("root", "mkdir", "d"), *with_owner("d", mode, 0, group), (actor, "umask", mask)]
        for bits in (0o777, 0o666, 0o4755, 0o2755, 0o7777, 0o2644, 0o1000, 0o000):
            steps += [
                (actor, "open", "f", f"d/open{bits:o}", "RDWR CREAT EXCL", bits),
                (actor, "write", "f", "x"),
                (actor, "open", "f", f"d/open{bits:o}", "RDONLY"),
                (actor, "mkdir", f"d/mkdir{bits:o}", bits),
                (actor, "mknod", f"d/fifo{bits:o}", "IFO", bits),
                (actor, "mknod", f"d/file{bits:o}", "REG", bits),
                (actor, "mknod", f"d/sock{bits:o}", "SOCK", bits),
                (actor, "mknod", f"d/char{bits:o}", "CHR", bits),
                (actor, "chmod", f"d/open{bits:o}", 0o2775),
                (actor, "chmod", f"d/mkdir{bits:o}", 0o2775),
                (actor, "mkdir", f"d/mkdir{bits:o}/below"),
            ]
        yield f"{actor} creates in {mode:o} of group {group} under umask {mask:o}", [*steps, (actor, "symlink", "x", "d/link")]


def set_id_bits():
    """Which calls take set-user-id and set-group-id away, and from whom."""
    changes = [
        [("open", "f", "p", "WRONLY"), ("write", "f", "x")],
        [("open", "f", "p", "WRONLY"), ("write", "f", "")],
        [("open", "f", "p", "WRONLY APPEND"), ("write", "f", "x")],
        [("open", "f", "p", "RDWR"), ("map_write", "f", 0, "x")],
        [("open", "f", "p", "WRONLY"), ("fallocate", "f", 0, 0, 100)],
        [("open", "f", "p", "RDWR"), ("open", "g", "p", "RDONLY"), ("copy_range", "g", "f", 2, 0, 4)],
        [("open", "f", "p", "WRONLY TRUNC")],
        [("open", "f", "p", "WRONLY"), ("ftruncate", "f", 2)],
        [("open", "f", "p", "WRONLY"), ("ftruncate", "f", 8)],
        [("truncate", "p", 3)],
        [("truncate", "p", 8)],
        [("chown", "p", -1, -1)],
        [("chown", "p", USER, -1)],
        [("chown", "p", -1, SHARED_GROUP)],
        [("lchown", "p", USER, SHARED_GROUP)],
        [("open", "f", "p", "RDONLY"), ("fchown", "f", -1, USER)],
        [("chmod", "p", 0o6777)],
        [("utimens", "p", None, None)],
        [("link", "p", "q"), ("rename", "q", "r")],
    ]
    modes = (0o4777, 0o2777, 0o6777, 0o2767, 0o6666, 0o7777)
    for actor, owner in product(("root", "user"), (USER, OWNER)):
        for group in (USER, SHARED_GROUP, 4000):
            steps = [("root", "chmod", ".", 0o777)]
            for mode, change in product(modes, changes):
                steps += [
                    ("root", "save", "p", "contents"),
                    *with_owner("p", mode, owner, group),
                    *((actor, *call) for call in change),
                    ("root", "unlink", "p"),
                ]
            yield f"set-id bits of a file of {owner}:{group}, {actor}", steps
        steps = []
        for mode, group in product((0o2777, 0o6755, 0o3777), (USER, 4000)):
            steps += [("root", "mkdir", "d"), *with_owner("d", mode, owner, group), (actor, "chown", "d", -1, USER), (actor, "chmod", "d", 0o2770),
                      (actor, "chown", "d", -1, -1), (actor, "chmod", "d", 0o6770), ("root", "rmdir", "d")]  # fmt: skip
        yield f"set-id bits of a directory of {owner}, {actor}", steps


def sticky_renames():
    """In a sticky directory one moves, replaces and removes only what is one's own, or what is in a directory of one's own."""
    for actor, directory_owner in product(ACTORS, (0, OWNER, USER)):
        steps = [
            ("root", "mkdir", "s"),
            ("root", "mkdir", "o"),
            ("root", "chmod", "o", 0o777),
            *with_owner("s", 0o1777, directory_owner, 0),
        ]
        owners = (0, OWNER, USER)
        for number, (owner, other) in enumerate(product(owners, owners)):
            mine, theirs = f"s/m{number}", f"s/t{number}"
            steps += [
                *(("root", "save", path, path) for path in (mine, theirs)),
                ("root", "chown", mine, owner, owner),
                ("root", "chown", theirs, other, other),
                ("root", "mkdir", f"{mine}d"),
                ("root", "chown", f"{mine}d", owner, owner),
                (actor, "rename", mine, theirs, 2),
                (actor, "rename", mine, theirs),
                (actor, "rename", f"{mine}d", f"o/d{number}"),
                (actor, "rename", mine, f"o/f{number}"),
                (actor, "rmdir", f"{mine}d"),
                (actor, "unlink", mine),
                (actor, "unlink", theirs),
                (actor, "open", "f", theirs, "WRONLY CREAT"),
                (actor, "link", theirs, f"o/l{number}"),
            ]
        yield f"{actor} in a sticky directory of {directory_owner}", steps


def access_checks():
    """access(2) with real and effective ids; search permission along a path; running what may be run."""
    for actor in ACTORS:
        steps = []
        for mode, owner in product((0o000, 0o100, 0o001, 0o640, 0o051, 0o777, 0o4711), (0, OWNER, USER)):
            steps += [("root", "save", "f", ""), *with_owner("f", mode, owner, SHARED_GROUP)]
            steps += [(actor, "access", "f", wanted, effective) for wanted in range(8) for effective in (False, True)]
        yield f"access, {actor}", steps
        steps = [("root", "mkdir", "a"), ("root", "mkdir", "a/b"), ("root", "save", "a/b/f", "x"), ("root", "mkdir", "c")]
        for mode, owner in product((0o700, 0o710, 0o711, 0o744, 0o007, 0o000), (0, OWNER)):
            steps += [*with_owner("a", mode, owner, SHARED_GROUP), (actor, "lstat", "a/b/f"), (actor, "open", "f", "a/b/f", "RDONLY"), (actor, "list", "a"),
                      (actor, "rename", "a/b", "a/b2"), (actor, "rename", "a/b2", "a/b"), (actor, "mkdir", "a/m"), (actor, "rmdir", "a/m"),
                      (actor, "chdir", "a"), (actor, "lstat", "b"), ("root", "chdir_home"), (actor, "symlink", "x", "a/s"), (actor, "readlink", "a/s")]  # fmt: skip
        yield f"search permission, {actor}", steps
        steps = [("root", "save_program", "p")]
        for mode, owner in product(PROGRAM_MODES, (0, OWNER)):
            steps += [*with_owner("p", mode, owner, SHARED_GROUP), (actor, "run_file", "p"), ("root", "end_program")]
        steps += [("root", "run_file", "p"), ("root", "open", "f", "p", "WRONLY"), ("root", "truncate", "p", 3),
                  ("root", "end_program"), ("root", "open", "f", "p", "WRONLY"), ("root", "run_file", "p"), ("root", "close", "f"), ("root", "run_file", "p"),
                  ("root", "open", "f", "p", "RDONLY TRUNC")]  # fmt: skip
        yield f"running a program, {actor}", steps
