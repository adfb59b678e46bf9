"""The command line: options named and behaving as the Rust virtiofsd's, because libvirt, Kata, virtme-ng and others write them.

Exit status: 0 when all went well, 2 for a command line that cannot be, 1 for everything else that fails; the last line on
stderr names the option, the reason and what to do.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import vfsd
from vfsd.broker.xattr_map import parse as parse_xattr_map
from vfsd.cli_compat import modernize
from vfsd.cli_types import bounded_int, id_range, modcaps, path_bytes, tag_bytes, xattrmap
from vfsd.config import MAX_REQUEST_QUEUES, MAX_SPARE_WORKERS, Features, HandleMode, Options
from vfsd.errors import ConfigError
from vfsd.log import ERROR, LEVELS, STDERR, StderrLog
from vfsd.sandbox.id_maps import IdMap, IdRange, find_overlap
from vfsd.service_manager import NOTHING_GIVEN, Given, take_given
from vfsd.syslog import DEV_LOG, SyslogLog
from vfsd.wire.id_map import make_id_maps

# What libvirt reads to learn how to write our command line; `migrate-precopy` is not there until migration is.
CAPABILITIES = {"type": "fs", "features": ["separate-options"]}

_LARGEST_FD = 2**31 - 1
_DESCRIPTION = "Serve a directory to a virtual machine over vhost-user-fs. The guest mounts it with: mount -t virtiofs TAG DIR"
_EPILOG = (
    "SIGTERM, SIGINT and SIGHUP end vfsd with exit status 0; so does the frontend when it closes the connection (see --keep-listening)."
)


def _id_map(parser: argparse.ArgumentParser, option: str, ranges: Sequence[IdRange]) -> IdMap:
    if overlap := find_overlap(tuple(ranges)):
        first, second = ("".join(f":{number}" for number in each) + ":" for each in overlap)
        parser.error(f"argument {option}: {first} and {second} map an id twice, inside or outside; give ranges that do not overlap")
    return tuple(ranges)


class _Parser(argparse.ArgumentParser):
    """One line for a mistake: the usage of this many options would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (`{self.prog} --help` lists the options)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vfsd", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False)
    _add_endpoint_options(parser)
    _add_share_options(parser)
    _add_feature_options(parser)
    _add_process_options(parser)
    return parser


def _add_endpoint_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the frontend (QEMU, cloud-hypervisor, User-Mode Linux ...) connects")
    endpoint = group.add_mutually_exclusive_group()  # one is required, unless a service manager passes a socket: Given.choose_fd
    endpoint.add_argument(
        "--socket-path", type=path_bytes, metavar="PATH", help="make and listen on this vhost-user socket; writes PATH.pid too"
    )
    endpoint.add_argument("--socket", dest="socket_path", type=path_bytes, metavar="PATH", help="the same (deprecated)")
    endpoint.add_argument(
        "--fd", type=bounded_int(0, _LARGEST_FD), metavar="N", help="use this inherited socket, listening or connected already"
    )
    group.add_argument(
        "--keep-listening", action="store_true", help="wait for another frontend when one is gone, and serve on what it had open"
    )
    group.add_argument("--socket-group", metavar="GROUP", help="let this group, and not only the user, connect to the socket")
    group.add_argument(
        "--tag",
        type=tag_bytes,
        metavar="TAG",
        help="offer this tag in the configuration space, for frontends that have no option for it (UML, crosvm)",
    )
    group.add_argument(
        "--num-request-queues",
        type=bounded_int(1, MAX_REQUEST_QUEUES),
        default=default_request_queues(),
        metavar="N",
        help="request queues to offer; each one that the frontend uses gets its own worker process (default: CPUs, at most 4: here %(default)s)",
    )


def _add_share_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is shared, and how")
    group.add_argument("--shared-dir", type=path_bytes, required=True, metavar="DIR", help="the directory to serve")
    group.add_argument("--readonly", action="store_true", help="refuse everything that would change the share")
    group.add_argument(
        "--cache",
        choices=("auto", "always", "metadata", "never"),
        default="auto",
        help="how long the guest may keep what it learned: auto 1 s; always and metadata a day; never not at all (default: auto)",
    )
    group.add_argument(
        "--inode-file-handles",
        choices=("never", "prefer", "mandatory", "fallback"),
        default="prefer",
        help="keep inodes as kernel file handles instead of open descriptors; fallback means prefer (default: prefer)",
    )
    group.add_argument(
        "--announce-submounts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the guest where other file systems are mounted in the share (default: on)",
    )

    for kind, what in (("uid", "users"), ("gid", "groups")):
        group.add_argument(
            f"--translate-{kind}", action="append", default=[], metavar="RULE",
            help=f"the host's {what} for the guest's, by ids: map:GUEST:HOST:COUNT both ways, guest:GUEST:HOST:COUNT or "
            "host:HOST:GUEST:COUNT one way, squash-guest or squash-host all to one, forbid-guest:GUEST:COUNT none; repeatable",
        )  # fmt: skip


def _add_feature_options(parser: argparse.ArgumentParser) -> None:
    """What the guest may do beyond the plain operations."""
    group = parser.add_argument_group("what the guest may do with it")
    group.add_argument("--xattr", action=argparse.BooleanOptionalAction, default=None, help="extended attributes (default: off)")
    group.add_argument(
        "--xattrmap",
        type=xattrmap,
        metavar="RULES",
        help="keep the guest's extended attributes under other names, by these rules; implies --xattr",
    )
    group.add_argument(
        "--posix-acl", nargs="?", const="on", default="off", choices=("auto", "on"), metavar="auto",
        help="POSIX ACLs; implies --xattr. A guest that cannot is refused, with =auto served without (default: off)",
    )  # fmt: skip
    group.add_argument(
        "--security-label", nargs="?", const="on", default="off", choices=("auto", "on"), metavar="auto",
        help="new files get the guest's security label; implies --xattr. =auto as above (default: off)",
    )  # fmt: skip
    group.add_argument(
        "--killpriv-v2", action=argparse.BooleanOptionalAction, default=False,
        help="the host takes set-id bits and file capabilities away, which saves the guest a request per write (default: off)",
    )  # fmt: skip
    group.add_argument(
        "--posix-lock", action=argparse.BooleanOptionalAction, default=True,
        help="POSIX record locks, shared with the host and other guests; without it they fail with ENOLCK (default: on)",
    )  # fmt: skip
    group.add_argument(
        "--flock", action=argparse.BooleanOptionalAction, default=True,
        help="flock(2), shared with the host and other guests; without it it fails with ENOLCK (default: on)",
    )  # fmt: skip
    group.add_argument("--readdirplus", action=argparse.BooleanOptionalAction, default=True, help="list with attributes (default: on)")
    group.add_argument(
        "--writeback", action="store_true", help="let the guest collect writes; only if nobody else changes the share's files"
    )
    group.add_argument("--allow-direct-io", action="store_true", help="O_DIRECT of the guest reaches the host's files")
    group.add_argument(
        "--allow-mmap", action="store_true", help="shared mappings also where the guest does not cache (--cache=never, metadata)"
    )
    group.add_argument("--preserve-noatime", action="store_true", help="O_NOATIME of the guest reaches the host's files")


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the daemon itself")
    group.add_argument(
        "--sandbox",
        choices=("namespace", "chroot", "none"),
        default="namespace",
        help="how processes are kept from the rest of the host's files (default: namespace; chroot needs root)",
    )
    for kind in ("uid", "gid"):
        group.add_argument(
            f"--{kind}-map",
            type=id_range,
            action="append",
            default=[],
            metavar=":INSIDE:OUTSIDE:COUNT:",
            help=f"for an ordinary user: make these {kind}s of the host known to the guest as INSIDE and following; may be repeated; "
            "more than one's own id takes /etc/subuid and /etc/subgid (default: one's own id, as it is)",
        )
    group.add_argument(
        "--seccomp",
        choices=("kill", "log", "trap", "none"),
        default="kill",
        help="what happens at a system call that the role's filter does not list (default: kill)",
    )
    group.add_argument(
        "--modcaps",
        type=modcaps,
        default=(),
        metavar="-CAP:+CAP",
        help="take these capabilities from the broker, or give it more, as in -mknod:-setfcap (default: what docs/threat-model.md lists)",
    )
    group.add_argument(
        "--seccomp-policy",
        metavar="FILE",
        help="lists of system calls to use instead of vfsd's own (vfsdctl policy show prints those; vfsdctl policy check FILE)",
    )
    group.add_argument(
        "--allow-weak-policy",
        action="store_true",
        help="with --seccomp-policy: only warn where the file allows what no policy should",
    )
    group.add_argument(
        "--rlimit-nofile",
        type=bounded_int(0, 2**63 - 1),
        metavar="N",
        help="limit of open files; 0 leaves it alone (default: 1000000, or what the system allows)",
    )
    group.add_argument(
        "--spare-workers", type=bounded_int(0, MAX_SPARE_WORKERS), default=0, metavar="N",
        help="worker processes kept ready to take a dead one's place: the guest's pause is shorter (default: 0)",
    )  # fmt: skip
    group.add_argument("--log-level", choices=tuple(LEVELS), default="info", help="what is logged to stderr (default: info)")
    group.add_argument("--syslog", action="store_true", help="log to the system's log and not to stderr")
    group.add_argument(
        "--fault-rules",
        metavar="FILE",
        help="make things fail by the rules in this TOML file, to test a guest (docs/faults.md); never for production",
    )
    group.add_argument(
        "--fault-socket", type=path_bytes, metavar="PATH",
        help="where vfsdctl fault connects to; turns fault injection on too (default: with --fault-rules, in a directory beside the socket)",
    )  # fmt: skip
    group.add_argument(
        "--thread-pool-size", type=bounded_int(0, 2**31), metavar="N", help="without effect: see --num-request-queues (others have it)"
    )
    group.add_argument(
        "-o", metavar="OPTION[,OPTION...]", help="options as older versions wrote them, also -d for debug and -f (deprecated)"
    )
    group.add_argument("--print-capabilities", action="store_true", help="print what this program can do as JSON, and exit")
    group.add_argument("-V", "--version", action="version", version=f"vfsd {vfsd.__version__}")


def default_request_queues() -> int:
    return min(4, len(os.sched_getaffinity(0)))


def parse_options(argv: Sequence[str], given: Given = NOTHING_GIVEN) -> Options:
    """Exits with 2 and one line for a command line that cannot be; `given` is the service manager's part."""
    parser = build_parser()
    try:
        found = parser.parse_args(modernize(argv))
        fd, fd_from = given.choose_fd(found.fd, found.socket_path)
    except ConfigError as error:
        parser.error(str(error))
    if found.socket_group is not None and fd is not None:
        parser.error(f"argument --socket-group: not allowed with {fd_from or 'argument --fd'}; set the group where the socket is made")
    if found.xattr is False and _implies_xattr(found):
        parser.error(f"argument --no-xattr: not allowed with argument {_implies_xattr(found)[0]}, which needs extended attributes")
    _check_translation(parser, found)
    if found.seccomp_policy is not None and found.seccomp == "none":
        parser.error("argument --seccomp-policy: not allowed with argument --seccomp=none, which uses none")
    if found.spare_workers and (found.fault_rules is not None or found.fault_socket is not None):
        parser.error("argument --spare-workers: not allowed with faults: a rule knows a worker by its number, which a spare one has not")
    if found.allow_weak_policy and found.seccomp_policy is None:
        parser.error("argument --allow-weak-policy: is about --seccomp-policy, which is not given")
    handles: HandleMode = "prefer" if found.inode_file_handles == "fallback" else found.inode_file_handles
    return Options(
        shared_dir=found.shared_dir,
        socket_path=found.socket_path,
        socket_group=found.socket_group,
        fd=fd,
        fd_from=fd_from,
        tag=found.tag,
        keep_listening=found.keep_listening,
        spare_workers=found.spare_workers,
        cache=found.cache,
        sandbox=found.sandbox,
        seccomp=found.seccomp,
        seccomp_policy=found.seccomp_policy,
        allow_weak_policy=found.allow_weak_policy,
        inode_file_handles=handles,
        request_queues=found.num_request_queues,
        readonly=found.readonly,
        announce_submounts=found.announce_submounts,
        features=_features(found),
        xattrmap=found.xattrmap,
        translate_uid=tuple(found.translate_uid),
        translate_gid=tuple(found.translate_gid),
        allow_direct_io=found.allow_direct_io,
        preserve_noatime=found.preserve_noatime,
        rlimit_nofile=found.rlimit_nofile,
        modcaps=found.modcaps,
        log_level=LEVELS[found.log_level],
        syslog=found.syslog,
        fault_rules=found.fault_rules,
        fault_socket=found.fault_socket,
        uid_map=_id_map(parser, "--uid-map", found.uid_map),
        gid_map=_id_map(parser, "--gid-map", found.gid_map),
    )


def _check_translation(parser: argparse.ArgumentParser, found: argparse.Namespace) -> None:
    try:
        maps = make_id_maps(found.translate_uid, found.translate_gid)
    except ConfigError as error:
        parser.error(str(error))
    if maps is not None and found.posix_acl != "off":
        parser.error("--posix-acl: cannot be used with --translate-uid or --translate-gid: ids in ACLs are not translated; leave one out")


def _implies_xattr(found: argparse.Namespace) -> list[str]:
    """The options given that are about extended attributes."""
    given = {
        "--xattrmap": found.xattrmap is not None,
        "--posix-acl": found.posix_acl != "off",
        "--security-label": found.security_label != "off",
    }
    return [option for option, is_given in given.items() if is_given]


def _features(found: argparse.Namespace) -> Features:
    return Features(
        xattr=bool(found.xattr or _implies_xattr(found)),
        posix_acl=found.posix_acl,
        security_label=found.security_label,
        killpriv_v2=found.killpriv_v2,
        posix_lock=found.posix_lock,
        flock=found.flock,
        readdirplus=found.readdirplus,
        writeback=found.writeback,
        allow_mmap=found.allow_mmap,
        capability_remapped=found.xattrmap is not None and parse_xattr_map(found.xattrmap).remaps_capability,
    )


def run(argv: Sequence[str]) -> int:
    # The convention for vhost-user backend programs: this option ignores all others, so it is looked for before parsing.
    if "--print-capabilities" in argv:
        print(json.dumps(CAPABILITIES))  # noqa: T201  # this is the program's output
        return 0
    given = take_given(os.environ)
    options = parse_options(argv, given)
    log = _make_log(options, given)
    try:
        from vfsd.serve import serve  # noqa: PLC0415  # --help and --version need neither libseccomp nor python-prctl

        return serve(options, log, given)
    except ConfigError as error:
        log.log(ERROR, str(error))
        return 1


def _make_log(options: Options, given: Given) -> StderrLog:
    log = StderrLog(options.log_level, journal=given.is_journal(STDERR))
    if options.syslog:
        try:
            return SyslogLog(options.log_level)
        except OSError as error:
            log.warning(f"--syslog: {DEV_LOG}: {error.strerror}; logging to stderr instead")
    return log


def main() -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _leave)
    _occupy_standard_fds()
    sys.exit(run(sys.argv[1:]))


def _leave(_number: int, _frame: object) -> NoReturn:
    """A signal to end before there is a supervisor to heed it: what was made is removed on the way out."""
    sys.exit(0)


def _occupy_standard_fds() -> None:
    """Whoever starts us without fds 0 to 2 must not get log lines written into a socket that took one of the numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
