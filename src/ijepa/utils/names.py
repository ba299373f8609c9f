"""Names of files, samples and classes as text that can be shown and stored.

A file name is bytes. Python keeps bytes that are not UTF-8 as lone surrogates, which no terminal and no JSON, HTML or
Markdown file takes. A name becomes printable where it leaves the code that opens files: `Source.name`, `Source.file`
and `Source.classes` return printable names, and the line of an error is printable.
"""

import re

_UNPRINTABLE = re.compile(r"[\ud800-\udfff]")


def printable(name: str) -> str:
    r"""Return a name with each byte that is not UTF-8 written as `\xe9`. A printable name is returned unchanged."""
    return _UNPRINTABLE.sub(_escaped, name)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    byte = code - 0xDC00  # how Python keeps a byte of a file name (PEP 383)
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else f"\\u{code:04x}"
