"""Notices the death of a process of the group, whoever started it, and ends the others with one line.

A collective does not always: NCCL waits in a kernel, gloo for a peer of a peer. So each process holds a connection to the
leader, which the system closes at any death; that of a machine shows in the connection's own probes. It is a matter of the
kernel alone: a process that computes or writes for minutes is not taken for dead.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

FRAME = struct.Struct("!cI")  # what happened, to which process
WELL, BADLY, GONE = b"w", b"b", b"g"  # it ended well, it stopped on an error and said so, it died
GRACE_SECONDS = 3.0  # for a process to end by itself after another stopped on an error: often it is the same error
PROBE_SECONDS = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # a lost machine shows in 30 s
HELLO = struct.Struct("!I16s")  # which process connects, and what the store told it
CONTINUES = "the same command continues from the last checkpoint"


class Watch:
    """One end of the connections between the leader and the others; a thread listens until the process ends."""

    def __init__(self, index: int, size: int, connections: dict[int, socket.socket], speaks: bool = True):
        self._index, self._size, self._connections, self._speaks = index, size, connections, speaks
        self._ending = False
        self._selector = selectors.DefaultSelector()
        for number, connection in connections.items():
            self._selector.register(connection, selectors.EVENT_READ, number)
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def end(self, well: bool) -> None:
        """Tell the others that this process needs them no more, or that it failed. What was told first holds."""
        if self._ending:
            return
        self._ending = True
        self._tell(WELL if well else BADLY, self._index)

    def _listen(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                kind, number = _read(key.fileobj) or (GONE, key.data)
                if kind == WELL:
                    self._selector.unregister(key.fileobj)
                elif not self._ending:
                    self._lost(kind, number)
                else:
                    return

    def _lost(self, kind: bytes, number: int) -> None:
        if self._index == 0:
            self._tell(kind, number)
        what = "is gone (killed, or its machine was lost)"
        if kind == BADLY:
            time.sleep(GRACE_SECONDS)
            what = "stopped on an error (see what it said)"
        if self._ending:
            return
        if self._index == 0 or (number == 0 and self._speaks):
            sys.stderr.write(f"harness: process {number} of {self._size} {what}; {CONTINUES}\n")
            sys.stderr.flush()
        os._exit(1)  # the main thread may wait in a collective for ever

    def _tell(self, kind: bytes, number: int) -> None:
        for connection in self._connections.values():
            try:
                connection.sendall(FRAME.pack(kind, number))
            except OSError:  # it is gone, which it is told of or will be
                continue


def lead(size: int, publish: Callable[[str], None]) -> Watch:
    """The leader's end. `publish` brings the others what they give to `follow`."""
    token = os.urandom(16)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    connections: dict[int, socket.socket] = {}
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=size) as server:
        publish(f"{server.getsockname()[1]} {token.hex()}")
        server.settimeout(60)
        while len(connections) < size - 1:
            connection, _ = server.accept()
            connection.settimeout(10)
            hello = connection.recv(HELLO.size, socket.MSG_WAITALL)
            if len(hello) != HELLO.size or HELLO.unpack(hello)[1] != token:
                connection.close()  # a stranger
                continue
            connections[HELLO.unpack(hello)[0]] = _kept_alive(connection)
    return Watch(0, size, connections)


def follow(index: int, size: int, address: str, published: str, speaks: bool) -> Watch:
    """The end of any other process. speaks: whether it says that the leader is gone, which one of a machine does."""
    port, token = published.split()
    connection = socket.create_connection((address, int(port)), timeout=60)
    connection.sendall(HELLO.pack(index, bytes.fromhex(token)))
    return Watch(index, size, {0: _kept_alive(connection)}, speaks)


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in PROBE_SECONDS:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
    return connection


def _read(connection: socket.socket) -> tuple[bytes, int] | None:
    """A frame, or None when the other end is closed."""
    try:
        frame = connection.recv(FRAME.size, socket.MSG_WAITALL)
    except OSError:
        return None
    return FRAME.unpack(frame) if len(frame) == FRAME.size else None
