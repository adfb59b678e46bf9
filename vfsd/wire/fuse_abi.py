"""The FUSE kernel ABI as data: opcodes, flags and structure layouts, with the names of the kernel's include/uapi/linux/fuse.h.

Source: that header at version 7.38 (Linux 6.2), and what came later to 7.45: statx and copies of more than 4 GiB. Who controls the bytes: the guest sends every `*_in`, vfsd every `*_out`.

Layout rules, the same for every structure:
* Little-endian. FUSE uses the guest's byte order, and every architecture that vfsd serves is little-endian.
* The kernel pads each structure to 8 bytes by explicit fields, so that no compiler adds holes: "<" (no alignment) reproduces it.
* `padding`, `dummy`, `unused` and `spare` fields are pad bytes (`x`): ignored when unpacked, whatever the guest put there, and zero when packed.
* Names and data follow a structure directly; only `fuse_dirent`s and `fuse_direntplus`es are aligned (FUSE_REC_ALIGN).

The comment over a layout lists the fields that pack() takes and unpack() gives. Pure data: imports nothing of vfsd; sizes and values
are checked against the header by tests/unit/test_fuse_abi.py.
"""

from __future__ import annotations

from struct import Struct

# Version

FUSE_KERNEL_VERSION = 7
FUSE_KERNEL_MINOR_VERSION = 45  # the highest whose structures stand here
FUSE_ROOT_ID = 1

# Opcodes (enum fuse_opcode)

FUSE_LOOKUP = 1
FUSE_FORGET = 2  # no reply
FUSE_GETATTR = 3
FUSE_SETATTR = 4
FUSE_READLINK = 5
FUSE_SYMLINK = 6
FUSE_MKNOD = 8
FUSE_MKDIR = 9
FUSE_UNLINK = 10
FUSE_RMDIR = 11
FUSE_RENAME = 12
FUSE_LINK = 13
FUSE_OPEN = 14
FUSE_READ = 15
FUSE_WRITE = 16
FUSE_STATFS = 17
FUSE_RELEASE = 18
FUSE_FSYNC = 20
FUSE_SETXATTR = 21
FUSE_GETXATTR = 22
FUSE_LISTXATTR = 23
FUSE_REMOVEXATTR = 24
FUSE_FLUSH = 25
FUSE_INIT = 26
FUSE_OPENDIR = 27
FUSE_READDIR = 28
FUSE_RELEASEDIR = 29
FUSE_FSYNCDIR = 30
FUSE_GETLK = 31
FUSE_SETLK = 32
FUSE_SETLKW = 33
FUSE_ACCESS = 34
FUSE_CREATE = 35
FUSE_INTERRUPT = 36  # no reply
FUSE_BMAP = 37
FUSE_DESTROY = 38
FUSE_IOCTL = 39
FUSE_POLL = 40
FUSE_NOTIFY_REPLY = 41
FUSE_BATCH_FORGET = 42  # no reply
FUSE_FALLOCATE = 43
FUSE_READDIRPLUS = 44
FUSE_RENAME2 = 45
FUSE_LSEEK = 46
FUSE_COPY_FILE_RANGE = 47
FUSE_SETUPMAPPING = 48
FUSE_REMOVEMAPPING = 49
FUSE_SYNCFS = 50
FUSE_TMPFILE = 51  # 7.37
FUSE_STATX = 52  # 7.39
FUSE_COPY_FILE_RANGE_64 = 53  # 7.45

# INIT flags; bits 32 and up travel in flags2, shifted down by 32, and only if FUSE_INIT_EXT is set in flags

FUSE_ASYNC_READ = 1 << 0
FUSE_POSIX_LOCKS = 1 << 1
FUSE_FILE_OPS = 1 << 2
FUSE_ATOMIC_O_TRUNC = 1 << 3
FUSE_EXPORT_SUPPORT = 1 << 4
FUSE_BIG_WRITES = 1 << 5
FUSE_DONT_MASK = 1 << 6
FUSE_SPLICE_WRITE = 1 << 7
FUSE_SPLICE_MOVE = 1 << 8
FUSE_SPLICE_READ = 1 << 9
FUSE_FLOCK_LOCKS = 1 << 10
FUSE_HAS_IOCTL_DIR = 1 << 11
FUSE_AUTO_INVAL_DATA = 1 << 12
FUSE_DO_READDIRPLUS = 1 << 13
FUSE_READDIRPLUS_AUTO = 1 << 14
FUSE_ASYNC_DIO = 1 << 15
FUSE_WRITEBACK_CACHE = 1 << 16
FUSE_NO_OPEN_SUPPORT = 1 << 17
FUSE_PARALLEL_DIROPS = 1 << 18
FUSE_HANDLE_KILLPRIV = 1 << 19
FUSE_POSIX_ACL = 1 << 20
FUSE_ABORT_ERROR = 1 << 21
FUSE_MAX_PAGES = 1 << 22
FUSE_CACHE_SYMLINKS = 1 << 23
FUSE_NO_OPENDIR_SUPPORT = 1 << 24
FUSE_EXPLICIT_INVAL_DATA = 1 << 25
FUSE_MAP_ALIGNMENT = 1 << 26
FUSE_SUBMOUNTS = 1 << 27
FUSE_HANDLE_KILLPRIV_V2 = 1 << 28
FUSE_SETXATTR_EXT = 1 << 29
FUSE_INIT_EXT = 1 << 30
FUSE_INIT_RESERVED = 1 << 31
FUSE_SECURITY_CTX = 1 << 32
FUSE_HAS_INODE_DAX = 1 << 33
FUSE_CREATE_SUPP_GROUP = 1 << 34
FUSE_HAS_EXPIRE_ONLY = 1 << 35
FUSE_DIRECT_IO_ALLOW_MMAP = 1 << 36
FUSE_PASSTHROUGH = 1 << 37
FUSE_NO_EXPORT_SUPPORT = 1 << 38
FUSE_HAS_RESEND = 1 << 39
FUSE_ALLOW_IDMAP = 1 << 40
FUSE_OVER_IO_URING = 1 << 41
FUSE_REQUEST_TIMEOUT = 1 << 42

# Flags of single requests and replies

FATTR_MODE = 1 << 0  # fuse_setattr_in.valid
FATTR_UID = 1 << 1
FATTR_GID = 1 << 2
FATTR_SIZE = 1 << 3
FATTR_ATIME = 1 << 4
FATTR_MTIME = 1 << 5
FATTR_FH = 1 << 6
FATTR_ATIME_NOW = 1 << 7
FATTR_MTIME_NOW = 1 << 8
FATTR_LOCKOWNER = 1 << 9
FATTR_CTIME = 1 << 10
FATTR_KILL_SUIDGID = 1 << 11

FOPEN_DIRECT_IO = 1 << 0  # fuse_open_out.open_flags
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NONSEEKABLE = 1 << 2
FOPEN_CACHE_DIR = 1 << 3
FOPEN_STREAM = 1 << 4
FOPEN_NOFLUSH = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6

FUSE_OPEN_KILL_SUIDGID = 1 << 0  # fuse_open_in.open_flags, fuse_create_in.open_flags
FUSE_RELEASE_FLUSH = 1 << 0  # fuse_release_in.release_flags
FUSE_RELEASE_FLOCK_UNLOCK = 1 << 1
FUSE_GETATTR_FH = 1 << 0  # fuse_getattr_in.getattr_flags
FUSE_IOCTL_COMPAT = 1 << 0  # fuse_ioctl_in.flags
FUSE_IOCTL_UNRESTRICTED = 1 << 1
FUSE_IOCTL_32BIT = 1 << 3
FUSE_IOCTL_DIR = 1 << 4
FUSE_IOCTL_COMPAT_X32 = 1 << 5
FUSE_LK_FLOCK = 1 << 0  # fuse_lk_in.lk_flags
FUSE_WRITE_CACHE = 1 << 0  # fuse_write_in.write_flags: from the page cache, the fh is a guess
FUSE_WRITE_LOCKOWNER = 1 << 1
FUSE_WRITE_KILL_SUIDGID = 1 << 2
FUSE_READ_LOCKOWNER = 1 << 1  # fuse_read_in.read_flags
FUSE_FSYNC_FDATASYNC = 1 << 0  # fuse_fsync_in.fsync_flags
FUSE_ATTR_SUBMOUNT = 1 << 0  # fuse_attr.flags
FUSE_ATTR_DAX = 1 << 1
FUSE_SETXATTR_ACL_KILL_SGID = 1 << 0  # fuse_setxattr_in.setxattr_flags

FUSE_MAX_NR_SECCTX = 31  # extension types to 31 are counts of security contexts
FUSE_EXT_GROUPS = 32

# Headers

# struct fuse_in_header: len (of the whole request), opcode, unique, nodeid, uid, gid, pid, total_extlen (in units of 8 bytes)
fuse_in_header = Struct("<IIQQIIIH2x")  # 40 bytes
# struct fuse_out_header: len (of the whole reply), error (0 or a negative errno), unique
fuse_out_header = Struct("<IiQ")  # 16 bytes

# Parts of replies

# struct fuse_attr: ino, size, blocks (of 512 bytes), atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags
FUSE_ATTR_FORMAT = "QQQQQQIIIIIIIIII"
fuse_attr = Struct("<" + FUSE_ATTR_FORMAT)  # 88 bytes
# struct fuse_entry_out: nodeid, generation, entry_valid, attr_valid (seconds), entry_valid_nsec, attr_valid_nsec, then fuse_attr
FUSE_ENTRY_OUT_FORMAT = "QQQQII" + FUSE_ATTR_FORMAT
fuse_entry_out = Struct("<" + FUSE_ENTRY_OUT_FORMAT)  # 128 bytes
# struct fuse_attr_out: attr_valid, attr_valid_nsec, then fuse_attr
fuse_attr_out = Struct("<QI4x" + FUSE_ATTR_FORMAT)  # 104 bytes

# Session

# struct fuse_init_in as of 7.36: major, minor, max_readahead, flags, flags2. Before 7.36 it ends after flags.
fuse_init_in = Struct("<IIIII44x")  # 64 bytes
FUSE_COMPAT_INIT_IN_SIZE = 16  # not named by the kernel: the size of the request before 7.36
# struct fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages, map_alignment, flags2
fuse_init_out = Struct("<IIIIHHIIHHI28x")  # 64 bytes
FUSE_COMPAT_INIT_OUT_SIZE = 8
FUSE_COMPAT_22_INIT_OUT_SIZE = 24

# Lookups

fuse_forget_in = Struct("<Q")  # nlookup
fuse_forget_one = Struct("<QQ")  # nodeid, nlookup
fuse_batch_forget_in = Struct("<I4x")  # count (of fuse_forget_one)
fuse_interrupt_in = Struct("<Q")  # unique (of the request to interrupt)

# Attributes

fuse_getattr_in = Struct("<I4xQ")  # getattr_flags, fh
# struct fuse_setattr_in: valid, fh, size, lock_owner, atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode, uid, gid
fuse_setattr_in = Struct("<I4xQQQQQQIIII4xII4x")  # 88 bytes
fuse_access_in = Struct("<I4x")  # mask

# Names (each is followed by one or two names, each ended by a NUL)

fuse_mknod_in = Struct("<III4x")  # mode, rdev, umask; + name
fuse_mkdir_in = Struct("<II")  # mode, umask; + name
fuse_rename_in = Struct("<Q")  # newdir; + old name, new name
fuse_rename2_in = Struct("<QI4x")  # newdir, flags; + old name, new name
fuse_link_in = Struct("<Q")  # oldnodeid; + new name
fuse_create_in = Struct("<IIII")  # flags, mode, umask, open_flags; + name. The reply is a fuse_entry_out and a fuse_open_out.

fuse_statx_in = Struct("<I4xQII")  # getattr_flags, fh, sx_flags, sx_mask
FUSE_STATX_OUT_HEAD = Struct("<QI4x16x")  # attr_valid, attr_valid_nsec; a struct fuse_statx follows (wire/attr.py), 288 bytes in all

# Open files

fuse_open_in = Struct("<II")  # flags, open_flags
fuse_open_out = Struct("<QI4x")  # fh, open_flags
fuse_release_in = Struct("<QIIQ")  # fh, flags, release_flags, lock_owner
fuse_flush_in = Struct("<Q8xQ")  # fh, lock_owner
fuse_read_in = Struct("<QQIIQI4x")  # fh, offset, size, read_flags, lock_owner, flags
fuse_write_in = Struct("<QQIIQI4x")  # fh, offset, size, write_flags, lock_owner, flags; + data
fuse_write_out = Struct("<I4x")  # size
fuse_fsync_in = Struct("<QI4x")  # fh, fsync_flags
fuse_fallocate_in = Struct("<QQQI4x")  # fh, offset, length, mode
fuse_lseek_in = Struct("<QQI4x")  # fh, offset, whence
fuse_lseek_out = Struct("<Q")  # offset
fuse_copy_file_range_in = Struct("<QQQQQQQ")  # fh_in, off_in, nodeid_out, fh_out, off_out, len, flags; replied by a fuse_write_out
fuse_copy_file_range_out = Struct("<Q")  # bytes_copied, of FUSE_COPY_FILE_RANGE_64
# struct fuse_ioctl_in: fh, flags, cmd, arg, in_size, out_size; + in_size bytes
fuse_ioctl_in = Struct("<QIIQII")
fuse_ioctl_out = Struct("<iIII")  # result, flags, in_iovs, out_iovs; + data
# struct fuse_lk_in: fh, owner, then struct fuse_file_lock: start, end, type, pid; then lk_flags
fuse_lk_in = Struct("<QQQQIII4x")  # 48 bytes
fuse_lk_out = Struct("<QQII")  # start, end, type, pid

# File system

# struct fuse_statfs_out: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize
fuse_statfs_out = Struct("<QQQQQIII28x")  # 80 bytes
fuse_syncfs_in = Struct("<8x")  # 8 bytes of padding

# Extended attributes

fuse_setxattr_in = Struct("<III4x")  # size, flags, setxattr_flags; + name, value
FUSE_COMPAT_SETXATTR_IN_SIZE = 8  # without FUSE_SETXATTR_EXT: size and flags only
fuse_getxattr_in = Struct("<I4x")  # size; + name
fuse_getxattr_out = Struct("<I4x")  # size

# Extensions after the arguments of creations (total_extlen): each begins with one of these, which share a shape

fuse_secctx_header = Struct("<II")  # size (of all contexts and this), nr_secctx
fuse_secctx = Struct("<I4x")  # size (of the label); + name, label
fuse_ext_header = Struct("<II")  # size (of this extension), type

# Directory entries

fuse_dirent = Struct(
    "<QQII"
)  # ino, off (the cookie that continues after this entry), namelen, type (st_mode >> 12); + name: 24 bytes before it
fuse_direntplus = Struct("<" + FUSE_ENTRY_OUT_FORMAT + "QQII")  # a fuse_entry_out, then a fuse_dirent: 152 bytes before the name
FUSE_NAME_OFFSET = fuse_dirent.size
FUSE_NAME_OFFSET_DIRENTPLUS = fuse_direntplus.size


def FUSE_REC_ALIGN(size: int) -> int:  # noqa: N802  the kernel's macro, by its name
    """The bytes a variable-length record takes: rounded up to a 64-bit boundary."""
    return (size + 7) & ~7
