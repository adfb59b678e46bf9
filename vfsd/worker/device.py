"""The vhost-user-fs device as the frontend sees it: one handler per message, in one table. No I/O of its own.

Who controls the messages: the frontend, which a guest may have taken over. Everything that is wrong with a message ends in
FrontendBreach naming the message and the reason; the caller then closes the connection. What workers must do is asked of a
`WorkerPort`, which waits until it is done, so that a NEED_REPLY is answered only when the queue really runs.
The order of messages is free where the specification leaves it free: after each one, rings that are complete are started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from vfsd.channel import close_all
from vfsd.errors import NOT_SHARED, FrontendBreach
from vfsd.fds import OwnedFd
from vfsd.log import Logger
from vfsd.wire import vhost_user as vu
from vfsd.wire.inflight import TABLE_STRIDE_BYTES
from vfsd.worker.config_space import ConfigSpace
from vfsd.worker.memory_table import MAX_MEM_SLOTS, MemoryTable
from vfsd.worker.vrings import Vring
from vfsd.worker.worker_links import WorkerRefused
from vfsd.worker.worker_port import FdReply, WorkerPort

FEATURES: Final = (
    1 << vu.VIRTIO_F_VERSION_1
    | 1 << vu.VIRTIO_RING_F_INDIRECT_DESC
    | 1 << vu.VIRTIO_RING_F_EVENT_IDX
    | 1 << vu.VHOST_USER_F_PROTOCOL_FEATURES
)
PROTOCOL_FEATURES: Final = (
    1 << vu.VHOST_USER_PROTOCOL_F_MQ
    | 1 << vu.VHOST_USER_PROTOCOL_F_REPLY_ACK
    | 1 << vu.VHOST_USER_PROTOCOL_F_BACKEND_REQ
    | 1 << vu.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
    | 1 << vu.VHOST_USER_PROTOCOL_F_RESET_DEVICE
    | 1 << vu.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
)


class Device:
    """All state that the frontend has set up. `handle` gives the reply to send, or None."""

    def __init__(self, workers: WorkerPort, log: Logger, memory: MemoryTable, *, request_queues: int, tag: bytes | None) -> None:
        """`memory` is shared with whoever tells workers of it."""
        self._workers = workers
        self._log = log
        self._config = ConfigSpace(tag, request_queues, log) if tag is not None else None
        self._features: int | None = None  # None until SET_FEATURES, and again after a reset
        self._protocol_features = 0
        self._memory = memory
        self._rings = [Vring(index) for index in range(request_queues + 1)]  # 0 is hiprio
        self._backend_fd: OwnedFd | None = None

    def handle(self, message: vu.Message, fds: list[OwnedFd]) -> bytes | FdReply | None:
        """Takes the descriptors. Raises FrontendBreach; WorkerFailed and StopAsked pass through."""
        try:
            return self._dispatch(message, fds)
        finally:
            close_all(fds)  # those that no handler took

    def ring_broken(self, queue_index: int, text: str) -> None:
        """A worker says that the guest broke this ring. The others go on."""
        ring = self._rings[queue_index] if queue_index < len(self._rings) else None
        if ring is not None and ring.running and not ring.broken:
            ring.broken = True
            self._log.error(f"queue {queue_index} is stopped, the guest's driver broke it: {text}")

    def close(self) -> None:
        for ring in self._rings:
            ring.close()
        self._memory.clear()
        self._keep_backend_fd(None)

    def _dispatch(self, message: vu.Message, fds: list[OwnedFd]) -> bytes | FdReply | None:
        row = _ROWS.get(message.request)
        if row is None:
            raise FrontendBreach(f"{message.name}: vfsd does not know this message, and has offered no feature that it belongs to")
        if not row.min_fds <= len(fds) <= row.max_fds:
            raise FrontendBreach(f"{message.name}: {len(fds)} descriptors, expected {row.min_fds} to {row.max_fds}")
        try:
            reply = row.handler(self, message, fds)
        except WorkerRefused as error:
            return self._refused(message, row, str(error))
        except FrontendBreach as error:
            raise _naming(message, error) from error
        if reply is None and self._wants_acknowledgement(message):
            return vu.encode_u64_reply(message.request, 0)
        return reply

    def _refused(self, message: vu.Message, row: Row, text: str) -> bytes:
        """A correct message that cannot be carried out: the frontend learns of it, or if it would not, the connection ends."""
        if row.replies or not self._wants_acknowledgement(message):
            raise FrontendBreach(f"{message.name}: {text}")
        self._log.error(f"{message.name} failed: {text}")
        return vu.encode_u64_reply(message.request, 1)

    def _wants_acknowledgement(self, message: vu.Message) -> bool:
        return message.need_reply and bool(self._protocol_features & 1 << vu.VHOST_USER_PROTOCOL_F_REPLY_ACK)

    # --- features and the device as a whole ----------------------------------------------------------------------------

    def get_features(self, message: vu.Message, _fds: list[OwnedFd]) -> bytes:
        vu.decode_empty(message)
        return vu.encode_u64_reply(message.request, FEATURES)

    def set_features(self, message: vu.Message, _fds: list[OwnedFd]) -> None:
        features = vu.decode_u64(message)
        if unknown := features & ~FEATURES:
            raise FrontendBreach(f"bits {unknown:#x} were not offered")
        if self._features is not None and _event_idx(features) != _event_idx(self._features) and any(ring.running for ring in self._rings):
            raise FrontendBreach("another choice of EVENT_IDX while rings run")
        self._features = features
        if not features & 1 << vu.VHOST_USER_F_PROTOCOL_FEATURES:
            # "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly in the enabled state."
            for ring in self._rings:
                ring.enabled = True
        self._start_complete_rings()

    def get_protocol_features(self, message: vu.Message, _fds: list[OwnedFd]) -> bytes:
        vu.decode_empty(message)
        return vu.encode_u64_reply(message.request, self._offered_protocol_features())

    def set_protocol_features(self, message: vu.Message, _fds: list[OwnedFd]) -> None:
        features = vu.decode_u64(message)
        if unknown := features & ~self._offered_protocol_features():
            raise FrontendBreach(f"bits {unknown:#x} were not offered")
        self._protocol_features = features

    def _offered_protocol_features(self) -> int:
        # QEMU 7.1 to 8.0 crashes when it is offered CONFIG: only with --tag, which nothing but CONFIG can use.
        return PROTOCOL_FEATURES | (1 << vu.VHOST_USER_PROTOCOL_F_CONFIG if self._config is not None else 0)

    def get_queue_num(self, message: vu.Message, _fds: list[OwnedFd]) -> bytes:
        vu.decode_empty(message)
        return vu.encode_u64_reply(message.request, len(self._rings))

    def set_owner(self, message: vu.Message, _fds: list[OwnedFd]) -> None:
        vu.decode_empty(message)

    def reset_owner(self, message: vu.Message, _fds: list[OwnedFd]) -> None:
        """Deprecated; "it is recommended that back-ends either ignore this message, or use it to disable all rings"."""
        vu.decode_empty(message)
        for ring in self._rings:
            ring.enabled = False
            self._stop(ring)

    def reset_device(self, message: vu.Message, _fds: list[OwnedFd]) -> None:
        """Rings and features as at the start; memory and protocol features stay (QEMU does not send them again)."""
        vu.decode_empty(message)
        for ring in self._rings:
            self._stop(ring)
            ring.reset()
        self._features = None

    def set_backend_req_fd(self, message: vu.Message, fds: list[OwnedFd]) -> None:
        """Kept, though nothing is sent on it yet: a frontend may take its closing for our end."""
        vu.decode_empty(message)
        self._keep_backend_fd(fds.pop())

    def _keep_backend_fd(self, fd: OwnedFd | None) -> None:
        if self._backend_fd is not None:
            self._backend_fd.close()
        self._backend_fd = fd

    def get_config(self, message: vu.Message, _fds: list[OwnedFd]) -> bytes:
        return self._config_space().read(message)

    def set_config(self, message: vu.Message, _fds: list[OwnedFd]) -> None:
        """Every field of a virtio-fs device is read-only for the driver (virtio 1.2, 5.11.4)."""
        vu.decode_config(message)
        self._config_space()
        raise WorkerRefused("the configuration space is read-only")

    def _config_space(self) -> ConfigSpace:
        if self._config is None:
            raise FrontendBreach("vfsd offers a configuration space only with --tag; start it with --tag=NAME")
        return self._config

    # --- in-flight tables ----------------------------------------------------------------------------------------------

    def get_inflight_fd(self, message: vu.Message, _fds: list[OwnedFd]) -> FdReply:
        """Memory for the tables of so many queues. The frontend does not look into it: how long a table is, is ours to say."""
        asked = vu.decode_inflight(message)
        self._check_inflight(asked)
        given = asked._replace(mmap_size=asked.num_queues * TABLE_STRIDE_BYTES, mmap_offset=0)
        return FdReply(vu.encode_inflight_reply(message, given), self._workers.inflight_memory())

    def set_inflight_fd(self, message: vu.Message, fds: list[OwnedFd]) -> None:
        """That memory again, perhaps on another connection: what it says is in flight is served before anything else."""
        given = vu.decode_inflight(message)
        self._check_inflight(given)
        if any(ring.running for ring in self._rings):
            raise FrontendBreach("other in-flight tables while rings run; stop them first (GET_VRING_BASE)")
        self._workers.adopt_inflight(fds.pop(), given.mmap_offset, given.mmap_size, given.num_queues)

    def _check_inflight(self, inflight: vu.Inflight) -> None:
        if not 1 <= inflight.num_queues <= len(self._rings):
            raise FrontendBreach(f"in-flight tables of {inflight.num_queues} queues, there are {len(self._rings)}")

    # --- memory --------------------------------------------------------------------------------------------------------

    def get_max_mem_slots(self, message: vu.Message, _fds: list[OwnedFd]) -> bytes:
        vu.decode_empty(message)
        return vu.encode_u64_reply(message.request, MAX_MEM_SLOTS)

    def set_mem_table(self, message: vu.Message, fds: list[OwnedFd]) -> None:
        regions = vu.decode_memory_table(message)
        if len(fds) != len(regions):
            raise FrontendBreach(f"{len(fds)} descriptors for {len(regions)} memory regions")
        with self._rings_paused():
            self._memory.clear()
            self._workers.clear_memory()
            for region in regions:
                self._add_region(region, fds.pop(0))

    def add_mem_reg(self, message: vu.Message, fds: list[OwnedFd]) -> None:
        self._add_region(vu.decode_single_region(message), fds.pop())
        self._resume_rings()

    def rem_mem_reg(self, message: vu.Message, _fds: list[OwnedFd]) -> None:
        region = vu.decode_single_region(message)
        with self._rings_paused():  # what is in flight may lie in this region
            self._workers.remove_memory(self._memory.remove(region))

    def _add_region(self, region: vu.MemoryRegion, fd: OwnedFd) -> None:
        slot = self._memory.add(region, fd)
        try:
            self._workers.add_memory(slot.region, slot.fd)
        except WorkerRefused:
            self._memory.remove(region)
            raise

    @contextmanager
    def _rings_paused(self) -> Iterator[None]:
        for ring in self._rings:
            self._stop(ring)
        yield
        self._resume_rings()

    def _resume_rings(self) -> None:
        """Start again what was paused, if it still lies in memory; a region that comes later may bring it back."""
        for ring in self._rings:
            if self._may_start(ring) and ring.lies_in(self._memory):
                self._start(ring)

    # --- rings ---------------------------------------------------------------------------------------------------------

    def set_vring_num(self, message: vu.Message, _fds: list[OwnedFd]) -> None:
        state = vu.decode_vring_state(message)
        self._ring(state.index).set_size(state.num)
        self._start_complete_rings()

    def set_vring_base(self, message: vu.Message, _fds: list[OwnedFd]) -> None:
        state = vu.decode_vring_state(message)
        self._ring(state.index).set_base(state.num)
        self._start_complete_rings()

    def set_vring_addr(self, message: vu.Message, _fds: list[OwnedFd]) -> None:
        addresses = vu.decode_vring_addr(message)
        self._ring(addresses.index).set_addresses(addresses)
        self._start_complete_rings()

    def set_vring_enable(self, message: vu.Message, _fds: list[OwnedFd]) -> None:
        state = vu.decode_vring_state(message)
        if state.num not in {0, 1}:
            raise FrontendBreach(f"{state.num} is neither 0 (disable) nor 1 (enable)")
        ring = self._ring(state.index)
        ring.enabled = bool(state.num)
        if not ring.enabled:
            self._stop(ring)
        self._start_complete_rings()

    def get_vring_base(self, message: vu.Message, _fds: list[OwnedFd]) -> bytes:
        ring = self._ring(vu.decode_vring_state(message).index)
        self._stop(ring)
        ring.stop()
        return vu.encode_vring_state_reply(message.request, vu.VringState(ring.index, ring.base))

    def set_vring_kick(self, message: vu.Message, fds: list[OwnedFd]) -> None:
        ring, fd = self._ring_and_fd(message, fds)
        ring.set_kick(fd)
        if ring.running:
            self._workers.replace_kick(ring.index, fd)
        self._start_complete_rings()

    def set_vring_call(self, message: vu.Message, fds: list[OwnedFd]) -> None:
        ring, fd = self._ring_and_fd(message, fds)
        ring.set_call(fd)
        if ring.running:
            self._workers.replace_call(ring.index, fd)

    def set_vring_err(self, message: vu.Message, fds: list[OwnedFd]) -> None:
        ring, fd = self._ring_and_fd(message, fds)
        ring.set_err(fd)
        if ring.running:
            self._workers.replace_err(ring.index, fd)

    def _ring_and_fd(self, message: vu.Message, fds: list[OwnedFd]) -> tuple[Vring, OwnedFd | None]:
        index, has_fd = vu.decode_vring_fd(message)
        if len(fds) != has_fd:
            raise FrontendBreach(f"{len(fds)} descriptors where the payload announces {int(has_fd)}")
        ring = self._ring(index)
        return ring, fds.pop() if has_fd else None

    def _ring(self, index: int) -> Vring:
        """The ring, and on its way the worker that will serve it: named once means used soon."""
        if index >= len(self._rings):
            raise FrontendBreach(f"there is no queue {index}, there are {len(self._rings)} (--num-request-queues and hiprio)")
        self._workers.need_for(index)
        return self._rings[index]

    def _start_complete_rings(self) -> None:
        """What the frontend completed it expects to run: memory must be there by now."""
        for ring in self._rings:
            if not self._may_start(ring):
                continue
            if not len(self._memory):
                raise FrontendBreach(NOT_SHARED)
            if not ring.lies_in(self._memory):
                raise FrontendBreach(f"ring {ring.index} does not lie in the memory regions that were given")
            self._start(ring)

    def _may_start(self, ring: Vring) -> bool:
        return ring.wants_to_run and self._features is not None

    def _start(self, ring: Vring) -> None:
        self._workers.start_ring(ring, event_idx=_event_idx(self._features or 0))
        ring.running = True

    def _stop(self, ring: Vring) -> None:
        """Drained and stopped; the base is where it goes on. A broken ring has no better base than the last known."""
        if not ring.running:
            return
        ring.running = False
        try:
            ring.base = self._workers.stop_ring(ring.index) & 0xFFFF
        except WorkerRefused as error:
            if not ring.broken:
                raise FrontendBreach(f"ring {ring.index} could not be drained: {error}") from error


class Row(NamedTuple):
    """One known message: its handler, how many descriptors may come along, and whether it has a reply of its own."""

    handler: Callable[[Device, vu.Message, list[OwnedFd]], bytes | FdReply | None]
    min_fds: int = 0
    max_fds: int = 0
    replies: bool = False


# What is not in this table is not permitted. Exact numbers of descriptors that depend on the payload: in the handler.
_ROWS: Final[dict[int, Row]] = {
    vu.VHOST_USER_GET_FEATURES: Row(Device.get_features, replies=True),
    vu.VHOST_USER_SET_FEATURES: Row(Device.set_features),
    vu.VHOST_USER_SET_OWNER: Row(Device.set_owner),
    vu.VHOST_USER_RESET_OWNER: Row(Device.reset_owner),
    vu.VHOST_USER_SET_MEM_TABLE: Row(Device.set_mem_table, min_fds=1, max_fds=vu.MAX_REGIONS),
    vu.VHOST_USER_SET_VRING_NUM: Row(Device.set_vring_num),
    vu.VHOST_USER_SET_VRING_ADDR: Row(Device.set_vring_addr),
    vu.VHOST_USER_SET_VRING_BASE: Row(Device.set_vring_base),
    vu.VHOST_USER_GET_VRING_BASE: Row(Device.get_vring_base, replies=True),
    vu.VHOST_USER_SET_VRING_KICK: Row(Device.set_vring_kick, max_fds=1),
    vu.VHOST_USER_SET_VRING_CALL: Row(Device.set_vring_call, max_fds=1),
    vu.VHOST_USER_SET_VRING_ERR: Row(Device.set_vring_err, max_fds=1),
    vu.VHOST_USER_GET_PROTOCOL_FEATURES: Row(Device.get_protocol_features, replies=True),
    vu.VHOST_USER_SET_PROTOCOL_FEATURES: Row(Device.set_protocol_features),
    vu.VHOST_USER_GET_QUEUE_NUM: Row(Device.get_queue_num, replies=True),
    vu.VHOST_USER_SET_VRING_ENABLE: Row(Device.set_vring_enable),
    vu.VHOST_USER_SET_BACKEND_REQ_FD: Row(Device.set_backend_req_fd, min_fds=1, max_fds=1),
    vu.VHOST_USER_GET_CONFIG: Row(Device.get_config, replies=True),
    vu.VHOST_USER_SET_CONFIG: Row(Device.set_config),
    vu.VHOST_USER_GET_INFLIGHT_FD: Row(Device.get_inflight_fd, replies=True),
    vu.VHOST_USER_SET_INFLIGHT_FD: Row(Device.set_inflight_fd, min_fds=1, max_fds=1),
    vu.VHOST_USER_RESET_DEVICE: Row(Device.reset_device),
    vu.VHOST_USER_GET_MAX_MEM_SLOTS: Row(Device.get_max_mem_slots, replies=True),
    vu.VHOST_USER_ADD_MEM_REG: Row(Device.add_mem_reg, min_fds=1, max_fds=1),
    # "For compatibility with existing incorrect implementations": one descriptor may come along, and is closed.
    vu.VHOST_USER_REM_MEM_REG: Row(Device.rem_mem_reg, max_fds=1),
}


def _event_idx(features: int) -> bool:
    return bool(features & 1 << vu.VIRTIO_RING_F_EVENT_IDX)


def _naming(message: vu.Message, error: FrontendBreach) -> FrontendBreach:
    """Every breach names its message; the codec's do so already."""
    text = str(error)
    return error if text.startswith(message.name) else FrontendBreach(f"{message.name}: {text}")
