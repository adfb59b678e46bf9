"""Names are bytes: whatever the host's file system takes arrives unchanged, and what it refuses is refused with its errno."""

import os

import pytest

from tests.guest import probes
from tests.guest.conftest import Share

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

ODD_NAMES = [
    " ",
    " leading and trailing ",
    "-rf",
    "...",
    ".hidden",
    "new\nline",
    "tab\tand\x01control\x7f",
    "back\\slash",
    "quote'\"`$(x)*?",
    "ünïcödé-名前-🗂",
    "Case",
    "case",
    os.fsdecode(b"\xff\xfe not UTF-8 \x80"),
    os.fsdecode(bytes(range(1, 47)) + bytes(range(48, 250))),  # every byte but NUL and the slash, as far as a name is long
    "x" * 255,
    "é" * 127,
]


def test_odd_names_made_on_the_host_are_seen(share: Share) -> None:
    probes.make_names(share.host, ODD_NAMES)
    assert share.call(probes.names, share.inside) == sorted(ODD_NAMES)
    share.assert_same()


def test_odd_names_are_made_by_the_guest(share: Share) -> None:
    share.call(probes.make_names, share.inside, ODD_NAMES)
    assert probes.names(share.host) == sorted(ODD_NAMES)
    share.assert_same()


def test_odd_names_can_be_removed_and_renamed(share: Share) -> None:
    probes.make_names(share.host, ODD_NAMES)
    for number, name in enumerate(ODD_NAMES):
        share.guest.python(
            "import os; os.rename(f'{root}/{name}', f'{root}/renamed'); os.rename(f'{root}/renamed', f'{root}/{number}')",
            root=share.inside,
            name=name,
            number=number,
        )
    assert sorted(os.listdir(share.host), key=int) == [str(number) for number in range(len(ODD_NAMES))]


@pytest.mark.parametrize("operation", ["mkdir", "rmdir", "unlink", "stat", "listdir"])
def test_a_name_that_is_too_long_is_refused(share: Share, operation: str) -> None:
    assert share.call(probes.error_of, operation, f"{share.inside}/{'x' * 256}") == "ENAMETOOLONG"


def test_a_tree_deeper_than_a_path_can_say(share: Share) -> None:
    os.mkdir(f"{share.host}/by-host")
    os.mkdir(f"{share.host}/by-guest")
    name = "level-of-a-deep-tree-" + "x" * 40
    probes.make_deep(f"{share.host}/by-host", 150, name)
    share.call(probes.make_deep, f"{share.inside}/by-guest", 150, name)
    for folder in ("by-host", "by-guest"):
        inside, host = share.both(probes.walk_deep, folder, name)
        assert inside == host == [150, "here"]


def test_rename_over_a_file_replaces_it(share: Share) -> None:
    probes.write_text(f"{share.host}/a", "from a")
    probes.write_text(f"{share.host}/b", "from b")
    assert share.call(probes.error_of, "rename", f"{share.inside}/a", f"{share.inside}/b") is None
    assert probes.names(share.host) == ["b"]
    assert probes.read_text(f"{share.host}/b") == share.call(probes.read_text, f"{share.inside}/b") == "from a"


def test_a_directory_moves_with_all_that_is_in_it(share: Share) -> None:
    os.makedirs(f"{share.host}/from/inner")
    os.mkdir(f"{share.host}/to")
    probes.write_text(f"{share.host}/from/inner/file", "moved")
    assert share.call(probes.read_text, f"{share.inside}/from/inner/file") == "moved"
    assert share.call(probes.error_of, "rename", f"{share.inside}/from", f"{share.inside}/to/here") is None
    assert share.call(probes.read_text, f"{share.inside}/to/here/inner/file") == "moved"
    share.assert_same()


def test_refused_renames_and_removals_have_the_hosts_errno(share: Share) -> None:
    os.makedirs(f"{share.host}/full/inner")
    os.mkdir(f"{share.host}/empty")
    probes.write_text(f"{share.host}/file", "")
    for operation, *names in (
        ("rename", "empty", "full"),
        ("rename", "full", "full/inner/below"),
        ("rename", "file", "empty"),
        ("rename", "empty", "file"),
        ("rename", "missing", "empty"),
        ("rmdir", "full"),
        ("rmdir", "file"),
        ("unlink", "full"),
        ("unlink", "missing"),
        ("mkdir", "file"),
        ("mkdir", "missing/below"),
        ("mkdir", "file/below"),
        ("link", "full", "link"),
        ("readlink", "file"),
        ("listdir", "file"),
    ):
        inside = share.call(probes.error_of, operation, *(f"{share.inside}/{name}" for name in names))
        host = probes.error_of(operation, *(f"{share.host}/{name}" for name in names))
        assert inside == host is not None, (operation, names)


def test_exclusive_creation_fails_on_an_existing_file(share: Share) -> None:
    probes.write_text(f"{share.host}/file", "kept")
    assert share.call(probes.error_of, "open", f"{share.inside}/file", os.O_CREAT | os.O_EXCL | os.O_WRONLY) == "EEXIST"
    assert probes.read_text(f"{share.host}/file") == "kept"


def test_rename_flags(share: Share) -> None:
    probes.write_text(f"{share.host}/a", "from a")
    probes.write_text(f"{share.host}/b", "from b")
    assert share.call(probes.rename_with_flags, f"{share.inside}/a", f"{share.inside}/b", RENAME_NOREPLACE) == "EEXIST"
    assert share.call(probes.rename_with_flags, f"{share.inside}/a", f"{share.inside}/b", RENAME_EXCHANGE) is None
    assert (probes.read_text(f"{share.host}/a"), probes.read_text(f"{share.host}/b")) == ("from b", "from a")
    assert share.call(probes.rename_with_flags, f"{share.inside}/a", f"{share.inside}/c", RENAME_NOREPLACE) is None
    assert probes.names(share.host) == ["b", "c"]
