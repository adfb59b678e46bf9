"""An in-process vhost-user frontend: it owns guest memory, builds rings and speaks FUSE to any virtio-fs daemon.

From the bottom up: `guest_memory` (RAM), `ring` (a virtqueue's driver side), `vhost_user_client` (the socket), `device` (all of
them), `sequences` (what QEMU, cloud-hypervisor and User-Mode Linux send when), `fuse_client` (FUSE operations), `daemon` (the
process under test). Each layer also does what no correct guest or frontend would: that is what it is for.

It shares no codec with vfsd's vhost-user and ring code, so that an error made once is not confirmed by itself; of vfsd it uses
only the tables of vfsd.wire.fuse_abi, which are checked against the kernel's header.
"""
