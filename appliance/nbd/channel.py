"""A connection's socket: whole messages in, whole messages out, or Hangup."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from threading import Lock

from appliance.errors import FormatError
from appliance.nbd.protocol import Hangup

ZEROS = memoryview(bytes(1 << 20))
SOCKET_BUFFER = 4 << 20  # bytes; the kernel caps it at net.core.[rw]mem_max


class Channel:
    """Bytes to and from one client. Whoever sends holds `lock`; only one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        for direction in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, direction, SOCKET_BUFFER)
        self._socket = sock
        self.lock = Lock()

    def patience(self, seconds: float | None) -> None:
        """From now on a receive or send that takes longer is a Hangup; None waits for ever."""
        self._socket.settimeout(seconds)

    def receive(self, view: memoryview) -> None:
        """Fill `view`."""
        wanted = len(view)
        try:
            got = self._socket.recv_into(view, wanted, socket.MSG_WAITALL)
            while 0 < got < wanted:  # a signal, or a socket with a timeout
                more = self._socket.recv_into(view[got:], wanted - got, socket.MSG_WAITALL)
                got = got + more if more else 0
        except OSError as error:
            raise Hangup(f"receiving: {error}") from error
        if not got:
            raise Hangup("the client closed the connection")

    def send(self, head: bytes, data: bytes | memoryview = b"") -> None:
        """Send both, as one packet if it fits."""
        try:
            sent = self._socket.sendmsg((head, data)) if data else self._socket.send(head)
            if sent < len(head) + len(data):  # a signal, or a socket with a timeout
                self._socket.sendall(head[sent:])
                self._socket.sendall(memoryview(data)[max(0, sent - len(head)) :])
        except OSError as error:
            raise Hangup(f"sending: {error}") from error

    def hang_up(self) -> None:
        """End the connection, whoever waits on it. The file descriptor stays ours until `close`."""
        with suppress(OSError):  # the client was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the file descriptor back. Nobody may use the channel any more."""
        self._socket.close()

    def send_file(self, fd: int, position: int, length: int) -> int:
        """Send up to `length` bytes of a file without a copy and say how many it were.

        Raises OSError if the file cannot be read, FormatError if it ends at `position`.
        """
        try:
            sent = os.sendfile(self._socket.fileno(), fd, position, length)
        except ConnectionError as error:
            raise Hangup(f"sending: {error}") from error
        if not sent:
            raise FormatError(f"the file ends at byte {position}, {length} bytes early")
        return sent


class Payload:
    """The data of one reply. `left` counts what the header promised and is not sent yet."""

    def __init__(self, channel: Channel, length: int) -> None:
        self._channel = channel
        self.left = length

    def data(self, data: memoryview) -> None:
        """Bytes from memory."""
        if data:
            self._channel.send(b"", data)
            self.left -= len(data)

    def zeros(self, length: int) -> None:
        """Bytes that are not stored anywhere."""
        while length > 0:
            self.data(ZEROS[:length])
            length -= min(length, len(ZEROS))

    def file(self, fd: int, position: int, length: int) -> None:
        """Bytes of a file; where they end early, `left` still says how far the reply came."""
        end = position + length
        while position < end:
            sent = self._channel.send_file(fd, position, end - position)
            position += sent
            self.left -= sent
