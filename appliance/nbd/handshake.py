"""The handshake: what a client and we agree on before it may ask for data (proto.md, "Handshake").

There is one export, with the empty name that stands for a server's default. Every step is bounded:
the whole handshake in time, one option in bytes, all of them in number.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from appliance.nbd.channel import Channel
from appliance.nbd.protocol import (
    ALLOCATION,
    ALLOCATION_ID,
    CLIENT_FLAGS,
    COUNT16,
    COUNT32,
    EXPORT,
    EXPORT_PADDING,
    GREETING,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAXIMUM_PAYLOAD,
    MINIMUM_BLOCK,
    NBDMAGIC,
    OPTION,
    PREFERRED_BLOCK,
    ExportFlag,
    HandshakeFlag,
    Hangup,
    Info,
    Option,
    OptionReply,
    option_reply,
)

TIMEOUT = 10.0  # seconds for the whole handshake
OPTIONS = 64  # in one handshake; QEMU sends 5
OPTION_BYTES = 64 << 10  # of one option; a name has 4096 at most
EXPORT_NAME = b""

_READ_ONLY = ExportFlag.HAS_FLAGS | ExportFlag.READ_ONLY | ExportFlag.MULTI_CONN
_WRITABLE = (
    ExportFlag.HAS_FLAGS
    | ExportFlag.FLUSH
    | ExportFlag.FUA
    | ExportFlag.TRIM
    | ExportFlag.WRITE_ZEROES
    | ExportFlag.MULTI_CONN
)


class Terms(NamedTuple):
    """What was agreed: structured replies, and (which needs them) block status."""

    structured: bool
    allocation: bool


class Fields:
    """Cursor over an option's data. Raises struct.error where the data end before a field does."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, layout: struct.Struct) -> int:
        """The next field, of `layout`."""
        (value,) = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return int(value)

    def text(self) -> bytes:
        """The next string: 32 bits of length, then its bytes."""
        length = self.number(COUNT32)
        if length > len(self._data) - self._at:
            raise struct.error("a string is longer than its option")
        self._at += length
        return self._data[self._at - length : self._at]

    def end(self) -> None:
        """There must be nothing more."""
        if self._at != len(self._data):
            raise struct.error("an option is longer than its fields")


class Handshake:
    """One client's handshake. `run` returns the terms or raises Hangup."""

    def __init__(self, channel: Channel, size: int, read_only: bool) -> None:
        self._channel = channel
        self._size = size
        self._read_only = read_only
        self._structured = False
        self._allocation = False
        self._padding = EXPORT_PADDING
        self._deadline = time.monotonic() + TIMEOUT
        # Each answers its option and returns whether the transmission phase begins.
        self._answers: dict[int, Callable[[int, Fields], bool]] = {
            Option.ABORT: self._abort,
            Option.LIST: self._list,
            Option.INFO: self._info,
            Option.GO: self._info,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._meta_context,
            Option.SET_META_CONTEXT: self._meta_context,
        }

    def run(self) -> Terms:
        """Greet, then answer options until one of them begins the transmission phase."""
        ours = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._channel.send(GREETING.pack(NBDMAGIC, IHAVEOPT, ours))
        theirs = Fields(self._receive(CLIENT_FLAGS.size)).number(CLIENT_FLAGS)
        if theirs & ~ours:
            raise Hangup(f"client flags {theirs:#x}")
        if theirs & HandshakeFlag.NO_ZEROES:
            self._padding = b""
        for _ in range(OPTIONS):
            if self._option():
                self._channel.patience(None)
                return Terms(self._structured, self._allocation)
        raise Hangup(f"more than {OPTIONS} options")

    def _receive(self, length: int) -> bytes:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Hangup(f"no end of the handshake after {TIMEOUT} s")
        self._channel.patience(left)
        data = bytearray(length)
        self._channel.receive(memoryview(data))
        return bytes(data)

    def _option(self) -> bool:
        magic, option, length = OPTION.unpack(self._receive(OPTION.size))
        if magic != IHAVEOPT or length > OPTION_BYTES:
            raise Hangup(f"option {option} of {length} bytes, magic {magic:#x}")
        data = self._receive(length) if length else b""
        if option == Option.EXPORT_NAME:
            return self._export_name(data)
        answer = self._answers.get(option)
        if answer is None:
            return self._reply(option, OptionReply.UNSUPPORTED)
        try:
            return answer(option, Fields(data))
        except struct.error:
            return self._reply(option, OptionReply.INVALID)

    def _reply(self, option: int, kind: OptionReply, data: bytes = b"") -> bool:
        self._channel.send(option_reply(option, kind, data))
        return False

    def _flags(self) -> int:
        flags = _READ_ONLY if self._read_only else _WRITABLE
        return flags | ExportFlag.DF if self._structured else flags

    def _export_name(self, name: bytes) -> bool:
        if name != EXPORT_NAME:  # this option has no error reply
            raise Hangup("no export of that name")
        self._channel.send(EXPORT.pack(self._size, self._flags()), self._padding)
        return True

    def _abort(self, option: int, fields: Fields) -> bool:
        self._reply(option, OptionReply.ACK)
        raise Hangup("the client gave up")

    def _list(self, option: int, fields: Fields) -> bool:
        fields.end()
        self._reply(option, OptionReply.SERVER, COUNT32.pack(len(EXPORT_NAME)) + EXPORT_NAME)
        return self._reply(option, OptionReply.ACK)

    def _info(self, option: int, fields: Fields) -> bool:
        """INFO and GO. What the client wants to know is skipped: it gets all that we have."""
        name = fields.text()
        for _ in range(fields.number(COUNT16)):
            fields.number(COUNT16)
        fields.end()
        if name != EXPORT_NAME:
            return self._reply(option, OptionReply.UNKNOWN)
        export = INFO_EXPORT.pack(Info.EXPORT, self._size, self._flags())
        sizes = (MINIMUM_BLOCK, PREFERRED_BLOCK, MAXIMUM_PAYLOAD)
        self._reply(option, OptionReply.INFO, export)
        self._reply(option, OptionReply.INFO, INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
        self._reply(option, OptionReply.ACK)
        return option == Option.GO

    def _structured_reply(self, option: int, fields: Fields) -> bool:
        fields.end()
        self._structured = True
        return self._reply(option, OptionReply.ACK)

    def _meta_context(self, option: int, fields: Fields) -> bool:
        """LIST: what there is, for queries that are a name or a namespace. SET: what was named."""
        setting = option == Option.SET_META_CONTEXT
        if setting:
            self._allocation = False  # even if the rest proves to be wrong
        name = fields.text()
        queries = [fields.text() for _ in range(fields.number(COUNT32))]
        fields.end()
        if not self._structured:
            return self._reply(option, OptionReply.INVALID)
        if name != EXPORT_NAME:
            return self._reply(option, OptionReply.UNKNOWN)
        if ALLOCATION in queries or (not setting and (b"base:" in queries or not queries)):
            number = ALLOCATION_ID if setting else 0
            self._reply(option, OptionReply.META_CONTEXT, COUNT32.pack(number) + ALLOCATION)
            self._allocation = self._allocation or setting
        return self._reply(option, OptionReply.ACK)
