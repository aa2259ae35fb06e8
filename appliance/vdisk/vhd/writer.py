"""Writing VHD files: new ones, blocks added to old ones, and sectors written by a running machine.

Two ways to add data, for two kinds of crash:

- `allocate`, then `commit`: data first, sync, then the BAT and bitmaps that make it visible, sync.
  For backups and merges, which are complete or did not happen.
- `write`, `zero`, `flush`: every write is visible at once, so that a killed server loses nothing
  that it acknowledged; `flush` makes it durable, as a disk's own cache does. Space is reserved and
  synced ahead, so no crash leaves an entry of the BAT that points behind the end of the file.

The file's last sector is a footer of ours in every state that a crash can leave after `reserve`;
in between, it is zeros, never a block's data (a guest could make that look like a footer).
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import NamedTuple
from uuid import UUID, uuid4

from appliance.block import zero_range
from appliance.errors import FormatError, Refused
from appliance.vdisk.base import write_exactly
from appliance.vdisk.vhd import layout
from appliance.vdisk.vhd.image import VhdImage
from appliance.vdisk.vhd.layout import (
    ALIGNMENT,
    BAT_OFFSET,
    DIFFERENCING,
    DYNAMIC,
    HEADER_BANKS,
    LOCATOR_BANKS,
    LOCATOR_SPACE,
    SECTOR,
    UNALLOCATED,
    Footer,
    Header,
    Locator,
)
from appliance.vdisk.vhd.structure import Structure, blocks, read_structure

BLOCK_SIZE = 2 << 20  # bytes; what Windows, QEMU and VirtualBox write
RESERVE = 32  # blocks reserved at once for a running machine's writes


class ParentLink(NamedTuple):
    """Whom a differencing file is written for: `name` is the parent's file name in the folder."""

    uuid: UUID
    timestamp: int
    name: str


def check_size(size: int) -> None:
    """Refuse a disk that no VHD can hold."""
    if size > layout.MAX_SIZE:
        raise Refused(
            f"the disk has {size} bytes; a VHD holds at most {layout.MAX_SIZE >> 30} GiB",
            "back up its partitions one by one, each as a machine of its own",
        )
    if size < SECTOR or size % SECTOR:
        raise Refused(f"a disk of {size} bytes is not a whole number of 512-byte sectors")


def create(
    path: Path,
    size: int,
    parent: ParentLink | None = None,
    *,
    block_size: int = BLOCK_SIZE,
    uuid: UUID | None = None,
    stamp: int | None = None,
) -> WritableVhd:
    """Write a new, empty, valid VHD of `size` bytes and open it; the caller syncs it by `commit`.

    With a parent it is differencing, else dynamic. `stamp` is seconds since 2000. Raises
    FileExistsError, OSError, and Refused for a size that a VHD cannot hold.
    """
    check_size(size)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        footer = Footer(
            uuid or uuid4(), size, DIFFERENCING if parent else DYNAMIC, HEADER_BANKS[0],
            layout.timestamp() if stamp is None else stamp, size,
        )
        _write_empty(fd, footer, _header(size, block_size, parent, 0), parent)
        return WritableVhd(fd, path.name, read_structure(fd))
    except BaseException:
        os.close(fd)
        raise


def _write_empty(fd: int, footer: Footer, header: Header, parent: ParentLink | None) -> None:
    write_exactly(fd, footer.pack(), 0)
    write_exactly(fd, header.pack(), footer.data_offset)
    if parent:
        _write_locators(fd, parent, 0)
    bat_end = layout.align(BAT_OFFSET + header.entries * 4, SECTOR)
    write_exactly(fd, b"\xff" * (bat_end - BAT_OFFSET), BAT_OFFSET)
    write_exactly(fd, footer.pack(), bat_end)


def _header(size: int, block_size: int, parent: ParentLink | None, bank: int) -> Header:
    entries = blocks(size, block_size)
    if parent is None:
        return Header(BAT_OFFSET, entries, block_size)
    locators = tuple(
        Locator(code, LOCATOR_SPACE, len(text), LOCATOR_BANKS[bank] + i * LOCATOR_SPACE)
        for i, (code, text) in enumerate(_locator_texts(parent))
    )
    return Header(BAT_OFFSET, entries, block_size, parent.uuid, parent.timestamp, parent.name,
                  locators)


def _locator_texts(parent: ParentLink) -> list[tuple[bytes, bytes]]:
    """Relative and absolute Windows paths; as measured, `.\\name` is what readers resolve."""
    if len(parent.name.encode("utf-16-le")) > layout.MAX_NAME * 2:
        raise Refused(f"the file name {parent.name} is too long for a parent locator")
    return [(b"W2ru", f".\\{parent.name}".encode("utf-16-le")),
            (b"W2ku", parent.name.encode("utf-16-le"))]


def _write_locators(fd: int, parent: ParentLink, bank: int) -> None:
    for i, (_, text) in enumerate(_locator_texts(parent)):
        write_exactly(fd, text.ljust(LOCATOR_SPACE, b"\0"), LOCATOR_BANKS[bank] + i * LOCATOR_SPACE)


class WritableVhd(VhdImage):
    """An open VHD that can grow. Only files of our own layout are ever written."""

    def __init__(self, fd: int, name: str, structure: Structure) -> None:
        super().__init__(fd, name, structure)
        header = structure.header
        if (header is None or header.table_offset != BAT_OFFSET
                or self.footer.data_offset not in HEADER_BANKS):
            raise FormatError(f"{name}: was not written by Coldspare, and is only ever read")
        self._new: list[int] = []  # blocks whose BAT entry waits for `commit`
        self._bits: dict[int, int] = {}  # bitmaps that wait for `commit`
        self._stride = layout.align(self.block_size + SECTOR + self.bitmap_bytes, ALIGNMENT)
        self._next = self._first_free()
        self._reserved = 0  # end of the synced, zeroed space for `write`

    @classmethod
    def reopen(cls, path: Path) -> WritableVhd:
        """Open an existing file for writing, and cut off what a crash left behind its last block.

        Raises FormatError, OSError.
        """
        image = super().open(path, writable=True)
        assert isinstance(image, WritableVhd)
        image.seal()
        return image

    def _first_free(self) -> int:
        """Where the next block's data goes: aligned, its bitmap and an old footer before it."""
        last = max((entry for entry in self.bat if entry != UNALLOCATED), default=None)
        if last is not None:
            return last * SECTOR + self.bitmap_bytes + self._stride
        used = layout.align(BAT_OFFSET + len(self.bat) * 4, SECTOR) + SECTOR
        return layout.align(used + self.bitmap_bytes, ALIGNMENT)

    @property
    def _end(self) -> int:
        """Where the file's data ends and its footer belongs."""
        empty = layout.align(BAT_OFFSET + len(self.bat) * 4, SECTOR)
        first = layout.align(empty + SECTOR + self.bitmap_bytes, ALIGNMENT)
        return empty if self._next == first else self._next - self._stride + self.block_size

    def seal(self) -> None:
        """Put the footer right behind the last block, cut the rest off, and sync."""
        end = self._end
        write_exactly(self.fd, self.footer.pack(), end)
        os.fsync(self.fd)
        os.ftruncate(self.fd, end + SECTOR)
        os.fsync(self.fd)
        self._reserved = 0

    def reserve(self, count: int) -> None:
        """Make room for `count` more blocks, as zeros with the footer behind them, durably."""
        end = self._next + (count - 1) * self._stride + self.block_size
        os.ftruncate(self.fd, end + SECTOR)
        write_exactly(self.fd, self.footer.pack(), end)
        os.fsync(self.fd)
        self._reserved = end

    # Complete or not at all: backups and merges

    def allocate(self, block: int, bits: int) -> int:
        """Give `block` a place with the sector bitmap `bits`; returns where its data goes.

        The caller writes the data there; what it leaves out reads as zeros. Nothing refers to the
        place before `commit`.
        """
        position = self._place(block)
        self._write_bitmap(block, bits)
        self._new.append(block)
        return position

    def allocate_whole(self, block: int) -> int:
        """`allocate` with every sector marked as held."""
        return self.allocate(block, self._full)

    def _place(self, block: int) -> int:
        position = self._next
        if position - self.bitmap_bytes >= UNALLOCATED * SECTOR:
            raise FormatError(f"{self.name}: a VHD file cannot grow beyond 2 TiB")
        self.bat[block] = (position - self.bitmap_bytes) // SECTOR
        self._next = position + self._stride
        return position

    def add_bits(self, block: int, bits: int) -> None:
        """Mark more sectors of an allocated block as held, from `commit` on."""
        self._bits[block] = self.bitmap(block) | bits

    def commit(self) -> None:
        """Sync the data, then make it visible and sync that. Raises OSError; then it is undone."""
        self._finish_end()
        os.fsync(self.fd)
        if not self._new and not self._bits:
            return
        if self._new:
            self._write_bat(min(self._new), max(self._new))
        for block, bits in self._bits.items():
            self._write_bitmap(block, bits)
        self._new.clear()
        self._bits.clear()
        os.fsync(self.fd)

    def _finish_end(self) -> None:
        end = self._end
        if os.fstat(self.fd).st_size <= end + SECTOR:  # more than that is reserved, with a footer
            write_exactly(self.fd, self.footer.pack(), end)

    def _write_bat(self, first: int, last: int) -> None:
        """Write the entries of blocks first..last, in whole sectors."""
        first = first * 4 // SECTOR * (SECTOR // 4)
        table = self.bat[first : layout.align((last + 1) * 4, SECTOR) // 4]
        if sys.byteorder == "little":
            table.byteswap()
        raw = table.tobytes()
        write_exactly(self.fd, raw.ljust(layout.align(len(raw), SECTOR), b"\xff"),
                      BAT_OFFSET + first * 4)

    def _write_bitmap(self, block: int, bits: int) -> None:
        length = -(-self.block_sectors // 8)
        raw = (bits << (length * 8 - self.block_sectors)).to_bytes(length, "big")
        write_exactly(self.fd, raw.ljust(self.bitmap_bytes, b"\0"), self.bat[block] * SECTOR)
        with self._lock:
            self._keep(block, bits)

    # As a disk: the writes of a running machine

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Store `data`, a whole number of sectors, at `offset`. Raises OSError."""
        view = memoryview(data)
        while view:
            block, within = divmod(offset, self.block_size)
            take = min(len(view), self.block_size - within)
            position = self._position_for(block)
            write_exactly(self.fd, view[:take], position + within)
            self._mark(block, within, take)
            offset, view = offset + take, view[take:]

    def zero(self, offset: int, length: int) -> None:
        """Make a range of whole sectors read as zeros, whatever the parent holds."""
        while length:
            block, within = divmod(offset, self.block_size)
            take = min(length, self.block_size - within)
            zero_range(self.fd, self._position_for(block) + within, take)
            self._mark(block, within, take)
            offset, length = offset + take, length - take

    def flush(self) -> None:
        """Make all writes durable. An error is final: what was lost cannot be known."""
        os.fdatasync(self.fd)

    def _position_for(self, block: int) -> int:
        with self._lock:
            if self.bat[block] == UNALLOCATED:
                self._place_at_once(block)
            return self.data_position(block)

    def _place_at_once(self, block: int) -> None:
        if self._next + self.block_size > self._reserved:
            self.reserve(RESERVE)
        self._place(block)
        self._keep(block, 0)  # reserved space is zeros, so this is what its bitmap says
        write_exactly(self.fd, struct.pack(">I", self.bat[block]), BAT_OFFSET + block * 4)

    def _mark(self, block: int, within: int, length: int) -> None:
        sectors, first = length // SECTOR, within // SECTOR
        mask = ((1 << sectors) - 1) << (self.block_sectors - first - sectors)
        with self._lock:
            bits = self.bitmap(block)
            if bits & mask != mask:
                self._write_bitmap(block, bits | mask)

    # Who it is, and whose child

    def take_identity(self, uuid: UUID, stamp: int) -> None:
        """Become another: the copy first, then, in one atomic sector, the footer that counts."""
        self.footer = self.footer.replace(uuid=uuid, timestamp=stamp)
        self.uuid = uuid
        self._write_footers()

    def reparent(self, parent: ParentLink) -> None:
        """Become a child of another parent, in one atomic step. Raises OSError."""
        bank = 1 - HEADER_BANKS.index(self.footer.data_offset)
        self.header = _header(self.size, self.block_size, parent, bank)
        _write_locators(self.fd, parent, bank)
        write_exactly(self.fd, self.header.pack(), HEADER_BANKS[bank])
        os.fsync(self.fd)
        self.footer = self.footer.replace(data_offset=HEADER_BANKS[bank], type=DIFFERENCING)
        self._write_footers()

    def _write_footers(self) -> None:
        """The copy, sync, the footer, sync: the last sector decides, and is never torn."""
        raw = self.footer.pack()
        for position in (0, os.fstat(self.fd).st_size - SECTOR):
            write_exactly(self.fd, raw, position)
            os.fsync(self.fd)
