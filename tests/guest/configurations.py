"""Which guests and options of the daemon the guest tests run with, as data.

Each configuration is a guest kernel and one value each of how inodes are kept, how long the guest caches, and what else is
on. Everyday runs take three on User-Mode Linux that have every value between them, and one on the newest kernel;
`VFSD_TEST_FULL=1` takes the whole product on User-Mode Linux, and the three on each QEMU kernel.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from tests.support.guest.daemons import CDaemon, daemon_under_test
from tests.support.guest.guest import Guest, QemuGuest, UmlGuest
from tests.support.guest.images import qemu_image
from tests.support.guest.packages import TRIXIE

FULL = os.environ.get("VFSD_TEST_FULL") == "1"

KINDS: dict[str, Callable[[Sequence[str]], Guest]] = {  # by name; the first word is the marker
    "uml": UmlGuest,
    "qemu": QemuGuest,
    "qemu-6.12": lambda sockets: QemuGuest(sockets, image=qemu_image(TRIXIE)),
}
HANDLES = ("prefer", "mandatory", "never")
CACHES = ("auto", "never", "always")
FEATURES = {
    "plain": (),
    "acl": ("--xattr", "--posix-acl", "--killpriv-v2", "--allow-mmap"),
    "writeback": ("--writeback", "--allow-direct-io"),
}
EVERY_VALUE_ONCE = list(zip(HANDLES, CACHES, FEATURES, strict=True))


@dataclass(frozen=True)
class Configuration:
    """A guest and the daemon's options; `number` tells apart what may be tested once and not in each of them."""

    number: int
    kind: str
    handles: str = "prefer"
    cache: str = "auto"
    features: str = "plain"
    bare: bool = False  # for the daemon that knows none of these options

    def __str__(self) -> str:
        return self.kind if self.bare else f"{self.kind}-{self.handles}-{self.cache}-{self.features}"

    @property
    def options(self) -> tuple[str, ...]:
        if self.bare:
            return extra_options()
        return (f"--inode-file-handles={self.handles}", f"--cache={self.cache}", *FEATURES[self.features], *extra_options())

    @property
    def writeback(self) -> bool:
        return "--writeback" in self.options


def extra_options() -> tuple[str, ...]:
    return tuple(os.environ.get("VFSD_TEST_DAEMON_OPTIONS", "").split())


def configurations() -> list[Configuration]:
    if daemon_under_test() is CDaemon:
        return [Configuration(number, kind, bare=True) for number, kind in enumerate(KINDS)]
    if not FULL:
        chosen = [("uml", *values) for values in EVERY_VALUE_ONCE] + [("qemu-6.12", "mandatory", "auto", "acl")]
    else:
        chosen = [("uml", *values) for values in _first_every_value_once()]
        chosen += [(kind, *values) for kind in ("qemu", "qemu-6.12") for values in EVERY_VALUE_ONCE]
    return [Configuration(number, *values) for number, values in enumerate(chosen)]


def _first_every_value_once() -> list[tuple[str, str, str]]:
    return EVERY_VALUE_ONCE + [values for values in product(HANDLES, CACHES, FEATURES) if values not in EVERY_VALUE_ONCE]
