"""What every virtual disk can do, whatever its format.

`Disk` is what is served, restored and compared: a flat run of bytes that knows where each of them
is stored. `VirtualDisk` is one *file* of a chain: it knows which bytes it holds itself and who its
parent is. Offsets and lengths are bytes; a virtual disk's size is a multiple of SECTOR.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple
from uuid import UUID

from appliance.errors import FormatError

SECTOR = 512  # bytes; the unit of a VHD's sector bitmap


class Extent(NamedTuple):
    """Where a stretch of a disk is stored: `position` in the open file `fd`; no file means zeros."""

    offset: int
    length: int
    fd: int | None
    position: int = 0


class Run(NamedTuple):
    """A stretch of a disk in one file: at byte `position`, or (None) not in this file."""

    offset: int
    length: int
    position: int | None


class Parent(NamedTuple):
    """What a differencing file says of its parent. Only `uuid` identifies; the names are hints."""

    uuid: UUID
    name: str
    hints: tuple[str, ...] = ()


class Disk(ABC):
    """A flat disk of `size` bytes. Safe for several threads that read and write at once."""

    size: int
    read_only: bool = True

    @abstractmethod
    def map(self, offset: int, length: int) -> Iterator[Extent]:
        """Extents that cover [offset, offset+length) in order, none of them empty.

        An extent stays valid while the disk is open: bytes that a disk stores never move.
        Raises FormatError when a file proves to be damaged.
        """

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at [offset, offset+length), which must lie on the disk."""
        parts = [
            bytes(extent.length) if extent.fd is None
            else read_exactly(extent.fd, extent.length, extent.position)
            for extent in self.map(offset, length)
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Store `data` at `offset`; both are multiples of SECTOR."""
        raise PermissionError("the disk is read-only")

    def zero(self, offset: int, length: int) -> None:
        """Make [offset, offset+length) read as zeros; both are multiples of SECTOR."""
        raise PermissionError("the disk is read-only")

    def flush(self) -> None:
        """Return when everything written before is durable."""

    def close(self) -> None:
        """Give the files back."""


class VirtualDisk(ABC):
    """One virtual-disk file: it holds some runs of the disk and may name a parent for the rest."""

    size: int
    block_size: int
    uuid: UUID
    parent: Parent | None
    fd: int

    @abstractmethod
    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """Runs that cover [offset, offset+length) in order, saying which of it this file holds."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


def read_exactly(fd: int, length: int, position: int) -> bytes:
    """`length` bytes of a file from `position`. Raises FormatError where the file ends before."""
    data = os.pread(fd, length, position)
    if len(data) == length:
        return data
    parts = [data]
    done = len(data)
    while done < length:  # pread stops at 2 GiB, at the end and at a signal
        data = os.pread(fd, length - done, position + done)
        if not data:
            raise FormatError(f"the file ends at byte {position + done}, {length - done} bytes early")
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def write_exactly(fd: int, data: bytes | memoryview, position: int) -> None:
    """Write all of `data` at `position`, however many calls it takes."""
    done = os.pwrite(fd, data, position)
    view = memoryview(data)
    while done < len(view):
        done += os.pwrite(fd, view[done:], position + done)
