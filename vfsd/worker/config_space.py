"""The device configuration space (virtio 1.2, 5.11.4): the tag and the number of request queues. Pure.

Who controls the bytes: what is asked for, the frontend; what is answered, the command line.
"""

from __future__ import annotations

import struct
from typing import Final

from vfsd.log import Logger
from vfsd.wire import vhost_user as vu

_CONFIG_SPACE: Final = struct.Struct("<36sI")  # tag, num_request_queues


class ConfigSpace:
    def __init__(self, tag: bytes, request_queues: int, log: Logger) -> None:
        self._bytes = _CONFIG_SPACE.pack(tag, request_queues)
        self._log = log

    def read(self, message: vu.Message) -> bytes:
        """The reply to GET_CONFIG. FrontendBreach as its codec."""
        request, length = vu.decode_config(message), len(self._bytes)
        if request.size > length or request.offset > length - request.size:
            self._log.warning(f"{message.name}: {request.size} bytes at {request.offset} of a configuration space of {length}")
            return vu.encode_reply(message.request, b"")  # an empty payload says that it failed
        return vu.encode_config_reply(request, self._bytes[request.offset : request.offset + request.size])
