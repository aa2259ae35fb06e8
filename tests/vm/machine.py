"""A small real machine as a raw disk image: what a backup backs up, and what then has to boot.

    python -m tests.vm.machine OUT.img [--flavour amd64]

It is laid out as Debian lays out a machine: GRUB in the MBR, an ext4 root with Debian's own kernel,
its modules, an initramfs and a grub.cfg, and an XFS on /data. The user space is busybox. A service
(demo/coldspare-demo) counts the boots on the root, and answers on the serial line:

    COLDSPARE-DEMO boot 3, data generation 7

and then obeys `status`, `write MIB`, `sum` and `poweroff`; the ACPI power button works too.

Building needs apt, grub-pc-bin, e2fsprogs and xfsprogs, but neither root nor loop devices;
`mounted` and `change_files` need both. Sizes and offsets are bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import random
import re
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid5

from tests.vm.debian import BuildError, Modules, describe, fetch, kernel_package, locked, run

MIB = 1 << 20
DISK = 512 * MIB
LINE = re.compile(rb"COLDSPARE-DEMO boot (\d+), data generation (\d+)")
CACHE = Path(os.environ.get("COLDSPARE_TEST_CACHE", "/var/tmp/coldspare-test-cache"))

DEMO = Path(__file__).parent / "demo"
GRUB = Path("/usr/lib/grub/i386-pc")
NAMESPACE = UUID("0c1d5a9e-c01d-5bae-b007-ab1ebac00b1e")  # any; makes a machine's UUIDs from its name

# What Debian's MODULES=most would let boot here, of what QEMU can offer.
DRIVERS = ("virtio_pci", "virtio_blk", "virtio_scsi", "ahci", "ata_piix", "nvme", "sd_mod")
FILE_SYSTEMS = ("ext4", "crc32c_generic")
# On the root, for retargeting: drivers that the initramfs may lack.
FOLDERS = ("kernel/drivers/virtio", "kernel/drivers/block", "kernel/drivers/ata",
           "kernel/drivers/nvme", "kernel/fs/xfs", "kernel/fs/ext4", "kernel/fs/fat",
           "kernel/fs/nls", "kernel/drivers/acpi", "kernel/drivers/input")  # fmt: skip
EXTRAS = ("virtio_net", "e1000e", "sd_mod", "sr_mod", "crc32c_generic", "crc32c_intel")


@dataclass(frozen=True)
class Partition:
    """A partition: where it is on the disk, its MBR type byte and its file system's UUID."""

    number: int
    offset: int
    length: int
    kind: int
    file_system: str
    uuid: UUID


@dataclass(frozen=True)
class Machine:
    """A built machine."""

    image: Path
    name: str
    kernel: str  # its version, as uname -r says it
    root: Partition
    data: Partition


def build(
    path: Path,
    cache: Path = CACHE,
    *,
    name: str = "demo",
    flavour: str = "cloud-amd64",
    drivers: Sequence[str] = DRIVERS,
    root: str = "",
) -> Machine:
    """Write the machine to `path`, sparse, complete or not at all.

    `flavour` is the kernel's: "cloud-amd64" boots fastest, "amd64" has AHCI too. `drivers` are the
    block drivers in the initramfs and `root` what boot loader and fstab call the root (its UUID when
    empty): drivers=("ahci", "sd_mod"), root="/dev/sda1" is a machine that has to be retargeted
    before it boots on virtio. `name` is its host name and the seed of its UUIDs.
    Raises BuildError when a program or a package is missing.
    """
    first, second = _partitions(name)
    names = {"ROOT_UUID": str(first.uuid), "ROOT": root or f"UUID={first.uuid}",
             "DATA": f"UUID={second.uuid}"}  # fmt: skip
    with locked(cache):
        tree = _tree(cache, flavour, drivers)
    version = kernel_package(flavour).removeprefix("linux-image-")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        work = Path(scratch)
        shutil.copytree(tree, work / "tree", symlinks=True)
        _name(work / "tree", name, {**names, "VERSION": version})
        image = work / "image"
        with image.open("wb") as disk:
            disk.truncate(DISK)
        _make_ext4(image, first, work / "tree")
        _make_xfs(image, second, work)
        _make_bootable(image, (first, second), name, work)
        image.rename(path)
    return Machine(path, name, version, first, second)


def _partitions(name: str) -> tuple[Partition, Partition]:
    border = 160 * MIB  # mkfs.xfs refuses less than 300 MiB, and the kernels take half the rest
    return (
        Partition(1, MIB, border - MIB, 0x83, "ext4", uuid5(NAMESPACE, f"{name} root")),
        Partition(2, border, DISK - border, 0x83, "xfs", uuid5(NAMESPACE, f"{name} data")),
    )


# --- the root's files ---------------------------------------------------------------------------


def _tree(cache: Path, flavour: str, drivers: Sequence[str]) -> Path:
    """The root's files but for the machine's name, from the cache or made anew."""
    packages = (kernel_package(flavour), "busybox-static")
    sources = [*sorted(DEMO.iterdir()), Path(__file__), Path(__file__).with_name("debian.py")]
    key = hashlib.sha256(repr(drivers).encode())
    for part in (*(describe(package)["SHA256"].encode() for package in packages),
                 *(source.read_bytes() for source in sources)):  # fmt: skip
        key.update(hashlib.sha256(part).digest())
    kept = cache / "trees" / key.hexdigest()[:24]
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            work = Path(scratch)
            for package in packages:
                run("dpkg-deb", "-x", fetch(package, cache), work / "debs")
            _fill(work, packages[0].removeprefix("linux-image-"), drivers)
            (work / "root").rename(kept)
    return kept


def _fill(work: Path, version: str, drivers: Sequence[str]) -> None:
    debs, root, early = work / "debs", work / "root", work / "early"
    busybox = debs / "bin/busybox"
    modules = Modules(debs, version, busybox)
    _skeleton(early, busybox, ("bin", "root", "proc", "sys", "dev"))
    _install(DEMO / "init", early / "init", 0o755)
    modules.copy((*drivers, *FILE_SYSTEMS), early / "usr")
    _skeleton(root, busybox, ("bin", "sbin", "usr/bin", "usr/sbin", "boot/grub", "data", "dev", "etc",
                              "proc", "root", "run", "sys", "tmp", "var/tmp"))  # fmt: skip
    folders = (name for folder in FOLDERS for name in modules.beneath(folder))
    modules.copy((*drivers, *EXTRAS, *folders), root / "usr")
    shutil.copyfile(debs / f"boot/vmlinuz-{version}", root / f"boot/vmlinuz-{version}")
    packed = gzip.compress(cpio(early), compresslevel=6, mtime=0)
    (root / f"boot/initrd.img-{version}").write_bytes(packed)
    _configure(root)


def _skeleton(root: Path, busybox: Path, folders: Sequence[str]) -> None:
    for folder in (*folders, "usr/lib"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "lib").symlink_to("usr/lib")  # as in every Debian since 12
    for applet in run(busybox, "--list-full").split():
        link = root / (applet if "sbin" in folders else f"bin/{Path(applet).name}")
        if link.parent.is_dir() and link.name != "busybox":
            link.symlink_to("/bin/busybox")
    _install(busybox, root / "bin/busybox", 0o755)


def _configure(root: Path) -> None:
    state = root / "var/lib/coldspare-demo"
    state.mkdir(parents=True)
    (state / "boots").write_text("0\n")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/debian_version").write_text("12\n")
    for name in ("inittab", "os-release", "fstab"):
        _install(DEMO / name, root / "etc" / name)
    for name in ("rcS", "rcK"):
        _install(DEMO / name, root / "etc/init.d" / name, 0o755)
    _install(DEMO / "power-button", root / "etc/acpi/PWRF/00000080", 0o755)
    _install(DEMO / "coldspare-demo", root / "usr/local/sbin/coldspare-demo", 0o755)
    _install(DEMO / "grub.cfg", root / "boot/grub/grub.cfg")


def _install(source: Path, target: Path, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def _name(tree: Path, name: str, words: dict[str, str]) -> None:
    (tree / "etc/hostname").write_text(name + "\n")
    for file in (tree / "etc/fstab", tree / "boot/grub/grub.cfg"):
        file.write_text(re.sub(r"@(\w+)@", lambda match: words[match[1]], file.read_text()))


def cpio(root: Path) -> bytes:
    """The tree as a "newc" archive, as the kernel unpacks it (initramfs buffer format, kernel docs)."""
    out = bytearray()
    for number, path in enumerate([*sorted(root.rglob("*")), None]):
        name = b"TRAILER!!!" if path is None else os.fsencode(path.relative_to(root))
        mode, data = 0, b""
        if path is not None:
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                data = os.fsencode(path.readlink())
            elif stat.S_ISREG(mode):
                data = path.read_bytes()
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


# --- the disk -----------------------------------------------------------------------------------


def _make_ext4(image: Path, partition: Partition, tree: Path) -> None:
    extended = f"offset={partition.offset},hash_seed={partition.uuid},root_owner=0:0,nodiscard"
    run("mke2fs", "-q", "-F", "-t", "ext4", "-U", str(partition.uuid), "-E", extended,
        "-d", tree, image, f"{partition.length // 1024}k")  # fmt: skip


def _make_xfs(image: Path, partition: Partition, work: Path) -> None:
    """An XFS with generation 1, an empty log and a few files of random bytes."""
    made = work / "xfs"
    lines = ["/dev/null", "0 0", "d--755 0 0"]
    for name, data in {"generation": b"1\n", "log": b""}.items():
        (work / name).write_bytes(data)
        lines.append(f"{name} ---644 0 0 {work / name}")
    lines.append("files d--755 0 0")
    for number in range(6):
        file = work / f"file-{number}"
        file.write_bytes(random.Random(number).randbytes(4 * MIB))
        lines.append(f"{file.name} ---644 0 0 {file}")
    (work / "proto").write_text("\n".join([*lines, "$", "$", ""]))
    run("mkfs.xfs", "-q", "-m", f"uuid={partition.uuid}", "-p", work / "proto",
        "-d", f"file,name={made},size={partition.length}")  # fmt: skip
    _copy_sparse(made, image, partition.offset)


def _copy_sparse(source: Path, target: Path, offset: int) -> None:
    with source.open("rb") as reader, target.open("r+b") as writer:
        end, at = os.fstat(reader.fileno()).st_size, 0
        while at < end:
            try:
                at = os.lseek(reader.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                return
            hole = os.lseek(reader.fileno(), at, os.SEEK_HOLE)
            while at < hole:
                at += os.copy_file_range(
                    reader.fileno(), writer.fileno(), hole - at, at, offset + at
                )


def _make_bootable(
    image: Path, partitions: Sequence[Partition], name: str, work: Path
) -> None:
    """GRUB and the partition table.

    boot.img finds its continuation in the sector after it and diskboot.img the rest after that,
    unless somebody patches other numbers in; so putting them there is the whole installation.
    """
    core = work / "core.img"
    run("grub-mkimage", "-O", "i386-pc", "-o", core, "-p", "(hd0,msdos1)/boot/grub",
        "biosdisk", "part_msdos", "ext2", "normal", "linux", "search_fs_uuid", "search")  # fmt: skip
    if core.stat().st_size > partitions[0].offset - 512:
        raise BuildError("GRUB does not fit in front of the first partition")
    boot = (GRUB / "boot.img").read_bytes()[:440]
    table = b"".join(_entry(partition) for partition in partitions).ljust(64, b"\0")
    with image.open("r+b") as disk:
        disk.write(boot + uuid5(NAMESPACE, name).bytes[:4] + b"\0\0" + table + b"\x55\xaa")
        disk.write(core.read_bytes())


def _entry(partition: Partition) -> bytes:
    active = 0x80 if partition.number == 1 else 0
    chs = b"\xfe\xff\xff"  # beyond what cylinders, heads and sectors can say: use the numbers
    first, count = partition.offset // 512, partition.length // 512
    return struct.pack("<B3sB3sII", active, chs, partition.kind, chs, first, count)


# --- changing it --------------------------------------------------------------------------------


@contextmanager
def mounted(image: Path, partition: Partition) -> Iterator[Path]:
    """The partition's file system on a temporary directory; written back and undone at the end."""
    options = f"loop,offset={partition.offset},sizelimit={partition.length},nosuid,nodev,noexec"
    with tempfile.TemporaryDirectory(prefix="coldspare-demo-") as scratch:
        run("mount", "-t", partition.file_system, "-o", options, image, scratch)
        try:
            yield Path(scratch)
        finally:
            run("umount", scratch)  # the loop device goes with it


def change_files(image: Path, *, name: str = "demo", count: int = 3, size: int = MIB) -> int:
    """Write `count` new files of `size` random bytes to /data, unmount it cleanly.

    Returns the new data generation, which the machine tells at its next boot. The machine must be off.
    """
    with mounted(image, _partitions(name)[1]) as data:
        generation = int((data / "generation").read_text()) + 1
        source = random.Random(f"{name} {generation}")
        for number in range(count):
            (data / f"files/host-{generation}-{number}").write_bytes(source.randbytes(size))
        (data / "generation").write_text(f"{generation}\n")
        with (data / "log").open("a") as log:
            log.write(f"generation {generation} written by the host\n")
    return generation


def files_digest(data: Path) -> str:
    """What the machine answers to `sum`: SHA-256 over the files in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted((data / "files").iterdir()):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Build one from the command line."""
    parser = argparse.ArgumentParser(prog="tests.vm.machine", description=__doc__.split("\n")[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--name", default="demo")
    parser.add_argument("--flavour", default="cloud-amd64")
    chosen = parser.parse_args()
    began = time.monotonic()
    machine = build(chosen.image, chosen.cache, name=chosen.name, flavour=chosen.flavour)
    used = machine.image.stat().st_blocks * 512 // MIB
    print(f"{machine.image}: {DISK // MIB} MiB, {used} MiB in use, Linux {machine.kernel}, "
          f"{time.monotonic() - began:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
