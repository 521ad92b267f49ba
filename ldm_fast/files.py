"""Writing files so that neither a crash nor a full disk leaves half of one behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(path: str | Path, content: bytes) -> None:
    """`path` holds either all of `content` or what it held before. Raises OSError with the path.

    The content goes to a temporary file in the same folder, is flushed to the disk, and takes the name by a rename.
    """
    path = Path(path)
    unfinished = None
    try:
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, _ordinary_mode(path))
        os.replace(unfinished, path)
    except BaseException as error:
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise type(error)(error.errno, f"cannot write: {error.strerror}", str(path)) from error
        raise


def _ordinary_mode(path: Path) -> int:
    """The mode of the file replaced, or what a new file gets; mkstemp makes files that only their owner can read."""
    if path.exists():
        return path.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def check_writable(path: str | Path) -> None:
    """OSError if no file could be written at `path`: to be known before minutes of work, not after."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(f"cannot write {path}: permission denied")
