"""Atomic, durable writes: a file or folder is there complete, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamahome.errors import StorageError

_TEMPORARY = ".tmp-"
_DELETED = ".del-"
_REPLACED = ".old-"  # whole until its successor is in place
_LEFTOVER = re.compile(r"\.(?P<name>.+)(?P<mark>\.(tmp|del|old)-)(?P<pid>\d+)")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file through a temporary name in the same folder. Raises: StorageError."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    write_atomic(path, json.dumps(content, indent=2, sort_keys=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or nothing where there is none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `path` when the block ends well and vanishes when it does not.

    Every file is on disk before the rename. An existing `path` is replaced; a process that dies between the two
    renames leaves the old one to `remove_leftovers`, which puts it back. Raises: StorageError.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}")
    replaced = path.with_name(f".{path.name}{_REPLACED}{os.getpid()}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            sync_tree(temporary)
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                path.rename(replaced)
            temporary.rename(path)
            sync_folder(path.parent)
        except BaseException:
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder so that no half of it is ever seen under its name."""
    if not path.exists():
        return
    doomed = path.with_name(f".{path.name}{_DELETED}{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, *, locked: bool = False) -> None:
    """Delete what writers that no longer run have left behind in `folder`.

    With `locked` the caller keeps all other writers out, and whatever process id a leftover carries, it is one.
    """
    for path in folder.glob(".*"):
        found = _LEFTOVER.fullmatch(path.name)
        if not found or (not locked and process_runs(int(found["pid"]))):
            continue
        if found["mark"] == _REPLACED and not (folder / found["name"]).exists():
            path.rename(folder / found["name"])
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether the name is one that a writer here gives to what is not complete."""
    return bool(_LEFTOVER.fullmatch(path.name))


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync_folder(path)
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """fsync of a folder (or file): its entries are on disk afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system or a writer says about a full or failing disk into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror or error}", where=str(path), fix=_fix(error)) from error
    except Exception as error:
        # safetensors and torch report a full disk in their own types.
        text = str(error)
        if "os error" in text or "inline_container" in text or "No space left" in text:
            raise StorageError(f"cannot write: {text}", where=str(path), fix="free some space") from error
        raise


def _fix(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return "free some space or choose another folder"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "choose a folder that you may write to"
        case errno.EEXIST | errno.ENOTDIR | errno.EISDIR:
            return "a file or folder is in the way: choose another place"
        case errno.ENOENT:
            return "make its folder first, or choose another place"
        case _:
            return "check the disk"


def process_runs(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
