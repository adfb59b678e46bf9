"""Real programs on the share: git, cp, dd, tar. What they make is the same on both sides."""

import subprocess

import pytest

from tests.guest import probes
from tests.guest.conftest import Share

GIT = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b", "GIT_CONFIG_COUNT": "0"}


def on_host(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.timeout(600)
def test_git_works_and_the_host_agrees(share: Share) -> None:
    repository = f"{share.inside}/repository"
    probes_made = share.size(400, 40, 200)
    share.guest.check("git", "init", "--quiet", "--initial-branch=main", repository)
    share.call(probes.make_tree, f"{repository}/tree", probes_made)
    share.guest.check("git", "add", ".", cwd=repository, env=GIT)
    share.guest.check("git", "commit", "--quiet", "-m", "first", cwd=repository, env=GIT)
    share.guest.check("sh", "-c", "echo changed >>tree/000/0/file-000001; rm tree/000/0/file-000002", cwd=repository)
    changes = share.guest.check("git", "status", "--porcelain", cwd=repository).splitlines()
    assert sorted(changes) == [" D tree/000/0/file-000002", " M tree/000/0/file-000001"]
    share.guest.check("git", "commit", "--quiet", "-a", "-m", "second", cwd=repository, env=GIT)
    assert share.guest.check("git", "status", "--porcelain", cwd=repository) == ""
    share.guest.check("git", "fsck", "--strict", cwd=repository)
    share.guest.check("git", "gc", "--quiet", cwd=repository)
    in_guest = share.guest.check("git", "rev-parse", "HEAD", "HEAD^{tree}", cwd=repository).strip()
    on_share = ["git", "-c", "safe.directory=*", "-C", f"{share.host}/repository"]
    assert on_host(*on_share, "rev-parse", "HEAD", "HEAD^{tree}") == in_guest
    on_host(*on_share, "fsck", "--strict")
    assert on_host(*on_share, "status", "--porcelain") == ""


@pytest.mark.timeout(1200)
def test_a_large_tree_is_copied_out_and_in(share: Share) -> None:
    files = share.size(20_000, 200, 3_000)
    probes.make_tree(f"{share.host}/tree", files)
    expected = probes.contents_digest(f"{share.host}/tree")
    share.guest.check("cp", "-a", f"{share.inside}/tree", "/tmp/tree", timeout=900)
    assert share.call(probes.contents_digest, "/tmp/tree", timeout=600) == expected
    share.guest.check("cp", "-a", "/tmp/tree", f"{share.inside}/copy", timeout=900)
    assert probes.contents_digest(f"{share.host}/copy") == expected
    assert share.call(probes.contents_digest, f"{share.inside}/copy", timeout=600) == expected


@pytest.mark.timeout(1200)
def test_dd_both_ways(share: Share) -> None:
    size_mib = share.size(1024, 16, 256)
    probes.write_pattern(f"{share.host}/pattern", size_mib << 20)
    expected = probes.digest(f"{share.host}/pattern")
    read = share.guest.check("sh", "-c", f"dd if='{share.inside}/pattern' bs=1M 2>/dev/null | sha256sum", timeout=900)
    assert read.split()[0] == expected
    share.guest.check("dd", f"if={share.inside}/pattern", f"of={share.inside}/copy", "bs=1M", "conv=fsync", timeout=900)
    assert probes.digest(f"{share.host}/copy") == expected


def test_tar_unpacks_on_the_share_what_it_packed(share: Share) -> None:
    files = share.size(2_000, 100, 500)
    probes.make_tree(f"{share.host}/tree", files)
    share.guest.check("sh", "-c", f"cd '{share.inside}' && tar -cf packed.tar tree && mkdir out && tar -xf packed.tar -C out", timeout=300)
    assert probes.contents_digest(f"{share.host}/out/tree") == probes.contents_digest(f"{share.host}/tree")
    listed = on_host("tar", "-tf", f"{share.host}/packed.tar").splitlines()
    assert len(listed) == len(probes.survey(f"{share.host}/tree"))
