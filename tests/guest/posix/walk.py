"""Random walks: thousands of calls in one directory, by everybody, each drawn from its number; whatever the first side does is right."""

from random import Random

WALKS, STEPS = 48, 250
ACTORS = ("root", "root", "owner", "user", "stranger")
FOLDERS = ("", "d/", "e/", "d/f/", "link-to-d/")
FILES = ("a", "b", "c", "d", "e", "f")
MODES = (0o777, 0o755, 0o700, 0o644, 0o660, 0o1777, 0o2775, 0o4755, 0o6777, 0o000)
IDS = (-1, 0, 1000, 65534, 3000)
FLAGS = (
    "RDONLY",
    "WRONLY",
    "RDWR",
    "RDWR CREAT",
    "WRONLY CREAT EXCL",
    "RDWR TRUNC",
    "WRONLY CREAT APPEND",
    "RDONLY DIRECTORY",
    "RDONLY NOFOLLOW",
)
TIMES = ("now", "omit", 5, 10**18 + 7, -3)
OWNERS = [(uid, gid) for uid in IDS for gid in IDS if (uid, gid) != (-1, -1)]  # which changes ctime: owners.py has it
TEXTS = ("", "short", "0123456789" * 500)


def scenarios():
    for number in range(WALKS):
        yield f"walk {number}", list(steps(Random(number)))


def steps(random):
    yield from (("root", "chmod", ".", 0o777), ("root", "mkdir", "d", 0o777), ("root", "symlink", "d", "link-to-d"))
    for _ in range(STEPS):
        operation = random.choice(list(CALLS))
        yield (random.choice(ACTORS), operation, *CALLS[operation](random))


def path(random):
    return random.choice(FOLDERS) + random.choice(FILES)


def slot(random):
    return random.choice("xyz")


CALLS = {
    "mkdir": lambda random: (path(random), random.choice(MODES)),
    "rmdir": lambda random: (path(random),),
    "unlink": lambda random: (path(random),),
    "mknod": lambda random: (path(random), random.choice(("REG", "SOCK", "CHR")), random.choice(MODES)),
    "symlink": lambda random: (random.choice((path(random), "../" + path(random), "absent/nowhere")), path(random)),
    "readlink": lambda random: (path(random),),
    "link": lambda random: (path(random), path(random), random.choice((0, 0x400))),
    "rename": lambda random: (path(random), path(random), random.choice((0, 0, 0, 1, 2))),
    "list": lambda random: (random.choice(FOLDERS) or ".",),
    "stat": lambda random: (path(random),),
    "chmod": lambda random: (path(random), random.choice(MODES)),
    "chown": lambda random: (path(random), *random.choice(OWNERS)),
    "lchown": lambda random: (path(random), *random.choice(OWNERS)),
    "access": lambda random: (path(random), random.randrange(8)),
    "umask": lambda random: (random.choice((0, 0o022, 0o077)),),
    "utimens": lambda random: (path(random), random.choice(TIMES), random.choice(TIMES)),
    "utimens_link": lambda random: (path(random), random.choice(TIMES), random.choice(TIMES)),
    "save": lambda random: (path(random), random.choice(TEXTS), random.choice(MODES)),
    "truncate": lambda random: (path(random), random.choice((0, 3, 5000))),
    "open": lambda random: (slot(random), path(random), random.choice(FLAGS), random.choice(MODES)),
    "close": lambda random: (slot(random),),
    "read": lambda random: (slot(random), random.choice((1, 10, 6000))),
    "write": lambda random: (slot(random), random.choice(TEXTS)),
    "seek": lambda random: (slot(random), random.choice((0, 4, 4096)), random.choice(("SET", "CUR", "END", "DATA", "HOLE"))),
    "ftruncate": lambda random: (slot(random), random.choice((0, 2, 9000))),
    "fchmod": lambda random: (slot(random), random.choice(MODES)),
    "fchown": lambda random: (slot(random), *random.choice(OWNERS)),
    "futimens": lambda random: (slot(random), random.choice(TIMES), random.choice(TIMES)),
    "fstat": lambda random: (slot(random),),
    "fsync": lambda random: (slot(random),),
    "fallocate": lambda random: (slot(random), random.choice((0, 1, 3, 16)), random.choice((0, 100, 4096)), random.choice((1, 4096))),
    "lock": lambda random: (slot(random), random.choice(("read", "write", "unlock")), random.choice((0, 10)), random.choice((0, 10))),
    "flock": lambda random: (slot(random), random.choice(("SH NB", "EX NB", "UN"))),
}
