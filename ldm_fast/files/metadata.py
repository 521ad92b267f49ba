"""The orientation in a picture's metadata, and a picture without its metadata, for files whose metadata is damaged.

JPEG, PNG, WebP and TIFF are taken apart here only as far as needed to tell metadata from picture. Nothing in the
metadata is understood but the orientation, so nothing else in it can go wrong.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

ORIENTATION = 0x0112
WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I"}  # the TIFF types that an orientation may have
PNG, TIFF = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*")
JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
VP8X_METADATA = 0x20 | 0x08 | 0x04  # the flags of a profile, EXIF and XMP
# The tags of a TIFF file without which its pixels cannot be read or shown.
TIFF_TAGS = {
    *range(254, 260),
    *(262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 338, 339, 347),
    *(512, 513, 514, 519, 520, 521, 529, 530, 531, 532),
}


def orientation(data: bytes, info: dict[Any, Any]) -> int:
    """Return the EXIF orientation of a picture, 1 to 8; 1 if its metadata does not tell.

    data: the file. info: what Pillow has read from it, for formats that are not taken apart here.
    """
    blocks = [content for kind, content in _parts(data) if kind in (b"\xe1", b"eXIf", b"EXIF")]
    blocks += [info["exif"]] if isinstance(info.get("exif"), bytes) else []
    blocks += [data] if data.startswith(TIFF) else []
    for block in (*blocks, _raw_profile(info)):
        value = _in_tiff(block.removeprefix(b"Exif\0\0"))
        if value is not None:
            return value
    for key in ("XML:com.adobe.xmp", "xmp"):
        xmp = info.get(key, "")
        text = xmp.decode("latin-1") if isinstance(xmp, bytes) else str(xmp)
        if found := re.search(r'tiff:Orientation(?:="|>)([1-8])', text):
            return int(found[1])
    return 1


def _raw_profile(info: dict[Any, Any]) -> bytes:
    """Return the EXIF block that ImageMagick writes into a PNG, as hexadecimal digits after three lines."""
    try:
        return bytes.fromhex("".join(str(info.get("Raw profile type exif", "")).split("\n")[3:]))
    except ValueError:
        return b""


def _in_tiff(block: bytes) -> int | None:
    """Return the orientation in the first directory of a TIFF file, which an EXIF block is."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return None
    for tag, kind, _, value in _entries(block, order):
        if tag == ORIENTATION and kind in WHOLE_NUMBERS:
            number = int(struct.unpack_from(order + WHOLE_NUMBERS[kind], value)[0])
            return number if 1 <= number <= 8 else None
    return None


def unturned(data: bytes) -> bytes:
    """Return a TIFF file with orientation 1, because Pillow may turn these itself; any other file as it is."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return data
    (start,) = struct.unpack_from(order + "I", data, 4) if len(data) >= 8 else (0,)
    for number, (tag, kind, _, _) in enumerate(_entries(data, order)):
        if tag == ORIENTATION and kind in WHOLE_NUMBERS:
            at = start + 2 + 12 * number + 8
            return (
                data[:at]
                + struct.pack(order + WHOLE_NUMBERS[kind], 1)
                + data[at + struct.calcsize(WHOLE_NUMBERS[kind]) :]
            )
    return data


def _entries(data: bytes, order: str) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield tag, type, count, and the four bytes of the value, of each whole entry of the first directory."""
    if len(data) < 8:
        return
    (start,) = struct.unpack_from(order + "I", data, 4)
    count = struct.unpack_from(order + "H", data, start)[0] if start + 2 <= len(data) else 0
    for at in range(start + 2, start + 2 + 12 * count, 12):
        if at + 12 <= len(data):
            yield struct.unpack_from(order + "HHI4s", data, at)


def without_metadata(data: bytes) -> bytes:
    """Return a JPEG, PNG, WebP or TIFF file with what its pixels need alone; anything else as it is."""
    if data.startswith(b"\xff\xd8"):
        parts = list(_parts(data))
        dropped = {
            bytes([marker]) for marker in (*range(0xE0, 0xEE), 0xEF, 0xFE)
        }  # but Adobe's, which tells the colours
        start = JFIF if any(kind == b"\xe0" for kind, _ in parts) else b""
        kept = (_segment(kind, content) for kind, content in parts if kind not in dropped)
        return b"\xff\xd8" + start + b"".join(kept)
    if data.startswith(PNG):
        chunks = (data[at:end] for at, end in _png_chunks(data))
        return PNG + b"".join(chunk for chunk in chunks if chunk[4:5].isupper() or chunk[4:8] == b"tRNS")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kept = (_riff_chunk(kind, content) for kind, content in _parts(data) if kind not in (b"EXIF", b"XMP ", b"ICCP"))
        body = b"WEBP" + b"".join(kept)
        return b"RIFF" + struct.pack("<I", len(body)) + body
    return _bare_tiff(data) if data.startswith(TIFF) else data


def _parts(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of the parts of a JPEG, PNG or WebP file; the rest of a JPEG, from its scan on, as b""."""
    if data.startswith(b"\xff\xd8"):
        at = 2
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b"") and at + 4 <= len(data):
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            yield data[at + 1 : at + 2], data[at + 4 : at + 2 + length]
            at += 2 + length
        yield b"", data[at:]
    elif data.startswith(PNG):
        for at, end in _png_chunks(data):
            yield data[at + 4 : at + 8], data[at + 8 : end - 4]
    elif data[:4] == b"RIFF":
        at = 12
        while at + 8 <= len(data):
            length = int.from_bytes(data[at + 4 : at + 8], "little")
            yield data[at : at + 4], data[at + 8 : at + 8 + length]
            at += 8 + length + length % 2


def _png_chunks(data: bytes) -> Iterator[tuple[int, int]]:
    at = len(PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield at, end
        at = end


def _segment(kind: bytes, content: bytes) -> bytes:
    return b"\xff" + kind + struct.pack(">H", len(content) + 2) + content if kind else content


def _riff_chunk(kind: bytes, content: bytes) -> bytes:
    if kind == b"VP8X":
        content = bytes([content[0] & ~VP8X_METADATA]) + content[1:]
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _bare_tiff(data: bytes) -> bytes:
    """Return a TIFF file whose first directory has only the tags that its pixels need, and is the only one."""
    order = "<" if data.startswith(b"II") else ">"
    entries = [struct.pack(order + "HHI4s", *entry) for entry in _entries(data, order) if entry[0] in TIFF_TAGS]
    (start,) = struct.unpack_from(order + "I", data, 4) if len(data) >= 8 else (0,)
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :] if entries else data
