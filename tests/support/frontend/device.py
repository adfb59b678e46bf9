"""A vhost-user-fs device as a frontend and its guest see it together: the connection, guest RAM, and one ring per queue."""

from __future__ import annotations

import os
import socket
import struct
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tests.support.frontend.guest_memory import MIB, GuestRam, Region
from tests.support.frontend.ring import Ring
from tests.support.frontend.vhost_user_client import (
    NO_FD,
    Feature,
    ProtocolFeature,
    Request,
    VhostUserClient,
    memory_table,
    single_region,
    u64,
    vring_state,
)

if TYPE_CHECKING:
    from tests.support.frontend.sequences import Frontend

INFLIGHT = struct.Struct("<QQHH4x")  # padded as C has it
DEFAULT_FEATURES = Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.PROTOCOL_FEATURES


class Device:
    """Connects at once; `attach()` goes through a frontend's messages until the queues run. Queue 0 is hiprio."""

    def __init__(
        self,
        path: str,
        *,
        queues: int = 2,
        ring_size: int = 128,
        ram: tuple[int, ...] = (64 * MIB,),
        features: int = DEFAULT_FEATURES,
    ) -> None:
        self.closed = False
        self.client = VhostUserClient(path)
        self.ram = GuestRam(ram)
        self.wanted_features = features
        event_idx = bool(features & Feature.EVENT_IDX)
        self.rings = [Ring(self.ram, index, ring_size, event_idx, backend=self.client.sock) for index in range(queues)]
        self.bases = [0] * queues
        self.features = self.offered_features = 0
        self.protocol_features = ProtocolFeature(0)
        self.queue_num = 0
        self._backend_channel: list[socket.socket] = []
        self.inflight_fd: int | None = None
        self.inflight = (0, 0, 0, 0)

    def attach(self, frontend: Frontend) -> Self:
        frontend.realize(self)
        frontend.start(self)
        return self

    def close(self) -> None:
        """The frontend goes: connection, descriptors and memory. Closing twice is harmless."""
        if self.closed:
            return
        self.closed = True
        self.disconnect()
        self.forget_inflight()
        for ring in self.rings:
            ring.close()
        self.ram.close()

    def disconnect(self) -> None:
        """The connection ends; the guest, its memory and its rings are still there."""
        self.client.close()
        for sock in self._backend_channel:
            sock.close()
        self._backend_channel.clear()

    def reconnect(self, path: str) -> None:
        """Another connection for the same guest."""
        self.disconnect()
        self.client = VhostUserClient(path)
        for ring in self.rings:
            ring.backend = self.client.sock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # The messages, each once; `need` says whether that frontend asks for an acknowledgement

    def _send(self, request: Request, payload: bytes, fds: tuple[int, ...] = (), *, need: bool = False) -> None:
        (self.client.acked if need else self.client.tell)(request, payload, fds)

    def get_features(self) -> int:
        self.offered_features = self.client.call_u64(Request.GET_FEATURES)
        return self.offered_features

    def negotiate_protocol(self, wanted: int) -> ProtocolFeature:
        """GET and SET_PROTOCOL_FEATURES; REPLY_ACK holds from here on."""
        offered = self.client.call_u64(Request.GET_PROTOCOL_FEATURES)
        self.protocol_features = ProtocolFeature(offered & wanted)
        self.client.tell(Request.SET_PROTOCOL_FEATURES, u64(self.protocol_features))
        self.client.reply_ack = ProtocolFeature.REPLY_ACK in self.protocol_features
        return self.protocol_features

    def get_queue_num(self) -> int:
        self.queue_num = self.client.call_u64(Request.GET_QUEUE_NUM)
        return self.queue_num

    def set_backend_req_fd(self, *, need: bool) -> None:
        ours, theirs = socket.socketpair()
        self._backend_channel.append(ours)
        with theirs:
            self._send(Request.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),), need=need)

    def set_features(self, *, need: bool = False) -> None:
        self.features = self.wanted_features & self.offered_features
        self._send(Request.SET_FEATURES, u64(self.features), need=need)

    def set_mem_table(self, *, need: bool = False, padding: int = 0) -> None:
        regions = self.ram.regions
        self._send(Request.SET_MEM_TABLE, memory_table(regions) + bytes(padding), tuple(region.fd for region in regions), need=need)

    def add_region(self, region: Region) -> None:
        self._send(Request.ADD_MEM_REG, single_region(region), (region.fd,), need=True)

    def remove_region(self, region: Region) -> None:
        self._send(Request.REM_MEM_REG, single_region(region), need=True)

    def get_inflight(self) -> None:
        """Fresh in-flight tables, of which the frontend keeps the descriptor."""
        self.forget_inflight()
        asked = INFLIGHT.pack(0, 0, len(self.rings), self.rings[0].size)
        payload, self.inflight_fd = self.client.call_with_fd(Request.GET_INFLIGHT_FD, asked)
        self.inflight = INFLIGHT.unpack(payload)

    def set_inflight(self, *, need: bool = False) -> None:
        if self.inflight_fd is None:
            raise AssertionError("there are no in-flight tables")
        self._send(Request.SET_INFLIGHT_FD, INFLIGHT.pack(*self.inflight), (self.inflight_fd,), need=need)

    def forget_inflight(self) -> None:
        if self.inflight_fd is not None:
            os.close(self.inflight_fd)
            self.inflight_fd = None

    def set_num(self, ring: Ring, *, need: bool = False) -> None:
        self._send(Request.SET_VRING_NUM, vring_state(ring.index, ring.size), need=need)

    def set_base(self, ring: Ring, *, need: bool = False) -> None:
        self._send(Request.SET_VRING_BASE, vring_state(ring.index, self.bases[ring.index]), need=need)

    def set_addr(self, ring: Ring, *, need: bool = False) -> None:
        uva = self.ram.uva
        self._send(
            Request.SET_VRING_ADDR,
            struct.pack("<IIQQQQ", ring.index, 0, uva(ring.desc), uva(ring.used), uva(ring.avail), 0),
            need=need,
        )

    def set_fd(self, request: Request, ring: Ring, fd: int | None, *, need: bool = False) -> None:
        """SET_VRING_KICK, SET_VRING_CALL or SET_VRING_ERR."""
        if fd is None:
            self._send(request, u64(ring.index | NO_FD), need=need)
        else:
            self._send(request, u64(ring.index), (fd,), need=need)

    def set_kick(self, ring: Ring, *, need: bool = False) -> None:
        self.set_fd(Request.SET_VRING_KICK, ring, ring.kick_fd, need=need)

    def set_call(self, ring: Ring, *, need: bool = False) -> None:
        self.set_fd(Request.SET_VRING_CALL, ring, ring.call_fd, need=need)

    def set_err(self, ring: Ring, *, need: bool = False) -> None:
        self.set_fd(Request.SET_VRING_ERR, ring, ring.err_fd, need=need)

    def enable(self, ring: Ring, on: bool = True, *, need: bool = False) -> None:
        self._send(Request.SET_VRING_ENABLE, vring_state(ring.index, int(on)), need=need)

    def get_base(self, ring: Ring) -> int:
        """GET_VRING_BASE: the ring stops; where it would go on."""
        index, base = struct.unpack("<II", self.client.call(Request.GET_VRING_BASE, vring_state(ring.index, 0)))
        if index != ring.index:
            raise AssertionError(f"GET_VRING_BASE of ring {ring.index} answered for ring {index}")
        self.bases[ring.index] = base
        return int(base)

    def get_config(self, offset: int, size: int) -> bytes:
        """A window of the configuration space; empty if the device refuses."""
        payload = self.client.call(Request.GET_CONFIG, struct.pack("<III", offset, size, 0) + bytes(size))
        if not payload:
            return b""
        got_offset, got_size, _flags = struct.unpack_from("<III", payload)
        if (got_offset, got_size, len(payload)) != (offset, size, 12 + size):
            raise AssertionError(f"GET_CONFIG of {size} bytes at {offset} answered {payload!r}")
        return payload[12:]

    # What a guest or frontend does at run time

    def replace_kick(self, ring: Ring) -> None:
        """Another kick eventfd; the old one is closed."""
        old, ring.kick_fd = ring.kick_fd, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.set_kick(ring, need=True)
        os.close(old)

    def replace_call(self, ring: Ring) -> None:
        """Another call eventfd, as irqfd set-up does; the old one is closed."""
        old, ring.call_fd = ring.call_fd, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.set_call(ring, need=True)
        os.close(old)

    def reset_rings(self) -> None:
        """What a rebooted guest's driver does: rings from the start."""
        for ring in self.rings:
            ring.reset()
        self.bases = [0] * len(self.rings)
