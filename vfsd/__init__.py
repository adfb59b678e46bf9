"""vfsd: a virtio-fs daemon with a privileged broker and confined workers."""

__version__ = "0.1.0"
