"""The broker's start: configuration, root, lock-down, then service. `python -I -m vfsd.broker CONFIG_FD`."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn

from vfsd.broker.closer import Closer
from vfsd.broker.credentials import Credentials
from vfsd.broker.id_squash import IdSquash
from vfsd.broker.pool import Pool
from vfsd.broker.reaper import Reaper
from vfsd.broker.server import Server
from vfsd.broker.share import Settings, Share
from vfsd.broker.watchdog import Watchdog
from vfsd.broker.whereabouts import Whereabouts
from vfsd.broker.worker_link import Task
from vfsd.channel import Channel, ChannelClosed
from vfsd.config import BrokerConfig, read_config
from vfsd.log import ChildLog
from vfsd.role import run_role
from vfsd.sandbox import capabilities, syscalls
from vfsd.sandbox.lockdown import lock_down
from vfsd.sandbox.memory import share_one_heap
from vfsd.sandbox.namespaces import enter_share
from vfsd.wire.channel import Failed, Ready
from vfsd.wire.id_map import IdMaps, make_id_maps

POOL_THREADS = 16
_OWN_FDS = 256  # sockets, mounts, and what requests open for a moment
_PATH_FDS_MOST = 1024  # remembered directories; more would not make lookups faster
_PATH_FDS_SHARE = 8  # of the limit of open files


def main() -> None:
    config = read_config(BrokerConfig, int(sys.argv[1]))
    run_role(config, "broker", lambda channel, log: serve(config, channel, log))


def serve(config: BrokerConfig, channel: Channel, log: ChildLog) -> None:
    root = enter_share(config.sandbox, config.shared_dir, config.readonly)
    share_one_heap()
    os.umask(0)
    ids = make_id_maps(config.translate_uid, config.translate_gid)
    credentials = _credentials(config, log, ids)
    server = Server(log, channel.send)
    watchdog = Watchdog(channel, server)

    reserve = [bytearray(64 << 10) for _ in range(16)]

    def crashed(error: BaseException) -> NoReturn:
        reserve.clear()  # so that there is memory to say that there was none
        if isinstance(error, MemoryError):
            with suppress(ChannelClosed):
                channel.send(Failed(b"no memory is left, of the host or within the limits of its process"))
        else:
            log.bug("a thread", error)
        os._exit(1)

    whereabouts = Whereabouts()
    pool: Pool[Task] = Pool(server, POOL_THREADS, whereabouts, watchdog.wake, crashed)
    closer, reaper = Closer(), Reaper(crashed)

    def start_threads() -> None:
        closer.start()
        reaper.start()
        pool.start(lambda: _prepare_thread(root.proc_self_fd.fileno()))

    done = lock_down(config.confinement, start_threads=start_threads)
    path_fds = min(_PATH_FDS_MOST, config.nofile // _PATH_FDS_SHARE)
    settings = Settings(
        config.inode_file_handles,
        config.readonly,
        config.announce_submounts,
        path_fds,
        config.nofile - min(_OWN_FDS, config.nofile // 2) - path_fds,
        xattr=config.xattr,
        posix_acl=config.posix_acl,
        xattrmap=config.xattrmap,
        allow_direct_io=config.allow_direct_io,
        preserve_noatime=config.preserve_noatime,
        writeback=config.writeback,
        ids=ids,
    )
    server.serve(Share(root.root, root.proc_self_fd, settings, credentials, log, server.links.notify, closer, whereabouts, reaper.wake))
    # No request makes cycles (see errors.drop_traceback), and a collection over a million inodes would be a pause that every guest feels.
    gc.collect()
    gc.freeze()
    gc.disable()
    channel.send(Ready(done.securebits, done.landlock, done.dumpable))
    pool.release()
    watchdog.watch(pool)


def _prepare_thread(proc_self_fd: int) -> None:
    """Give this thread a umask of its own, and /proc/self/fd as its working directory: see xattrs.py. No other call uses that."""
    syscalls.unshare(syscalls.CLONE_FS)
    os.fchdir(proc_self_fd)


def _credentials(config: BrokerConfig, log: ChildLog, ids: IdMaps | None) -> Credentials:
    """Without the capabilities for it nobody else's files can be made: then all belong to who started vfsd."""
    own = (config.own_uid, config.own_gid)
    if capabilities.may("SETUID") and capabilities.may("SETGID"):
        permitted = capabilities.mask_of(config.confinement.capabilities) & capabilities.permitted()
        return Credentials(
            permitted, own, IdSquash(own, config.uid_map, config.gid_map, log, may_set_groups=config.confinement.may_drop_groups), ids
        )
    return Credentials(None, own, IdSquash(own, (), (), log), ids)


if __name__ == "__main__":
    main()
