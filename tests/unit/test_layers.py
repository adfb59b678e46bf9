"""The layers of the design, read off the source: who may import whom, and what nobody may do."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "vfsd"

# What a module may import of vfsd. The entry points (supervisor, cli, the roles' __main__) see more than the layers do.
BASE = {"errors", "fds"}
SUPPORT = BASE | {"wire", "channel", "log", "config", "role", "shortages"}
ALLOWED = {
    "errors": set(),
    "fds": set(),
    "wire": {"errors", "wire"},
    "faults": {"errors", "wire", "faults"},
    "sandbox": {"errors", "fds", "sandbox"},
    "broker": SUPPORT | {"sandbox", "broker"},
    "worker": SUPPORT | {"sandbox", "worker"},
    "channel": BASE | {"wire"},
    "log": BASE | {"wire", "channel"},
    "role": SUPPORT,
    "shortages": {"log"},
    "record": {"fds", "config", "sandbox"},
    "tools": {"errors", "wire", "config", "sandbox", "cli_compat", "record", "faults", "tools"},
    # Children that inject faults are programs of their own: no other module of theirs knows of faults.
    "faulty": SUPPORT | {"faults"},
    "worker.faulty": SUPPORT | {"sandbox", "worker", "faults", "faulty"},
    "broker.faulty": SUPPORT | {"sandbox", "broker", "faults", "faulty"},
    "fault_socket": {"errors", "faults", "sockets"},
    "fault_desk": {"children", "config", "errors", "fault_socket", "faults", "fds", "log", "wire"},
}
PURE = ("wire", "faults")
CODECS_OF_THE_GUEST = {"vfsd.wire.fuse_abi", "vfsd.wire.virtio_ring", "vfsd.wire.vhost_user"}
INPUT_AND_OUTPUT = {
    "os",
    "socket",
    "select",
    "selectors",
    "mmap",
    "fcntl",
    "io",
    "asyncio",
    "subprocess",
    "threading",
    "time",
    "ctypes",
    "signal",
}
FORBIDDEN_EVERYWHERE = {"pickle", "multiprocessing", "marshal", "shelve"}
CREDENTIALS = {
    f"set{what}" for what in ("uid", "gid", "euid", "egid", "reuid", "regid", "resuid", "resgid", "groups", "fsuid", "fsgid")
} | {"initgroups"}
# A worker has no system call that takes a path: these do.
PATH_CALLS = {
    "open", "stat", "lstat", "readlink", "access", "listdir", "scandir", "walk", "mkdir", "makedirs", "unlink", "remove", "rmdir", "rename",
    "replace", "link", "symlink", "chmod", "chown", "lchown", "mknod", "mkfifo", "truncate", "utime", "statvfs", "getxattr", "setxattr",
    "listxattr", "removexattr", "chdir", "chroot", "execv", "execve", "system", "popen", "posix_spawn", "fork",
}  # fmt: skip
CONFINED = ("broker", "worker", "wire", "errors", "fds", "channel", "log", "role", "shortages", "sandbox.filecalls", "faults", "faulty")


def modules():
    """(dotted name below vfsd, source) of every module."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((".".join(part for part in parts if part != "__init__"), path.read_text(encoding="utf-8")))
    return found


MODULES = modules()


def is_in(name, layer):
    return name == layer or name.startswith(layer + ".")


def layer_named(name):
    """The most particular row of the table that a module falls under."""
    return max((layer for layer in ALLOWED if is_in(name, layer)), key=len, default=name.split(".")[0])


def is_entry_point(name):
    return name.endswith("__main__") or name == "worker.control"


def imports(tree, name=""):
    """Every module that is imported, in full, and the names imported from it: `from a import b` is a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:  # relative: from the package that the module lies in
                base = ["vfsd", *name.split(".")][: -node.level]
                package = ".".join([*base, *([node.module] if node.module else [])])
            yield package, node
            yield from ((f"{package}.{alias.name}", node) for alias in node.names)


def layer_of(imported):
    parts = imported.split(".")
    return parts[1] if parts[0] == "vfsd" and len(parts) > 1 else None


def is_of_faults(imported):
    """Whether it is code that only a vfsd with fault injection runs; names of messages are not."""
    return any(
        is_in(imported, f"vfsd.{name}") for name in ("faults", "faulty", "fault_desk", "fault_socket", "worker.faulty", "broker.faulty")
    )


def called(tree):
    """(dotted name, line) of everything that is named as an attribute, called or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            yield owner, node.attr, node.lineno


def import_faults(name, tree):
    for imported, node in imports(tree, name):
        where = f"vfsd.{name}:{node.lineno}: imports {imported}"
        top, _, member = imported.partition(".")
        if top == "os" and member in CREDENTIALS and not is_in(name, "sandbox"):
            yield f"{where}, which changes the ids of every thread"
        if top == "os" and member in PATH_CALLS and is_in(name, "worker") and not is_entry_point(name):
            yield f"{where}: a worker has no call that takes a path"
        if top in FORBIDDEN_EVERYWHERE:
            yield where
        if top in ("ctypes", "_ctypes", "cffi") and not is_in(name, "sandbox"):
            yield f"{where} outside vfsd/sandbox"
        if any(is_in(name, pure) for pure in PURE) and top in INPUT_AND_OUTPUT - ({"threading"} if is_in(name, "faults") else set()):
            yield f"{where}: this layer does no input and output"
        if is_in(name, "broker") and imported in CODECS_OF_THE_GUEST:
            yield f"{where}: the broker parses nothing that the guest laid out"
        layer = layer_of(imported)
        own = name.split(".")[0]
        row = layer_named(name)
        if is_of_faults(imported) and not is_in(row, "faulty") and not {"faults", "faulty"} & ALLOWED.get(row, {"faults"}):
            yield f"{where}: who injects no faults has no part of it"
        if layer in ("worker", "broker") and own in ("worker", "broker") and layer != own:
            yield f"{where}: broker and worker do not know each other"
        elif layer and row in ALLOWED and layer not in ALLOWED[row] and not is_entry_point(name):
            yield f"{where}: above its layer"


def call_faults(name, tree):
    for owner, attribute, line in called(tree):
        where = f"vfsd.{name}:{line}: {owner}.{attribute}"
        if owner == "os" and attribute in CREDENTIALS and not is_in(name, "sandbox"):
            yield f"{where} changes the ids of every thread"
        if owner == "os" and attribute in PATH_CALLS and is_in(name, "worker") and not is_entry_point(name):
            yield f"{where}: a worker has no call that takes a path"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            shell = [word for word in node.keywords if word.arg == "shell" and getattr(word.value, "value", True)]
            if shell or (isinstance(node.func, ast.Attribute) and node.func.attr in ("system", "popen")):
                yield f"vfsd.{name}:{node.lineno}: starts a shell"
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
                yield f"vfsd.{name}:{node.lineno}: {node.func.id}"
            if isinstance(node.func, ast.Name) and node.func.id == "open" and is_in(name, "worker") and not is_entry_point(name):
                yield f"vfsd.{name}:{node.lineno}: a worker opens nothing"
        elif isinstance(node, ast.Assert):
            yield f"vfsd.{name}:{node.lineno}: assert does not validate, python -O drops it"


def nesting_faults(name, tree):
    """An import inside a function runs when it is called, which in a confined process opens files."""
    if not any(is_in(name, confined) for confined in CONFINED):
        return
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    yield f"vfsd.{name}:{node.lineno}: imports while it runs"


def faults(name, source):
    tree = ast.parse(textwrap.dedent(source))
    return [*import_faults(name, tree), *call_faults(name, tree), *nesting_faults(name, tree)]


@pytest.mark.parametrize(("name", "source"), MODULES, ids=[name or "vfsd" for name, _source in MODULES])
def test_a_module_keeps_to_its_layer(name, source):
    assert faults(name, source) == []


def test_every_layer_was_looked_at():
    assert all(any(is_in(name, layer) for name, _source in MODULES) for layer in ALLOWED)
    assert len(MODULES) > 60


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("broker.server", "from vfsd.worker.files import OpenFile"),
        ("broker.server", "import vfsd.worker"),
        ("broker.__main__", "from vfsd.worker import files"),
        ("worker.files", "from vfsd.broker import share"),
        ("worker.files", "from vfsd import broker"),
        ("worker.__main__", "from vfsd.broker.share import Share"),
        ("worker.control", "import vfsd.broker.share"),
        ("worker.files", "from ..broker import share"),
        ("broker.share", "from vfsd.wire import fuse_abi"),
        ("broker.share", "from vfsd.wire.fuse_abi import FUSE_READ"),
        ("broker.share", "from vfsd.wire import virtio_ring as rings"),
        ("broker.share", "def f():\n    from vfsd.wire import vhost_user"),
        ("broker.share", "from vfsd.supervisor import Supervisor"),
        ("wire.attr", "import os"),
        ("wire.attr", "from socket import socketpair"),
        ("wire.attr", "from vfsd.fds import OwnedFd"),
        ("wire.attr", "from vfsd.sandbox import filecalls"),
        ("wire.attr", "from . import broker_messages\nfrom ..fds import OwnedFd"),
        ("errors", "from vfsd.wire import attr"),
        ("fds", "from vfsd.errors import Breach"),
        ("sandbox.syscalls", "from vfsd.wire import attr"),
        ("sandbox.syscalls", "from vfsd.broker import share"),
        ("broker.share", "import ctypes"),
        ("worker.files", "from ctypes import CDLL"),
        ("supervisor", "import ctypes.util"),
        ("supervisor", "import pickle"),
        ("supervisor", "from multiprocessing import Process"),
        ("broker.credentials", "import os\nos.setresuid(1, 1, 1)"),
        ("broker.credentials", "import os\nbecome = os.setgroups"),
        ("supervisor", "import os\nos.seteuid(1)"),
        ("supervisor", "from os import setgroups as become"),
        ("worker.files", "from os import readlink"),
        ("supervisor", "import subprocess\nsubprocess.run('ls', shell=True)"),
        ("supervisor", "import subprocess\nsubprocess.run('ls', shell=SHELL)"),
        ("supervisor", "import os\nos.system('ls')"),
        ("cli", "assert True"),
        ("worker.files", "def f(x):\n    assert x"),
        ("worker.files", "def f():\n    import struct"),
        ("broker.share", "class A:\n    def f(self):\n        from vfsd import errors"),
        ("worker.ops_dirs", "import os\nos.open('x', 0)"),
        ("worker.ops_dirs", "import os\nread = os.readlink"),
        ("worker.ops_dirs", "open('x')"),
        ("worker.ops_dirs", "eval('1')"),
        ("tools.status", "from vfsd.broker.share import Share"),
        ("tools.status", "from vfsd.roles import make_roles"),
        ("record", "from vfsd.tools import daemon"),
        ("faults.rule", "import os"),
        ("faults.rule", "from vfsd.log import Logger"),
        ("worker.dispatch", "from vfsd.faults.rule import Rule"),
        ("worker.dispatch", "from vfsd.worker.faulty import rings"),
        ("worker.__main__", "from vfsd.worker.faulty import rings"),
        ("broker.__main__", "from vfsd import faulty"),
        ("role", "from vfsd.faulty import Faults"),
        ("broker.faulty.server", "from vfsd.worker.faulty import rings"),
    ],
)
def test_a_module_that_does_not_is_found(name, source):
    assert faults(name, source) != []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("broker.share", "from vfsd.wire.attr import ATTR\nfrom vfsd.wire import broker_messages\nfrom vfsd.sandbox import filecalls"),
        ("broker.share", "import os\nos.open('x', 0)\nos.stat('x')"),
        ("worker.files", "from vfsd.wire import fuse_abi\nimport os\nos.preadv(0, [], 0)"),
        ("wire.attr", "import struct\nfrom vfsd.errors import Breach\nfrom . import broker_messages"),
        ("sandbox.syscalls", "import ctypes\nimport os\nos.setgroups([])"),
        ("supervisor", "import subprocess\nsubprocess.run(['ls'], shell=False)"),
        ("supervisor", "def f():\n    import struct"),
    ],
)
def test_a_module_that_keeps_to_it_is_not_blamed(name, source):
    assert faults(name, source) == []


def test_what_a_worker_imports_can_be_imported_without_the_broker():
    """The table holds for what is really loaded, too."""

    for own, other in (("worker.event_loop", "broker"), ("broker.server", "worker")):
        script = f"import sys, vfsd.{own}; print([name for name in sys.modules if name.startswith('vfsd.{other}')])"
        done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True, env=os.environ)
        assert done.stdout.strip() == "[]"
