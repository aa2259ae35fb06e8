"""The NBD protocol's numbers and structures (proto.md). Everything on the wire is big endian."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

from appliance.vdisk.base import SECTOR

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

MINIMUM_BLOCK = SECTOR  # bytes; a Disk writes whole sectors
PREFERRED_BLOCK = 64 << 10  # bytes; from here on a read goes by sendfile
MAXIMUM_PAYLOAD = 32 << 20  # bytes; what every client assumes if it does not ask
ALLOCATION = b"base:allocation"
ALLOCATION_ID = 1  # our number for the context, in block status replies


class Hangup(Exception):
    """The connection has to end: the client left, broke the protocol, or the stream is out of step."""


class HandshakeFlag(IntFlag):
    """Server's and client's flags, which have the same bits."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What a client asks for in the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReply(IntEnum):
    """Kinds of answer to an option; an error has bit 31 set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    UNSUPPORTED = 2**31 + 1
    INVALID = 2**31 + 3
    UNKNOWN = 2**31 + 6


class Info(IntEnum):
    """Kinds of information about an export."""

    EXPORT = 0
    BLOCK_SIZE = 3


class ExportFlag(IntFlag):
    """Transmission flags: what an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    FLUSH = 4
    FUA = 8
    TRIM = 32
    WRITE_ZEROES = 64
    DF = 128
    MULTI_CONN = 256


class Command(IntEnum):
    """Request types."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


# Plain numbers where every request passes: an IntFlag costs a microsecond for each operation.
FLAG_FUA = 1  # force unit access: durable before the reply
FLAG_NO_HOLE = 2
FLAG_DF = 4  # do not fragment
FLAG_REQ_ONE = 8  # one block status descriptor

CHUNK_DONE = 1  # flag: the last chunk of a reply
CHUNK_NONE = 0
CHUNK_OFFSET_DATA = 1
CHUNK_OFFSET_HOLE = 2
CHUNK_BLOCK_STATUS = 5
CHUNK_ERROR = 2**15 + 1

STATE_DATA = 0
STATE_HOLE_ZERO = 1 | 2  # NBD_STATE_HOLE | NBD_STATE_ZERO


class Error(IntEnum):
    """The protocol's own error numbers; they look like Linux' on most machines, not on all."""

    EPERM = 1
    EIO = 5
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75


class Request(NamedTuple):
    """What a client asks for in the transmission phase; `offset` and `length` are bytes."""

    magic: int
    flags: int
    command: int
    cookie: int  # the client's number for the request, returned with every reply
    offset: int
    length: int


GREETING = Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
CLIENT_FLAGS = Struct(">I")
OPTION = Struct(">QII")  # IHAVEOPT, option, length of its data
OPTION_REPLY = Struct(">QIII")  # magic, option, kind, length of its data
EXPORT = Struct(">QH")  # size, transmission flags
EXPORT_PADDING = bytes(124)  # after an EXPORT_NAME's reply, unless NO_ZEROES was agreed
INFO_EXPORT = Struct(">HQH")  # kind, size, transmission flags
INFO_BLOCK_SIZE = Struct(">HIII")  # kind, minimum, preferred, maximum payload
COUNT16 = Struct(">H")
COUNT32 = Struct(">I")
REQUEST = Struct(">IHHQQI")  # the fields of Request
SIMPLE_REPLY = Struct(">IIQ")  # magic, error, cookie
CHUNK = Struct(">IHHQI")  # magic, flags, kind, cookie, length of its payload
DATA_CHUNK = Struct(">IHHQIQ")  # CHUNK, offset
HOLE_CHUNK = Struct(">IHHQIQI")  # CHUNK, offset, length of the hole
ERROR_CHUNK = Struct(">IHHQIIH")  # CHUNK, error, length of a message
STATUS_CHUNK = Struct(">IHHQII")  # CHUNK, context
DESCRIPTOR = Struct(">II")  # length, state


def option_reply(option: int, kind: OptionReply, data: bytes = b"") -> bytes:
    """An answer to `option`."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """The outcome of a request, or (error 0) the head of a read's data."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def data_chunk(cookie: int, offset: int, length: int, flags: int) -> bytes:
    """The head of `length` bytes that the client finds at `offset`."""
    size = length + DATA_CHUNK.size - CHUNK.size
    return DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, CHUNK_OFFSET_DATA, cookie, size, offset)


def hole_chunk(cookie: int, offset: int, length: int) -> bytes:
    """The whole answer to a read of zeros."""
    size = HOLE_CHUNK.size - CHUNK.size
    return HOLE_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, CHUNK_DONE, CHUNK_OFFSET_HOLE, cookie, size, offset, length
    )


def done_chunk(cookie: int) -> bytes:
    """The end of a reply that went well."""
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, CHUNK_NONE, cookie, 0)


def error_chunk(cookie: int, error: int) -> bytes:
    """The end of a reply that went wrong."""
    size = ERROR_CHUNK.size - CHUNK.size
    return ERROR_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, CHUNK_DONE, CHUNK_ERROR, cookie, size, error, 0
    )


def status_chunk(cookie: int, descriptors: Iterable[tuple[int, int]]) -> bytes:
    """The answer to a block status request: (length, state) pairs from the request's offset on."""
    body = b"".join(DESCRIPTOR.pack(length, state) for length, state in descriptors)
    size = STATUS_CHUNK.size - CHUNK.size + len(body)
    return STATUS_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, CHUNK_DONE, CHUNK_BLOCK_STATUS, cookie, size, ALLOCATION_ID
    ) + body
