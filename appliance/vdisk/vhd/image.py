"""Reading a VHD file: which sectors of its disk it holds, and where.

Memory is 4 bytes a block for the BAT and a bounded cache of sector bitmaps. A bitmap is kept as one
integer, most significant bit first as on disk, so that the length of a run is one `bit_length`.
"""

from __future__ import annotations

import os
import stat
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

from appliance.errors import FormatError
from appliance.vdisk.base import Parent, Run, VirtualDisk, read_exactly
from appliance.vdisk.vhd import layout
from appliance.vdisk.vhd.layout import DIFFERENCING, DYNAMIC, SECTOR, UNALLOCATED, Footer, Header
from appliance.vdisk.vhd.structure import Structure, read_bat, read_structure

BITMAPS_KEPT = 4096  # bitmaps in the cache; 2 MiB at a block size of 2 MiB


def open_regular(name: str | Path, flags: int, dir_fd: int | None = None) -> int:
    """A descriptor of a regular file; a link, device or pipe is refused with FormatError."""
    try:
        fd = os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dir_fd)
    except FileNotFoundError as error:
        raise FormatError(f"{name}: the file is missing") from error
    except OSError as error:
        raise FormatError(f"{name}: cannot be opened: {error.strerror}") from error
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise FormatError(f"{name}: is not a regular file")


class VhdImage(VirtualDisk):
    """An open VHD file: fixed, dynamic or differencing. Reading is safe from several threads."""

    def __init__(self, fd: int, name: str, structure: Structure) -> None:
        self.fd = fd
        self.name = name
        self.footer: Footer = structure.footer
        self.size = structure.footer.size
        self.uuid: UUID = structure.footer.uuid
        self.parent: Parent | None = structure.parent
        self.notes = structure.notes
        self._lock = threading.RLock()
        self._bitmaps: dict[int, int] = {}
        self.bat = array("I")
        if structure.header is None:
            self.block_size = self.size
            return
        self.header: Header = structure.header
        self.block_size = structure.header.block_size
        self.block_sectors = self.block_size // SECTOR
        self.bitmap_bytes = layout.bitmap_size(self.block_size)
        self._full = (1 << self.block_sectors) - 1
        self.bat = read_bat(fd, structure)

    @classmethod
    def open(cls, path: Path, writable: bool = False) -> VhdImage:
        """Open a file. Raises FormatError, whose message begins with the file's name."""
        fd = open_regular(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            return cls(fd, path.name, read_structure(fd))
        except FormatError as error:
            os.close(fd)
            raise type(error)(f"{path.name}: {error.message}", error.hint) from error
        except BaseException:
            os.close(fd)
            raise

    @property
    def type(self) -> int:
        """FIXED, DYNAMIC or DIFFERENCING."""
        return self.footer.type

    def close(self) -> None:
        """Close the file; twice does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def allocated(self) -> Iterator[int]:
        """The numbers of the blocks that have a place in this file."""
        return (block for block, entry in enumerate(self.bat) if entry != UNALLOCATED)

    def data_position(self, block: int) -> int:
        """Where the data of an allocated block begins in the file, in bytes."""
        return self.bat[block] * SECTOR + self.bitmap_bytes

    def bitmap(self, block: int) -> int:
        """An allocated block's sector bitmap; its most significant bit is the first sector."""
        bits = self._bitmaps.get(block)
        if bits is None:
            with self._lock:  # or a writer's new bits could be overtaken by the old ones read here
                bits = self._bitmaps.get(block)
                if bits is None:
                    bits = self._keep(block, self._read_bitmap(block))
        return bits

    def _read_bitmap(self, block: int) -> int:
        raw = read_exactly(self.fd, self.block_sectors + 7 >> 3, self.bat[block] * SECTOR)
        return int.from_bytes(raw, "big") >> (len(raw) * 8 - self.block_sectors)

    def _keep(self, block: int, bits: int) -> int:
        if len(self._bitmaps) >= BITMAPS_KEPT:
            self._bitmaps.clear()
        self._bitmaps[block] = bits
        return bits

    def is_whole(self, block: int) -> bool:
        """Whether this file holds every sector of an allocated block."""
        return self.bitmap(block) == self._full

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        if self.footer.type == layout.FIXED:
            yield Run(offset, length, offset)
            return
        end = offset + length
        while offset < end:
            block, within = divmod(offset, self.block_size)
            take = min(end - offset, self.block_size - within)
            if self.bat[block] == UNALLOCATED:
                yield Run(offset, take, None)
            else:
                yield from self._block_runs(block, within, take)
            offset += take

    def _block_runs(self, block: int, within: int, length: int) -> Iterator[Run]:
        """Runs of one allocated block, by its bitmap, cut to [within, within+length)."""
        bits, base = self.bitmap(block), block * self.block_size
        position = self.data_position(block)
        end = within + length
        while within < end:
            present, sectors = self._leading(bits, within // SECTOR)
            stop = min(end, (within // SECTOR + sectors) * SECTOR)
            if not present and self.footer.type == DYNAMIC:
                self._never_written(position + within, stop - within)
            yield Run(base + within, stop - within, position + within if present else None)
            within = stop

    def _leading(self, bits: int, sector: int) -> tuple[bool, int]:
        """Whether `sector` is held, and for how many sectors from there that stays so."""
        left = self.block_sectors - sector
        rest = bits & ((1 << left) - 1)
        if rest >> (left - 1):
            return True, left - (rest ^ ((1 << left) - 1)).bit_length()
        return False, left - rest.bit_length()

    def _never_written(self, position: int, length: int) -> None:
        """A dynamic image's unset bits promise zeros; readers disagree where there are none."""
        if any(read_exactly(self.fd, length, position)):
            raise FormatError(
                f"{self.name}: sectors marked as never written hold data, at byte {position}",
                "readers disagree about such a file: convert it with the program that wrote it",
            )

    @property
    def is_differencing(self) -> bool:
        """Whether what this file does not hold is the parent's."""
        return self.footer.type == DIFFERENCING
