"""The structures of a VHD file, byte for byte.

Source: Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0 (2006). Everything
is big-endian. Where files in the wild differ from the text, the place says so.

A file that Coldspare writes (offsets in bytes):

    0       footer, a copy (the primary one is the file's last sector)
    512     dynamic header, bank 0        2048    dynamic header, bank 1
    4096    parent locators of bank 0     8192    parent locators of bank 1
    12288   BAT, padded with 0xFF to a sector
    ...     slots: bitmap in the sector before a 4 KiB boundary, then the block's data
    end     footer

Two banks make a change of parent one atomic write: the new header goes into the bank that is not
in use, and the footer's `data_offset`, in one sector, switches over.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, replace
from typing import NamedTuple
from uuid import UUID

from appliance.errors import FormatError

SECTOR = 512
EPOCH = 946684800  # 2000-01-01T00:00:00Z in Unix seconds; VHD timestamps count from here
NO_OFFSET = 0xFFFFFFFFFFFFFFFF
UNALLOCATED = 0xFFFFFFFF  # a BAT entry that points nowhere
MAX_SIZE = 2040 << 30  # bytes; VHD_MAX_SECTORS of QEMU's vpc driver, and Windows' limit
MAX_ENTRIES = 4 << 20  # more blocks than this in a BAT is hostile: 2040 GiB in 2 MiB blocks is 1 Mi
MIN_BLOCK, MAX_BLOCK = 4 << 10, 256 << 20
MAX_LOCATOR = 4096  # bytes of a parent locator's text
MAX_NAME = 255  # UTF-16 units of a parent's name that we write

HEADER_BANKS = (512, 2048)
LOCATOR_BANKS = (4096, 8192)
LOCATOR_SPACE = 2048  # bytes kept for each locator's text
BAT_OFFSET = 12288
ALIGNMENT = 4096  # of a block's data, so that file systems can share it between files

FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
TYPE_NAMES = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}

_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427s")
_HEADER = struct.Struct(">8sQQIIII16sII512s192s256s")
_LOCATOR = struct.Struct(">4sIIIQ")
assert _FOOTER.size == SECTOR and _HEADER.size == 1024 and _LOCATOR.size == 24


class Geometry(NamedTuple):
    """Cylinders, heads and sectors per track, as an ATA disk of that size would show them."""

    cylinders: int
    heads: int
    sectors: int


NO_GEOMETRY = Geometry(0, 0, 0)
NO_UUID = UUID(int=0)


def geometry(size: int) -> Geometry:
    """CHS for `size` bytes: the specification's appendix "CHS Calculation"."""
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        return Geometry(total // 255 // 16, 16, 255)
    sectors, per_head = 17, total // 17
    heads = max((per_head + 1023) // 1024, 4)
    if per_head >= heads * 1024 or heads > 16:
        sectors, heads, per_head = 31, 16, total // 31
    if per_head >= heads * 1024:
        sectors, heads, per_head = 63, 16, total // 63
    return Geometry(per_head // heads, heads, sectors)


def checksum(data: bytes) -> int:
    """One's complement of the sum of the bytes; the checksum's own field counts as zero."""
    return ~sum(data) & 0xFFFFFFFF


def timestamp(unix: float | None = None) -> int:
    """Seconds since 2000 of a Unix time (default: now), as a VHD has it."""
    return max(0, int(time.time() if unix is None else unix) - EPOCH)


@dataclass(frozen=True)
class Footer:
    """The footer: which disk this is. Sizes are bytes, the timestamp seconds since 2000."""

    uuid: UUID
    size: int
    type: int
    data_offset: int = NO_OFFSET
    timestamp: int = 0
    original_size: int = 0
    creator: bytes = b"win "  # any other name makes QEMU cut the disk to its CHS size
    creator_version: int = 0x000A0000
    creator_os: bytes = b"Wi2k"
    geometry: Geometry = NO_GEOMETRY

    def pack(self) -> bytes:
        """The footer's 512 bytes with their checksum."""
        raw = self._pack(0)
        return self._pack(checksum(raw))

    def _pack(self, check: int) -> bytes:
        return _FOOTER.pack(
            b"conectix", 2, 0x00010000, self.data_offset, self.timestamp, self.creator,
            self.creator_version, self.creator_os, self.original_size or self.size, self.size,
            *(self.geometry if any(self.geometry) else geometry(self.size)),
            self.type, check, self.uuid.bytes, 0, bytes(427),
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Footer:
        """Read a footer of 512 bytes, or of 511 as Virtual PC before 2004 wrote it.

        Raises FormatError where the cookie, the checksum, the version or the type is wrong.
        """
        raw = raw.ljust(SECTOR, b"\0")
        (cookie, _, version, data_offset, stamp, creator, creator_version, creator_os, original,
         size, cylinders, heads, sectors, kind, check, uuid, _, _) = _FOOTER.unpack(raw)
        if cookie != b"conectix":
            raise FormatError("no VHD footer: the cookie is missing")
        if checksum(raw[:64] + bytes(4) + raw[68:]) != check:
            raise FormatError("the VHD footer's checksum is wrong")
        if version >> 16 != 1:
            raise FormatError(f"VHD version {version >> 16} is unknown")
        if kind not in TYPE_NAMES:
            raise FormatError(f"VHD type {kind} is unknown")
        if not 0 < size <= MAX_SIZE or size % SECTOR:
            raise FormatError(f"a VHD cannot hold a disk of {size} bytes")
        return cls(UUID(bytes=uuid), size, kind, data_offset, stamp, original, creator,
                   creator_version, creator_os, Geometry(cylinders, heads, sectors))

    def replace(self, **changes: object) -> Footer:
        """A footer with other values for some fields."""
        return replace(self, **changes)  # type: ignore[arg-type]


class Locator(NamedTuple):
    """Where a parent locator's text is: `code` says in which form."""

    code: bytes
    space: int
    length: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The dynamic header: where the BAT is, how large a block is, and who the parent is."""

    table_offset: int
    entries: int
    block_size: int
    parent_uuid: UUID = NO_UUID
    parent_timestamp: int = 0
    parent_name: str = ""
    locators: tuple[Locator, ...] = ()

    def pack(self) -> bytes:
        """The header's 1024 bytes with their checksum."""
        raw = self._pack(0)
        return self._pack(checksum(raw))

    def _pack(self, check: int) -> bytes:
        locators = b"".join(_LOCATOR.pack(x.code, x.space, x.length, 0, x.offset)
                            for x in self.locators)
        name = self.parent_name.encode("utf-16-be", "surrogatepass")
        return _HEADER.pack(
            b"cxsparse", NO_OFFSET, self.table_offset, 0x00010000, self.entries, self.block_size,
            check, self.parent_uuid.bytes, self.parent_timestamp, 0, name, locators, b"",
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Header:
        """Read a dynamic header. Raises FormatError on a wrong cookie, checksum or block size."""
        (cookie, _, table, version, entries, block_size, check, parent, stamp, _, name,
         locators, _) = _HEADER.unpack(raw)
        if cookie != b"cxsparse":
            raise FormatError("no dynamic VHD header: the cookie is missing")
        if checksum(raw[:36] + bytes(4) + raw[40:]) != check:
            raise FormatError("the dynamic VHD header's checksum is wrong")
        if version >> 16 != 1:
            raise FormatError(f"dynamic VHD header version {version >> 16} is unknown")
        if not MIN_BLOCK <= block_size <= MAX_BLOCK or block_size & (block_size - 1):
            raise FormatError(f"a VHD block size of {block_size} bytes is not allowed")
        return cls(table, entries, block_size, UUID(bytes=parent), stamp,
                   text(name, "utf-16-be"), tuple(_locators(locators)))


def _locators(raw: bytes) -> list[Locator]:
    found = []
    for code, space, length, _, offset in _LOCATOR.iter_unpack(raw):
        if code.strip(b"\0"):
            found.append(Locator(code, space, length, offset))
    return found


def text(raw: bytes, encoding: str) -> str:
    """Foreign UTF-16 up to its NUL. Lone surrogates are kept, so that nothing is refused here."""
    raw = raw[: len(raw) // 2 * 2]
    return raw.decode(encoding, "surrogatepass").partition("\0")[0]


def bitmap_size(block_size: int) -> int:
    """Bytes of a block's sector bitmap: a bit for each sector, padded to whole sectors."""
    return -(-block_size // SECTOR // 8 // SECTOR) * SECTOR or SECTOR


def align(position: int, unit: int) -> int:
    """`position` rounded up to a multiple of `unit`."""
    return -(-position // unit) * unit
