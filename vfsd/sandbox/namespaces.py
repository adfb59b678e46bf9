"""Namespaces and roots: a broker sees nothing but the share, control and workers see nothing at all.

The new root is made as a mount that is attached nowhere, put over `/` of an own mount namespace, and pivoted to; no
directory of the host is needed for it. Descriptors made here are the only way left to what lies outside. Who controls the
bytes: the administrator (the share's path); what is *in* the share belongs to the guest, so it is mounted without device
nodes, set-id bits and symlinks that the kernel would follow. For entry points only; runs while there is one thread.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import Literal

from vfsd.fds import OwnedFd
from vfsd.sandbox import syscalls
from vfsd.sandbox.steps import step

Sandbox = Literal["namespace", "chroot", "none"]

_OWN_NAMESPACES = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
USE_CHROOT = "start vfsd as root with CAP_SYS_ADMIN, or use --sandbox=chroot or --sandbox=none"
_USE_NONE = "start vfsd as root with CAP_SYS_CHROOT, or use --sandbox=none"
_NEEDS_5_14 = f"it needs Linux 5.14; {USE_CHROOT}"
_READABLE = "name a directory in --shared-dir that vfsd may read"
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OPEN_PATH = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

_EMPTY_ATTRIBUTES = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
_PROC_ATTRIBUTES = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
# Not NOEXEC: access(2) would then deny X_OK for files that the guest may well execute.
_SHARE_ATTRIBUTES = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOSYMFOLLOW


@dataclass(frozen=True, slots=True)
class ShareRoot:
    """What the broker reaches files by. `root` is a real descriptor, so it can be a mount fd; `proc_self_fd` is an O_PATH one."""

    root: OwnedFd
    proc_self_fd: OwnedFd

    def close(self) -> None:
        self.root.close()
        self.proc_self_fd.close()


def enter_empty_root(sandbox: Sandbox) -> None:
    """Leave the host's files, network, IPC and host name behind: control and workers."""
    if sandbox == "namespace":
        _unshare()
        with step("make an empty root file system", USE_CHROOT):
            # Mode 500: only uid 0 may so much as list it, and control and workers are not uid 0 for long.
            empty = OwnedFd(syscalls.new_mount(b"tmpfs", {b"mode": b"500", b"nr_inodes": b"1"}, _EMPTY_ATTRIBUTES))
        with empty:
            _pivot_into(empty.fileno())
    elif sandbox == "chroot":
        _chroot_into_nothing()


def enter_share(sandbox: Sandbox, shared_dir: bytes, readonly: bool) -> ShareRoot:
    """Make the share the root of this process: the broker.

    Mounts that the host makes later inside the share appear here too, and are *not* covered by `readonly`; what this
    process mounts or unmounts stays here. Without namespaces `readonly` has no effect at all: the broker refuses by itself.
    """
    if sandbox == "namespace":
        return _enter_share_namespace(shared_dir, readonly)
    with step("open the shared directory", _READABLE):
        root = OwnedFd(os.open(shared_dir, _OPEN_DIRECTORY))
    with step("open /proc/self", "mount procfs on /proc"):
        share = ShareRoot(root, OwnedFd(os.open("/proc/self/fd", _OPEN_PATH)))
    if sandbox == "chroot":
        with step("change the root directory", _USE_NONE):
            os.fchdir(root.fileno())
            os.chroot(".")
    return share


def _enter_share_namespace(shared_dir: bytes, readonly: bool) -> ShareRoot:
    _unshare()
    attributes = _SHARE_ATTRIBUTES | (syscalls.MOUNT_ATTR_RDONLY if readonly else 0)
    with step("open the shared directory", _READABLE):
        path = OwnedFd(os.open(shared_dir, _OPEN_PATH))
    with path, step("copy the mounts of the shared directory", _NEEDS_5_14):
        flags = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC | syscalls.AT_EMPTY_PATH | syscalls.AT_RECURSIVE
        tree = OwnedFd(syscalls.open_tree(path.fileno(), b"", flags))
    with tree:
        with step("protect the mounts of the shared directory", _NEEDS_5_14):
            # Before they are attached: nobody ever sees them with fewer attributes.
            syscalls.mount_setattr(tree.fileno(), b"", syscalls.AT_EMPTY_PATH | syscalls.AT_RECURSIVE, attributes)
        proc_self_fd = _open_proc_self_fd()
        _pivot_into(tree.fileno())
        with step("open the shared directory", _READABLE):  # once more, through the mount that is protected
            return ShareRoot(OwnedFd(os.open("/", _OPEN_DIRECTORY)), proc_self_fd)


def _open_proc_self_fd() -> OwnedFd:
    """Of a procfs of this pid namespace; of the one on /proc where the kernel refuses a new one.

    It does in a user namespace if parts of /proc are hidden by mounts, as containers do it: a new procfs would show them.
    """
    try:
        proc = OwnedFd(syscalls.new_mount(b"proc", {b"subset": b"pid"}, _PROC_ATTRIBUTES))
    except PermissionError:
        with step("open /proc/self", "mount procfs on /proc"):
            return OwnedFd(os.open("/proc/self/fd", _OPEN_PATH))
    except OSError as error:
        with step("mount a procfs of the pid namespace", USE_CHROOT):
            raise error from None
    with proc, step("open /proc/self", USE_CHROOT):
        return OwnedFd(os.open("self/fd", _OPEN_PATH, dir_fd=proc.fileno()))


def _unshare() -> None:
    with step("make namespaces (mount, network, IPC, UTS)", USE_CHROOT):
        syscalls.unshare(_OWN_NAMESPACES)
    with step("keep own mounts from reaching the host", USE_CHROOT):
        syscalls.mount(b"none", b"/", None, syscalls.MS_SLAVE | syscalls.MS_REC)


def _pivot_into(tree: int) -> None:
    """Make a mount that is attached nowhere the root, and detach all that was there."""
    with step("attach the new root", USE_CHROOT):
        syscalls.move_mount(tree, b"", syscalls.AT_FDCWD, b"/", syscalls.MOVE_MOUNT_F_EMPTY_PATH)
    with step("enter the new root", _READABLE):
        os.fchdir(tree)
    with step("change the root", f"pivot_root(2) is not possible where / is an initramfs; {USE_CHROOT}"):
        syscalls.pivot_root(b".", b".")  # the old root now lies over the new one, at the same place (pivot_root(2), NOTES)
        syscalls.umount2(b".", syscalls.MNT_DETACH)
        os.chdir("/")


def _chroot_into_nothing() -> None:
    with step("make an empty directory", "let vfsd write to /tmp, or use --sandbox=none"):
        directory = tempfile.mkdtemp(prefix="vfsd-empty-")
        empty = OwnedFd(os.open(directory, _OPEN_DIRECTORY))
        os.rmdir(directory)  # deleted: nothing can be made in it
    with empty, step("change the root directory", _USE_NONE):
        os.fchdir(empty.fileno())
        os.chroot(".")
