"""Options of older virtiofsd versions, in terms of today's: libvirt before 10 and many scripts still write them.

    -o source=DIR,cache=none,no_flock   -d   -f

`modernize` turns them into options that cli.py knows, before it parses. Who controls the bytes: whoever starts vfsd.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vfsd.errors import ConfigError

_ON_OR_OFF = {"xattr", "readdirplus", "killpriv_v2", "posix_lock", "flock", "announce_submounts"}
_OFF_BY_DEFAULT = {"writeback", "allow_direct_io", "posix_acl", "security_label"}  # and no option says so
_OPTIONS = {
    "source": "--shared-dir",
    "cache": "--cache",
    "sandbox": "--sandbox",
    "xattrmap": "--xattrmap",
    "modcaps": "--modcaps",
    "log_level": "--log-level",
    "loglevel": "--log-level",
}
_VALUES = {("--cache", "none"): "never", ("--log-level", "err"): "error"}
_WITHOUT_EFFECT = {"allow_root", "fsname"} | {f"no_{name}" for name in _OFF_BY_DEFAULT}
_REFUSED = {
    "timeout": "is not there; choose by --cache how long the guest may keep what it learned",
    "max_idle_threads": "is not there; --num-request-queues says how many processes serve the guest",
}
_ENTRY = re.compile(r"(?:[^,]|,,)+")  # a comma ends an entry, unless it is doubled


def modernize(argv: Sequence[str]) -> list[str]:
    """The command line without `-o`, `-d` and `-f`. Raises ConfigError for an entry of `-o` that means nothing."""
    modern: list[str] = []
    words = iter(argv)
    for word in words:
        if word.startswith("-o"):
            modern += _modern_entries(word[2:] or next(words, ""))
        elif word == "-d":
            modern.append("--log-level=debug")
        elif word != "-f":  # in the foreground, as always
            modern.append(word)
    return modern


def _modern_entries(text: str) -> Iterator[str]:
    entries = [entry.replace(",,", ",") for entry in _ENTRY.findall(text)]
    if not entries:
        raise ConfigError("argument -o: says nothing; give it options, as in -o cache=auto,xattr")
    for entry in entries:
        key, equals, value = entry.partition("=")
        name = key.removeprefix("no_")
        if key in _REFUSED:
            raise ConfigError(f"argument -o: {key} {_REFUSED[key]}")
        if equals and key in _OPTIONS:
            option = _OPTIONS[key]
            yield f"{option}={_VALUES.get((option, value), value)}"
        elif not equals and (name in _ON_OR_OFF or key in _OFF_BY_DEFAULT):
            yield "--" + key.replace("_", "-")
        elif key not in _WITHOUT_EFFECT:
            raise ConfigError(f"argument -o: {entry!r} is not known")
