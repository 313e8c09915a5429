"""Write a folder whole or not at all, and by one run at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from prunekit.errors import PrunekitError
from prunekit.files.locks import locked


@contextlib.contextmanager
def replaced_folder(
    folder: Path | str, *, overwrite: bool = False, replaceable: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield a temporary sibling of `folder` that takes its place when the block succeeds.

    Files are synced to the disk before the rename. Whatever goes wrong in the block, Ctrl-C
    included, leaves the old `folder` as it was and no temporary one.

    Args:
        folder: Where the result goes; missing parents are created.
        overwrite: Whether a non-empty `folder` may be replaced.
        replaceable: With `overwrite`, a non-empty folder is replaced only if it holds one of these
            file names: a mistyped path must not cost anybody their home.

    Raises:
        PrunekitError: `folder` is a file, not empty, not replaceable, can't be written, or another
            run writes it; or it is one that no result may replace (`/`, the current folder).
    """
    target = check_target(folder, overwrite=overwrite, replaceable=replaceable)
    with locked(target):
        yield from _replaced(target)


def _replaced(target: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    try:
        written = temporary / "new"
        written.mkdir()
        yield written
        _give_usual_permissions(written)
        _sync(written)
        _swap(written, target, temporary / "old")
    except OSError as error:
        raise PrunekitError(
            f"{target} couldn't be written ({error.strerror or error}): free some space or choose "
            f"another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of the file `path` that takes its place when the block succeeds.

    Synced to the disk before the rename and after it. A process that is killed leaves the old file
    or none, and perhaps the sibling, which the next attempt replaces.

    Raises:
        OSError: It can't be written.
    """
    written = path.with_name(f".{path.name}.new")
    try:
        yield written
        _sync_one(written)
        written.replace(path)
        _sync_one(path.parent)
    finally:
        written.unlink(missing_ok=True)


def check_target(
    folder: Path | str, *, overwrite: bool = False, replaceable: Sequence[str] = ()
) -> Path:
    """Make sure, before any work is done, that `replaced_folder` would accept the same arguments.

    Returns:
        The absolute path.

    Raises:
        PrunekitError: See `replaced_folder`.
    """
    target = Path(folder).expanduser().resolve()
    _refuse_precious(target)
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir():
        raise PrunekitError(f"{parent} is a file: choose another folder")
    try:  # a folder's permissions don't tell: no process can create one below /proc
        Path(tempfile.mkdtemp(dir=parent, prefix=".prunekit-")).rmdir()
    except OSError as error:
        raise _unwritable(parent, error) from error
    if not target.exists():
        return target
    if not target.is_dir():
        raise PrunekitError(f"{target} is a file: choose a folder")
    names = {path.name for path in target.iterdir()}
    if not names:
        return target
    if not overwrite:
        raise PrunekitError(f"{target} is not empty: choose another folder or allow overwriting")
    if not names.intersection(replaceable):
        raise PrunekitError(
            f"{target} holds none of {', '.join(replaceable)}, so it won't be overwritten: choose "
            f"another folder"
        )
    return target


def _refuse_precious(target: Path) -> None:
    """Refuse folders whose replacement would take more with it than an earlier result."""
    if target == target.parent:
        raise PrunekitError(f"{target} is the root of the file system: choose a folder inside it")
    for find, what in ((Path.cwd, "the current folder"), (Path.home, "your home folder")):
        try:
            precious = find().resolve()
        except (OSError, RuntimeError):  # deleted meanwhile, or no home
            continue
        if target == precious:
            raise PrunekitError(f"{target} is {what}: choose a folder inside it")
        if target in precious.parents:
            raise PrunekitError(f"{target} holds {what}: choose a folder inside it")


def _unwritable(folder: Path, error: OSError) -> PrunekitError:
    return PrunekitError(f"{folder} can't be written ({error.strerror}): choose another folder")


def _give_usual_permissions(folder: Path) -> None:
    """Let the user's umask decide who may read: safetensors creates files for their owner only."""
    umask = os.umask(0o077)  # there is no other way to ask for it
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    folder.chmod(0o777 & ~umask)


def _sync(folder: Path) -> None:
    """Have everything in `folder` reach the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows can't open folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(written: Path, target: Path, old: Path) -> None:
    """Put `written` where `target` is; `target` is back in place if anything interrupts."""
    try:
        if target.exists():
            target.rename(old)
        written.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
