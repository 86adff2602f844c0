"""Notices when a process of the group dies, whatever launched it, and ends the others with one line on stderr.

A collective may never notice: NCCL waits in a kernel, gloo waits for a process that waits for the dead one. So every
process keeps a connection to the main process open. The kernel closes it when a process dies, and its keepalive probes
fail when a machine is lost. A process that is busy for minutes, computing or writing, is not taken for dead.
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

FRAME = struct.Struct("!cI")  # a message: an event, one of the next line, and the index of the process that it is about
DONE, FAILED, GONE = b"w", b"b", b"g"  # a process has finished its work, stopped on an error that it printed, or died
GRACE_SECONDS = 6.0  # for a process to end by itself after another has failed: often on the same error
PROBE_SECONDS = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # a lost machine is noticed in 30 s
HELLO = struct.Struct("!I16s")  # the index of the process that connects, and the token
CONTINUES = "the same command continues from the last checkpoint"


class Watch:
    """The connections of one process: the main process has one to each of the others, which have one to it.

    A daemon thread listens until the processes at the other ends have finished, and ends this process if one of the group
    fails or dies. The main process prints a line on stderr about it. If it is the main process that fails or dies, the
    processes with `reports_main_exit` print the line.
    """

    def __init__(
        self,
        index: int,
        size: int,
        connections: dict[int, socket.socket],  # by the index of the process at the other end
        reports_main_exit: bool = False,
    ):
        self._index, self._size, self._connections = index, size, connections
        self._reports_main_exit = reports_main_exit
        self._announced = False  # whether this process has announced its own end; from then on no other process ends it
        self._selector = selectors.DefaultSelector()
        for other, connection in connections.items():
            self._selector.register(connection, selectors.EVENT_READ, data=other)
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def end(self, done: bool) -> None:
        """Announce the end of this process to the others: done, or failed. Later calls do nothing."""
        if self._announced:
            return
        self._announced = True
        self._send(DONE if done else FAILED, self._index)

    def _listen(self) -> None:
        """Read messages until all other processes have finished, or one has failed or died."""
        while self._selector.get_map():
            for key, _ in self._selector.select():
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                event, number = _read(connection) or (GONE, key.data)  # closed without DONE: process key.data died
                if event == DONE:  # always about the process at the other end
                    self._selector.unregister(connection)
                elif not self._announced:
                    self._end_process(event, number)
                else:
                    return  # this process ends by itself, whatever happens to the others

    def _end_process(self, event: bytes, number: int) -> None:
        """End this process, because process `number` has failed or died. Returns only if this process ends by itself."""
        if self._index == 0:  # the others are connected to the main process alone
            self._send(event, number)
        what = "is gone (killed, or its machine was lost)"
        if event == FAILED:
            time.sleep(GRACE_SECONDS)
            what = "stopped on an error (see its message)"
        if self._announced:  # in the meantime
            return
        if self._index == 0 or (number == 0 and self._reports_main_exit):
            sys.stderr.write(f"harness: process {number} of {self._size} {what}; {CONTINUES}\n")
            sys.stderr.flush()
        os._exit(1)  # the main thread may wait in a collective for ever

    def _send(self, event: bytes, number: int) -> None:
        """Send a message about process `number` over all connections."""
        for connection in self._connections.values():
            try:
                connection.sendall(FRAME.pack(event, number))
            except OSError:  # that process is gone, and its connection will show it
                continue


def accept_others(size: int, publish: Callable[[str], None]) -> Watch:
    """Wait until all other processes have connected, and return the watch of the main process.

    publish: is called with a text, "PORT TOKEN", and makes it known to the other processes, which call `connect_to_main`
    with it.
    """
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
                connection.close()  # not a process of this group
                continue
            connections[HELLO.unpack(hello)[0]] = _keep_alive(connection)
    return Watch(0, size, connections)


def connect_to_main(index: int, size: int, address: str, published: str, reports_main_exit: bool) -> Watch:
    """Connect to the main process, and return the watch of this process, which is not the main process.

    address: of the main process. published: the text from `accept_others`. reports_main_exit: whether this process
    prints that the main process has failed or died; true in one process of each machine.
    """
    port, token = published.split()
    connection = socket.create_connection((address, int(port)), timeout=60)
    connection.sendall(HELLO.pack(index, bytes.fromhex(token)))
    return Watch(index, size, {0: _keep_alive(connection)}, reports_main_exit)


def _keep_alive(connection: socket.socket) -> socket.socket:
    """Remove the timeout of `connection`, and turn on probes that close it when the other machine is lost. Returns it."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in PROBE_SECONDS:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
    return connection


def _read(connection: socket.socket) -> tuple[bytes, int] | None:
    """The next message as (event, index of the process that it is about); None: the connection is closed or broken."""
    try:
        frame = connection.recv(FRAME.size, socket.MSG_WAITALL)
    except OSError:
        return None
    return FRAME.unpack(frame) if len(frame) == FRAME.size else None
