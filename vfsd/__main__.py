"""`python -m vfsd` is `vfsd`."""

from vfsd.cli import main

main()
