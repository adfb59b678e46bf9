"""Large directories, listed and emptied from either side."""

import os

import pytest

from tests.guest import probes
from tests.guest.conftest import Share

pytestmark = pytest.mark.timeout(900)  # emulation on a busy machine takes minutes to make and remove so many files


def test_a_large_directory_made_on_the_host_is_listed(share: Share) -> None:
    entries = share.size(10_000, 1_000, 5_000)
    probes.make_numbered(share.host, entries)
    inside, host = share.both(probes.names_digest, "")
    assert inside == host
    assert host[0] == entries


def test_a_large_directory_is_made_by_the_guest(share: Share) -> None:
    entries = share.size(10_000, 1_000, 5_000)
    share.call(probes.make_numbered, share.inside, entries, timeout=600)
    inside, host = share.both(probes.names_digest, "")
    assert inside == host
    assert host[0] == entries


def test_listing_and_stat_agree_on_the_types(share: Share) -> None:
    probes.make_every_type(share.host)
    probes.make_numbered(share.host, 500)
    inside, host = share.both(probes.types_in_listing, "")
    assert inside == host == []


def test_a_directory_is_emptied_while_it_is_listed(share: Share) -> None:
    count = share.size(3000, 1000)
    probes.make_numbered(share.host, count)
    assert share.call(probes.remove_while_listing, share.inside) == [count, []]
    assert os.listdir(share.host) == []


def test_a_listing_sees_what_the_host_added_and_removed(share: Share) -> None:
    probes.make_names(share.host, ["a", "b", "c"])
    assert share.call(probes.names, share.inside) == ["a", "b", "c"]
    os.unlink(f"{share.host}/b")
    probes.write_text(f"{share.host}/d", "")
    assert share.call(probes.names, share.inside) == ["a", "c", "d"]
