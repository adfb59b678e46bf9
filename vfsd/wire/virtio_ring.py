"""The split virtqueue's layout and the walk of its descriptor chains (virtio 1.2, 2.7).

Trust: every byte of a descriptor table belongs to the guest and may change while we look at it. Each descriptor is read
exactly once, by one `unpack_from`, and from then on only that copy is judged and used. What a chain *says* is checked here;
whether its addresses are guest memory is asked in `vfsd.worker.guest_memory`. A walk raises GuestBreach and nothing else.

Pure: no I/O, no state. Indexes are multiplied and lengths compared so that the same source is right in 64-bit arithmetic:
bounds are tested by subtraction, never by a sum that could wrap.

The rings are little-endian (virtio 1.x); the index rings are read through native-order memoryviews, so vfsd runs on
little-endian hosts only.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from vfsd.errors import GuestBreach

VIRTQ_DESC_F_NEXT = 1
VIRTQ_DESC_F_WRITE = 2
VIRTQ_DESC_F_INDIRECT = 4
VIRTQ_AVAIL_F_NO_INTERRUPT = 1
VIRTQ_USED_F_NO_NOTIFY = 1

MAX_QUEUE_SIZE = 32768  # 2.7: "Queue Size value is always a power of 2. The maximum Queue Size value is 32768."
MAX_CHAIN_BYTES = 1 << 32  # 2.7.5: "Drivers MUST NOT add a descriptor chain longer than 2^32 bytes in total."

# struct virtq_desc { le64 addr; le32 len; le16 flags; le16 next; }
_unpack_descriptor = Struct("<QIHH").unpack_from
DESCRIPTOR_BYTES = 16

# virtq_avail and virtq_used, in units of their u16 fields: flags, idx, then the ring and, after it, the other side's event.
RING_FLAGS = 0
RING_IDX = 1
RING_START = 2
USED_ENTRY_BYTES = 8  # struct virtq_used_elem { le32 id; le32 len; }

AVAIL_ALIGN = 2  # 2.7: so that an index is read and written by one aligned access
USED_ALIGN = 4

Descriptor = tuple[int, int, int, int]
"""address, length in bytes, VIRTQ_DESC_F_* flags, next; as the guest wrote them"""


def table_bytes(size: int) -> int:
    return DESCRIPTOR_BYTES * size


def avail_bytes(size: int, event_idx: bool) -> int:
    """Length of the available ring; used_event is there only with EVENT_IDX."""
    return 2 * (avail_event_position(size) + event_idx)


def used_bytes(size: int, event_idx: bool) -> int:
    """Length of the used ring; avail_event is there only with EVENT_IDX."""
    return 2 * (used_event_position(size) + event_idx)


def avail_event_position(size: int) -> int:
    """Where the available ring ends and the driver's used_event stands, in u16 units."""
    return RING_START + size


def used_event_position(size: int) -> int:
    """Where the used ring ends and the device's avail_event stands, in u16 units."""
    return RING_START + USED_ENTRY_BYTES // 2 * size


def is_queue_size(size: int) -> bool:
    return 0 < size <= MAX_QUEUE_SIZE and size & (size - 1) == 0


def need_event(event: int, new: int, old: int) -> bool:
    """Whether the step from index `old` to `new` passed `event` (vring_need_event of 2.7.7.1 and 2.7.10.1)."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


def walk_chain(
    table: memoryview | bytes,
    size: int,
    head: int,
    budget: int,
    open_indirect: Callable[[int, int], memoryview | bytes],
) -> list[Descriptor]:
    """Follow the chain that begins at descriptor `head` of a table of `size` entries (2.7.5).

    Returns its buffers' descriptors in order, every one at least a byte long, device-readable before device-writable ones; a
    descriptor that refers to an indirect table is replaced by that table's chain. `open_indirect(address, length)` gives the
    bytes of such a table or raises GuestBreach.

    At most `budget` descriptors: that is also what ends a loop, for the chain of a correct driver visits no descriptor twice.
    Unknown flag bits are ignored, as every other device does.
    """
    chain: list[Descriptor] = []
    index = head
    indirect = writable = False
    while True:
        if index >= size:
            raise GuestBreach(f"descriptor {index} lies outside a table of {size}")
        descriptor = _unpack_descriptor(table, index * DESCRIPTOR_BYTES)
        address, length, flags, index = descriptor
        if flags & VIRTQ_DESC_F_INDIRECT:
            size = _indirect_size(length, flags, nested=indirect)
            table = open_indirect(address, length)
            indirect = True
            index = 0
            continue
        if length == 0:
            raise GuestBreach("a descriptor of zero bytes")
        if len(chain) >= budget:
            raise GuestBreach(f"a chain that loops or has more than {budget} descriptors")
        if flags & VIRTQ_DESC_F_WRITE:
            writable = True
        elif writable:
            raise GuestBreach("a device-readable descriptor after a device-writable one")
        chain.append(descriptor)
        if not flags & VIRTQ_DESC_F_NEXT:
            return chain


def _indirect_size(length: int, flags: int, *, nested: bool) -> int:
    """Entries of the indirect table that a descriptor refers to.

    Such a descriptor may follow direct ones but ends their chain; its write-only flag is ignored (2.7.5.3.2).
    """
    if nested:
        raise GuestBreach("an indirect descriptor inside an indirect table")
    if flags & VIRTQ_DESC_F_NEXT:
        raise GuestBreach("an indirect descriptor with a next one")
    size, rest = divmod(length, DESCRIPTOR_BYTES)
    if rest or size == 0:
        raise GuestBreach(f"an indirect table of {length} bytes")
    # No chain may be longer than the longest queue, so no driver makes such a table; and where it lies in two memory
    # regions it is copied.
    if size > MAX_QUEUE_SIZE:
        raise GuestBreach(f"an indirect table of {size} descriptors")
    return size
