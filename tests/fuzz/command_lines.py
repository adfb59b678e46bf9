"""vfsd's command line: any list of arguments.

Oracle: Options that hold what was asked, or the exit status 2 with a line that names the program and says what is wrong (0 for
--help and --version); never a traceback.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout

from tests.fuzz.provider import Provider, Recipe
from vfsd.cli import build_parser, parse_options
from vfsd.config import Options
from vfsd.wire.id_map import make_id_maps

_OPTIONS = tuple(sorted(option for action in build_parser()._actions for option in action.option_strings))
_VALUES = (
    "/srv", "/run/s", "auto", "never", "always", "metadata", "on", "0", "1", "4", "64", "65", "-1", "kvm", "none", "chroot", "namespace",
    "kill", "log", "trap", "prefer", "mandatory", "fallback", "trace", "off", "", "%s", "%(prog)s", "=", "--", "-", ":map::u.:", ":0:1000:1:",
    "map:0:1:1", "squash-host:0:0:4294967295", "\udcff", "\u0663", "99999999999999999999999", "x" * 37, "@/etc/passwd",
    "source=/srv", "source=/srv,cache=none,ro", "xattr,posix_lock", "no_xattr,no_such_option", "-mknod:-setfcap", "+sys_admin", "-nope",
)  # fmt: skip
_WAYS = ("option", "option=value", "option value", "value", "bytes")
_BEGINNINGS = (("--shared-dir=/srv", "--socket-path=/run/s"), ("--shared-dir=/srv", "--fd=3"), ())


def one_input(data: bytes) -> None:
    provider = Provider(data)
    argv = list(provider.pick(_BEGINNINGS))
    while provider.left and len(argv) < 20:
        argv += _arguments(provider)
    output = _Text()
    try:
        with redirect_stderr(output), redirect_stdout(output):
            options = parse_options(argv)
    except SystemExit as end:
        _check_end(end.code, output.text)
        return
    _check_options(options, argv)


class _Text(io.TextIOWrapper):
    """As the real stderr: what is not UTF-8 is escaped."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        super().__init__(self._bytes, encoding="utf-8", errors="backslashreplace", write_through=True)

    @property
    def text(self) -> str:
        return self._bytes.getvalue().decode()


def _arguments(provider: Provider) -> list[str]:
    way = provider.pick(_WAYS)
    if way == "bytes":
        return [provider.blob(100).decode(errors="surrogateescape").replace("\0", "")]
    option, value = provider.pick(_OPTIONS), provider.pick(_VALUES)
    return {"option": [option], "option=value": [f"{option}={value}"], "option value": [option, value]}.get(way, [value])


def _check_end(code: object, text: str) -> None:
    assert code in (0, 2), code
    if code == 2:
        assert text.startswith("vfsd: error: "), text
        assert text.endswith("(`vfsd --help` lists the options)\n"), text
    assert "Traceback" not in text


def _check_options(options: Options, argv: list[str]) -> None:
    assert options.shared_dir
    assert (options.socket_path is None) != (options.fd is None)
    assert options.socket_group is None or options.socket_path is not None
    assert options.tag is None or 1 <= len(options.tag) <= 36
    assert 1 <= options.request_queues <= 64
    assert options.rlimit_nofile is None or 0 <= options.rlimit_nofile < 1 << 63
    assert options.readonly == ("--readonly" in argv)
    assert options.features.xattr or (options.xattrmap is None and options.features.posix_acl == options.features.security_label == "off")
    make_id_maps(options.translate_uid, options.translate_gid)  # as the supervisor does: what is wrong with them was said before


def seeds() -> dict[str, bytes]:
    lines = {
        "minimal": [],
        "what-libvirt-writes": ["--fd=3", "-o", "source=/srv"],
        "every-feature": [
            "--cache=never", "--xattr", "--posix-acl=auto", "--security-label", "auto", "--killpriv-v2", "--no-flock", "--writeback",
            "--allow-direct-io", "--sandbox=none", "--seccomp=log", "--inode-file-handles=fallback", "--rlimit-nofile=0",
        ],
        "maps": ["--xattrmap=:map::user.virtiofs.:", "--translate-uid=map:0:100000:65536", "--uid-map=:0:1000:1:", "--gid-map", ":0:1000:1:"],
        "a-percent-sign-in-a-value": ["--cache=%(choices)s%d", "--tag=%"],
        "bytes-that-are-not-utf-8": ["--shared-dir=/\udcff", "--cache=\udcff"],
        "help": ["--help"],
        "version": ["-V"],
    }  # fmt: skip
    found = {}
    for name, line in lines.items():
        recipe = Recipe().byte(0)
        for argument in line:
            recipe.pick(_WAYS, "bytes").blob(argument.encode(errors="surrogateescape"))
        found[name] = bytes(recipe)
    return found
