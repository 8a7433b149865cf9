"""Redirects all connections to the loopback of a network namespace, whatever their port, to sockets of ours.

Processes in the guest listen on the guest's loopback, so a client that connects to ``localhost`` in the sandbox's
network namespace on the host (as CRI's port-forward does) would find no listener. A BPF program, which the kernel runs
before it looks for a listener, assigns such a connection to a socket of ours; the accepted socket's local address has
the port. The program changes nothing else in the namespace and is removed with the last descriptor of its link, which
only the engine holds.

Source: the kernel's ``Documentation/bpf/prog_sk_lookup.rst`` and ``linux/bpf.h`` (struct bpf_sk_lookup); Linux 5.9.
"""

from __future__ import annotations

import os
import socket

from kata import bpf
from kata.bpf import (
    ADD,
    AND,
    CALL,
    EXIT,
    JUMP,
    JUMP_EQ,
    JUMP_NE,
    LOAD,
    LOAD_MAP,
    MOV,
    MOV_REGISTER,
    STORE_VALUE,
)
from kata.errors import HostError
from kata.network import resolver
from kata.sysio import Fd

_BACKLOG = 64
_IP_FREEBIND, _IPV6_FREEBIND = 15, 78
_MAP_CREATE, _MAP_UPDATE, _LINK_CREATE = 0, 2, 28
_SOCKMAP = 15
_SK_LOOKUP = 30
_ATTACH_SK_LOOKUP = 36
_INET4, _INET6, _TCP = 2, 10, 6

# Offsets in struct bpf_sk_lookup. Addresses are in network byte order, family and protocol are not.
_FAMILY, _PROTOCOL, _LOCAL_IP4, _LOCAL_IP6 = 8, 12, 40, 44

_MAP_FD = 1
_LOOKUP_ELEMENT, _RELEASE, _ASSIGN = 1, 86, 124


def program(map_fd: int) -> bytes:
    """Return the BPF program: TCP to 127.0.0.0/8 gets the map's socket 0, TCP to ::1 its socket 1.

    All other connections get the usual listener, and so do those to Docker's resolver: dockerd listens in the namespace
    itself.

    Args:
        map_fd: Descriptor of the map with the sockets.
    """
    names = int.from_bytes(resolver.pack(resolver.DOCKER), "little")
    return bpf.assemble(
        [
            (MOV_REGISTER, 6, 1, 0, 0),
            (LOAD, 2, 6, _PROTOCOL, 0),
            (JUMP_NE, 2, 0, "on", _TCP),
            (LOAD, 2, 6, _FAMILY, 0),
            (JUMP_EQ, 2, 0, "six", _INET6),
            (JUMP_NE, 2, 0, "on", _INET4),
            (LOAD, 2, 6, _LOCAL_IP4, 0),
            (JUMP_EQ, 2, 0, "on", names),
            (AND, 2, 0, 0, 0xFF),
            (JUMP_NE, 2, 0, "on", 127),
            (STORE_VALUE, 10, 0, -4, 0),
            (JUMP, 0, 0, "found", 0),
            "six",
            *((LOAD, 2, 6, _LOCAL_IP6, 0), (JUMP_NE, 2, 0, "on", 0)),
            *((LOAD, 2, 6, _LOCAL_IP6 + 4, 0), (JUMP_NE, 2, 0, "on", 0)),
            *((LOAD, 2, 6, _LOCAL_IP6 + 8, 0), (JUMP_NE, 2, 0, "on", 0)),
            *(
                (LOAD, 2, 6, _LOCAL_IP6 + 12, 0),
                (JUMP_NE, 2, 0, "on", int.from_bytes(b"\0\0\0\1", "little")),
            ),
            (STORE_VALUE, 10, 0, -4, 1),
            "found",
            (LOAD_MAP, 1, _MAP_FD, 0, map_fd),
            (0, 0, 0, 0, 0),  # the upper half of that constant
            (MOV_REGISTER, 2, 10, 0, 0),
            (ADD, 2, 0, 0, -4),
            (CALL, 0, 0, 0, _LOOKUP_ELEMENT),
            (JUMP_EQ, 0, 0, "on", 0),
            (MOV_REGISTER, 7, 0, 0, 0),
            (MOV_REGISTER, 1, 6, 0, 0),
            (MOV_REGISTER, 2, 7, 0, 0),
            (MOV, 3, 0, 0, 0),
            (CALL, 0, 0, 0, _ASSIGN),
            (MOV_REGISTER, 1, 7, 0, 0),
            (CALL, 0, 0, 0, _RELEASE),
            "on",
            (MOV, 0, 0, 0, 1),
            (EXIT, 0, 0, 0, 0),
        ]
    )


class LoopbackRedirect:
    """Redirects loopback connections of the calling thread's network namespace, until `close`.

    Raises:
        HostError: This host's kernel does not support it.

    Attributes:
        listeners: The non-blocking sockets at which redirected connections are accepted.
    """

    def __init__(self) -> None:
        self.listeners: list[socket.socket] = []
        self._link: Fd | None = None
        try:
            self._listen(socket.AF_INET, "127.0.0.1")
            try:
                self._listen(socket.AF_INET6, "::1")
            except OSError:
                pass  # a namespace without IPv6
            self._link = Fd(_attach(self.listeners))
        except OSError as error:
            self.close()
            raise HostError(
                f"connections to the sandbox's loopback are not passed on to the guest: {error.strerror}",
                "Port-forward needs Linux 5.9 or newer with CONFIG_BPF_SYSCALL and CONFIG_NET_SOCK_MSG.",
            ) from error

    def _listen(self, family: socket.AddressFamily, address: str) -> None:
        one = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self.listeners.append(one)
        try:
            # While the loopback is not up, the namespace does not have that address.
            if family == socket.AF_INET:
                one.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            else:
                one.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            one.bind((address, 0))
            one.listen(_BACKLOG)
        except OSError:
            self.listeners.remove(one)
            one.close()
            raise

    def close(self) -> None:
        """End the redirection and close the sockets."""
        for one in self.listeners:
            one.close()
        self.listeners.clear()
        if self._link is not None:
            self._link.close()


def _attach(listeners: list[socket.socket]) -> int:
    """Make the map, load the program and attach it. Returns the link's descriptor."""
    import ctypes

    held: list[int] = []
    try:
        # type, key size, value size (8: a socket's cookie can be asked for), entries
        sockets = bpf.call(_MAP_CREATE, b"".join(n.to_bytes(4, "little") for n in (_SOCKMAP, 4, 8, 2)))
        held.append(sockets)
        for index, listener in enumerate(listeners):
            key, value = ctypes.c_uint32(index), ctypes.c_uint64(listener.fileno())
            pointers = (ctypes.addressof(key), ctypes.addressof(value), 0)
            fields = sockets.to_bytes(8, "little") + b"".join(n.to_bytes(8, "little") for n in pointers)
            bpf.call(_MAP_UPDATE, fields)
        loaded = bpf.load(_SK_LOOKUP, _ATTACH_SK_LOOKUP, program(sockets), "kata_sk_lookup")
        held.append(loaded)
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        held.append(namespace)
        wanted = (loaded, namespace, _ATTACH_SK_LOOKUP, 0)
        link = bpf.call(_LINK_CREATE, b"".join(n.to_bytes(4, "little") for n in wanted))
        os.set_inheritable(link, False)
        return link
    finally:
        for fd in held:
            os.close(fd)
