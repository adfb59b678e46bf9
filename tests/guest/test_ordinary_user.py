"""A guest whose vfsd was started by an ordinary user, with and without ranges of ids."""

import pytest

from tests.support.as_user import User, command_as, folder_of
from tests.support.frontend.daemon import Daemon, Options, vfsd
from tests.support.guest.guest import UmlGuest

USER = User(subuid="vfsd-test:100000:65536\n", subgid="vfsd-test:200000:65536\n")
RANGE_MAPS = (f"--uid-map=:0:{USER.uid}:1:", "--uid-map=:1:100000:65536:", f"--gid-map=:0:{USER.gid}:1:", "--gid-map=:1:200000:65536:")
MAKE_FILES_AS_1000 = """
import os
pid = os.fork()
if pid == 0:
    try:
        os.setgroups([])
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
        with open("/mnt/open/file", "w") as file:
            file.write("contents")
        os.mkdir("/mnt/open/directory")
        os._exit(0)
    except OSError as error:
        os._exit(error.errno)
result = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

pytestmark = pytest.mark.uml


@pytest.fixture
def folder():
    with folder_of(USER) as path:
        yield path


@pytest.mark.parametrize(("maps", "expected"), [((), (USER.uid, USER.gid)), (RANGE_MAPS, (100999, 200999))], ids=["own-id", "ranges"])
def test_users_of_the_guest_make_files(folder, maps, expected):
    options = Options(tag="myfs", handles="never", extra=maps)
    with (
        Daemon(folder / "share", folder / "socket", options, command=lambda *arguments: command_as(USER, vfsd(*arguments))),
        UmlGuest([str(folder / "socket")]) as guest,
    ):
        guest.mount()
        guest.check("/bin/sh", "-c", "cd /mnt && mkdir -p a/b open && echo x > a/b/c && ln a/b/c d && chmod 777 open && mv d e && rm -r a")
        assert guest.python(MAKE_FILES_AS_1000) == 0
        assert guest.check("cat", "/mnt/open/file") == "contents"
    made = {path.name: path for path in (folder / "share").rglob("*")}
    owners = {name: (path.stat().st_uid, path.stat().st_gid) for name, path in made.items()}
    assert owners == {"open": (USER.uid, USER.gid), "e": (USER.uid, USER.gid), "file": expected, "directory": expected}
