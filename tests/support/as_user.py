"""Run a command as an ordinary user: `python as_user.py SPEC COMMAND…`, as root; `command_as` makes that line.

In a mount namespace of its own, where that user is in /etc/passwd, /etc/subuid and /etc/subgid say what the test wants,
and the running interpreter, its packages and this tree can be reached by everybody, wherever they lie. The machine's own
files stay as they are.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

TOP = Path(__file__).parents[2]
MS_BIND = 4096


@dataclass(frozen=True)
class User:
    """`subuid` and `subgid`: lines of those files. `files`: contents to be seen at other paths."""

    uid: int = 4711
    gid: int = 4712
    groups: tuple[int, ...] = ()
    name: str = "vfsd-test"
    subuid: str = ""
    subgid: str = ""
    no_new_privs: bool = False
    user_namespaces: bool = True  # whether it may make some; if not it is in one already, with the limit 0 there
    files: tuple[tuple[str, str], ...] = ()


def command_as(user: User, command: Sequence[str]) -> list[str]:
    return [sys.executable, __file__, json.dumps(asdict(user)), *command]


@contextmanager
def folder_of(user: User) -> Iterator[Path]:
    """A directory of the user's that the user can reach, with a share in it."""
    path = Path(tempfile.mkdtemp(prefix="user-", dir="/var/tmp"))
    try:
        (path / "share").mkdir()
        for each in (path, path / "share"):
            os.chown(each, user.uid, user.gid)
            each.chmod(0o755)
        yield path
    finally:
        shutil.rmtree(path)


def main() -> None:
    from vfsd.sandbox import syscalls  # noqa: PLC0415  # only where the tree can be imported from

    user = User(**json.loads(sys.argv[1]))
    os.umask(0o022)
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(b"none", b"/", None, syscalls.MS_PRIVATE | syscalls.MS_REC)
    make_reachable([Path(sys.base_prefix), Path(sys.prefix), TOP])
    passwd = Path("/etc/passwd").read_text() + f"{user.name}:x:{user.uid}:{user.gid}::/:/bin/false\n"
    for path, text in (("/etc/passwd", passwd), ("/etc/subuid", user.subuid), ("/etc/subgid", user.subgid), *user.files):
        put_over(path, text)
    if user.no_new_privs:
        syscalls.prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)
    if not user.user_namespaces:
        forbid_user_namespaces(user)
    os.execv(sys.argv[2], sys.argv[2:])


def make_reachable(directories: list[Path]) -> None:
    """Where a directory lies below one that others may not enter, cover that and put the directory back in."""
    from vfsd.sandbox import syscalls  # noqa: PLC0415

    held = {path: os.open(path, os.O_PATH) for path in directories}
    for path, fd in held.items():
        closed = next((each for each in reversed(path.parents) if not each.stat().st_mode & 0o001), None)
        if closed is not None:
            syscalls.mount(b"tmpfs", os.fsencode(closed), b"tmpfs", 0)
        if not os.path.exists(path):
            os.makedirs(path)
            syscalls.mount(f"/proc/self/fd/{fd}".encode(), os.fsencode(path), None, MS_BIND | syscalls.MS_REC)
        os.close(fd)


def forbid_user_namespaces(user: User) -> None:
    """The limit is of the namespace that it is set in, and needs a capability there."""
    from vfsd.sandbox import syscalls  # noqa: PLC0415

    syscalls.prctl(4, 1)  # PR_SET_DUMPABLE, which the change of uid cleared: /proc/self would be root's
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    for name, text in (
        ("self/uid_map", f"{user.uid} {user.uid} 1"),
        ("self/setgroups", "deny"),
        ("self/gid_map", f"{user.gid} {user.gid} 1"),
        ("sys/user/max_user_namespaces", "0"),
    ):
        Path("/proc", name).write_text(text)


def put_over(path: str, text: str) -> None:
    from vfsd.sandbox import syscalls  # noqa: PLC0415

    with tempfile.NamedTemporaryFile("w", prefix="over-") as file:
        file.write(text)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        syscalls.mount(os.fsencode(file.name), os.fsencode(path), None, MS_BIND)


if __name__ == "__main__":
    main()
