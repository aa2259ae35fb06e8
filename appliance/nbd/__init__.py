"""Network block device: a `Disk` served on a unix socket, so that QEMU and every NBD tool can use it.

    protocol    the numbers and structures of the wire
    channel     a connection's socket: whole messages in and out
    handshake   what a client and we agree on
    connection  requests and replies
    server      the socket file, and a thread for each connection

Source: doc/proto.md of the NetworkBlockDevice project ("proto.md" in this package), fixed newstyle.
"""

from appliance.nbd.server import Server

__all__ = ["Server"]
