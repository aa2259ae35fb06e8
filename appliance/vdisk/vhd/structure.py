"""A VHD's structure, read and held against the rules before anything believes it.

Every count and offset of a file is foreign until it was checked here: nothing is allocated, looped
over or read by a number that the file's own size does not bear out.
"""

from __future__ import annotations

import os
import sys
from array import array
from bisect import bisect_left
from itertools import pairwise
from typing import NamedTuple
from uuid import UUID

from appliance.errors import FormatError
from appliance.vdisk.base import Parent, read_exactly
from appliance.vdisk.vhd import layout
from appliance.vdisk.vhd.layout import FIXED, SECTOR, UNALLOCATED, Footer, Header

_TEXT = {b"W2ru": "utf-16-le", b"W2ku": "utf-16-le"}


class Structure(NamedTuple):
    """The checked head of a file: `end` is where block data must stop, `notes` what was odd."""

    footer: Footer
    header: Header | None
    parent: Parent | None
    end: int
    notes: tuple[str, ...]


def read_structure(fd: int) -> Structure:
    """Read and check footer, header and locators, not the BAT. Raises FormatError."""
    file_size = os.fstat(fd).st_size
    footer, end, notes = _read_footers(fd, file_size)
    if footer.type == FIXED:
        if end < footer.size:
            raise FormatError(f"a fixed VHD of {footer.size} bytes has only {end} bytes of data")
        return Structure(footer, None, None, end, notes)
    header = _read_header(fd, footer.data_offset, end)
    _check_table(footer, header, end)
    parent = _read_parent(fd, header, end) if footer.type == layout.DIFFERENCING else None
    return Structure(footer, header, parent, end, notes)


def _read_footers(fd: int, file_size: int) -> tuple[Footer, int, tuple[str, ...]]:
    """The footer to believe, where data ends, and what is odd.

    The last sector is the authority (so that a change of identity is one atomic write); the copy
    in the first one stands in when a crash left the end unwritten. Where both are sound and differ,
    the authority counts and the difference is noted.
    """
    if file_size < SECTOR:
        raise FormatError(f"a file of {file_size} bytes is no VHD")
    tail, why, end = None, "", file_size
    for length in (SECTOR, SECTOR - 1):  # Virtual PC before 2004 wrote 511 bytes
        try:
            tail = Footer.unpack(read_exactly(fd, length, file_size - length))
            end = file_size - length
            break
        except FormatError as error:
            why = why or error.message
    head = _read_head(fd)
    if tail is None:
        if head is None or head.type == FIXED:
            raise FormatError(why)
        return head, file_size, ("the footer at the end is missing; its copy is used",)
    if tail.type == FIXED or head == tail:
        return tail, end, ()
    return tail, end, ("the footer's copy differs" if head else "the footer's copy is damaged",)


def _read_head(fd: int) -> Footer | None:
    try:
        return Footer.unpack(read_exactly(fd, SECTOR, 0))
    except FormatError:
        return None


def _read_header(fd: int, offset: int, end: int) -> Header:
    if not SECTOR <= offset <= end - 1024:
        raise FormatError(f"the dynamic header at byte {offset} lies outside the file")
    return Header.unpack(read_exactly(fd, 1024, offset))


def blocks(size: int, block_size: int) -> int:
    """How many blocks a disk has; the last one may be partial."""
    return -(-size // block_size)


def _check_table(footer: Footer, header: Header, end: int) -> None:
    need = blocks(footer.size, header.block_size)
    if header.entries < need:
        raise FormatError(f"a BAT of {header.entries} entries is too short for {need} blocks")
    if need > layout.MAX_ENTRIES:
        raise FormatError(f"{need} blocks are more than the {layout.MAX_ENTRIES} allowed")
    _check_region("the BAT", footer, header.table_offset, header.entries * 4, end)


def _check_region(what: str, footer: Footer, offset: int, length: int, end: int) -> None:
    """A region must lie behind the first sector, before `end`, and off the dynamic header."""
    if offset < SECTOR or offset + length > end:
        raise FormatError(f"{what} at byte {offset} lies outside the file")
    if offset < footer.data_offset + 1024 and footer.data_offset < offset + length:
        raise FormatError(f"{what} at byte {offset} overlaps the dynamic header")


def _read_parent(fd: int, header: Header, end: int) -> Parent:
    if not header.parent_uuid.int:
        raise FormatError("a differencing VHD names no parent")
    hints = [_locator_text(fd, locator, end) for locator in header.locators]
    names = (header.parent_name, *(hint for hint in hints if hint))
    return Parent(header.parent_uuid, basename(header.parent_name), tuple(map(basename, names)))


def _locator_text(fd: int, locator: layout.Locator, end: int) -> str:
    encoding = _TEXT.get(locator.code)
    if encoding is None:
        return ""
    if locator.length > layout.MAX_LOCATOR:
        raise FormatError(f"a parent locator of {locator.length} bytes is too long")
    if locator.offset < SECTOR or locator.offset + locator.length > end:
        raise FormatError(f"a parent locator at byte {locator.offset} lies outside the file")
    return layout.text(read_exactly(fd, locator.length, locator.offset), encoding)


def basename(path: str) -> str:
    """The last part of a foreign path, or "" where it cannot name a file in a folder.

    A locator is a hint and may be hostile: it never leads out of the folder of its file.
    """
    name = path.replace("\\", "/").rpartition("/")[2]
    return "" if name in ("", ".", "..") or "\0" in name else name


def read_bat(fd: int, structure: Structure) -> array[int]:
    """The BAT's used part as native integers, 4 bytes a block, checked. Raises FormatError."""
    header, footer = structure.header, structure.footer
    assert header is not None
    need = blocks(footer.size, header.block_size)
    table = array("I", read_exactly(fd, need * 4, header.table_offset))
    if sys.byteorder == "little":
        table.byteswap()
    _check_bat(table, structure)
    return table


def _check_bat(table: array[int], structure: Structure) -> None:
    """Every allocated block lies within the file, clear of the metadata and of the others."""
    header = structure.header
    assert header is not None
    size = layout.bitmap_size(header.block_size) + header.block_size
    entries = _ascending(table)
    if entries and entries[-1] * SECTOR + size > structure.end:
        raise FormatError(f"a block at byte {entries[-1] * SECTOR} lies outside the file")
    if any((b - a) * SECTOR < size for a, b in pairwise(entries)):
        raise FormatError("two blocks share bytes of the file")
    for start, end in _metadata(structure.footer, header):
        nearest = bisect_left(entries, (start - size) // SECTOR + 1)
        if nearest < len(entries) and entries[nearest] * SECTOR < end:
            raise FormatError(f"a block at byte {entries[nearest] * SECTOR} overlaps metadata")


def _metadata(footer: Footer, header: Header) -> list[tuple[int, int]]:
    """The byte ranges that no block may touch."""
    return [
        (0, SECTOR),
        (footer.data_offset, footer.data_offset + 1024),
        (header.table_offset, header.table_offset + header.entries * 4),
        *((x.offset, x.offset + x.length) for x in header.locators if x.length),
    ]


def _ascending(table: array[int]) -> array[int]:
    """The allocated entries in the file's order; most files were written in it already."""
    entries = array("I", (entry for entry in table if entry != UNALLOCATED))
    if all(a < b for a, b in pairwise(entries)):
        return entries
    return array("I", sorted(entries))


def read_identity(fd: int) -> tuple[UUID, Parent | None, int]:
    """UUID, parent and size in bytes of the disk in a VHD file, without reading its BAT."""
    structure = read_structure(fd)
    return structure.footer.uuid, structure.parent, structure.footer.size
