"""Ports for servers that tests start and that cannot choose one by themselves."""

import random
import socket
from pathlib import Path

LOWEST = 20_000
"""Above those that Ray hands out to its workers."""
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A TCP port on loopback that nobody listens on, outside the range from which the kernel gives ports to clients, so
    that none gets it until the server is up."""
    end = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32_768
    for port in random.SystemRandom().sample(range(LOWEST, max(end, LOWEST + 1_000)), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
