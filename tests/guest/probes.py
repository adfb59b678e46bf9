"""Functions that run in the guest (sent over as source) and on the host, so that both sides are asked the same question.

Standard library only, and nothing that bookworm's Python 3.11 lacks. Results are JSON; names may hold surrogates.
"""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import signal
import socket
import stat
import struct
import time

LIBC = ctypes.CDLL(None, use_errno=True)
BLOCK = 1 << 20


# -- looking ---------------------------------------------------------------------------------------------------------


def attributes(path):
    """What stat says, but for the access time and the device number, which is the guest's own."""
    found = os.lstat(path)
    return {
        "mode": oct(found.st_mode),
        "nlink": found.st_nlink,
        "uid": found.st_uid,
        "gid": found.st_gid,
        "size": found.st_size,
        "blocks": found.st_blocks,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "rdev": found.st_rdev,
        "ino": found.st_ino,
    }


def digest(path):
    summary = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(BLOCK):
            summary.update(data)
    return summary.hexdigest()


def describe(path):
    """A file as [mode, nlink, uid, gid, size, mtime, rdev, contents]: all that a copy should keep."""
    found = os.lstat(path)
    contents = ""
    if stat.S_ISREG(found.st_mode):
        contents = digest(path)
    elif stat.S_ISLNK(found.st_mode):
        contents = os.readlink(path)
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return [oct(found.st_mode), found.st_nlink, found.st_uid, found.st_gid, size, found.st_mtime_ns, found.st_rdev, contents]


def survey(root):
    """Everything below a directory, by relative name."""
    found = {".": describe(root)}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, root)] = describe(path)
    return found


def survey_digest(root):
    """The survey as a number of entries and a checksum: short enough for a serial line."""
    found = survey(root)
    summary = hashlib.sha256(repr(sorted(found.items())).encode("utf-8", "surrogateescape"))
    return [len(found), summary.hexdigest()]


def contents_digest(root):
    """Names and contents only, for copies that do not keep times."""
    found = sorted((name, entry[0], entry[7]) for name, entry in survey(root).items())
    return [len(found), hashlib.sha256(repr(found).encode("utf-8", "surrogateescape")).hexdigest()]


def names(path):
    return sorted(os.listdir(path))


def names_digest(path):
    found = names(path)
    return [len(found), hashlib.sha256(repr(found).encode("utf-8", "surrogateescape")).hexdigest()]


def types_in_listing(path):
    """The type of each entry as the listing itself says it, against what lstat says: names where the two differ."""
    wrong = []
    with os.scandir(path) as entries:
        for entry in entries:
            mode = os.lstat(entry.path).st_mode
            said = (entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False), entry.is_symlink())
            if said != (stat.S_ISDIR(mode), stat.S_ISREG(mode), stat.S_ISLNK(mode)) or entry.inode() != os.lstat(entry.path).st_ino:
                wrong.append(entry.name)
    return wrong


def file_system(path):
    found = os.statvfs(path)
    return {"bsize": found.f_bsize, "frsize": found.f_frsize, "blocks": found.f_blocks, "files": found.f_files, "namemax": found.f_namemax}


def segments(path):
    """Where a sparse file has data: [start, end] pairs."""
    found = []
    with open(path, "rb") as file:
        size, position = os.fstat(file.fileno()).st_size, 0
        while position < size:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append([start, position])
    return found


def read_text(path):
    with open(path, errors="surrogateescape") as file:
        return file.read()


def error_of(operation, *arguments):
    """The symbolic errno that a function of os raises with these arguments; None if it succeeds."""
    try:
        getattr(os, operation)(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return None


# -- making ----------------------------------------------------------------------------------------------------------


def pattern(size, seed):
    """Bytes that differ at every position that matters: no two blocks of a file are alike."""
    stream = hashlib.shake_128(repr((size, seed)).encode()).digest(min(size, 1 << 16))
    if size <= len(stream):
        return stream[:size]
    whole = bytearray()
    for number in range(-(-size // len(stream))):
        whole += number.to_bytes(8, "little") + stream[8:]
    return bytes(whole[:size])


def write_pattern(path, size, seed=0):
    with open(path, "wb") as file:
        file.write(pattern(size, seed))


def write_text(path, text):
    with open(path, "w", errors="surrogateescape") as file:
        file.write(text)


def make_tree(root, files, seed=0):
    """A tree of so many small files, a hundred to a directory, with links and odd modes among them."""
    for number in range(files):
        folder = f"{root}/{number // 1000:03d}/{number // 100 % 10}"
        if number % 100 == 0:
            os.makedirs(folder, exist_ok=True)
        path = f"{folder}/file-{number:06d}"
        if number % 50 == 49:
            os.symlink(f"file-{number - 1:06d}", path)
        else:
            write_pattern(path, number * 37 % 5000, seed + number)
            if number % 20 == 0:
                os.chmod(path, 0o755)


def make_every_type_but_devices(root):
    write_pattern(f"{root}/regular", 1234)
    os.mkdir(f"{root}/directory", 0o700)
    os.symlink("regular", f"{root}/symlink")
    os.symlink("nothing/there", f"{root}/dangling")
    os.link(f"{root}/regular", f"{root}/hard-link")
    os.mkfifo(f"{root}/fifo", 0o640)
    os.mknod(f"{root}/socket", stat.S_IFSOCK | 0o755)


def make_every_type(root):
    make_every_type_but_devices(root)
    os.mknod(f"{root}/character", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(f"{root}/block", stat.S_IFBLK | 0o600, os.makedev(259, 65537))


def make_names(root, wanted):
    for number, name in enumerate(wanted):
        write_text(f"{root}/{name}", f"contents {number}")


def make_numbered(root, count):
    for number in range(count):
        os.close(os.open(f"{root}/entry-{number:05d}-{'x' * (number % 40)}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def make_deep(root, levels, name):
    """Directories inside each other, deeper than a path can say, with a file at the bottom."""
    folder = os.open(root, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=folder)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
        os.close(folder)
        folder = below
    bottom = os.open("bottom", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=folder)
    os.write(bottom, b"here")
    os.close(bottom)
    os.close(folder)


def walk_deep(root, name):
    """How many levels there are below, and what the file at the bottom says."""
    folder, levels = os.open(root, os.O_RDONLY), 0
    while True:
        try:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
        except FileNotFoundError:
            break
        os.close(folder)
        folder, levels = below, levels + 1
    bottom = os.open("bottom", os.O_RDONLY, dir_fd=folder)
    text = os.read(bottom, 100).decode()
    os.close(bottom)
    os.close(folder)
    return [levels, text]


# -- operations on one file --------------------------------------------------------------------------------------------


def patch(path, offset, text):
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), text.encode(), offset)


def append(path, text):
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def truncate_open(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)
        return os.fstat(file.fileno()).st_size


def fallocate(path, mode, offset, length):
    with open(path, "r+b") as file:
        if LIBC.fallocate(file.fileno(), mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")


def rename_with_flags(old, new, flags):
    """renameat2(2); the errno's name, or None."""
    if LIBC.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        return errno.errorcode[ctypes.get_errno()]
    return None


def copy_range(source, target, length):
    """copy_file_range(2) until so many bytes are copied."""
    with open(source, "rb") as read, open(target, "wb") as write:
        left = length
        while left and (done := os.copy_file_range(read.fileno(), write.fileno(), left)):
            left -= done
    return length - left


def write_synced(path, size):
    """Writes, fsyncs, fdatasyncs, and fsyncs the directory: each must succeed."""
    with open(path, "wb") as file:
        file.write(pattern(size, 5))
        file.flush()
        os.fsync(file.fileno())
        file.write(b"tail")
        file.flush()
        os.fdatasync(file.fileno())
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(folder)
    if LIBC.syncfs(folder) != 0:
        raise OSError(ctypes.get_errno(), "syncfs")
    os.close(folder)


def write_mapped(path, size):
    """Changes a file through a shared mapping only."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as view:
        view[:] = pattern(size, 9)
        view[size // 2 : size // 2 + 6] = b"mapped"
        view.flush()


def digest_mapped(path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        return hashlib.sha256(view).hexdigest()


def direct_round_trip(path, size):
    """Writes and reads past the guest's page cache. Buffers of O_DIRECT must be aligned, as anonymous mappings are."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
    with mmap.mmap(-1, size) as out, mmap.mmap(-1, size) as back:
        out[:] = pattern(size, 11)
        written = os.pwrite(descriptor, out, 0)
        read = os.preadv(descriptor, [back], 0)
        same = out[:] == back[:]
    os.close(descriptor)
    return [written, read, same]


def use_unlinked(path):
    """Goes on writing to and reading from a file whose name is gone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(descriptor, b"before ")
    os.unlink(path)
    gone = not os.path.lexists(path)
    os.write(descriptor, b"after")
    os.fsync(descriptor)
    os.ftruncate(descriptor, 10)
    os.fchmod(descriptor, 0o640)
    found = os.fstat(descriptor)
    text = os.pread(descriptor, 100, 0).decode()
    os.close(descriptor)
    return [gone, text, found.st_nlink, found.st_size, oct(found.st_mode)]


def read_across_rename(old, new):
    """Opens `new`, renames `old` over it: what the open file and the name then say."""
    with open(new) as kept:
        os.rename(old, new)
        return [kept.read(), read_text(new), os.path.lexists(old), os.fstat(kept.fileno()).st_nlink]


def use_temporary_file(folder, name):
    """A file that never had a name (O_TMPFILE) is written and then given one; None where the file system has no such thing."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o644)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return None
        raise
    os.write(descriptor, b"named late")
    own = os.open("/proc/self/fd", os.O_RDONLY)  # without a directory Python calls link(2), which does not follow
    os.link(str(descriptor), f"{folder}/{name}", src_dir_fd=own, follow_symlinks=True)
    os.close(own)
    os.close(descriptor)
    return read_text(f"{folder}/{name}")


# -- as another user, and with other processes ---------------------------------------------------------------------------


def in_child(action):
    """Runs an action in a child process and gives its result, or its exception as text: credentials and locks are per process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = repr(action())
        except BaseException as error:  # noqa: BLE001 - what it was is the answer
            text = f"{type(error).__name__} {errno.errorcode.get(getattr(error, 'errno', 0), '')}".strip()
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with open(read) as answers:
        text = answers.read()
    os.waitpid(pid, 0)
    return text


def as_user(uid, gid, groups, operation, *arguments):
    """A probe's result when an unprivileged user of the guest calls it; `operation` is a name in this file or in os."""

    def action():
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        return (globals().get(operation) or getattr(os, operation))(*arguments)

    return in_child(action)


def change_contents(path, how):
    """In one of the ways that take set-id bits away where the caller may not keep them."""
    if how == "truncate":
        os.truncate(path, 1)
        return
    fd = os.open(path, os.O_RDWR | (os.O_TRUNC if how == "open" else 0))
    if how == "write":
        os.write(fd, b"new")
    elif how == "ftruncate":
        os.ftruncate(fd, 1)
    elif how == "fallocate":
        os.posix_fallocate(fd, 0, 100)
    elif how == "copy":
        os.copy_file_range(fd, fd, 2, 3, 0)
    os.close(fd)


def create_with_umask(path, mask, mode):
    os.umask(mask)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    os.mkdir(f"{path}-directory", mode)


def xattrs(path):
    """name: value in hexadecimal."""
    return {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in os.listxattr(path, follow_symlinks=False)}


def set_xattr(path, name, value):
    os.setxattr(path, name, bytes.fromhex(value), follow_symlinks=False)


def remove_xattr(path, name):
    os.removexattr(path, name, follow_symlinks=False)


def several(count, work):
    """Runs work(number) in so many processes at once; the sum of their exit codes."""
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = work(number) or 0
            finally:
                os._exit(code)
        pids.append(pid)
    return sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


def append_from_several(path, processes, records):
    def work(number):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for record in range(records):
            os.write(descriptor, b"%03d %05d\n" % (number, record))

    return several(processes, work)


def write_own_parts(path, processes, part):
    """Each process writes its own part of one file, in small pieces, last piece first."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))

    def work(number):
        data = pattern(part, number)
        with open(path, "r+b", buffering=0) as file:
            for start in reversed(range(0, part, 3000)):
                os.pwrite(file.fileno(), data[start : start + 3000], number * part + start)

    return several(processes, work)


def race_to_create(folder, processes, files):
    """All processes try to create the same names exclusively; each leaves its number in those it won."""

    def work(number):
        for file in range(files):
            try:
                descriptor = os.open(f"{folder}/{file:04d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                continue
            os.write(descriptor, b"%d" % number)
            os.close(descriptor)

    return several(processes, work)


def build_and_clear(folder, processes, files):
    """Each process makes, renames, reads and removes files of its own, in one directory with all others."""

    def work(number):
        for file in range(files):
            name = f"{folder}/{number}-{file}"
            write_pattern(name, 2000, file)
            os.rename(name, f"{name}.renamed")
            if os.stat(f"{name}.renamed").st_size != 2000:
                return 1
            os.unlink(f"{name}.renamed")
        return 0

    return several(processes, work)


def stat_while_renamed(folder, rounds):
    """One process renames a file to and fro; another opens it by both names: one of the two must always work within a few tries."""
    write_text(f"{folder}/a", "moving")

    def work(number):
        for turn in range(rounds):
            here, there = ("a", "b") if turn % 2 == 0 else ("b", "a")
            if number == 0:
                os.rename(f"{folder}/{here}", f"{folder}/{there}")
                continue
            for _ in range(100):
                try:
                    if read_text(f"{folder}/{here}") == "moving":
                        break
                except FileNotFoundError:
                    here, there = there, here
            else:
                return 1
        return 0

    return several(2, work)


def count_under_lock(path, processes, rounds, lock):
    """Several processes increase a number in a file, each time under a lock; what it says in the end."""
    write_text(path, "0")

    def work(_):
        for _ in range(rounds):
            with open(path, "r+") as file:
                getattr(fcntl, lock)(file, fcntl.LOCK_EX)
                number = int(file.read())
                file.seek(0)
                file.write(str(number + 1))
                file.flush()
                os.fsync(file.fileno())
                getattr(fcntl, lock)(file, fcntl.LOCK_UN)

    return [several(processes, work), read_text(path)]


def try_lock(path, how):
    """Whether this side gets a lock at once. `how`: flock, lockf or ofd."""
    with open(path, "r+") as file:
        try:
            _lock(file, how, wait=False)
        except BlockingIOError:
            return False
        return True


def _lock(file, how, *, wait):
    if how == "ofd":  # struct flock: F_WRLCK, SEEK_SET, the whole file
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, struct.pack("hhxxxxqqixxxx", 1, 0, 0, 0, 0))
    else:
        getattr(fcntl, how)(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def begin_to_wait_for_lock(path, how):
    """A process that waits for a lock, and keeps it when it has it; its pid."""
    return begin_to_hold_lock(path, how, wait=True)


def begin_to_hold_lock(path, how, *, wait=False):
    """A process that locks a file and keeps it so; its pid."""
    ready, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        with open(path, "r+") as file:
            if wait:
                os.write(said, b"x")
            _lock(file, how, wait=wait)
            os.write(said, b"x")
            signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(said)
    return pid


def kill_and_reap(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def talk_through_fifo(path, text):
    """A named pipe on the share connects two processes of the guest."""
    pid = os.fork()
    if pid == 0:
        write_text(path, text)
        os._exit(0)
    heard = read_text(path)
    os.waitpid(pid, 0)
    return heard


def talk_through_socket(path):
    """A Unix socket whose name is on the share connects two processes of the guest."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        pid = os.fork()
        if pid == 0:
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(path)
                caller.sendall(b"hello")
            os._exit(0)
        with listener.accept()[0] as connection:
            heard = connection.recv(100).decode()
        os.waitpid(pid, 0)
    return [heard, stat.S_ISSOCK(os.stat(path).st_mode)]


def remove_while_listing(path):
    """Removes each entry as the listing names it; what is left then."""
    removed = 0
    with os.scandir(path) as entries:
        for entry in entries:
            os.unlink(entry.path)
            removed += 1
    return [removed, os.listdir(path)]


def remove_trees(*paths):
    """Unlike rm, also where the paths are longer than a system call takes."""
    for path in paths:
        if os.path.lexists(path):
            shutil.rmtree(path)


def wait_for(path, text, seconds):
    """Polls until a file says this; the time it took, or None."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if os.path.exists(path) and read_text(path) == text:
            return time.monotonic() - start
        time.sleep(0.05)
    return None


# -- failing -----------------------------------------------------------------------------------------------------------


def attempt(operation, path):
    """Open a file and do this to it: 0, or the errno of whatever failed first."""
    try:
        fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if operation == "create" else 0))
        try:
            if operation == "read":
                os.pread(fd, 100, 0)
            if operation in ("write", "fsync"):
                os.pwrite(fd, b"data", 0)
            if operation == "fsync":
                os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno
    return 0


def write_and_sync(path, size):
    """Of writing so much to a file in one open: the errnos of write(2), fsync(2), fsync(2) again, and close(2); 0 for none."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    found = []
    for call in (lambda: os.write(fd, bytes(size)), lambda: os.fsync(fd), lambda: os.fsync(fd), lambda: os.close(fd)):
        try:
            call()
            found.append(0)
        except OSError as error:
            found.append(error.errno)
    return found
