"""What the file system behind an open file is like, learnt once per mount by fstatfs(2)."""

from __future__ import annotations

from vfsd.sandbox import filecalls
from vfsd.wire.broker_messages import TRAIT_FLUSH, TRAIT_SLOW

# linux/magic.h: file systems with a flush method, whose calls also wait for somebody else.
_REMOTE = {
    0x6969,  # NFS
    0xFF534D42,  # CIFS
    0xFE534D42,  # SMB2
    0x517B,  # SMB
    0x65735546,  # FUSE
    0x01021997,  # 9P
    0x5346414F,  # AFS, OpenAFS's
    0x6B414653,  # AFS, the kernel's
    0x00C36400,  # CEPH
    0x73757245,  # CODA
    0x7461636F,  # OCFS2
    0x01161970,  # GFS2
    0x0BD00BD0,  # Lustre
    0x20030528,  # OrangeFS
    0x47504653,  # GPFS
    0x19830326,  # BeeGFS
    0x786F4256,  # VirtualBox's shared folders
}
_MOST_MOUNTS = 1024


class Traits:
    """Traits by (mount id, device): a mount id may come again for another file system, a pair hardly."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], int] = {}

    def of(self, fd: int, mount_id: int, device: int) -> int:
        key = (mount_id, device)
        known = self._known.get(key)
        if known is None:
            known = TRAIT_FLUSH | TRAIT_SLOW if filecalls.file_system_type(fd) in _REMOTE else 0
            if len(self._known) >= _MOST_MOUNTS:
                self._known.clear()
            self._known[key] = known
        return known
