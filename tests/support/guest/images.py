"""Guest kernels and the initramfs that they boot: busybox, Python and git from Debian packages, the modules for virtio-fs, and our agent.

All of it comes from unpacked packages (packages.py); the result is cached under a name that changes with its ingredients.
"""

import hashlib
import lzma
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from py_compile import compile as compile_python
from tempfile import TemporaryDirectory

from tests.support.guest.cpio import CpioWriter
from tests.support.guest.packages import BOOKWORM, CACHE, TRIXIE, PackageError, cache_lock, newest, unpack

GUEST_PYTHON = "python3.11"  # bookworm's

_USERLAND_PACKAGES = (
    "busybox-static",
    "git",
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "libexpat1",
    "libffi8",
    "libpcre2-8-0",
    "zlib1g",
)
_LIBRARIES = ("ld-linux-x86-64.so.2", "libc.so.6", "libm.so.6", "libexpat.so.1", "libffi.so.8", "libpcre2-8.so.0", "libz.so.1")
_EXTENSION_MODULES = ("_contextvars", "_ctypes", "_json", "_posixshmem", "_queue", "mmap", "resource", "termios")
_STDLIB_LEFT_OUT = frozenset(
    [
        "asyncio",
        "distutils",
        "email",
        "ensurepip",
        "html",
        "http",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "sqlite3",
        "test",
        "tkinter",
        "turtledemo",
        "unittest",
        "urllib",
        "xml",
        "xmlrpc",
    ]
)
_ENCODINGS = ("__init__", "aliases", "ascii", "latin_1", "utf_8")


@dataclass(frozen=True)
class Image:
    """A kernel (or the User-Mode Linux program) with its initramfs."""

    name: str
    kernel: Path
    initramfs: Path


def uml_image() -> Image:
    tree = unpack(BOOKWORM, ["user-mode-linux"])
    modules = _only(tree.glob("usr/lib/uml/modules/*"))
    return Image("uml", tree / "usr/bin/linux.uml", _initramfs("uml", modules, ["fuse", "virtiofs"]))


def qemu_image(suite: str = BOOKWORM) -> Image:
    """Debian's cloud kernel: 6.1 (modules) of bookworm, 6.12 (virtio-fs built in) of trixie."""
    tree = _cloud_kernel(suite)
    modules = _only(path for path in [*tree.glob("lib/modules/*"), *tree.glob("usr/lib/modules/*")])
    wanted = ["virtio_pci", "fuse", "virtiofs"]
    return Image(f"qemu-{suite}", _only(tree.glob("boot/vmlinuz-*")), _initramfs(f"qemu-{suite}", modules, wanted))


def systemd_initramfs() -> Image:
    """For a guest whose root is a disk with Debian: init.sh hands over to what is there. AppArmor takes the kernel of a suite with it."""
    tree = _cloud_kernel(BOOKWORM)
    modules = _only(tree.glob("lib/modules/*"))
    wanted = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "unix_diag"]  # by the last vfsdctl sees who is at the end of a socket
    return Image("debian", _only(tree.glob("boot/vmlinuz-*")), _initramfs("debian", modules, wanted))


def all_images() -> list[Image]:
    return [uml_image(), qemu_image(BOOKWORM), qemu_image(TRIXIE)]


def _cloud_kernel(suite: str) -> Path:
    """The unpacked kernel of a suite. The one in the cache is good for ever: only its absence asks the mirror for the newest."""
    cached = sorted(path for path in (CACHE / "packages").glob(f"{suite}-linux-image-*") if path.suffix != ".new")
    return cached[-1] if cached else unpack(suite, [newest(suite, "linux-image-cloud-amd64")])


def _only(paths: Iterator[Path]) -> Path:
    found = list(paths)
    if len(found) != 1:
        raise PackageError(f"expected one file in the unpacked package, found {len(found)}: {', '.join(map(str, found))}")
    return found[0]


def _initramfs(name: str, modules: Path, wanted: list[str]) -> Path:
    userland = unpack(BOOKWORM, _USERLAND_PACKAGES)
    here = Path(__file__).parent
    ingredients = [
        modules.as_posix().encode(),
        *((here / file).read_bytes() for file in ("images.py", "cpio.py", "agent.py", "link.py", "init.sh")),
    ]
    image = CACHE / "images" / f"{name}-{hashlib.sha256(b''.join(ingredients)).hexdigest()[:12]}.cpio"
    with cache_lock():
        if not image.exists():
            image.parent.mkdir(exist_ok=True)
            scratch = image.with_suffix(".new")
            with scratch.open("wb") as out, CpioWriter(out) as archive:
                _add_skeleton(archive)
                _add_programs(archive, userland)
                _add_python(archive, userland / "usr/lib" / GUEST_PYTHON)
                _add_modules(archive, modules, wanted)
            for old in image.parent.glob(f"{name}-*.cpio"):
                old.unlink()
            scratch.rename(image)
    return image


def _add_skeleton(archive: CpioWriter) -> None:
    here = Path(__file__).parent
    for name in ("dev", "etc", "mnt", "proc", "root", "run", "sys", "usr/bin", "usr/lib/x86_64-linux-gnu", "var"):
        archive.directory(name)
    archive.directory("tmp", 0o1777)
    for name, target in {"bin": "usr/bin", "sbin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib/x86_64-linux-gnu"}.items():
        archive.symlink(name, target)
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\nuser:x:1000:\n")
    archive.file("init", (here / "init.sh").read_bytes(), 0o755)
    for module in ("agent.py", "link.py"):
        archive.file(module, (here / module).read_bytes())


def _add_programs(archive: CpioWriter, userland: Path) -> None:
    for program in ("bin/busybox", "usr/bin/git", f"usr/bin/{GUEST_PYTHON}"):
        archive.file(f"usr/bin/{Path(program).name}", (userland / program).read_bytes(), 0o755)
    archive.symlink("usr/bin/python3", GUEST_PYTHON)
    applets = subprocess.run([userland / "bin/busybox", "--list"], capture_output=True, text=True, check=True).stdout
    for applet in applets.split():
        archive.symlink(f"usr/bin/{applet}", "busybox")
    for library in _LIBRARIES:
        found = next(path for folder in ("lib", "usr/lib") for path in [userland / folder / "x86_64-linux-gnu" / library] if path.exists())
        archive.file(f"usr/lib/x86_64-linux-gnu/{library}", found.read_bytes(), 0o755)
    templates = userland / "usr/share/git-core/templates"
    for path in sorted(templates.rglob("*")):
        if path.is_file():
            archive.file(path.relative_to(userland).as_posix(), path.read_bytes(), 0o755 if os.access(path, os.X_OK) else 0o644)


def _add_python(archive: CpioWriter, stdlib: Path) -> None:
    """The standard library without what no test imports, compiled where our own Python writes the same bytecode."""
    for path in sorted(stdlib.rglob("*.py")):
        inside = path.relative_to(stdlib)
        if inside.parts[0] in _STDLIB_LEFT_OUT or (inside.parts[0] == "encodings" and path.stem not in _ENCODINGS):
            continue
        name = f"usr/lib/{GUEST_PYTHON}/{inside}"
        archive.file(name, path.read_bytes())
        if sys.version_info[:2] == (3, 11) and sys.implementation.name == "cpython":
            archive.file(pyc_name(name), compiled(path, f"/{name}"))
    for module in _EXTENSION_MODULES:
        library = _only((stdlib / "lib-dynload").glob(f"{module}.cpython-*.so"))
        archive.file(f"usr/lib/{GUEST_PYTHON}/lib-dynload/{library.name}", library.read_bytes())


def pyc_name(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/__pycache__/{file.removesuffix('.py')}.cpython-311.pyc"


def compiled(path: Path, shown_as: str) -> bytes:
    with TemporaryDirectory() as scratch:
        target = Path(scratch) / "compiled.pyc"
        compile_python(str(path), str(target), shown_as, doraise=True, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)
        return target.read_bytes()


def _add_modules(archive: CpioWriter, modules: Path, wanted: list[str]) -> None:
    """The wanted modules and what they depend on, with the order to insert them in as /etc/modules."""
    built_in = {_module_name(line) for line in (modules / "modules.builtin").read_text().split()}
    files = {_module_name(path.name): path for path in (modules / "kernel").rglob("*.ko*")}
    order: list[str] = []

    def need(name: str) -> None:
        if name in built_in or name in order:
            return
        if name not in files:
            raise PackageError(f"the kernel in {modules} has neither a module nor a built-in {name}")
        data = _module_data(files[name])
        for dependency in _dependencies(data):
            need(dependency)
        order.append(name)
        archive.file(f"usr/lib/modules/{name}.ko", data)

    for name in wanted:
        need(name)
    archive.file("etc/modules", "".join(f"{name}\n" for name in order).encode())


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")


def _module_data(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _dependencies(module: bytes) -> list[str]:
    """What the module's .modinfo section names in `depends=`: the packages come without a depmod index."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [_module_name(name) for name in found[1].decode().split(",") if name] if found else []
