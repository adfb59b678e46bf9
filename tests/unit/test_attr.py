"""The attribute record is the kernel's struct fuse_attr, and device numbers are Linux's new_encode_dev()."""

import os

from hypothesis import given
from hypothesis import strategies as st

from tests.support.broker import path_fd
from vfsd.broker.share import encode_attr
from vfsd.sandbox import filecalls
from vfsd.wire import attr, fuse_abi
from vfsd.worker.ops_inodes import encode_stat


def test_the_record_is_the_kernels():
    assert fuse_abi.fuse_attr.size == attr.ATTR_BYTES
    values = tuple(range(1, 17))
    assert fuse_abi.fuse_attr.unpack(attr.ATTR.pack(*values)) == values
    assert attr.ATTR_SUBMOUNT == fuse_abi.FUSE_ATTR_SUBMOUNT


def test_the_setattr_bits_are_fuses():
    names = ("MODE", "UID", "GID", "SIZE", "ATIME", "MTIME", "ATIME_NOW", "MTIME_NOW")
    for name in names:
        assert getattr(attr, f"SET_{name}") == getattr(fuse_abi, f"FATTR_{name}")
    assert sum(getattr(attr, f"SET_{name}") for name in names) == attr.SET_ALL


@given(st.integers(0, 0xFFF), st.integers(0, 0xFFFFF))
def test_a_device_number_survives_fuse(major, minor):
    encoded = attr.encode_rdev(major, minor)
    assert encoded < 2**32
    assert attr.decode_rdev(encoded) == (major, minor)


@given(st.integers(0, 2**32 - 1))
def test_any_device_number_a_guest_sends_can_be_decoded(rdev):
    major, minor = attr.decode_rdev(rdev)
    assert 0 <= major <= 0xFFF
    assert 0 <= minor <= 0xFFFFF


@given(st.integers(0, 0xFF), st.integers(0, 0xFF))
def test_small_device_numbers_look_as_they_always_did(major, minor):
    assert attr.encode_rdev(major, minor) == major << 8 | minor


def test_broker_and_worker_describe_a_file_alike(tmp_path):
    made = tmp_path / "file"
    made.write_bytes(b"x" * 5000)
    made.chmod(0o6751)
    os.utime(made, ns=(-1_500_000_000, 1_700_000_000_123_456_789))
    for path in (made, tmp_path, "/dev/null"):
        with path_fd(path) as fd:
            record = encode_attr(filecalls.statx(fd.fileno()))
            assert encode_stat(filecalls.fstat(fd.fileno())) == record
        seen = os.stat(path)
        unpacked = attr.ATTR.unpack(record)
        assert unpacked[:3] == (seen.st_ino, seen.st_size, seen.st_blocks)
        assert [unpacked[3 + i] * 10**9 + unpacked[6 + i] for i in range(3)] == [seen.st_atime_ns, seen.st_mtime_ns, seen.st_ctime_ns]
        rdev = attr.encode_rdev(os.major(seen.st_rdev), os.minor(seen.st_rdev))
        assert unpacked[9:] == (seen.st_mode, seen.st_nlink, seen.st_uid, seen.st_gid, rdev, seen.st_blksize, 0)
