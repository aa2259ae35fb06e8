"""A few of Debian's own packages, fetched by apt and unpacked without being installed.

`fetch` keeps each package in a cache under its SHA-256 as apt's index gives it, so the same content
is never fetched twice. Nothing of a package is run here but busybox, a static program.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


class BuildError(Exception):
    """The machine cannot be built here; the message says what is missing."""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """The program's standard output. Raises BuildError with its last words when it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=300)
    except FileNotFoundError as error:
        raise BuildError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))}: {done.stderr.strip()[-500:]}")
    return done.stdout


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One builder at a time: tests run in several processes and share the cache."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def describe(package: str) -> dict[str, str]:
    """What apt's index says of the newest version of `package`."""
    try:
        text = run("apt-cache", "show", "--no-all-versions", package)
    except BuildError:  # a new machine has no index
        run("apt-get", "update")
        text = run("apt-cache", "show", "--no-all-versions", package)
    return dict(re.findall(r"^([\w-]+): (.*)$", text, re.MULTILINE))


def kernel_package(flavour: str) -> str:
    """The package that `linux-image-<flavour>` stands for: the name carries the kernel's version."""
    return describe(f"linux-image-{flavour}")["Depends"].split()[0]


def fetch(package: str, cache_directory: Path) -> Path:
    """`package` as a .deb file in the cache, its content checked."""
    digest = describe(package)["SHA256"]
    kept = cache_directory / "debs" / f"{package}-{digest[:16]}.deb"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            # apt drops to the user _apt, who cannot write into our directory
            run("apt-get", "-o", "APT::Sandbox::User=root", "download", package, cwd=Path(scratch))
            (got,) = Path(scratch).glob("*.deb")
            if hashlib.sha256(got.read_bytes()).hexdigest() != digest:
                raise BuildError(f"{package}: apt fetched other bytes than its index names")
            got.rename(kept)
    return kept


class Modules:
    """The kernel modules of an unpacked kernel package and what each of them needs."""

    def __init__(self, tree: Path, version: str, busybox: Path) -> None:
        self.root = tree / "lib/modules" / version
        self.version = version
        self._busybox = busybox
        run(busybox, "depmod", "-b", tree, version)
        lines = (self.root / "modules.dep").read_text().splitlines()
        self._needs = {path: rest.split() for path, rest in (line.split(":", 1) for line in lines)}
        self._paths = {Path(path).stem.replace("-", "_"): path for path in self._needs}

    def beneath(self, folder: str) -> list[str]:
        """The names of the modules in a folder such as kernel/drivers/ata."""
        return [name for name, path in self._paths.items() if path.startswith(folder + "/")]

    def copy(self, names: Iterable[str], usr: Path) -> None:
        """Put the modules and all that they need into `usr`/lib/modules; unknown names are built in."""
        target = usr / "lib/modules" / self.version
        known = [self._paths[name] for name in names if name in self._paths]
        for path in {*known, *(need for path in known for need in self._needs[path])}:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / path, target / path)
        for builtin in self.root.glob("modules.[bo]*"):  # builtin*, order
            shutil.copyfile(builtin, target / builtin.name)
        run(self._busybox, "depmod", "-b", usr, self.version)
