"""What every child does around its own work: hear and tell the supervisor, and leave without surprises.

A child ends by os._exit: finalising the interpreter makes system calls that a confined role has no right to.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn

from vfsd.channel import Channel, ChannelClosed
from vfsd.config import RoleConfig
from vfsd.errors import ConfigError
from vfsd.fds import OwnedFd
from vfsd.log import ChildLog
from vfsd.wire.channel import MAX_FAILED_TEXT, SUPERVISOR_TO_CHILD, Failed, bounded

# In blocks that malloc takes from the heap. One large block would be mapped by itself, and what is given back of that goes to
# the kernel, from which a confined role gets nothing.
_RESERVE_BLOCKS, _RESERVE_BLOCK_BYTES = 16, 64 << 10


def run_role(config: RoleConfig, role: str, body: Callable[[Channel, ChildLog], None]) -> NoReturn:
    """Run `body(supervisor_channel, log)` and exit: 0 when it returns, 1 when it fails."""
    reserve = [bytearray(_RESERVE_BLOCK_BYTES) for _ in range(_RESERVE_BLOCKS)]
    channel = Channel.from_fd(OwnedFd(config.channel_fd), SUPERVISOR_TO_CHILD)
    log = ChildLog(channel, config.log_level)
    status = 1
    try:
        body(channel, log)
        status = 0
    except ConfigError as error:
        _send_failure(channel, str(error))
    except ChannelClosed:
        status = 0  # the supervisor is gone, and with it the reason to run
    except Exception as error:  # noqa: BLE001  # the last boundary: anything that gets here is a bug of ours
        reserve.clear()  # so that there is memory to say that there was none
        log.bug(role, error)
    finally:
        os._exit(status)


def _send_failure(channel: Channel, text: str) -> None:
    try:
        channel.send(Failed(bounded(text, MAX_FAILED_TEXT)))
    except ChannelClosed:
        return
