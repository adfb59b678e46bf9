"""Unpacks Debian packages into the cache without installing them.

The test guests need things the host has no use for: a kernel image, a Python and a git to run *inside*, and the Rust
virtiofsd of Debian's next suite to compare with. apt-get downloads and verifies them; dpkg-deb unpacks them.
The mirrors are those this machine already uses: the private configuration is its own list of sources with the name of
the suite replaced, so that no host name stands in this tree.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CACHE = Path(__file__).resolve().parents[3] / ".cache"

BOOKWORM = "bookworm"
TRIXIE = "trixie"

LISTS_GOOD_FOR_SECONDS = 24 * 3600  # a mirror removes a package soon after its successor came

_APT_ETC = Path("/etc/apt")
_SUITE_SUFFIXES = ("", "-updates", "-security")


class PackageError(Exception):
    """Debian's packages could not be fetched or unpacked; the text says which and why."""


def unpack(suite: str, packages: Sequence[str]) -> Path:
    """The directory below the cache that these packages are unpacked in; it is made once for a suite and list of packages."""
    key = hashlib.sha256("\n".join([suite, *packages]).encode()).hexdigest()[:12]
    target = CACHE / "packages" / f"{suite}-{packages[0].split('=')[0]}-{key}"
    with cache_lock():
        if not target.exists():
            _download_and_unpack(suite, packages, target)
    return target


@contextmanager
def cache_lock() -> Iterator[None]:
    """One process at a time fills the cache; the others wait for what it makes."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sources_of(suite: str) -> list[Path]:
    """Files in the two formats of sources.list, which name this machine's mirrors of a suite."""
    with cache_lock():
        return sorted((_apt_root(suite) / "sources.list.d").iterdir())


def newest(suite: str, meta_package: str) -> str:
    """The package that a meta package (linux-image-cloud-amd64) stands for at the moment."""
    with cache_lock():
        shown = run_tool("apt-cache", *_apt_options(_apt_root(suite)), "show", "--no-all-versions", meta_package)
    depends = next(line for line in shown.splitlines() if line.startswith("Depends:"))
    return depends.removeprefix("Depends:").split(",")[0].split("(")[0].strip()


def _download_and_unpack(suite: str, packages: Sequence[str], target: Path) -> None:
    options = _apt_options(_apt_root(suite))
    scratch = target.with_name(f"{target.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "debs").mkdir(parents=True)
    run_tool("apt-get", *options, "download", *packages, cwd=scratch / "debs")
    for deb in sorted((scratch / "debs").glob("*.deb")):
        run_tool("dpkg-deb", "--extract", str(deb), str(scratch / "root"))
    (scratch / "root").rename(target)
    shutil.rmtree(scratch)


def _apt_root(suite: str) -> Path:
    """A private apt configuration with the lists of one suite, fetched when it is new or a week old."""
    root = CACHE / "apt" / suite
    for name in ("sources.list.d", "lists/partial", "archives/partial", "preferences.d"):
        (root / name).mkdir(parents=True, exist_ok=True)
    stamp = root / "updated"
    if not stamp.exists() or stamp.stat().st_mtime < time.time() - LISTS_GOOD_FOR_SECONDS:
        _write_sources(suite, root / "sources.list.d")
        run_tool("apt-get", *_apt_options(root), "update")
        stamp.touch()
    return root


def _apt_options(root: Path) -> list[str]:
    settings = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": root / "sources.list.d",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": root / "preferences.d",
        "Dir::State::lists": root / "lists",
        "Dir::Cache::archives": root / "archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Get::List-Cleanup": "true",
        "APT::Sandbox::User": "root",  # the cache need not be readable for the user _apt
        "Acquire::Languages": "none",
        "Debug::NoLocking": "true",  # cache_lock() is the lock
    }
    return ["--quiet", "--quiet", *(f"--option={name}={value}" for name, value in settings.items())]


def _write_sources(suite: str, directory: Path) -> None:
    """This machine's Debian sources, main component, for another suite."""
    here = _this_suite()
    suites = {here + suffix: suite + suffix for suffix in _SUITE_SUFFIXES}
    stanzas = [stanza for text in _deb822_files() for stanza in _moved_stanza(text, suites)]
    lines = [line for text in _one_line_files() for line in _moved_lines(text, suites)]
    if not stanzas and not lines:
        raise PackageError(
            f"no source of {here} packages in {_APT_ETC}: guests are built from Debian packages, so apt-get must have a Debian mirror"
        )
    (directory / "debian.sources").write_text("\n\n".join(stanzas) + "\n")
    (directory / "debian.list").write_text("\n".join(lines) + "\n")


def _this_suite() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.removeprefix("VERSION_CODENAME=").strip('"')
    raise PackageError("/etc/os-release names no VERSION_CODENAME: is this Debian?")


def _deb822_files() -> list[str]:
    return [path.read_text() for path in sorted((_APT_ETC / "sources.list.d").glob("*.sources"))]


def _one_line_files() -> list[str]:
    paths = [_APT_ETC / "sources.list", *sorted((_APT_ETC / "sources.list.d").glob("*.list"))]
    return [path.read_text() for path in paths if path.exists()]


def _moved_stanza(text: str, suites: dict[str, str]) -> Iterator[str]:
    for stanza in text.split("\n\n"):
        lines = [line for line in stanza.splitlines() if line and not line.startswith("#")]
        named = [name for line in lines if line.startswith("Suites:") for name in line.removeprefix("Suites:").split()]
        if named and all(name in suites for name in named):
            moved = " ".join(suites[name] for name in named)
            yield "\n".join(f"Suites: {moved}" if line.startswith("Suites:") else line for line in lines)


def _moved_lines(text: str, suites: dict[str, str]) -> Iterator[str]:
    for line in text.splitlines():
        words = line.split()
        if words and words[0] == "deb" and any(word in suites for word in words):
            yield " ".join(suites.get(word, word) for word in words)


def run_tool(*argv: str, cwd: Path | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PackageError(f"`{argv[0]}` failed ({done.returncode}) at {' '.join(argv[-6:])}: {done.stderr.strip()[-2000:]}")
    return done.stdout
