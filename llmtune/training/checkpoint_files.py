"""The files of one checkpoint: which may be named, how they are read, and the manifest that says what they must be.

Whatever a manifest says, nothing outside the checkpoint's folder is opened, and nothing in it that is no plain file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmtune.errors import CheckpointError

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FORMAT = 1
MOST_MANIFEST, MOST_STATE = 1 << 24, 1 << 30  # bytes that are read into memory at most
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OTHER_ROOTS = re.compile(r"[\\:]")  # other systems' separators and drives


@dataclass(frozen=True)
class FileEntry:
    """What a manifest says of a file.

    Attributes:
        size: in bytes.
        sha256: of its content, 64 hexadecimal digits.
    """

    size: int
    sha256: str


def one_line(text: object) -> str:
    """Return a message as one line of printable characters; what it quotes may come from anybody's file."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)[:1000]).split())


def plain_path(folder: Path, name: str) -> Path:
    """Return the path of a file that a manifest names, after looking at everything on the way to it.

    Args:
        folder: the checkpoint's.
        name: a relative path in it, with "/" between folders.

    Raises:
        CheckpointError: the name leads out of the folder, or is no plain file in plain folders.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or _OTHER_ROOTS.search(name) or not name.isprintable():
        raise CheckpointError(f"{folder} names a file {name[:200]!r}: only plain paths inside the folder are read")
    path = folder
    for part in (None, *parts[:-1]):
        path = path if part is None else path / part
        if not stat.S_ISDIR(_mode(path)):
            raise CheckpointError(f"{path} is missing, or is a link or no folder")
    path = path / parts[-1]
    if not stat.S_ISREG(_mode(path)):
        raise CheckpointError(f"{path} is missing, or is no regular file")
    return path


def open_plain(folder: Path, name: str) -> BinaryIO:
    """Open a file that `plain_path` allows, for reading; never waits for a writer.

    Raises:
        CheckpointError: it is not allowed.
    """
    path = plain_path(folder, name)
    flags = (getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
    file = os.fdopen(os.open(path, sum(flags, os.O_RDONLY)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path} is no regular file")
    return file


def files_under(folder: Path) -> Iterator[str]:
    """Yield the names of all files in a folder and its sub-folders, sorted, as a manifest writes them.

    Raises:
        CheckpointError: there is something that is neither a plain file nor a plain folder.
    """
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            yield path.relative_to(folder).as_posix()
        elif not stat.S_ISDIR(mode):
            raise CheckpointError(f"{path} is a link or no plain file: a checkpoint holds plain files alone")


def describe(path: Path) -> FileEntry:
    """Return the size and hash of a file, read in blocks."""
    with path.open("rb") as file:
        return FileEntry(os.fstat(file.fileno()).st_size, sha256(file))


def sha256(file: BinaryIO) -> str:
    """Return the hash of what is left to read, taken in blocks of a mebibyte."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    while count := file.readinto(block):  # type: ignore[attr-defined]
        digest.update(block[:count])
    return digest.hexdigest()


def write_manifest(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Write the manifest of a checkpoint."""
    entries = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """Return what a checkpoint's manifest says of its files.

    Raises:
        CheckpointError: it is damaged, of another format, or names what no checkpoint holds.
    """
    with open_plain(folder, MANIFEST) as file:
        content = file.read(MOST_MANIFEST + 1)
    manifest = parse_json(content, most=MOST_MANIFEST)
    if (
        not isinstance(manifest, dict)
        or set(manifest) != {"format", "files"}
        or not isinstance(manifest["files"], dict)
    ):
        raise CheckpointError(f'{folder / MANIFEST} must be an object of "format" and "files"')
    if type(manifest["format"]) is not int or manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST} is of format {manifest['format']!r}; this version reads {FORMAT}")
    files = {name: _entry(folder, name, entry) for name, entry in manifest["files"].items()}
    lacking = [name for name in (TENSORS, STATE) if name not in files]
    if lacking or MANIFEST in files:
        raise CheckpointError(f"{folder / MANIFEST} must describe {TENSORS}, {STATE} and not itself")
    return files


def parse_json(content: bytes, *, most: int) -> Any:
    """Return what strict JSON says: no key twice in an object, no NaN or Infinity, no endless nesting.

    Args:
        content: UTF-8.
        most: how many bytes are allowed.

    Raises:
        CheckpointError: it is not such JSON.
    """
    if len(content) > most:
        raise CheckpointError(f"JSON of {len(content)} bytes is more than the {most} allowed")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_each_once, parse_constant=_no_constant)
    except RecursionError as error:
        raise CheckpointError("the JSON is nested too deeply") from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"that is no JSON: {error}") from error


def flush(path: Path) -> None:
    """Have the system write a file's or a folder's content to the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # it opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def _mode(path: Path) -> int:
    """Return what a path is, not following a link; 0 where there is nothing."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return path.lstat().st_mode
    return 0


def _entry(folder: Path, name: str, entry: Any) -> FileEntry:
    if isinstance(entry, dict) and set(entry) == {"size", "sha256"}:
        size, digest = entry["size"], entry["sha256"]
        if type(size) is int and 0 <= size < 1 << 63 and isinstance(digest, str) and _SHA256.fullmatch(digest):
            return FileEntry(size, digest)
    raise CheckpointError(
        f'{folder / MANIFEST} must give {name[:200]!r} a "size" in bytes and a "sha256" in hexadecimal'
    )


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise CheckpointError(f"the JSON has the key {twice[:80]!r} twice in one object")
    return made


def _no_constant(name: str) -> Any:
    raise CheckpointError(f"the JSON holds {name}, which is no JSON")
