import os

import pytest

from vfsd.sandbox.capabilities import NAMES, bounding, change, decode_changes, mask_of, names_of, permitted
from vfsd.sandbox.census import read_thread


def test_names_are_at_their_kernel_numbers():
    assert {name: NAMES.index(name) for name in ("CHOWN", "DAC_READ_SEARCH", "SETPCAP", "SYS_ADMIN", "SETFCAP", "CHECKPOINT_RESTORE")} == {
        "CHOWN": 0,
        "DAC_READ_SEARCH": 2,
        "SETPCAP": 8,
        "SYS_ADMIN": 21,
        "SETFCAP": 31,
        "CHECKPOINT_RESTORE": 40,
    }


def test_masks_and_names_are_each_others_inverse():
    assert names_of(mask_of(NAMES)) == NAMES
    assert mask_of(["FOWNER", "FOWNER", "CHOWN"]) == 0b1001
    assert mask_of([]) == 0


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="JUGGLE"):
        mask_of(["JUGGLE"])


def test_a_capability_newer_than_this_table_shows_as_its_number():
    assert names_of(1 << 50 | 1) == ("CHOWN", "50")


def test_sets_read_back_are_those_that_proc_shows():
    ours = read_thread(os.getpid(), os.getpid())
    assert names_of(permitted()) == ours.permitted
    assert names_of(bounding()) == ours.bounding


def test_changes_are_applied_in_their_order():
    changes = decode_changes("-mknod:+CAP_SYS_ADMIN:+kill:-kill")
    assert changes == ((False, "MKNOD"), (True, "SYS_ADMIN"), (True, "KILL"), (False, "KILL"))
    assert change(("CHOWN", "MKNOD"), changes) == ("CHOWN", "SYS_ADMIN")
    assert change(("CHOWN",), decode_changes("+chown")) == ("CHOWN",)


@pytest.mark.parametrize("text", ["", "mknod", "-", "-mknod:", "+nothing", "-mknod,+kill"])
def test_changes_that_mean_nothing_are_refused(text):
    with pytest.raises(ValueError, match="write as in -mknod:-setfcap"):
        decode_changes(text)
