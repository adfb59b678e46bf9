"""Probes of what a file system may have beyond POSIX: extended attributes, ACLs, inode flags, birth times, locks that wait.

Each runs in a guest and on the host from the same source, in two directories, and must say the same. Standard library only.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import select
import signal
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH = -100, 0x100, 0x1000
XATTR_CREATE, XATTR_REPLACE = 1, 2
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR = 0x80086601, 0x40086602, 0x801C581F
ACL_USER_OBJ, ACL_USER, ACL_GROUP_OBJ, ACL_GROUP, ACL_MASK, ACL_OTHER = 1, 2, 4, 8, 16, 32
NO_ID = 0xFFFFFFFF


def said(call, *arguments, **names):
    """What a call returns, or the name of its errno."""
    try:
        result = call(*arguments, **names)
    except OSError as error:
        return errno.errorcode[error.errno]
    return result.hex()[:80] + f" {len(result)}" if isinstance(result, bytes) else result


# -- extended attributes and ACLs --------------------------------------------------------------------------------------


def extended_attributes(folder):
    """Sizes, flags, names and refusals, on every type of file."""
    os.mkdir(f"{folder}/directory")
    os.close(os.open(f"{folder}/file", os.O_CREAT | os.O_WRONLY, 0o644))
    os.symlink("file", f"{folder}/link")
    os.mkfifo(f"{folder}/fifo")
    return {name: on_one_file(f"{folder}/{name}") for name in ("file", "directory", "link", "fifo")}


def on_one_file(path):
    def put(name, value, flags=0):
        return said(os.setxattr, path, name, value, flags, follow_symlinks=False)

    def get(name):
        return said(os.getxattr, path, name, follow_symlinks=False)

    results = [put("user.empty", b""), put("user.some", b"\0value\xff"), put("user.some", b"again", XATTR_CREATE)]
    results += [
        put("user.some", b"replaced", XATTR_REPLACE),
        put("user.none", b"x", XATTR_REPLACE),
        put("user.new", b"n" * 2000, XATTR_CREATE),
    ]
    results += [
        get("user.empty"),
        get("user.some"),
        get("user.none"),
        get("user.new"),
        put("user." + "n" * 250, b"long name"),
        put("user.", b"x"),
    ]
    results += [
        put("user." + "n" * 251, b"x"),
        put("nonsense.x", b"x"),
        get("nonsense.x"),
    ]
    results += [put("user.large", b"v" * 3000), put("user.larger", b"v" * 65537), get("user.large"), put(b"user.\xff\xfe", b"not UTF-8")]
    listed = said(os.listxattr, path, follow_symlinks=False)
    results += [sorted(listed) if isinstance(listed, list) else listed, *[short_buffer(path, size) for size in (0, 1, 4, 8, 100)]]
    results += [said(os.removexattr, path, name, follow_symlinks=False) for name in ("user.new", "user.new", "user.large")]
    return [*results, get("user.new"), get("user.some")]


def short_buffer(path, size):
    """lgetxattr(2) and llistxattr(2) into so many bytes: what they return, or ERANGE."""
    buffer = ctypes.create_string_buffer(size or 1)
    found = LIBC.lgetxattr(os.fsencode(path), b"user.some", buffer, size)
    listed = LIBC.llistxattr(os.fsencode(path), buffer, size)
    return [found if found >= 0 else -1, listed >= 0]


def acl(*entries):
    """The kernel's form of an access control list of (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def listed_user(uid, bits, others=0):
    owner, group, mask = (ACL_USER_OBJ, 7, NO_ID), (ACL_GROUP_OBJ, 5, NO_ID), (ACL_MASK, 7, NO_ID)
    return acl(owner, (ACL_USER, bits, uid), group, mask, (ACL_OTHER, others, NO_ID))


def access_lists(folder):
    """What a default ACL hands down, whom an access ACL lets in, and how mode and ACL change each other."""
    results = []
    os.chmod(folder, 0o755)
    os.mkdir(f"{folder}/d")
    results.append(said(os.setxattr, f"{folder}/d", "system.posix_acl_default", listed_user(2000, 6)))
    os.umask(0o022)
    for name, mode in (("a", 0o666), ("b", 0o640), ("c", 0o777)):
        os.close(os.open(f"{folder}/d/{name}", os.O_CREAT | os.O_WRONLY, mode))
        os.mkdir(f"{folder}/d/{name}-directory", mode)
        results += [acl_and_mode(f"{folder}/d/{name}"), acl_and_mode(f"{folder}/d/{name}-directory")]
    os.chmod(f"{folder}/d", 0o755)
    for uid in (1000, 2000):
        results += [as_user(uid, os.open, f"{folder}/d/{name}", flags) for name in "abc" for flags in (os.O_RDONLY, os.O_RDWR)]
    path = f"{folder}/d/a"
    results += [said(os.setxattr, path, "system.posix_acl_access", listed_user(1000, 4)), acl_and_mode(path)]
    results += [
        as_user(1000, os.open, path, os.O_RDONLY),
        as_user(1000, os.open, path, os.O_WRONLY),
        as_user(2000, os.open, path, os.O_RDONLY),
    ]
    os.chmod(path, 0o700)
    results += [acl_and_mode(path), as_user(1000, os.open, path, os.O_RDONLY)]
    os.chmod(path, 0o777)
    results += [acl_and_mode(path), as_user(1000, os.setxattr, path, "system.posix_acl_access", listed_user(1000, 7))]
    results += [
        said(os.setxattr, path, "system.posix_acl_access", b"nonsense"),
        said(os.setxattr, path, "system.posix_acl_default", listed_user(5, 1)),
    ]
    os.chown(path, 1000, 3000)
    os.chmod(path, 0o2775)
    results += [as_user(1000, os.setxattr, path, "system.posix_acl_access", listed_user(4000, 6)), acl_and_mode(path)]
    results += [said(os.removexattr, path, "system.posix_acl_access"), acl_and_mode(path), sorted(os.listxattr(f"{folder}/d"))]
    return results


def acl_and_mode(path):
    return [
        oct(os.stat(path).st_mode),
        said(os.getxattr, path, "system.posix_acl_access"),
        said(os.getxattr, path, "system.posix_acl_default"),
    ]


def as_user(uid, call, *arguments):
    """What a call says to an unprivileged user."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        result = said(call, *arguments)
        os.write(send, (result if isinstance(result, str) else "ok").encode())
        os._exit(0)
    os.close(send)
    result = os.read(receive, 100).decode()
    os.close(receive)
    os.waitpid(pid, 0)
    return result


# -- inode flags, birth times, files without names, mappings -------------------------------------------------------------


def inode_flags(folder):
    """What lsattr and chattr ask for, on a file and a directory."""
    results = []
    os.mkdir(f"{folder}/directory")
    os.close(os.open(f"{folder}/file", os.O_CREAT | os.O_WRONLY, 0o644))
    for name in ("file", "directory"):
        descriptor = os.open(f"{folder}/{name}", os.O_RDONLY)
        results.append(get_flags(descriptor))
        for flags in (0x40, 0x80, 0xC0, 0):  # no dump, no access time
            before = get_flags(descriptor)
            results += [before, said(set_flags, descriptor, before | flags if flags else before & ~0xC0), get_flags(descriptor)]
        answer = said(fcntl.ioctl, descriptor, FS_IOC_FSGETXATTR, bytes(28))
        results += [answer, as_user(1000, set_flags, descriptor, 0x40)]
        os.close(descriptor)
    return results


def get_flags(descriptor):
    return struct.unpack("<i", fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytes(4)))[0]


def set_flags(descriptor, flags):
    fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, struct.pack("<i", flags))


def birth_time(path):
    """[seconds, nanoseconds] of statx(2), or None where it does not say."""
    answer = ctypes.create_string_buffer(256)
    if LIBC.statx(AT_FDCWD, os.fsencode(path), AT_SYMLINK_NOFOLLOW, 0xFFF, answer) != 0:
        raise OSError(ctypes.get_errno(), "statx")
    mask = struct.unpack_from("<I", answer)[0]
    return list(struct.unpack_from("<qI", answer, 80)) if mask & 0x800 else None


def unnamed_files(folder):
    """O_TMPFILE: what it takes, whose it is, and which of them may be given a name."""
    results = [said(os.open, folder, os.O_TMPFILE | os.O_RDONLY), said(os.open, f"{folder}/missing", os.O_TMPFILE | os.O_RDWR)]
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_EXCL):
        descriptor = os.open(folder, os.O_TMPFILE | flags, 0o4642)
        os.write(descriptor, b"contents")
        found = os.fstat(descriptor)
        name = f"{folder}/named-{flags}"
        linked = LIBC.linkat(AT_FDCWD, f"/proc/self/fd/{descriptor}".encode(), AT_FDCWD, name.encode(), 0x400)
        results += [oct(found.st_mode), found.st_nlink, found.st_size, linked, os.fstat(descriptor).st_nlink]
        os.close(descriptor)
        results.append(said(lambda name: os.stat(name).st_size, name))
    return [*results, sorted(os.listdir(folder))]


def map_shared(path):
    """A shared mapping, written to: what the file says then, or the errno of mmap(2)."""
    with open(path, "w+b") as file:
        file.truncate(8192)
        try:
            with mmap.mmap(file.fileno(), 8192) as view:
                view[100:106] = b"mapped"
                view.flush()
        except OSError as error:
            return errno.errorcode[error.errno]
        return os.pread(file.fileno(), 6, 100).decode()


def write_direct(path, size, offset):
    """One O_DIRECT write from an aligned buffer: the bytes written or the errno."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
    with mmap.mmap(-1, 1 << 16) as buffer:
        view = memoryview(buffer)[:size]
        result = said(os.pwrite, descriptor, view, offset)
        view.release()
    os.close(descriptor)
    return result


# -- locks: a process that holds or waits for one -------------------------------------------------------------------------

HOLDERS = {}


def start_locking(path, kind):
    """A process of its own that takes an exclusive lock, waiting for it if need be, and keeps it; a number to ask about it by."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            descriptor = os.open(path, os.O_RDWR)
            getattr(fcntl, kind)(descriptor, fcntl.LOCK_EX)
            os.write(send, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(send)
    HOLDERS[pid] = receive
    return pid


def with_lock(pids, seconds):
    """Those of the processes that have got their lock, as soon as there is one."""
    ready = select.select([HOLDERS[pid] for pid in pids], [], [], seconds)[0]
    return [pid for pid in pids if HOLDERS[pid] in ready]


def end_locking(pid):
    """The process dies with its lock."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(HOLDERS.pop(pid))


def try_lock(path, kind):
    """Whether an exclusive lock is to be had at once, or its errno."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return said(getattr(fcntl, kind), descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
