"""Runs scenarios, lists of system calls, in the current directory, and records what each call did. The same source runs on
the host's file system and in a guest on virtio-fs: equal records mean that a program cannot tell the two apart.

A step is (actor, operation, arguments ...): the actor is who makes the call, the operation a method `op_…` below. A record
is the call's result, or the name of its errno, and what changed about the files that the scenario names: type, mode, owner,
group, links, size, device, whether its times moved. Nothing that two file systems may rightly differ in is recorded.
Standard library only.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct

from tests.guest.posix.other_process import OtherProcess, end_program, start_program

LIBC = ctypes.CDLL(None, use_errno=True)
ACTORS = {  # uid, gid, supplementary groups
    "root": (0, 0, []),
    "owner": (1000, 1000, [1000]),
    "user": (65534, 65534, [65534, 3000]),
    "stranger": (2000, 2000, [2000]),
}
UTIMES = {"now": (1 << 30) - 1, "omit": (1 << 30) - 2}
SET_BY_US_BEFORE_NS = 1_500_000_000 * 10**9  # times that a scenario sets are older than this, times that a call leaves are newer
FEW = 8  # watched files: of a scenario that names more, only those are looked at that the step names
AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
LOCK_TYPES = {"read": fcntl.F_RDLCK, "write": fcntl.F_WRLCK, "unlock": fcntl.F_UNLCK}
FLOCK = struct.Struct("hhlli4x")
# Static, x86-64, one segment: pause() for ever. A program must be running, not a script, for ETXTBSY.
PAUSING_PROGRAM = (
    b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, 128, 128, 4096) + b"\xb8\x22\0\0\0\x0f\x05\xf4"
)  # fmt: skip

PATHS = {  # which arguments of an operation name files
    **dict.fromkeys(("open", "symlink"), (1,)),
    **dict.fromkeys(("rename", "link"), (0, 1)),
    **dict.fromkeys(
        [
            "mkdir",
            "rmdir",
            "unlink",
            "readlink",
            "chmod",
            "chown",
            "lchown",
            "truncate",
            "utimens",
            "utimens_link",
            "access",
            "mknod",
            "list",
            "stat",
            "lstat",
            "save",
            "save_program",
            "run_file",
        ],
        (0,),
    ),
}


def become(actor):
    """Saved ids stay root's, and with them the way back. The real ids change too: access(2) asks for those."""
    uid, gid, groups = ACTORS[actor]
    os.setresuid(0, 0, 0)
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, 0)


def flags_of(words):
    return sum(getattr(os, f"O_{word}") for word in words.split())


def text(data):
    return data.decode("utf-8", "surrogateescape")


class Machine:
    """One scenario's process: its open files by name of slot, and what it saw of each watched path last."""

    def __init__(self, home, watched, times):
        self.home = home
        self.watched = watched
        self.times = times
        self.slots = {}
        self.seen = {}
        self.actor = "root"
        self.other = None
        self.programs = []

    def run(self, steps):
        try:
            self.changes(self.watched)
            return [self.record(*step) for step in steps]
        finally:
            self.clean_up()

    def clean_up(self):
        for pid in self.programs:
            end_program(pid)
        if self.other is not None:
            self.op_end_other()
        self.close_slots()
        os.umask(0o022)

    def close_slots(self):
        while self.slots:
            os.close(self.slots.popitem()[1])

    def record(self, actor, operation, *arguments):
        result = self.outcome(actor, operation, *arguments)
        few = len(self.watched) <= FEW
        return [result, self.changes(self.watched if few else watched_paths([(actor, operation, *arguments)]))]

    def outcome(self, actor, operation, *arguments):
        self.actor = actor
        if actor != "root":
            become(actor)
        try:
            result = getattr(self, f"op_{operation}")(*arguments)
        except OSError as error:
            return errno.errorcode[error.errno]
        except ValueError as error:  # Python itself refuses a name with NUL, a closed slot
            return str(error)
        finally:
            if actor != "root":
                become("root")
        return "ok" if result is None else result

    def changes(self, paths):
        """What is different about these files since they were looked at last."""
        changed = {}
        for path in paths:
            before, (now, times) = self.seen.get(path, (None, None)), self.look(path)
            said = list(now)
            if self.times and before[1] is not None and times is not None and before[1][0] == times[0]:
                said += [name for name, old, new in zip(("mtime", "ctime"), before[1][1:], times[1:], strict=True) if old != new]
            if before[0] != now or len(said) > len(now):
                changed[path] = said
            self.seen[path] = (now, times)
        return changed

    def look(self, path):
        try:
            found = os.lstat(path)
        except OSError as error:
            return [errno.errorcode[error.errno]], None
        return describe(found), (found.st_ino, found.st_mtime_ns, found.st_ctime_ns)

    def slot(self, name):
        if name not in self.slots:
            raise ValueError("not open")
        return self.slots[name]

    def keep(self, slot, descriptor):
        if slot in self.slots:
            os.close(self.slots[slot])
        self.slots[slot] = descriptor

    # -- names

    def op_mkdir(self, path, mode=0o755):
        os.mkdir(path, mode)

    def op_rmdir(self, path):
        os.rmdir(path)

    def op_unlink(self, path):
        os.unlink(path)

    def op_mknod(self, path, kind, mode=0o644):
        os.mknod(path, getattr(stat, f"S_IF{kind}") | mode, os.makedev(1, 3) if kind == "CHR" else os.makedev(259, 65537))

    def op_symlink(self, target, path):
        os.symlink(target, path)

    def op_readlink(self, path):
        return os.readlink(path)

    def op_link(self, old, new, flags=0):
        check(LIBC.linkat(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))

    def op_rename(self, old, new, flags=0):
        check(LIBC.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))

    def op_list(self, path):
        return sorted(os.listdir(path))

    def op_empty_while_listing(self, path):
        with os.scandir(path) as entries:
            for entry in entries:
                os.unlink(entry.path)
        return os.listdir(path)

    def op_chdir(self, path):
        os.chdir(path)

    def op_chdir_home(self):
        os.fchdir(self.home)

    # -- metadata

    def op_stat(self, path):
        return describe(os.stat(path))

    def op_lstat(self, path):
        return describe(os.lstat(path))

    def op_fstat(self, slot):
        return describe(os.fstat(self.slot(slot)))

    def op_chmod(self, path, mode):
        os.chmod(path, mode)

    def op_fchmod(self, slot, mode):
        os.fchmod(self.slot(slot), mode)

    def op_chown(self, path, uid, gid):
        os.chown(path, uid, gid)

    def op_lchown(self, path, uid, gid):
        os.lchown(path, uid, gid)

    def op_fchown(self, slot, uid, gid):
        os.fchown(self.slot(slot), uid, gid)

    def op_access(self, path, mode, effective=False):
        return os.access(path, mode, effective_ids=effective)

    def op_umask(self, mask):
        os.umask(mask)

    def op_utimens(self, path, atime, mtime, flags=0):
        check(LIBC.utimensat(AT_FDCWD, os.fsencode(path), timespecs(atime, mtime), flags))

    def op_utimens_link(self, path, atime, mtime):
        self.op_utimens(path, atime, mtime, AT_SYMLINK_NOFOLLOW)

    def op_futimens(self, slot, atime, mtime):
        check(LIBC.futimens(self.slot(slot), timespecs(atime, mtime)))

    # -- contents

    def op_open(self, slot, path, flags, mode=0o644):
        self.keep(slot, os.open(path, flags_of(flags), mode))

    def op_close(self, slot):
        os.close(self.slot(slot))
        del self.slots[slot]

    def op_save(self, path, data, mode=0o644):
        """A file with contents, whoever made it."""
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)
        try:
            os.write(descriptor, data.encode())
        finally:
            os.close(descriptor)

    def op_save_program(self, path):
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o755)
        os.write(descriptor, PAUSING_PROGRAM)
        os.close(descriptor)

    def op_read(self, slot, count, offset=None):
        descriptor = self.slot(slot)
        return text(os.read(descriptor, count) if offset is None else os.pread(descriptor, count, offset))

    def op_write(self, slot, data, offset=None):
        descriptor = self.slot(slot)
        return os.write(descriptor, data.encode()) if offset is None else os.pwrite(descriptor, data.encode(), offset)

    def op_writev(self, slot, pieces, offset, flags=0):
        return os.pwritev(self.slot(slot), [piece.encode() for piece in pieces], offset, flags)

    def op_truncate(self, path, size):
        check(LIBC.truncate(os.fsencode(path), ctypes.c_long(size)))

    def op_ftruncate(self, slot, size):
        check(LIBC.ftruncate(self.slot(slot), ctypes.c_long(size)))

    def op_fallocate(self, slot, mode, offset, length):
        check(LIBC.fallocate(self.slot(slot), mode, ctypes.c_long(offset), ctypes.c_long(length)))

    def op_seek(self, slot, offset, whence="SET"):
        return os.lseek(self.slot(slot), offset, getattr(os, f"SEEK_{whence}"))

    def op_copy_range(self, source, target, count, source_offset, target_offset):
        return os.copy_file_range(self.slot(source), self.slot(target), count, source_offset, target_offset)

    def op_map_write(self, slot, offset, data, shared=True):
        kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        with mmap.mmap(self.slot(slot), 4096, kind) as view:
            view[offset : offset + len(data)] = data.encode()
            view.flush()
            return text(view[:64])

    def op_map_read(self, slot, count):
        with mmap.mmap(self.slot(slot), 4096, mmap.MAP_SHARED, mmap.PROT_READ) as view:
            return text(view[:count])

    def op_fsync(self, slot):
        os.fsync(self.slot(slot))

    def op_fdatasync(self, slot):
        os.fdatasync(self.slot(slot))

    # -- locks and other processes

    def op_flock(self, slot, kind):
        fcntl.flock(self.slot(slot), sum(getattr(fcntl, f"LOCK_{word}") for word in kind.split()))

    def op_lock(self, slot, kind, start=0, length=0, command="F_SETLK"):
        request = FLOCK.pack(LOCK_TYPES[kind], os.SEEK_SET, start, length, 0)
        fcntl.fcntl(self.slot(slot), getattr(fcntl, command), request)

    def op_who_locks(self, slot, kind, start=0, length=0, command="F_GETLK"):
        answer = fcntl.fcntl(self.slot(slot), getattr(fcntl, command), FLOCK.pack(LOCK_TYPES[kind], os.SEEK_SET, start, length, 0))
        found, _, start, length, _ = FLOCK.unpack(answer)
        names = {number: name for name, number in LOCK_TYPES.items()}
        return names[found] if found == fcntl.F_UNLCK else [names[found], start, length]

    def op_in_other(self, *step):
        return self.other_process().ask([self.actor, *step])

    def op_begin_in_other(self, *step):
        self.other_process().send([self.actor, *step])

    def op_other_waits(self):
        return not self.other_process().answers_within(0.05)

    def op_end_in_other(self):
        return self.other_process().receive()

    def op_end_other(self):
        self.other_process().close()
        self.other = None

    def op_run_file(self, path):
        """execve(2) in a child, which goes on until the scenario ends it."""
        self.programs.append(start_program(path))

    def op_end_program(self):
        if self.programs:
            end_program(self.programs.pop())

    def other_process(self):
        if self.other is None:
            become("root")
            self.other = OtherProcess(self.close_slots, self.outcome)
        return self.other


def describe(found):
    """Mode, owner, group, links, and what a file of this type has besides; times only as far as a scenario set them."""
    said = [oct(found.st_mode), found.st_uid, found.st_gid, found.st_nlink]
    if not stat.S_ISDIR(found.st_mode):
        said.append(found.st_size)
    if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        said.append(f"device {os.major(found.st_rdev)}:{os.minor(found.st_rdev)}")
    times = {"atime": found.st_atime_ns, "mtime": found.st_mtime_ns}
    return said + [f"{name} {time}" for name, time in times.items() if time < SET_BY_US_BEFORE_NS]


def timespecs(*times):
    """Nanoseconds since 1970, "now" or "omit"; None for no array at all."""
    if times == (None, None):
        return None
    numbers = []
    for time in times:
        numbers += [0, UTIMES[time]] if time in UTIMES else divmod(time, 10**9)
    return (ctypes.c_long * 4)(*numbers)


def check(result):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def watched_paths(steps):
    """The files that a scenario's steps name, and the working directory; names no system call could take are left out."""
    found = dict.fromkeys(["."])
    for _, operation, *arguments in steps:
        for index in PATHS.get(operation, ()):
            if index < len(arguments) and isinstance(arguments[index], str) and 0 < len(os.fsencode(arguments[index])) < 256:
                found[arguments[index].rstrip("/") or "."] = None
    return list(found)
