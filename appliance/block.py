"""Moving and comparing pieces of disks: holes, copies, zero and change detection.

All offsets and lengths are bytes. Nothing here knows a format or a policy.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

KEEP_SIZE, PUNCH_HOLE = 1, 2  # fallocate(2), linux/falloc.h
PIECE = 1 << 20  # bytes moved at once where the kernel does not copy for us
GRAIN = 4096  # bytes; the unit in which changes are found

_ZEROS = bytes(PIECE)
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.ENODEV}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which the os module has only without modes. Raises OSError."""
    while _libc.fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make a range of a file read as zeros: a hole where the file system can, zeros elsewhere."""
    if offset + length > os.fstat(fd).st_size:
        os.ftruncate(fd, offset + length)
    try:
        fallocate(fd, KEEP_SIZE | PUNCH_HOLE, offset, length)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        write_zeros(fd, offset, length)


def write_zeros(fd: int, offset: int, length: int) -> None:
    """Write zeros over a range."""
    while length:
        done = os.pwrite(fd, memoryview(_ZEROS)[: min(length, PIECE)], offset)
        offset, length = offset + done, length - done


def data_ranges(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The stretches (start, end) of a file that are no holes, by SEEK_DATA and SEEK_HOLE."""
    while start < end:
        try:
            begin = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if begin >= end:
            return
        start = min(os.lseek(fd, begin, os.SEEK_HOLE), end)
        yield begin, start


def copy_range(source: int, at: int, target: int, to: int, length: int) -> None:
    """Copy a range between files; holes stay holes, and data is shared where files can share it.

    copy_file_range makes a reflink on XFS and btrfs when both positions are 4 KiB aligned: then no
    data is written at all. Raises OSError (EIO, ENOSPC, ...).
    """
    done = at
    for begin, end in data_ranges(source, at, at + length):
        if begin > done:
            zero_range(target, to + done - at, begin - done)
        _copy_data(source, begin, target, to + begin - at, end - begin)
        done = end
    if done < at + length:
        zero_range(target, to + done - at, at + length - done)


def _copy_data(source: int, at: int, target: int, to: int, length: int) -> None:
    while length:
        try:
            done = os.copy_file_range(source, target, length, at, to)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            done = 0
        done = done or _copy_piece(source, at, target, to, min(length, PIECE))
        at, to, length = at + done, to + done, length - done


def _copy_piece(source: int, at: int, target: int, to: int, length: int) -> int:
    data = os.pread(source, length, at)
    if not data:
        raise OSError(errno.EIO, "the file became shorter while it was copied")
    return os.pwrite(target, data, to)


def is_zero(data: bytes | bytearray | memoryview) -> bool:
    """Whether every byte is zero, at the speed of memcmp."""
    view = memoryview(data)
    return not view or (view[0] == 0 and bytes(view[:-1]) == bytes(view[1:]))


def changed_runs(new: bytes | bytearray, old: bytes, length: int) -> list[tuple[int, int]]:
    """Where `new` differs from `old`, as (start, end) in whole grains; the last one may be short."""
    runs: list[tuple[int, int]] = []
    for start in range(0, length, GRAIN):
        end = min(start + GRAIN, length)
        if new[start:end] != old[start:end]:
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
    return runs
