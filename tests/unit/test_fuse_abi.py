"""vfsd.wire.fuse_abi says the same as the kernel's own header: every constant, every structure's size, every field's offset."""

import re
import shutil
import subprocess
from pathlib import Path
from struct import Struct

import pytest

from vfsd.wire import fuse_abi

ATTR = "ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags"
ENTRY = "nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec"


def nested(prefix, names):
    return " ".join(f"{prefix}.{name}" for name in names.split())


# The fields that each Struct packs, in its order.
FIELDS = {
    "fuse_in_header": "len opcode unique nodeid uid gid pid total_extlen",
    "fuse_out_header": "len error unique",
    "fuse_attr": ATTR,
    "fuse_entry_out": f"{ENTRY} {nested('attr', ATTR)}",
    "fuse_attr_out": f"attr_valid attr_valid_nsec {nested('attr', ATTR)}",
    "fuse_init_in": "major minor max_readahead flags flags2",
    "fuse_init_out": "major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages map_alignment flags2",
    "fuse_forget_in": "nlookup",
    "fuse_forget_one": "nodeid nlookup",
    "fuse_batch_forget_in": "count",
    "fuse_interrupt_in": "unique",
    "fuse_getattr_in": "getattr_flags fh",
    "fuse_setattr_in": "valid fh size lock_owner atime mtime ctime atimensec mtimensec ctimensec mode uid gid",
    "fuse_access_in": "mask",
    "fuse_mknod_in": "mode rdev umask",
    "fuse_mkdir_in": "mode umask",
    "fuse_rename_in": "newdir",
    "fuse_rename2_in": "newdir flags",
    "fuse_link_in": "oldnodeid",
    "fuse_create_in": "flags mode umask open_flags",
    "fuse_open_in": "flags open_flags",
    "fuse_open_out": "fh open_flags",
    "fuse_release_in": "fh flags release_flags lock_owner",
    "fuse_flush_in": "fh lock_owner",
    "fuse_read_in": "fh offset size read_flags lock_owner flags",
    "fuse_write_in": "fh offset size write_flags lock_owner flags",
    "fuse_write_out": "size",
    "fuse_fsync_in": "fh fsync_flags",
    "fuse_fallocate_in": "fh offset length mode",
    "fuse_lseek_in": "fh offset whence",
    "fuse_lseek_out": "offset",
    "fuse_copy_file_range_in": "fh_in off_in nodeid_out fh_out off_out len flags",
    "fuse_lk_in": "fh owner lk.start lk.end lk.type lk.pid lk_flags",
    "fuse_lk_out": "lk.start lk.end lk.type lk.pid",
    "fuse_statfs_out": "st.blocks st.bfree st.bavail st.files st.ffree st.bsize st.namelen st.frsize",
    "fuse_syncfs_in": "",
    "fuse_setxattr_in": "size flags setxattr_flags",
    "fuse_getxattr_in": "size",
    "fuse_getxattr_out": "size",
    "fuse_secctx_header": "size nr_secctx",
    "fuse_secctx": "size",
    "fuse_ext_header": "size type",
    "fuse_ioctl_in": "fh flags cmd arg in_size out_size",
    "fuse_ioctl_out": "result flags in_iovs out_iovs",
    "fuse_dirent": "ino off namelen type",
    "fuse_direntplus": f"{nested('entry_out', ENTRY)} {nested('entry_out.attr', ATTR)} {nested('dirent', 'ino off namelen type')}",
}


# What the header of Debian 12 (7.38) lacks.
LATER = {
    "FUSE_STATX": 52,
    "FUSE_COPY_FILE_RANGE_64": 53,
    "FUSE_CREATE_SUPP_GROUP": 1 << 34,
    "FUSE_DIRECT_IO_ALLOW_MMAP": 1 << 36,
    "FUSE_PASSTHROUGH": 1 << 37,
    "FUSE_NO_EXPORT_SUPPORT": 1 << 38,
    "FUSE_HAS_RESEND": 1 << 39,
    "FUSE_ALLOW_IDMAP": 1 << 40,
    "FUSE_OVER_IO_URING": 1 << 41,
    "FUSE_REQUEST_TIMEOUT": 1 << 42,
    "FUSE_EXT_GROUPS": 32,
}
LATER_STRUCTURES = {"fuse_statx_in": 24, "FUSE_STATX_OUT_HEAD": 32, "fuse_copy_file_range_out": 8}
OURS = {"FUSE_COMPAT_INIT_IN_SIZE"}  # a size that the header does not name
# A newer header has a newer version number; the structures that vfsd uses are those of this one.
VERSION = {"FUSE_KERNEL_MINOR_VERSION"}


def constants():
    return {name: value for name, value in vars(fuse_abi).items() if re.match("FUSE_|FATTR_|FOPEN_", name) and type(value) is int}


def structs():
    return {name: value for name, value in vars(fuse_abi).items() if isinstance(value, Struct)}


def field_offsets(layout):
    """Where each packed field begins, found by packing ones into one field at a time."""
    count = len(layout.unpack(bytes(layout.size)))
    for position in range(count):
        values = [0] * count
        values[position] = 1
        yield next(offset for offset, byte in enumerate(layout.pack(*values)) if byte)


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """The numbers that the C compiler gets out of <linux/fuse.h>."""
    if not shutil.which("gcc") or not Path("/usr/include/linux/fuse.h").exists():
        pytest.skip("needs gcc and <linux/fuse.h> (Debian: gcc, linux-libc-dev)")
    lines = []
    for name in sorted(constants().keys() - LATER.keys() - OURS):
        value = name if name != "FUSE_NAME_OFFSET_DIRENTPLUS" else "offsetof(struct fuse_direntplus, dirent.name)"
        number = f"sizeof({value}) == 8 ? (unsigned long long)({value}) : (unsigned)({value})"  # 1 << 31 is negative in C
        lines.append(f'printf("{name} %llu\\n", {number});')
    for name, fields in FIELDS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        lines.extend(f'printf("{name}.{field} %zu\\n", offsetof(struct {name}, {field}));' for field in fields.split())
    folder = tmp_path_factory.mktemp("fuse_abi")
    source, program = folder / "abi.c", folder / "abi"
    source.write_text(
        "#include <stdio.h>\n#include <stddef.h>\n#include <linux/fuse.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    subprocess.run(["gcc", "-o", program, source], check=True, capture_output=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in map(str.split, output.splitlines())}


def test_every_constant_has_the_value_of_the_kernel_header(header):
    ours = {name: value for name, value in constants().items() if name not in LATER.keys() | OURS | VERSION}
    assert ours == {name: header[name] for name in ours}


def test_the_constants_that_came_later_are_those_of_newer_headers():
    assert {name: getattr(fuse_abi, name) for name in LATER} == LATER


def test_every_structure_has_its_size_and_every_field_its_offset(header):
    for name, layout in structs().items():
        if name in LATER_STRUCTURES:
            continue
        assert layout.size == header[name], name
        assert list(field_offsets(layout)) == [header[f"{name}.{field}"] for field in FIELDS[name].split()], name


def test_every_structure_is_compared_with_the_header():
    assert structs().keys() - LATER_STRUCTURES.keys() == FIELDS.keys()


def test_the_structures_that_came_later_have_their_sizes():
    """As <linux/fuse.h> of 7.45 has them: fuse_statx_out less its fuse_statx, fuse_statx_in, fuse_copy_file_range_out."""
    assert {name: structs()[name].size for name in LATER_STRUCTURES} == LATER_STRUCTURES


def test_padding_is_ignored_when_read_and_zero_when_written():
    assert fuse_abi.fuse_open_out.pack(1, 2)[12:] == bytes(4)
    assert fuse_abi.fuse_open_out.unpack(bytes(12) + b"\xff" * 4) == (0, 0)


@pytest.mark.parametrize(("size", "aligned"), [(0, 0), (1, 8), (8, 8), (25, 32), (24 + 255, 280)])
def test_records_are_aligned_to_eight_bytes(size, aligned):
    assert fuse_abi.FUSE_REC_ALIGN(size) == aligned
