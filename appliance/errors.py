"""Every error an operator can meet, as one tree.

    ColdspareError                exit 2: it failed
      FormatError                 a virtual-disk file, sidecar or journal is not what it must be
      ChainError                  a file is sound, but its chain is not (missing or wrong parent, loop)
      SourceError                 the source cannot be read, or stopped being readable
      StorageError                the storage cannot be read or written (full, gone, read-only)
      ToolError                   a program that we rely on is missing or failed
      Refused                     exit 3: it would not be safe, so nothing was done
        Held                      somebody uses it; the message says who
        NothingToDo               there is no work

An error is one line for a person at three in the morning: what, why, and a hint on the way out.
Each class has a message template; its fields are the template's. Text that came from a disk or a
file name is quoted by `safe_text` before it gets into a message.
"""

from __future__ import annotations

import unicodedata


def safe_text(text: str, limit: int = 200) -> str:
    """`text` with everything that could steer a terminal made visible as \\xNN or \\uNNNN.

    Control, format (bidi, zero width), surrogate, private and unassigned characters are replaced;
    what is left is at most `limit` characters of NFC text.
    """
    out = []
    for char in unicodedata.normalize("NFC", text[: limit * 4]):
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            code = ord(char)
            out.append(f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
        else:
            out.append(char)
    line = "".join(out)
    return line if len(line) <= limit else line[: limit - 3] + "..."


class ColdspareError(Exception):
    """The root: `message` is one line, `hint` the way out (may be empty), `exit_code` the process's."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = safe_text(message, 1000)
        self.hint = hint


class FormatError(ColdspareError):
    """A file's bytes break the rules of its format."""


class ChainError(ColdspareError):
    """Sound files that do not make a chain."""


class SourceError(ColdspareError):
    """The source could not be opened or read."""


class StorageError(ColdspareError):
    """The storage could not be read or written."""


class ToolError(ColdspareError):
    """A program that we rely on is missing, failed or took too long."""


class Refused(ColdspareError):
    """It would not be safe or make sense; nothing was changed."""

    exit_code = 3


class Held(Refused):
    """Somebody else uses it; the message names the holder."""


class NothingToDo(Refused):
    """There is no work; nothing was changed."""
