"""What the known frontends send, message by message, as recorded from them: start, stop, continue, reset.

Source: recordings of QEMU 7.2 and 10.0 and User-Mode Linux 6.1, and cloud-hypervisor's source (vu_common_ctrl.rs).
"""

from __future__ import annotations

from typing import Protocol

from tests.support.frontend.device import Device
from tests.support.frontend.vhost_user_client import ProtocolFeature, Request, u64


class Frontend(Protocol):
    """A program's way to drive a device."""

    name: str

    def realize(self, device: Device) -> None:
        """From the connection to the end of device creation: nothing runs yet."""

    def start(self, device: Device) -> None:
        """The guest's driver is ready (DRIVER_OK): the queues run afterwards."""

    def stop(self, device: Device) -> None:
        """The virtual machine is paused, or the guest resets the device."""

    def cont(self, device: Device) -> None:
        """The virtual machine goes on after stop()."""


class Qemu72:
    """QEMU 7.2: no acknowledgement for SET_VRING_ENABLE."""

    name = "qemu-7.2"
    protocol_features = 0x1B02B
    acknowledges_enable = False

    def realize(self, device: Device) -> None:
        device.get_features()
        acked = device.negotiate_protocol(self.protocol_features)
        if ProtocolFeature.MQ in acked:
            device.get_queue_num()
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in acked:
            device.client.call_u64(Request.GET_MAX_MEM_SLOTS)
        if ProtocolFeature.BACKEND_REQ in acked:
            device.set_backend_req_fd(need=True)
        device.client.tell(Request.SET_OWNER)
        device.get_features()
        for ring in device.rings:
            device.set_call(ring)
            device.set_err(ring)

    def start(self, device: Device) -> None:
        self._calls(device)
        device.set_features()
        self._status(device)
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in device.protocol_features:
            for region in device.ram.regions:
                device.add_region(region)
        else:
            device.set_mem_table(need=True)
        self._run(device)

    def _calls(self, device: Device) -> None:
        for ring in device.rings:
            device.set_call(ring)

    def _status(self, device: Device) -> None:
        if ProtocolFeature.STATUS in device.protocol_features:
            status = device.client.call_u64(Request.GET_STATUS)
            device.client.tell(Request.SET_STATUS, u64(status | 0x8))

    def _run(self, device: Device) -> None:
        for ring in device.rings:
            device.set_num(ring)
            device.set_base(ring)
            device.set_addr(ring)
            device.set_kick(ring)
        for ring in device.rings:
            device.enable(ring, need=self.acknowledges_enable)
        self._calls(device)

    def stop(self, device: Device) -> None:
        for ring in device.rings:
            device.enable(ring, on=False, need=self.acknowledges_enable)
        for ring in device.rings:
            device.get_base(ring)
        self._calls(device)

    def cont(self, device: Device) -> None:
        """From SET_FEATURES on, but the memory regions are not sent again."""
        device.set_features()
        self._status(device)
        self._run(device)


class Qemu10(Qemu72):
    """QEMU 10.0: waits for SET_VRING_ENABLE, and resets the device at machine reset."""

    name = "qemu-10.0"
    protocol_features = 0x9B02B
    acknowledges_enable = True

    def realize(self, device: Device) -> None:
        super().realize(device)
        self.reset_device(device)

    def reset_device(self, device: Device) -> None:
        """At machine reset, and once more when the guest's driver resets the device. No reply is asked for."""
        if ProtocolFeature.RESET_DEVICE in device.protocol_features:
            device.client.tell(Request.RESET_DEVICE)


class CloudHypervisor:
    """cloud-hypervisor: SET_MEM_TABLE, and every message is acknowledged."""

    name = "cloud-hypervisor"
    protocol_features = (
        ProtocolFeature.MQ
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.INFLIGHT_SHMFD
        | ProtocolFeature.LOG_SHMFD
        | ProtocolFeature.DEVICE_STATE
    )

    def realize(self, device: Device) -> None:
        device.client.tell(Request.SET_OWNER)
        device.get_features()
        device.negotiate_protocol(self.protocol_features)
        device.get_queue_num()

    def start(self, device: Device) -> None:
        device.forget_inflight()
        self._start(device)

    def reconnect(self, device: Device, path: str) -> None:
        """It lost the connection while the guest ran: as at the start, with the in-flight tables it was given, from avail.idx on."""
        device.reconnect(path)
        self.realize(device)
        device.bases = [ring.avail_idx for ring in device.rings]
        self._start(device)

    def _start(self, device: Device) -> None:
        device.set_features(need=True)
        device.set_mem_table(need=True)
        for ring in device.rings:
            device.set_num(ring, need=True)
        if ProtocolFeature.INFLIGHT_SHMFD in device.protocol_features:
            if device.inflight_fd is None:
                device.get_inflight()
            device.set_inflight(need=True)
        for ring in device.rings:
            device.set_addr(ring, need=True)
            device.set_base(ring, need=True)
            device.set_call(ring, need=True)
            device.set_kick(ring, need=True)
        for ring in device.rings:
            device.enable(ring, need=True)

    def stop(self, device: Device) -> None:
        for ring in device.rings:
            device.enable(ring, on=False, need=True)
        for ring in device.rings:
            device.get_base(ring)

    def cont(self, device: Device) -> None:
        self._start(device)


class CloudHypervisorWithoutInflight(CloudHypervisor):
    """As one that does not keep in-flight tables."""

    name = "cloud-hypervisor without INFLIGHT_SHMFD"
    protocol_features = CloudHypervisor.protocol_features & ~ProtocolFeature.INFLIGHT_SHMFD


class UserModeLinux:
    """User-Mode Linux 6.1: one region in a table for two, the kick and ENABLE of a ring only after all rings were described."""

    name = "uml-6.1"
    protocol_features = 0x229

    def realize(self, device: Device) -> None:
        device.client.tell(Request.SET_OWNER)
        device.get_features()
        acked = device.negotiate_protocol(self.protocol_features)
        if ProtocolFeature.BACKEND_REQ in acked:
            device.set_backend_req_fd(need=True)
        if ProtocolFeature.MQ in acked:
            device.get_queue_num()
        if ProtocolFeature.CONFIG in acked:
            for size in range(1, 37):  # the tag, byte by byte
                device.get_config(size - 1, 1)
            device.get_config(36, 4)

    def start(self, device: Device) -> None:
        device.set_features(need=True)
        device.set_mem_table(need=True, padding=32 if len(device.ram.regions) == 1 else 0)
        self._rings(device)

    def _rings(self, device: Device) -> None:
        for ring in device.rings:
            device.set_call(ring, need=True)
            device.set_num(ring, need=True)
            device.set_base(ring, need=True)
            device.set_addr(ring, need=True)
        for ring in device.rings:
            device.set_kick(ring, need=True)
            device.enable(ring, need=True)

    def stop(self, device: Device) -> None:
        for ring in device.rings:
            device.enable(ring, on=False, need=True)
        for ring in device.rings:
            device.get_base(ring)

    def cont(self, device: Device) -> None:
        self._rings(device)


QEMU_7_2 = Qemu72()
QEMU_10 = Qemu10()
CLOUD_HYPERVISOR = CloudHypervisor()
CLOUD_HYPERVISOR_WITHOUT_INFLIGHT = CloudHypervisorWithoutInflight()
USER_MODE_LINUX = UserModeLinux()
FRONTENDS: tuple[Frontend, ...] = (QEMU_7_2, QEMU_10, CLOUD_HYPERVISOR, USER_MODE_LINUX)
