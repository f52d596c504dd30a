#!/usr/bin/env python3
"""Delays what hosts of the testbed send, where the kernel has no netem. testbed.sh runs it.

    delay.py wires DELAY RATE PORT...   in the switch's namespace: stands between each PORT and the bridge
    delay.py plain DEVICE               in a host's namespace: frames as they go over a wire, checksums and all

DELAY is in seconds; RATE in bits a second, 0 for no limit. What a host sends waits in a queue of a thousand frames, as with
netem; what is sent to it goes straight through.
"""

import array
import collections
import fcntl
import os
import selectors
import socket
import struct
import subprocess
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x2, 0x1000
SIOCETHTOOL, SET_CHECKSUMS, SET_TSO, SET_GSO = 0x8946, 0x17, 0x1F, 0x24
QUEUE = 1000


def plain(device):
    """Switches off what leaves checksums and segments to hardware, which a wire's far end must not see."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command in (SET_TSO, SET_GSO, SET_CHECKSUMS):
            value = array.array("B", struct.pack("II", command, 0))
            address = value.buffer_info()[0]
            fcntl.ioctl(control, SIOCETHTOOL, struct.pack("16sP", device.encode(), address))


class Wire:
    """From a port to the bridge, slowly, and back."""

    def __init__(self, port, delay, rate):
        self.delay, self.rate = delay, rate
        self.queue, self.free = collections.deque(), 0.0
        self.tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        name = f"slow{port.removeprefix('port')}"
        fcntl.ioctl(self.tap, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
        self.port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.port.bind((port, 0))
        self.port.setblocking(False)
        self.port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        for command in (f"link set {port} nomaster promisc on", f"link set {name} master bridge up"):
            subprocess.run(["ip", *command.split()], check=True)

    def take(self):
        """Queues what the host has sent."""
        for _ in range(64):
            try:
                frame, address = self.port.recvfrom(65536)
            except OSError:
                return
            if address[2] == socket.PACKET_OUTGOING or len(self.queue) >= QUEUE:
                continue
            now = time.monotonic()
            self.free = max(self.free, now) + (len(frame) * 8 / self.rate if self.rate else 0.0)
            self.queue.append((self.free + self.delay, frame))

    def release(self, now):
        """Passes on what has waited long enough."""
        while self.queue and self.queue[0][0] <= now:
            try:
                os.write(self.tap, self.queue.popleft()[1])
            except OSError:
                pass

    def give(self):
        """Passes on what is sent to the host."""
        for _ in range(64):
            try:
                frame = os.read(self.tap, 65536)
            except OSError:
                return
            try:
                self.port.send(frame)
            except OSError:
                pass  # the link is cut, or frames come faster than it takes them


def wires(delay, rate, ports):
    ready = selectors.DefaultSelector()
    all_wires = [Wire(port, delay, rate) for port in ports]
    for wire in all_wires:
        ready.register(wire.port, selectors.EVENT_READ, wire.take)
        ready.register(wire.tap, selectors.EVENT_READ, wire.give)
    print("ready", flush=True)
    while True:
        due = min((wire.queue[0][0] for wire in all_wires if wire.queue), default=None)
        wait = None if due is None else max(0.0, due - time.monotonic())
        for key, _ in ready.select(wait):
            key.data()
        now = time.monotonic()
        for wire in all_wires:
            wire.release(now)


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        plain(sys.argv[2])
    else:
        wires(float(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
