"""A driver's side of one virtqueue, in guest RAM that a device of the same process has mapped: what is written there is up to the test."""

import os
import struct

from vfsd.wire.inflight import TABLE_BYTES, InflightTable
from vfsd.worker.guest_memory import GuestMemory
from vfsd.worker.virtqueue import Virtqueue

RAM_BYTES = 1 << 20
UVA = 0x7F0000000000
DESC_AT, AVAIL_AT, USED_AT, INDIRECT_AT, DATA_AT = 0, 0x10000, 0x20000, 0x30000, 0x40000


class Driver:
    """Guest RAM with one ring in it, seen from the other side. Guest address = offset in RAM; the frontend adds UVA."""

    def __init__(self, *, size=8, event_idx=True):
        self.size = size
        self.event_idx = event_idx
        self.ram_fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self.ram_fd, RAM_BYTES)
        self.memory = GuestMemory()
        self.memory.add(self.ram_fd, 0, RAM_BYTES, UVA, 0)
        self.ram = self.memory.contiguous(UVA, RAM_BYTES)
        self.queues = []

    def queue(self, *, last_avail=0, memory=None, **changed):
        arguments = {"size": self.size, "desc_uva": UVA + DESC_AT, "avail_uva": UVA + AVAIL_AT, "used_uva": UVA + USED_AT}
        table = InflightTable(memoryview(bytearray(TABLE_BYTES)))
        arguments |= {"event_idx": self.event_idx, "inflight": table, "start_number": 1} | changed
        queue = Virtqueue(memory or self.memory, 3, last_avail=last_avail, **arguments)
        self.queues.append(queue)
        return queue

    def close(self):
        for queue in self.queues:
            queue.close()
        self.ram.release()
        self.memory.clear()
        os.close(self.ram_fd)

    def put(self, at, layout, *values):
        if layout == "<H":
            self.ram[at : at + 2].cast("H")[0] = values[0]  # in one store: pack_into writes zeroes first, which the device may see
        else:
            struct.pack_into(layout, self.ram, at, *values)

    def get(self, at, layout="<H"):
        (value,) = struct.unpack_from(layout, self.ram, at)
        return value

    def describe(self, number, address, length, flags=0, following=0, *, table=DESC_AT):
        self.put(table + 16 * number, "<QIHH", address, length, flags, following)

    def offer(self, *heads):
        for head in heads:
            idx = self.get(AVAIL_AT + 2)
            self.put(AVAIL_AT + 4 + 2 * (idx % self.size), "<H", head)
            self.put(AVAIL_AT + 2, "<H", (idx + 1) & 0xFFFF)

    def offer_simple(self, *heads):
        """One readable and no further buffer each."""
        for head in heads:
            self.describe(head, DATA_AT + 64 * head, 64)
        self.offer(*heads)

    def set_avail_idx(self, value):
        self.put(AVAIL_AT + 2, "<H", value)

    def set_used_idx(self, value):
        self.put(USED_AT + 2, "<H", value)

    def set_no_interrupt(self, value):
        self.put(AVAIL_AT, "<H", value)

    def set_used_event(self, value):
        self.put(AVAIL_AT + 4 + 2 * self.size, "<H", value)

    @property
    def used_idx(self):
        return self.get(USED_AT + 2)

    @property
    def used_flags(self):
        return self.get(USED_AT)

    @property
    def avail_event(self):
        return self.get(USED_AT + 4 + 8 * self.size)

    def used_entry(self, number):
        return struct.unpack_from("<II", self.ram, USED_AT + 4 + 8 * (number % self.size))
