"""Names of files, samples and classes as text that can be printed and stored.

A file name is bytes. Python represents bytes that are not UTF-8 as lone surrogates, which terminals and JSON, HTML and
Markdown files do not accept. `Source.name`, `Source.file`, `Source.classes` and error lines are printable.
"""

import re

_UNPRINTABLE = re.compile(r"[\ud800-\udfff]")


def printable(name: str) -> str:
    r"""Return a name with each byte that is not UTF-8 written as an escape such as `\xe9`."""
    return _UNPRINTABLE.sub(_escaped, name)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    byte = code - 0xDC00  # Python adds 0xDC00 to a byte that is not UTF-8 (PEP 383)
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else f"\\u{code:04x}"
