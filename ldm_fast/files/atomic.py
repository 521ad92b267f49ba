"""Writing files so that neither a crash nor a full disk leaves half of one behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, which takes the place of `path` at the end.

    It is flushed to the disk and renamed; after an error it is gone, and `path` is as it was. If several write at once,
    the last one stands, as a whole. If `path` is a symbolic link, the file it points to is replaced. Raises OSError
    with the path.
    """
    target = Path(os.path.realpath(path))
    unfinished = target.with_name(f".{secrets.token_hex(4)}.tmp")  # short: the target's name may be as long as any
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, unfinished)
        unfinished.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise type(error)(error.errno, f"cannot write: {error.strerror}", str(path)) from error
        raise
    _sync_folder(target.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove what `replacing` left in a folder when its process was killed; not while another process writes there."""
    for unfinished in folder.glob(f"*.{'[0-9a-f]' * 8}.tmp"):
        unfinished.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` so that, even after a crash, `path` holds either all of it or what it held before.

    Raises OSError with the path.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut. Windows cannot open folders, and does not need this."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: OSError) -> str:
    """Say why it failed, without the path."""
    return os.strerror(error.errno) if error.errno else str(error)


def check_writable(path: str | Path) -> None:
    """Raise OSError if no file could be written at `path`, so that this is known before minutes of work, not after."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(f"cannot write {path}: permission denied")
