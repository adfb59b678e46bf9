"""A Debian guest with systemd, in which vfsd runs as a service: the machine that tests run on has no service manager.

The root file system is made once of Debian packages (mmdebstrap, from the sources that this machine uses) and kept in the
cache. What changes with the tree, vfsd itself and deploy/, comes in an archive on a second disk that the initramfs unpacks
over it. The guest writes to neither: QEMU discards what it changes.
"""

import hashlib
import importlib.util
import io
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.guest.guest import GUEST_APPEND, QemuGuest
from tests.support.guest.images import compiled, pyc_name, systemd_initramfs
from tests.support.guest.packages import BOOKWORM, CACHE, cache_lock, run_tool, sources_of

TREE = Path(__file__).resolve().parents[3]
PROGRAM = "/opt/vfsd/bin/vfsd"
VFSDCTL = "/opt/vfsd/bin/vfsdctl"
PROBE_PATH = "/opt/probe"  # the frontend library, for probes that run in the guest
PYTHON = "/opt/vfsd/bin/python3"

_PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "util-linux", "procps", "apparmor", "uidmap",
    "python3", "python3-msgpack", "python3-prctl", "libseccomp2",
)  # fmt: skip
_IMAGE_MIB = 700
_SITE_PACKAGES = "opt/vfsd/lib/python3.11/site-packages"
_SCRIPT = f"#!{PYTHON} -IP\nimport sys\nfrom {{module}} import main\nsys.exit(main())\n"
# What a server needs and this guest does not: each takes seconds in an emulated machine.
_MASKED = (
    "apparmor.service", "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    "fstrim.timer", "getty@tty1.service", "serial-getty@ttyS0.service", "systemd-logind.service", "systemd-random-seed.service",
    "systemd-sysctl.service", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "systemd-modules-load.service",
    "modprobe@configfs.service", "modprobe@dm_mod.service", "modprobe@drm.service", "modprobe@efi_pstore.service", "modprobe@fuse.service",
    "modprobe@loop.service", "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
)  # fmt: skip
_AGENT_UNIT = """
[Unit]
Description=what tests talk to
SuccessAction=poweroff-force
[Service]
ExecStart=/usr/bin/python3 -I -B -X utf8=1 /agent.py
Environment=PATH=/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8
[Install]
WantedBy=multi-user.target
"""


def debian_disk() -> Path:
    """The root file system, an ext4 image; made again when its ingredients change."""
    here = Path(__file__).parent
    ingredients = [BOOKWORM.encode(), *((here / file).read_bytes() for file in ("debian.py", "agent.py", "link.py"))]
    image = CACHE / "images" / f"debian-{hashlib.sha256(b''.join(ingredients)).hexdigest()[:12]}.ext4"
    sources = sources_of(BOOKWORM)
    with cache_lock():
        if not image.exists():
            image.parent.mkdir(exist_ok=True)
            for old in image.parent.glob("debian-*.ext4"):
                old.unlink()
            _make_disk(image, sources)
    return image


def _make_disk(image: Path, sources: Sequence[Path]) -> None:
    scratch = image.with_suffix(".new")
    with tempfile.TemporaryDirectory(dir=image.parent, prefix="debian-") as folder:
        root = Path(folder) / "root"
        named = [str(path) for path in sources if path.read_text().strip()]
        run_tool(
            "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(_PACKAGES)}", BOOKWORM, str(root), *named
        )
        for unneeded in ("usr/share/doc", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(root / unneeded, ignore_errors=True)
        (root / "agent.py").write_bytes((Path(__file__).parent / "agent.py").read_bytes())
        (root / "link.py").write_bytes((Path(__file__).parent / "link.py").read_bytes())
        (root / "etc/hostname").write_text("guest\n")
        (root / "etc/systemd/system/agent.service").write_text(_AGENT_UNIT)
        wants = root / "etc/systemd/system/multi-user.target.wants"
        wants.mkdir(exist_ok=True)
        (wants / "agent.service").symlink_to("/etc/systemd/system/agent.service")
        for unit in _MASKED:
            (root / "etc/systemd/system" / unit).unlink(missing_ok=True)
            (root / "etc/systemd/system" / unit).symlink_to("/dev/null")
        run_tool("mkfs.ext4", "-q", "-d", str(root), str(scratch), f"{_IMAGE_MIB}M")
    scratch.rename(image)


@contextmanager
def tree_archive() -> Iterator[Path]:
    """vfsd as docs/deployment.md installs it, with the units of deploy/, and the frontend library."""
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            _add_vfsd(archive)
            for path in sorted((TREE / "deploy").rglob("*")):
                if path.is_file():
                    archive.add(path, f"opt/deploy/{path.relative_to(TREE / 'deploy')}", filter=_as_root)
            for folder in ("tests/support/frontend", "tests/guest"):
                _add_python(archive, TREE / folder, f"{PROBE_PATH[1:]}/{folder}")
        file.flush()
        yield Path(file.name)


def _add_vfsd(archive: tarfile.TarFile) -> None:
    """A virtual environment with Debian's msgpack and prctl, which are compiled; the rest is Python source."""
    _add_text(archive, "opt/vfsd/pyvenv.cfg", "home = /usr/bin\ninclude-system-site-packages = true\n")
    link = tarfile.TarInfo(PYTHON[1:])
    link.type, link.linkname, link.mode = tarfile.SYMTYPE, "/usr/bin/python3", 0o777
    archive.addfile(link)
    for program, module in ((PROGRAM, "vfsd.cli"), (VFSDCTL, "vfsd.tools.vfsdctl")):
        _add_text(archive, program[1:], _SCRIPT.format(module=module), 0o755)
    _add_python(archive, TREE / "vfsd", f"{_SITE_PACKAGES}/vfsd")
    policy = (TREE / "vfsd/sandbox/seccomp_policy.toml").read_text()  # a link, in the tree
    _add_text(archive, f"{_SITE_PACKAGES}/vfsd/sandbox/seccomp_policy.toml", policy)
    found = importlib.util.find_spec("pyseccomp")
    assert found is not None
    assert found.origin is not None
    archive.add(found.origin, f"{_SITE_PACKAGES}/pyseccomp.py", filter=_as_root)


def _add_python(archive: tarfile.TarFile, folder: Path, name: str) -> None:
    for path in sorted(folder.rglob("*.py")):
        inside = f"{name}/{path.relative_to(folder)}"
        archive.add(path, inside, filter=_as_root)
        if sys.version_info[:2] == (3, 11) and sys.implementation.name == "cpython":  # as in the guest: it need not do it, slowly
            _add_bytes(archive, pyc_name(inside), compiled(path, f"/{inside}"))


def _add_text(archive: tarfile.TarFile, name: str, text: str, mode: int = 0o644) -> None:
    _add_bytes(archive, name, text.encode(), mode)


def _add_bytes(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), mode
    archive.addfile(info, io.BytesIO(data))


def _as_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.mode = 0o755 if info.mode & 0o100 else 0o644
    return info


class DebianGuest(QemuGuest):
    """Boots to multi-user.target, and answers as the other guests do, as root."""

    kind = "debian"
    boot_timeout_seconds = 400.0

    def __init__(self, archive: Path, *, memory_mib: int = 1024, prefix: Sequence[str] = ()) -> None:
        disks = [f"file={debian_disk()},format=raw,if=virtio,snapshot=on", f"file={archive},format=raw,if=virtio,readonly=on"]
        super().__init__(
            image=systemd_initramfs(),
            memory_mib=memory_mib,
            prefix=prefix,
            cpus=1,
            extra=[word for disk in disks for word in ("-drive", disk)],
            append=f"{GUEST_APPEND} disk=/dev/vda archive=/dev/vdb mitigations=off systemd.show_status=0",
        )

    def environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": "/var/tmp"}  # for what the guest writes

    def systemctl(self, *words: str) -> str:
        return self.check("systemctl", "--no-pager", *words, timeout=180)

    def properties(self, unit: str, *names: str) -> dict[str, str]:
        """What `systemctl show` says of these."""
        lines = self.systemctl("show", unit, f"--property={','.join(names)}").splitlines()
        return dict(line.split("=", 1) for line in lines)
