"""Runs many scenarios in one call, here or in a guest, and says only what differs from the other side: a serial line is slow.

Standard library only, but for its own package.
"""

import hashlib
import json
import os
import shutil
import sys
import traceback

from tests.guest.posix.contents import scenarios as about_contents
from tests.guest.posix.machine import Machine, describe, text, watched_paths
from tests.guest.posix.names import scenarios as about_names
from tests.guest.posix.owners import scenarios as about_owners
from tests.guest.posix.walk import scenarios as walks

CATALOGUES = {"names": about_names, "owners": about_owners, "contents": about_contents, "walk": walks}
PART = 1 << 17
HARDENING = ("protected_hardlinks", "protected_symlinks", "protected_regular", "protected_fifos")


def chosen(catalogue, part, parts):
    """Every so-manieth scenario of a catalogue, as (name, steps)."""
    return [scenario for number, scenario in enumerate(CATALOGUES[catalogue]()) if number % parts == part]


def record(catalogue, part, parts, root, times):
    """Scenario's name → its records and what is left in its directory; each scenario in a process and a directory of its own."""
    return {name: record_scenario(steps, f"{root}/{number}", times) for number, (name, steps) in enumerate(chosen(catalogue, part, parts))}


def record_scenario(steps, folder, times):
    """In a process of its own, because scenarios change their working directory, user and umask."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(receive)
            with open(send, "w", encoding="ascii") as out:
                json.dump(in_folder(steps, folder, times), out)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - whatever it was, this process ends here
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(send)
    with open(receive, encoding="ascii") as answer:
        said = answer.read()
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError(f"the scenario in {folder} did not end well")
    return json.loads(said)


def in_folder(steps, folder, times):
    """A directory inside another: a scenario may name its parent."""
    os.umask(0o022)
    os.makedirs(f"{folder}/work")
    os.chdir(f"{folder}/work")
    home = os.open(".", os.O_RDONLY)
    records = Machine(home, watched_paths(steps), times).run(steps)
    os.fchdir(home)
    return {"steps": records, "left": left_in(".")}


def left_in(folder):
    """Everything below a directory by name: what lstat says and what is in it."""
    root = os.fsencode(folder)
    paths = [os.path.join(here, name) for here, folders, files in os.walk(root) for name in folders + files]
    described = [describe(os.lstat(path)) for path in paths]  # all of them before the first is read: that moves access times
    return {text(os.path.relpath(path, root)): [*said, contents_of(path)] for path, said in sorted(zip(paths, described, strict=True))}


def contents_of(path):
    if os.path.islink(path):
        return text(os.readlink(path))
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:  # a sparse file may be larger than anyone has time for
        return hashlib.sha256(file.read(PART) + file.read(PART)).hexdigest()[:16]


def digest(found):
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]


def different(catalogue, part, parts, root, times, expected):
    """Runs scenarios here; of those that the other side recorded differently (by digest) the records, and the names of all."""
    found = record(catalogue, part, parts, root, times)
    shutil.rmtree(root)
    return [list(found), {name: records for name, records in found.items() if digest(records) != expected.get(name)}]


def hardening():
    """What this kernel protects in sticky directories; two kernels must agree on that before their answers can be compared."""
    found = {}
    for name in HARDENING:
        with open(f"/proc/sys/fs/{name}", encoding="ascii") as setting:
            found[name] = setting.read().strip()
    return found


def harden(settings):
    for name, value in settings.items():
        with open(f"/proc/sys/fs/{name}", "w", encoding="ascii") as setting:
            setting.write(value)


if __name__ == "__main__":
    catalogue, part, parts, root, times = sys.argv[1:]
    json.dump(record(catalogue, int(part), int(parts), root, times == "times"), sys.stdout)
