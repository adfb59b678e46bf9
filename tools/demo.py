"""`make demo [SHARE=directory] [GUEST=uml|qemu] [SHELL=1]`: a guest mounts a directory of this machine through vfsd.

Shows, in a page, what the guest sees, that both sides read each other's writes, and what each of vfsd's processes may do.
"""

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import termios
import tty
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.guest.daemons import DaemonError, VfsdDaemon
from tests.support.guest.guest import Guest, GuestError, GuestRaisedError, QemuGuest, UmlGuest
from tests.support.guest.packages import PackageError
from tools.process_table import process_table

GUESTS: dict[str, type[Guest]] = {"uml": UmlGuest, "qemu": QemuGuest}
GUEST_NAMES = {"uml": "User-Mode Linux", "qemu": "QEMU"}
LISTED = 14


class DemoError(Exception):
    """Something the user can put right; the text says how."""


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the guest and vfsd are ended on the way out
    try:
        with ExitStack() as stack:
            check_machine()
            share = stack.enter_context(share_directory(arguments.share))
            run(arguments.guest, share, shell=arguments.shell)
    except (DemoError, DaemonError, GuestError, GuestRaisedError, PackageError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description="Serve a directory to a guest through vfsd and show what happens.")
    # By the environment, to which make gives it as it is: no shell sees a name with quotes.
    parser.add_argument(
        "--share", default=os.environ.get("SHARE", ""), help="the directory to serve (default: a small tree made for the occasion)"
    )
    parser.add_argument("--guest", default="uml", choices=sorted(GUESTS), help="User-Mode Linux (default) or QEMU")
    parser.add_argument("--shell", action="store_true", help="end with a shell in the guest")
    return parser.parse_args()


def check_machine() -> None:
    if os.geteuid() != 0:
        raise DemoError("vfsd takes root to confine its processes and to act for every user of the guest: run `make demo` as root")


@contextmanager
def share_directory(wanted: str) -> Iterator[str]:
    """The user's directory as it is, or a small tree that goes away afterwards."""
    if wanted:
        if not os.path.isdir(wanted):
            raise DemoError(f"SHARE={wanted} is not a directory")
        yield os.path.abspath(wanted)
        return
    share = tempfile.mkdtemp(prefix="vfsd-demo-", dir="/var/tmp")
    try:
        os.chmod(share, 0o755)
        make_small_tree(Path(share))
        yield share
    finally:
        shutil.rmtree(share)


def make_small_tree(share: Path) -> None:
    (share / "letter.txt").write_text("Written on the host, read in the guest.\n")
    (share / "letter.txt").chmod(0o640)
    (share / "photos").mkdir()
    for number in range(3):
        (share / "photos" / f"{number}.raw").write_bytes(os.urandom(100_000 * (number + 1)))
    (share / "program").write_text("#!/bin/sh\necho I run in the guest\n")
    (share / "program").chmod(0o755)
    (share / "latest").symlink_to("photos/2.raw")
    os.mkfifo(share / "pipe")
    os.chown(share / "photos", 1000, 1000)


def run(kind: str, share: str, *, shell: bool) -> None:
    print(f"{GUEST_NAMES[kind]} mounts {share} through vfsd: starting ...", flush=True)
    with VfsdDaemon(share) as vfsd:
        with GUESTS[kind]([vfsd.socket]) as guest:
            guest.mount()
            show_guest(guest)
            show_listing(guest)
            show_files(guest, share)
            heading("vfsd's processes, as /proc shows them")
            print(process_table(vfsd.pid))
            if shell:
                run_shell(guest)
            guest.unmount()
        print(f"\nThe guest powered off; vfsd ended with {vfsd.wait()}.")


def show_guest(guest: Guest) -> None:
    heading("The guest")
    system, _, release, version, machine = guest.uname
    print(f"{system} {release} {machine}, {version}")
    print(next(line for line in guest.check("mount").splitlines() if " type virtiofs " in line))


def show_listing(guest: Guest) -> None:
    heading("The share in the guest: ls -la /mnt")
    lines = guest.check("ls", "-la", "/mnt").splitlines()[1:]
    for line in lines[:LISTED]:
        print(line)
    if len(lines) > LISTED:
        print(f"... and {len(lines) - LISTED} more")


def show_files(guest: Guest, share: str) -> None:
    """One file each way, removed afterwards: the share may be the user's own directory."""
    heading("A file written on each side, read on the other (sha256)")
    for number, writer in enumerate(("host", "guest")):
        name = f".vfsd-demo-{os.getpid()}-from-{writer}"
        on_host = Path(share, name)
        try:
            if writer == "host":
                on_host.write_bytes(os.urandom(3_000_000))
            else:
                guest.check("dd", "if=/dev/urandom", f"of=/mnt/{name}", "bs=100000", f"count={30 + number}")
            inside = guest.check("sha256sum", f"/mnt/{name}").split()[0]
            outside = hashlib.sha256(on_host.read_bytes()).hexdigest()
            print(
                f"written by the {writer:<6} guest {inside[:32]}...  host {outside[:32]}...  {'equal' if inside == outside else 'DIFFERENT'}"
            )
            if inside != outside:
                raise DemoError("the two sides do not see the same file: this is a defect of vfsd, please report it")
        finally:
            on_host.unlink(missing_ok=True)


def run_shell(guest: Guest) -> None:
    """Joins the user's terminal to the guest's console until the shell there ends."""
    heading("A shell in the guest; the share is /mnt; leave with `exit`")
    sys.stdout.flush()
    terminal = sys.stdin.fileno()
    size = os.get_terminal_size(sys.stdout.fileno()) if sys.stdout.isatty() else os.terminal_size((80, 24))
    saved = termios.tcgetattr(terminal) if sys.stdin.isatty() else None
    try:
        if saved is not None:
            tty.setraw(terminal)
        guest.shell(size.columns, size.lines, terminal, sys.stdout.fileno())
    finally:
        if saved is not None:
            termios.tcsetattr(terminal, termios.TCSADRAIN, saved)


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
