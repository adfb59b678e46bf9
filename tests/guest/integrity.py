"""A data-integrity workload: processes that do to files what programs do, each with a model of what must be there.

Runs in the guest (sent over as source) and checks on both sides: standard library only, nothing that Python 3.11 lacks. What is
done follows from the seed; how much of it is done, from the seconds. Any error of a system call is a finding: the programs
ask for nothing that could fail. Each process has a directory of its own; what they share is taken under locks or by O_EXCL.
"""

import fcntl
import hashlib
import json
import os
import random
import stat
import time

FILE_BYTES = 300_000
MOST_FILES = 40
MOST_OPEN = 8
LOG_BYTES = 8 << 20  # then it is emptied
CLAIMS = 64  # names that all processes try to make, at a time
REPORTS = "/tmp/integrity"


class Wrong(Exception):
    """The file system did something else than the model."""


class File:
    """An inode of the model: names may be several, or none while it is open."""

    def __init__(self):
        self.data = bytearray()
        self.mode = 0o644
        self.names = 0


class Process:
    """One process's files and what it knows of them."""

    def __init__(self, root, number, seed):
        self.rng = random.Random(f"{seed}.{number}")
        self.number = number
        self.home = f"{root}/p{number}"
        self.shared = f"{root}/shared"
        self.counts = {}
        self.serial = 0
        self.folders = [self.home]
        self.files = {}  # name -> File
        self.links = {}  # name -> target
        self.open = []  # (descriptor, File)
        self.won = []
        self.claim = 0
        self.increments = {"lockf": 0, "flock": 0}
        self.longest = [0.0, ""]
        os.mkdir(self.home, 0o755)
        self.log = os.open(f"{self.home}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        self.logged, self.log_digest, self.records = 0, hashlib.sha256(), 0

    # -- choosing ----------------------------------------------------------------------------------------------------

    def new_name(self):
        self.serial += 1
        return f"{self.rng.choice(self.folders)}/{self.rng.choice(('f', 'ä', 'name with spaces'))}-{self.serial}"

    def any_name(self):
        return self.rng.choice(list(self.files))

    def step(self):
        """One operation; those that need what is not there make something."""
        operation = self.rng.choices(OPERATIONS, WEIGHTS)[0]
        if (operation in NEED_FILE and not self.files) or (operation is Process.read_open and not self.open):
            operation = Process.create
        elif len(self.files) >= MOST_FILES and operation in (Process.create, Process.link):
            operation = Process.unlink
        self.now = operation.__name__
        self.counts[self.now] = self.counts.get(self.now, 0) + 1
        began = time.monotonic()
        operation(self)
        self.longest = max(self.longest, [time.monotonic() - began, self.now])

    # -- names -------------------------------------------------------------------------------------------------------

    def create(self):
        name, file = self.new_name(), File()
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, file.mode)
        self.files[name], file.names = file, 1
        self.write_to(descriptor, file)
        self.keep_or_close(descriptor, file)

    def keep_or_close(self, descriptor, file):
        if len(self.open) < MOST_OPEN:
            self.open.append((descriptor, file))
        else:
            os.close(descriptor)

    def link(self):
        old, new = self.any_name(), self.new_name()
        os.link(old, new)
        self.files[new] = self.files[old]
        self.files[new].names += 1

    def unlink(self):
        name = self.any_name()
        os.unlink(name)
        self.files.pop(name).names -= 1

    def rename(self):
        old = self.any_name()
        new = self.new_name() if self.rng.random() < 0.6 else self.any_name()
        os.rename(old, new)
        if old != new and self.files[old] is not self.files.get(new):  # two names of one file: rename does nothing
            if new in self.files:
                self.files[new].names -= 1
            self.files[new] = self.files.pop(old)

    def mkdir(self):
        if len(self.folders) < 12:
            name = self.new_name()
            os.mkdir(name, 0o755)
            self.folders.append(name)
        else:
            self.rmdir()

    def rmdir(self):
        name = self.rng.choice(self.folders)
        below = name + "/"
        if name != self.home and not any(each.startswith(below) for each in (*self.folders, *self.files, *self.links)):
            os.rmdir(name)
            self.folders.remove(name)

    def symlink(self):
        if len(self.links) < 10:
            name = self.new_name()
            self.links[name] = "x" * self.rng.randrange(1, 200)
            os.symlink(self.links[name], name)
        else:
            name = self.rng.choice(list(self.links))
            if os.readlink(name) != self.links.pop(name):
                raise Wrong(f"{name} points elsewhere")
            os.unlink(name)

    def chmod(self):
        name = self.any_name()
        self.files[name].mode = self.rng.choice((0o600, 0o640, 0o644, 0o755))
        os.chmod(name, self.files[name].mode)

    def look(self):
        name = self.any_name()
        found, file = os.stat(name), self.files[name]
        if [found.st_size, stat.S_IMODE(found.st_mode), found.st_nlink] != [len(file.data), file.mode, file.names]:
            raise Wrong(f"{name}: size {found.st_size}, mode {found.st_mode:o}, {found.st_nlink} links; {len(file.data)}, {file.names}")

    def listing(self):
        folder = self.rng.choice(self.folders)
        expected = {each.rpartition("/")[2] for each in (*self.folders, *self.files, *self.links) if each.rpartition("/")[0] == folder}
        found = os.listdir(folder)
        if len(found) != len(set(found)) or set(found) - {"log"} != expected:
            raise Wrong(f"{folder} has {sorted(found)}, expected {sorted(expected)}")

    # -- data --------------------------------------------------------------------------------------------------------

    def write_to(self, descriptor, file):
        offset = self.rng.randrange(FILE_BYTES) if self.rng.random() < 0.3 else self.rng.randrange(len(file.data) + 1)
        data = self.rng.randbytes(self.rng.choice((1, 100, 4096, 5000, 70_000)))
        write_all(descriptor, data, offset)
        if offset > len(file.data):
            file.data.extend(bytes(offset - len(file.data)))
        file.data[offset : offset + len(data)] = data

    def write(self):
        name = self.any_name()
        descriptor = os.open(name, os.O_WRONLY)
        self.write_to(descriptor, self.files[name])
        if self.rng.random() < 0.1:
            os.fsync(descriptor)
        os.close(descriptor)

    def write_open(self):
        if self.open:
            self.write_to(*self.rng.choice(self.open))

    def read(self):
        name = self.any_name()
        with open(name, "rb", buffering=0) as stream:
            self.compare(stream.fileno(), self.files[name], name)

    def read_open(self):
        descriptor, file = self.open[self.rng.randrange(len(self.open))]
        self.compare(descriptor, file, f"an open file with {file.names} names")
        if self.rng.random() < 0.4:
            self.open.remove((descriptor, file))
            os.close(descriptor)

    def compare(self, descriptor, file, what):
        if os.fstat(descriptor).st_size != len(file.data):
            raise Wrong(f"{what} has {os.fstat(descriptor).st_size} bytes, expected {len(file.data)}")
        offset = self.rng.randrange(len(file.data) + 1)
        length = self.rng.choice((4096, 20_000, FILE_BYTES))
        found = os.pread(descriptor, length, offset)
        if found != file.data[offset : offset + length]:
            raise Wrong(f"{what}: {first_difference(found, file.data[offset : offset + length])} from {offset} on")

    def truncate(self):
        name = self.any_name()
        size = self.rng.randrange(FILE_BYTES)
        os.truncate(name, size)
        file = self.files[name]
        file.data = file.data[:size].ljust(size, b"\0")

    def fsync(self):
        name = self.any_name()
        descriptor = os.open(name, os.O_RDWR)
        (os.fsync if self.rng.random() < 0.5 else os.fdatasync)(descriptor)
        os.close(descriptor)

    def append(self):
        """One appender to this file: each record must be there once, whole, in order."""
        for _ in range(self.rng.randrange(1, 20)):
            self.records += 1
            record = b"%d:%s\n" % (self.records, self.rng.randbytes(self.rng.choice((10, 500, 3000))).hex().encode())
            if os.write(self.log, record) != len(record):
                raise Wrong("a short append")
            self.log_digest.update(record)
            self.logged += len(record)
        if os.fstat(self.log).st_size != self.logged:
            raise Wrong(f"the log has {os.fstat(self.log).st_size} bytes after {self.records} records of {self.logged}")
        if self.logged > LOG_BYTES:
            os.ftruncate(self.log, 0)
            self.logged, self.log_digest = 0, hashlib.sha256()

    # -- with the other processes ------------------------------------------------------------------------------------

    def increment(self):
        how = self.rng.choice(("lockf", "flock"))
        with open(f"{self.shared}/{how}", "r+b", buffering=0) as stream:
            getattr(fcntl, how)(stream, fcntl.LOCK_EX)
            number = int(os.pread(stream.fileno(), 20, 0))
            os.pwrite(stream.fileno(), b"%019d" % (number + 1), 0)
            getattr(fcntl, how)(stream, fcntl.LOCK_UN)
        self.increments[how] += 1

    def contend(self):
        """Make a name that others try to make too."""
        self.claim += self.rng.randrange(1, 3)
        name = f"claim-{self.claim}"
        try:
            os.close(os.open(f"{self.shared}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            return
        self.won.append(name)

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self):
        for descriptor, file in self.open:
            if os.pread(descriptor, FILE_BYTES * 2, 0) != file.data:
                raise Wrong(f"an open file with {file.names} names has other data at the end")
            os.close(descriptor)
        os.close(self.log)

    def expected(self):
        """What must be there, by name below the root: as `survey` says it."""
        found = {name: ["directory", 0o755] for name in self.folders}
        found.update((name, ["link", target]) for name, target in self.links.items())
        for name, file in self.files.items():
            found[name] = ["file", file.mode, file.names, len(file.data), hashlib.sha256(file.data).hexdigest()]
        found[f"{self.home}/log"] = ["file", 0o644, 1, self.logged, self.log_digest.hexdigest()]
        above = len(self.home) - len(f"p{self.number}")
        return {name[above:]: value for name, value in found.items()}


TABLE = {
    Process.write: 12, Process.write_open: 8, Process.append: 10, Process.create: 8, Process.read: 10, Process.read_open: 8,
    Process.rename: 8, Process.link: 4, Process.unlink: 6, Process.truncate: 3, Process.mkdir: 3, Process.rmdir: 2, Process.symlink: 3,
    Process.chmod: 3, Process.look: 6, Process.listing: 4, Process.fsync: 2, Process.increment: 6, Process.contend: 6,
}  # fmt: skip
OPERATIONS, WEIGHTS = list(TABLE), list(TABLE.values())
NEED_FILE = {getattr(Process, name) for name in ("write", "read", "rename", "link", "unlink", "truncate", "chmod", "look", "fsync")}


def write_all(descriptor, data, offset):
    if os.pwrite(descriptor, data, offset) != len(data):
        raise Wrong("a short write")


def first_difference(found, expected):
    if len(found) != len(expected):
        return f"{len(found)} bytes instead of {len(expected)}"
    return f"byte {next(position for position, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1])} is another one"


def work(root, number, seed, seconds, least):
    """One process's life; its report goes to a file outside of the share."""
    report = {"failure": "", "operations": {}, "expected": {}, "won": [], "increments": {}, "longest": [0, ""], "records": 0}
    process = None
    try:
        process = Process(root, number, seed)
        end = time.monotonic() + seconds
        while time.monotonic() < end or sum(process.counts.values()) < least:
            process.step()
        process.now = "finish"
        process.finish()
    except (OSError, Wrong, ValueError) as error:
        doing = f"operation {sum(process.counts.values())}, {process.now}" if process else "the start"
        report["failure"] = f"process {number}, {doing}: {type(error).__name__}: {error}"
    if process is not None:
        report.update(operations=process.counts, expected=process.expected(), won=process.won, increments=process.increments)
        report.update(longest=process.longest, records=process.records)
    with open(f"{REPORTS}-{number}", "w") as file:
        json.dump(report, file)


def run(root, seed, processes, seconds, least=30):
    """The workload in `root`, which must not exist yet: for so many seconds, and at least so many operations of each process.

    What happened, but not what must be there now: `differences` says that.
    """
    os.mkdir(root, 0o755)
    os.mkdir(f"{root}/shared", 0o755)
    for how in ("lockf", "flock"):
        with open(f"{root}/shared/{how}", "w") as file:
            file.write(f"{0:019d}")
    children = []
    for number in range(processes):
        child = os.fork()
        if child == 0:
            try:
                work(root, number, seed, seconds, least)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    found = reports(processes)
    counts = {}
    for report in found:
        for name, count in report["operations"].items():
            counts[name] = counts.get(name, 0) + count
    return {
        "failures": [report["failure"] for report in found if report["failure"]],
        "operations": counts,
        "longest": max(report["longest"] for report in found),
        "appended": sum(report["records"] for report in found),
    }


def reports(processes):
    found = []
    for number in range(processes):
        with open(f"{REPORTS}-{number}") as file:
            found.append(json.load(file))
    return found


def expected(processes):
    """Everything that must be below the root, and how often each shared name was won: as `survey` says it."""
    found = {"shared": ["directory", 0o755]}
    empty = hashlib.sha256(b"").hexdigest()
    for report in reports(processes):
        found.update(report["expected"])
        for name in report["won"]:
            found[f"shared/{name}"] = ["file", 0o644, 1, 0, empty] if f"shared/{name}" not in found else ["won twice"]
    for how in ("lockf", "flock"):
        text = b"%019d" % sum(report["increments"].get(how, 0) for report in reports(processes))
        found[f"shared/{how}"] = ["file", 0o644, 1, len(text), hashlib.sha256(text).hexdigest()]
    return found


def survey(root):
    """Everything below the root, by name."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = f"{folder}/{name}"
            found[path[len(root) + 1 :]] = describe(path)
    return found


def describe(path):
    entry = os.lstat(path)
    if stat.S_ISDIR(entry.st_mode):
        return ["directory", stat.S_IMODE(entry.st_mode)]
    if stat.S_ISLNK(entry.st_mode):
        return ["link", os.readlink(path)]
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    return ["file", stat.S_IMODE(entry.st_mode), entry.st_nlink, entry.st_size, digest]


def compare(found, wanted):
    """What differs: at most 20 lines."""
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return [f"{name}: {found.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}" for name in names[:20]]


def differences(root, processes):
    """In the guest: what is there against what must be."""
    return compare(survey(root), expected(processes))
