"""One line of JSON at a time over a serial line, the same code at both ends (host: guest.py; in the guest: agent.py).

User-Mode Linux may miss the moment when a full serial line can take or give data again, and then waits for ever. So a long
line goes in pieces that fit any buffer on the way, and the receiver says "+" after each one but the last. The two ends
take turns (request, answer), so nothing else is ever under way.
"""

import json
import os
import select
from typing import Any

_PIECE_BYTES = 2048


class LinkClosedError(Exception):
    """The other end is gone."""


class Link:
    """A serial line, or our end of the socket behind it. Borrows the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, message: dict[str, Any], timeout: float | None = None) -> None:
        line = memoryview(json.dumps(message).encode() + b"\n")
        for start in range(0, len(line), _PIECE_BYTES):
            if start and self._read(1, timeout) != b"+":
                raise LinkClosedError("the other end sent something where it should have acknowledged a piece")
            piece = line[start : start + _PIECE_BYTES]
            while piece:
                piece = piece[os.write(self._descriptor, piece) :]

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message; TimeoutError when its next byte takes longer than so many seconds."""
        line = bytearray()
        while not line.endswith(b"\n"):
            line += self._read(_PIECE_BYTES - len(line) % _PIECE_BYTES, timeout)
            if len(line) % _PIECE_BYTES == 0 and not line.endswith(b"\n"):
                os.write(self._descriptor, b"+")
        message: dict[str, Any] = json.loads(line)
        return message

    def _read(self, count: int, timeout: float | None) -> bytes:
        if not select.select([self._descriptor], [], [], timeout)[0]:
            raise TimeoutError
        try:
            data = os.read(self._descriptor, count)
        except ConnectionResetError:
            data = b""
        if not data:
            raise LinkClosedError("the other end closed the line")
        return data
