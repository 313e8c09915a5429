"""Text as files and JSON hold it: encodings, and halves of characters."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.errors import PrunekitError

if TYPE_CHECKING:  # Python 3.10 keeps it elsewhere
    from importlib.resources.abc import Traversable


def clean(text: str) -> str:
    """`text` with surrogate pairs joined, and lone halves replaced by U+FFFD: no encoding has them.

    Unchanged text is returned as it is.
    """
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def utf8(path: Path | Traversable) -> str:
    """The content of a text file.

    Raises:
        PrunekitError: It can't be read, or is not UTF-8; the message says what it seems to be.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PrunekitError(f"'{path}' can't be read ({error.strerror}): check it") from None
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        seems = "it begins as UTF-16 does" if wide else f"byte {error.start}"
        raise PrunekitError(f"'{path}' is not UTF-8 text ({seems}): save it as UTF-8") from None
    if wide:  # UTF-16 without its mark decodes as UTF-8: every other character is NUL
        raise PrunekitError(
            f"'{path}' holds NUL characters, as UTF-16 and binary files do: save it as UTF-8 text"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as text files are read
