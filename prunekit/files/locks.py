"""One writer per output: the second run is told who the first one is.

A lock is a file beside the output, `.NAME.lock`, that the operating system locks for as long as the
process lives: a killed run leaves no lock behind, only perhaps the file. Where a file system has no
locks, or the system none of this kind (Windows), runs are not kept apart.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from prunekit.errors import PrunekitError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# what this process holds: the thread that holds it, and how often
_HELD: dict[Path, tuple[int, int]] = {}
_GUARD = threading.Lock()


@contextlib.contextmanager
def locked(output: Path | str) -> Iterator[None]:
    """Keep other runs from writing `output` while the block runs; a thread may nest it.

    Args:
        output: File or folder; it need not exist. Parents are created, and go again if the block
            leaves them empty.

    Raises:
        PrunekitError: Another run, or another thread of this one, writes it.
    """
    target = Path(output).expanduser().resolve()
    thread = threading.get_ident()
    with _GUARD:
        owner, depth = _HELD.get(target, (thread, 0))
        if owner != thread:
            raise PrunekitError(
                f"another thread of this process is writing {target}: wait for it, or choose "
                "another output"
            )
        _HELD[target] = (thread, depth + 1)
    try:
        with contextlib.nullcontext() if depth else _file_locked(target):
            yield
    finally:
        with _GUARD:
            if depth:
                _HELD[target] = (thread, depth)
            else:
                del _HELD[target]


@contextlib.contextmanager
def _file_locked(target: Path) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquired(path, target)
    except OSError as error:
        raise PrunekitError(
            f"{path.parent} can't be written ({error.strerror}): choose another folder"
        ) from error
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # while it is locked: a newcomer sees that it is gone
            file.close()
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _acquired(path: Path, target: Path) -> BinaryIO | None:
    """The open, locked file, or None where there are no locks."""
    if fcntl is None:
        return None
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().decode("utf-8", "replace").strip()
            file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise PrunekitError(
                f"another run is writing {target} ({holder or 'it has just started'}): wait for "
                "it, or choose another output"
            ) from None
        if _still_there(file, path):
            file.truncate(0)
            file.write(_myself().encode())
            file.flush()
            return file
        file.close()  # its owner removed it after it was opened here


def _still_there(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _myself() -> str:
    """Who holds the lock, for whoever wants it too."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else []
    command = " ".join(shlex.quote(word) for word in words)[:200]
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {started}: {command}"
