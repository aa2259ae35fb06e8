"""Several virtual-disk files read as one disk: the newest that holds a sector has the say.

A chain is put together by identity: a child names its parent's UUID, and only a file with that
UUID will do. Paths that a file carries are hints where to look first, never where to go.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

from appliance.errors import ChainError, FormatError
from appliance.vdisk.base import SECTOR, Disk, Extent, Parent
from appliance.vdisk.vhd.image import VhdImage, open_regular
from appliance.vdisk.vhd.structure import read_identity
from appliance.vdisk.vhd.writer import WritableVhd

MAX_DEPTH = 256  # files in a chain

Finder = Callable[[Parent], Path]


class Chain(Disk):
    """Files from the newest to the base, as one disk. Reading is safe from several threads."""

    def __init__(self, layers: list[VhdImage]) -> None:
        self.layers = layers
        self.top = layers[0]
        self.size = self.top.size
        self.read_only = True

    def map(self, offset: int, length: int) -> Iterator[Extent]:
        """Extents over all layers; neighbours that continue each other in a file are one."""
        if not 0 <= offset <= offset + length <= self.size:
            raise FormatError(f"bytes {offset} to {offset + length} lie outside the disk")
        pending: Extent | None = None
        for extent in self._descend(0, offset, length):
            if pending is None:
                pending = extent
            elif _continues(pending, extent):
                pending = pending._replace(length=pending.length + extent.length)
            else:
                yield pending
                pending = extent
        if pending is not None:
            yield pending

    def _descend(self, depth: int, offset: int, length: int) -> Iterator[Extent]:
        if depth == len(self.layers):
            yield Extent(offset, length, None)
            return
        layer = self.layers[depth]
        for run in layer.runs(offset, length):
            if run.position is None:
                yield from self._descend(depth + 1, run.offset, run.length)
            else:
                yield Extent(run.offset, run.length, layer.fd, run.position)

    def close(self) -> None:
        for layer in self.layers:
            layer.close()

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WritableChain(Chain):
    """A chain whose newest file, an overlay, takes the writes; the others are only read."""

    def __init__(self, layers: list[VhdImage]) -> None:
        super().__init__(layers)
        assert isinstance(layers[0], WritableVhd)
        self.overlay: WritableVhd = layers[0]
        self.read_only = False

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._check(offset, len(data))
        self.overlay.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Zeros, stored only where the chain does not read as zeros anyway."""
        self._check(offset, length)
        for extent in self.map(offset, length):
            if extent.fd is not None:
                self.overlay.zero(extent.offset, extent.length)

    def flush(self) -> None:
        self.overlay.flush()

    def close(self) -> None:
        self.overlay.seal()
        super().close()

    def _check(self, offset: int, length: int) -> None:
        if offset % SECTOR or length % SECTOR or not 0 <= offset <= offset + length <= self.size:
            raise FormatError(f"a write of {length} bytes at {offset} does not fit the disk")


def _continues(a: Extent, b: Extent) -> bool:
    return a.fd == b.fd and (a.fd is None or a.position + a.length == b.position)


def open_layers(top: VhdImage, find: Finder) -> list[VhdImage]:
    """The files of a chain from `top` down to its base.

    `find` gives the file with a parent's UUID. On an error every file is closed. Raises ChainError
    for a loop, a chain too deep, a parent of another size; FormatError for a damaged file.
    """
    layers = [top]
    seen = {layers[0].uuid}
    try:
        while (parent := layers[-1].parent) is not None:
            if parent.uuid in seen:
                raise ChainError(f"{layers[-1].name}: the chain of parents runs in a circle")
            if len(layers) == MAX_DEPTH:
                raise ChainError(f"{top.name}: more than {MAX_DEPTH} files in the chain")
            layers.append(_open_parent(layers[-1], parent, find))
            seen.add(parent.uuid)
    except BaseException:
        for layer in layers:
            layer.close()
        raise
    return layers


def open_chain(path: Path, find: Finder | None = None) -> Chain:
    """The disk that `path` and its parents make, read-only; errors as of `open_layers`."""
    return Chain(open_layers(VhdImage.open(path), find or in_folder(path.parent)))


def open_overlay(path: Path, find: Finder | None = None) -> WritableChain:
    """The disk that `path` and its parents make; `path` takes the writes."""
    return WritableChain(open_layers(WritableVhd.reopen(path), find or in_folder(path.parent)))


def _open_parent(child: VhdImage, parent: Parent, find: Finder) -> VhdImage:
    image = VhdImage.open(find(parent))
    wrong = ""
    if image.uuid != parent.uuid:
        wrong = f"has the identity {image.uuid}, not {parent.uuid}"
    elif image.size != child.size:
        wrong = f"has {image.size} bytes, its child {child.name} {child.size}"
    if wrong:
        image.close()
        raise ChainError(f"{image.name}: {wrong}")
    return image


def in_folder(folder: Path) -> Finder:
    """A finder that looks at the hinted names first, then at every VHD in `folder`."""

    def find(parent: Parent) -> Path:
        listed = sorted(name for name in os.listdir(folder) if name.lower().endswith(".vhd"))
        hinted = [name for name in parent.hints if name in listed]
        for name in (*hinted, *listed):
            if identity_of(folder / name) == parent.uuid:
                return folder / name
        raise ChainError(
            f"{parent.name or 'a parent'} ({parent.uuid}) is not in {folder.name}",
            "the parent was merged, moved or deleted: this file belongs to another chain now",
        )

    return find


def identity_of(path: Path) -> UUID | None:
    """The UUID in a VHD file, or None where the file is no sound VHD."""
    try:
        fd = open_regular(path, os.O_RDONLY)
    except FormatError:
        return None
    try:
        return read_identity(fd)[0]
    except FormatError:
        return None
    finally:
        os.close(fd)
