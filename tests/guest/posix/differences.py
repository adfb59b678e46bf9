"""What virtio-fs cannot make the same as the host's own file system: each difference, why, and where it holds.

Only what the guest's kernel decides before the daemon is asked belongs here, or what it does not tell the daemon. A test
checks that each of these still differs, so that an entry goes when its reason does.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What a difference may depend on: the guest's kernel and the daemon's options."""

    kernel: tuple[int, int]
    options: tuple[str, ...]

    @property
    def writeback(self) -> bool:
        return "--writeback" in self.options

    @property
    def handles(self) -> bool:
        return "--inode-file-handles=never" not in self.options

    @property
    def shared_mappings(self) -> bool:
        """Whether what a file holds can be mapped and written; without a cache it takes an option, and a kernel that knows it."""
        return "--cache=never" not in self.options or ("--allow-mmap" in self.options and self.kernel >= (6, 6))


def everywhere(_: Facts) -> bool:
    return True


def without_idle_set_gid(record: str) -> str:
    """A record with the set-group-ID bit taken from modes that give the group no execution."""

    def plain(mode: re.Match[str]) -> str:
        bits = int(mode[1], 8)
        return f"0o{bits if bits & 0o010 else bits & ~0o2000:o}"

    return re.sub(r"\b0o([0-7]+)\b", plain, record)


def without_access_times(record: str) -> str:
    return re.sub(r", 'atime -?\d+'", "", record)


def with_one_error_for_directories(record: str) -> str:
    return record.replace("EISDIR", "EINVAL")


def without_what_has_lost_idle_set_gid(record: str) -> str:
    """A record without the entry of a file that has no set-id bit, and gives its group no execution."""

    def left(entry: re.Match[str]) -> str:
        return entry[0] if int(entry[1], 8) & 0o6010 else ""

    return re.sub(r"'p': \['0o([0-7]+)'[^\]]*\]", left, record)


@dataclass(frozen=True)
class Difference:
    catalogue: str  # which scenarios show it
    reason: str
    where: str  # matches "scenario | step", or "scenario | leaves path"
    applies: Callable[[Facts], bool] = everywhere
    leaving_out: Callable[[str], str] | None = None  # explains it only if the records are equal without this
    on_host: str = ""  # what the host's record begins with
    sure: Callable[[Facts], bool] = everywhere  # where it shows each time

    def explains(self, place: str, host: str, guest: str, facts: Facts) -> bool:
        if not self.applies(facts) or re.search(self.where, place) is None or not host.startswith(self.on_host):
            return False
        return self.leaving_out is None or self.leaving_out(host) == self.leaving_out(guest)


DIFFERENCES = [
    Difference(
        "owners",
        "chown(2) with both ids -1: the guest's kernel sends neither, and an empty SETATTR does not say that it was a chown",
        r"\| .*'l?chown', .*, -1, -1\)$",
    ),
    Difference(
        "contents",
        "lseek(2): FUSE's largest file size is the largest offset there is, ext4's is smaller",
        r"^no room for such an offset \| .*'seek', 'f', 9223372036854775807",
    ),
    Difference(
        "contents",
        "fallocate(2): the guest's kernel passes on KEEP_SIZE, PUNCH_HOLE and ZERO_RANGE, and refuses the other modes itself",
        r"^fallocate with mode (8|32|64|128) \|",
    ),
    Difference(
        "owners",
        "open(O_RDONLY|O_TRUNC) of a running program: the guest's kernel lets the daemon truncate with the open, then finds ETXTBSY",
        r"^running a program, .* \| (.*'RDONLY TRUNC'\)|leaves p$)",
    ),
    Difference(
        "owners",
        "a kernel before 6.3 does not say which supplementary groups its caller has, and set-gid is kept for members only",
        r"^user creates in 2777 of group 3000 .* \| .*(open|mkdir|fifo|file|sock)(2755|7777|2644)\b",
        lambda facts: facts.kernel < (6, 3),
    ),
    Difference(
        "names",
        "a removed directory that is somebody's working directory: a file handle does not keep it alive",
        r"^an open directory without a name \| .*'(rmdir|lstat|list|mkdir|open|symlink|chmod|rename|chdir_home)'",
        lambda facts: facts.handles,
    ),
    Difference(
        "contents",
        "lseek(SEEK_DATA, SEEK_HOLE) with write-back: the guest's kernel asks the daemon about data that it has not sent yet",
        r" \| .*'(DATA|HOLE)'\)$",
        lambda facts: facts.writeback,
    ),
    Difference(
        "walk",
        "lseek(SEEK_DATA, SEEK_HOLE) of a directory: the guest's kernel answers itself, by the directory's size",
        r" \| .*'seek', '.', \d+, '(DATA|HOLE)'\)$",
        on_host="[9223372036854775807, {}]",
    ),
    Difference(
        "walk",
        "read(2) of a directory after such a lseek: beyond the largest offset there is, the host's kernel does not get to EISDIR",
        r"^walk .* \| .*'read', '.', \d+\)$",
        leaving_out=with_one_error_for_directories,
        on_host="['EINVAL'",
    ),
    Difference(
        "walk",
        "read(2) of an empty file, or at its end: the guest's kernel knows that there is nothing, and the host's access time stays",
        r"^walk ",
        leaving_out=without_access_times,
        sure=lambda facts: "--cache=never" not in facts.options,
    ),
    Difference(
        "contents",
        "shared mappings without a cache: the guest's kernel refuses them, and what is written by them is missing afterwards",
        r"^shared and private mappings \| ",
        lambda facts: not facts.shared_mappings,
    ),
    Difference(
        "owners",
        "set-gid without group execution stays when a member of the group writes, and FUSE does not say which groups a writer is in",
        r"^(user|owner|stranger|root|set-id bits|walk) ",
        leaving_out=without_idle_set_gid,
    ),
    Difference(
        "owners",
        "set-gid without group execution, where nothing else of the file changes, times not counted: FUSE's client takes that bit from no"
        " file by itself; who copies may be unknown, and then the daemon takes it",
        r"^set-id bits of a file .* \| .*'(copy_range|write|ftruncate|truncate|chown)'",
        lambda facts: facts.writeback,
        leaving_out=without_what_has_lost_idle_set_gid,
    ),
    Difference(
        "contents",
        "truncation to the length that a file has, with write-back: its times are the guest's own then, which moves none",
        r"^times move with the calls that move them \| .*'truncate', 'd/f', 1\)$",
        lambda facts: facts.writeback,
        on_host="['ok'",
    ),
]
