"""Headers of DICOM files: every length is held against the size of the file before ITK is let near it.

ITK believes a damaged length, and takes gigabytes of memory for it.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from struct import unpack
from typing import BinaryIO

from ..errors import InputError, reading
from .bounds import MAX_INFLATION

__all__ = ["Header", "has_dicom_mark", "read_header"]

IMPLICIT, DEFLATED, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
SHORT = {
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS",
    b"ST", b"TM", b"UI", b"UL", b"US",
}  # fmt: skip
UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END, PIXELS, SYNTAX = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0x7FE00010, 0x00020010
CLASS, MEDIA_CLASS = 0x00080016, 0x00020002
NO_IMAGES = (  # storage classes of files that are often kept beside slices
    "1.2.840.10008.1.3.10",  # DICOMDIR
    "1.2.840.10008.5.1.4.1.1.11.",  # presentation states
    "1.2.840.10008.5.1.4.1.1.88.",  # structured reports
    "1.2.840.10008.5.1.4.1.1.104.",  # documents
)
MAX_DEPTH = 32  # of sequences within sequences
MAX_VALUE = 2**12  # bytes of a value that is kept
KEPT_GROUPS = (0x0002, 0x0008, 0x0010, 0x0018, 0x0020, 0x0028)


class _Damage(Exception):
    """What is wrong with a header."""


@dataclass
class Header:
    """What a DICOM file says of itself, without its sequences.

    Args:
        path: the file.
        values: short values by tag, as they are stored.
        pixel_bytes: bytes of pixel data, as they are stored; 0 where it has none.
        compressed: whether these are in fragments, as compressed pixels are.
        order: ``<`` or ``>``, of binary values.
    """

    path: Path
    values: dict[int, bytes] = field(default_factory=dict)
    pixel_bytes: int = 0
    compressed: bool = False
    order: str = "<"

    @property
    def is_no_image(self) -> bool:
        """Whether it is a file of another kind, without pixels."""
        kind = self.text(CLASS) or self.text(MEDIA_CLASS)
        return kind.startswith(NO_IMAGES) and not self.pixel_bytes

    def text(self, tag: int) -> str:
        """A value as text; empty where it is missing."""
        return self.values.get(tag, b"").decode("latin-1").strip(" \0")

    def whole(self, tag: int) -> int | None:
        """A value of two bytes as a number; None where it is missing or something else."""
        value = self.values.get(tag, b"")
        return int(unpack(self.order + "H", value)[0]) if len(value) == 2 else None

    def numbers(self, tag: int, count: int) -> tuple[float, ...] | None:
        """Decimal numbers; None where they are missing.

        Raises:
            InputError: where there are others than ``count`` finite numbers.
        """
        text = self.text(tag)
        if not text:
            return None
        try:
            found = tuple(float(part) for part in text.split("\\"))
        except ValueError:
            found = ()
        if len(found) != count or not all(math.isfinite(value) for value in found):
            raise InputError(
                f"{self.path}: ({tag >> 16:04x},{tag & 0xFFFF:04x}) is {text[:80]!r}, not "
                f"{f'{count} numbers' if count > 1 else 'a number'}: replace the file, its header is damaged."
            )
        return found


def has_dicom_mark(path: Path) -> bool:
    """Whether the first bytes of a file say that it is DICOM."""
    with reading(path), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: Path) -> Header:
    """Read the header of a DICOM file; its pixels are not read.

    Raises:
        InputError: where the file cannot be read, is cut short, or its header is damaged.
    """
    header = Header(path)
    with reading(path), path.open("rb") as file:
        try:
            _read(file, path.stat().st_size, header)
        except _Damage as damage:
            raise InputError(f"{path}: {damage}: replace the file, it is damaged or was cut short.") from damage
    return header


def _read(file: BinaryIO, size: int, header: Header) -> None:
    at = 132
    meta = _Walk(file, header, "<", True)
    while at < size and meta.group(at) == 2:
        at = meta.element(at, size, keep=True)
    syntax = header.text(SYNTAX)
    if not syntax:
        raise _Damage("it does not say how it is coded (0002,0010)")
    if syntax == DEFLATED:
        file.seek(at)
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        content = unpacker.decompress(file.read(), size * MAX_INFLATION)
        if not unpacker.eof:
            raise _Damage("its packed content ends too early")
        file, at, size = BytesIO(content), 0, len(content)
    header.order = ">" if syntax == BIG_ENDIAN else "<"
    walk = _Walk(file, header, header.order, syntax != IMPLICIT)
    last = -1
    while at < size:
        tag = walk.tag(at)
        if tag <= last:
            raise _Damage(f"element ({tag >> 16:04x},{tag & 0xFFFF:04x}) is out of order")
        last = tag
        at = walk.element(at, size, keep=True)


@dataclass
class _Walk:
    """Walk over elements; each method takes where in the file it starts, and returns where it ends."""

    file: BinaryIO
    header: Header
    order: str
    explicit: bool
    depth: int = 0

    def _head(self, at: int) -> bytes:
        self.file.seek(at)
        head = self.file.read(12)
        if len(head) < 8:
            raise _Damage("it ends within an element")
        return head

    def group(self, at: int) -> int:
        return int(unpack(self.order + "H", self._head(at)[:2])[0])

    def tag(self, at: int) -> int:
        group, element = unpack(self.order + "HH", self._head(at)[:4])
        return int(group << 16 | element)

    def _open(self, at: int) -> tuple[int, bytes, int, int]:
        """Tag, kind of value, its length, and where it starts."""
        head = self._head(at)
        tag, kind = self.tag(at), head[4:6]
        if tag >> 16 == 0xFFFE or not self.explicit:
            return tag, b"", int(unpack(self.order + "I", head[4:8])[0]), at + 8
        if kind in SHORT:
            return tag, kind, int(unpack(self.order + "H", head[6:8])[0]), at + 8
        if kind not in LONG or len(head) < 12:
            raise _Damage(f"element ({tag >> 16:04x},{tag & 0xFFFF:04x}) is of an unknown kind")
        return tag, kind, int(unpack(self.order + "I", head[8:12])[0]), at + 12

    def element(self, at: int, end: int, keep: bool = False) -> int:
        tag, kind, length, start = self._open(at)
        name = f"element ({tag >> 16:04x},{tag & 0xFFFF:04x})"
        if length == UNDEFINED:
            if kind not in (b"SQ", b"UN", b"") and tag != PIXELS:
                raise _Damage(f"{name} has no length")
            stop, length = self._inner(kind).items(start, end, fragments=tag == PIXELS, open_end=True)
        else:
            stop = start + length
            if stop > end:
                raise _Damage(f"{name} claims {length} bytes, but only {end - start} are left")
            if kind == b"SQ" or (kind == b"" and self._starts_with_item(start, length)):
                self._inner(kind).items(start, stop)
        if keep and tag == PIXELS:
            self.header.pixel_bytes, self.header.compressed = length, stop != start + length
        elif keep and tag >> 16 in KEPT_GROUPS and length <= MAX_VALUE and stop == start + length:
            self.file.seek(start)
            self.header.values[tag] = self.file.read(length)
        return stop

    def _inner(self, kind: bytes) -> _Walk:
        if self.depth == MAX_DEPTH:
            raise _Damage("its sequences are nested too deeply")
        order, explicit = ("<", False) if kind == b"UN" else (self.order, self.explicit)
        return _Walk(self.file, self.header, order, explicit, self.depth + 1)

    def _starts_with_item(self, at: int, length: int) -> bool:
        return length >= 8 and self.tag(at) == ITEM

    def items(self, at: int, end: int, fragments: bool = False, open_end: bool = False) -> tuple[int, int]:
        """The items of a sequence, or the fragments of pixels; returns its end and the bytes within."""
        total = 0
        while at < end:
            tag, _, length, start = self._open(at)
            if tag == SEQUENCE_END and open_end:
                return start, total
            if tag != ITEM:
                raise _Damage(f"a sequence holds ({tag >> 16:04x},{tag & 0xFFFF:04x})")
            if length == UNDEFINED:
                at = self._elements(start, end, open_end=True)
            else:
                at = start + length
                if at > end:
                    raise _Damage(f"an item claims {length} bytes, but only {end - start} are left")
                if not fragments:
                    self._elements(start, at)
            total += at - start
        if open_end:
            raise _Damage("a sequence, or its pixels, has no end")
        return at, total

    def _elements(self, at: int, end: int, open_end: bool = False) -> int:
        while at < end:
            if open_end and self.tag(at) == ITEM_END:
                return at + 8
            at = self.element(at, end)
        if open_end:
            raise _Damage("an item has no end")
        return at
