"""Damages a pack file and a directory of the published format, as `mutate` does compressed directories."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from contextlib import suppress

import mutate
import zstandard
from mutate import Mutant

PACKED = "model.pack"
START, HEAD = struct.Struct("<8sIII"), struct.Struct("<IIIBxxx")


def flip_anywhere(m: Mutant) -> str:
    name = m.rng.choice(sorted(m.files))
    content = bytearray(m.files[name])
    bits = [
        m.rng.randrange(8 * min(len(content), m.rng.choice([64, 400, 1 << 30]))) for _ in range(m.rng.choice([1, 3]))
    ]
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    m.files[name] = bytes(content)
    return f"bits {bits} of {name}"


def overwrite_anywhere(m: Mutant) -> str:
    name = m.rng.choice(sorted(m.files))
    content = bytearray(m.files[name])
    start, size = m.rng.randrange(len(content)), m.rng.choice([1, 4, 16, 300])
    content[start : start + size] = m.rng.choice([bytes(size), b"\xff" * size, m.rng.randbytes(size)])
    m.files[name] = bytes(content)
    return f"{size} bytes from {start} of {name}"


def forge_list(m: Mutant) -> str:
    """A pack file's list of files says something else."""
    magic, version, length, _ = START.unpack_from(m.files[PACKED])
    listed = json.loads(m.files[PACKED][START.size :][:length])
    entry = m.rng.choice(listed["files"])
    match m.rng.randrange(4):
        case 0:
            entry["name"] = m.rng.choice([*mutate.PLACES, *mutate.NASTY, "a/../../b", "/tmp/x", "config.json/x"])
        case 1:
            entry["size"] = m.rng.choice([entry["size"] + 1, entry["size"] - 1, *mutate.NASTY])
        case 2:
            listed["files"].append(dict(entry))
        case _:
            listed["files"] = m.rng.choice([[], None, 7, {}, [7], listed["files"][:-1], listed["files"][::-1]])
    text = json.dumps(listed).encode("utf-8", "surrogatepass")
    start = START.pack(magic, version, len(text), zlib.crc32(text))
    m.files[PACKED] = start + text + m.files[PACKED][START.size + length :]
    return f"the list says {str(listed)[:60]}"


def forge_record(m: Mutant) -> str:
    """A record of an archive of torch.save is another; the archive's checksums are right."""
    name = m.rng.choice(sorted(name for name in m.files if name.endswith(".pt")))
    records = _records(m.files[name])
    which = m.rng.choice(sorted(records))
    content = bytearray(records[which])
    match m.rng.randrange(4):
        case 0:
            content = content[: m.rng.randrange(len(content))]
        case 1:
            other = m.rng.choice(sorted(records))
            content, records[other] = bytearray(records[other]), bytes(content)
        case _:
            for _ in range(m.rng.choice([1, 1, 4])):
                content[m.rng.randrange(len(content))] ^= 1 << m.rng.randrange(8)
    records[which] = bytes(content)
    m.files[name] = _archive(records)
    return f"record {which} of {name}"


def _records(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _archive(records: dict[str, bytes]) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return written.getvalue()


def unpacked(content: bytes) -> tuple[dict[str, bytes], list[tuple[int, int]]]:
    """What a pack file holds, by FORMAT.md, without a look at checksums; and of each frame its place and its CRC-32."""
    _, _, length, _ = START.unpack_from(content)
    listed = json.loads(content[START.size :][:length])["files"]
    place, files, sums = START.size + length, {}, []
    for entry in listed:
        files[entry["name"]] = b""
        while len(files[entry["name"]]) < entry["size"]:
            count, size, _, word = HEAD.unpack_from(content, place)
            body, streams = content[place + HEAD.size :][:size], []
            for _ in range(word):
                (own,) = struct.unpack_from("<I", body)
                plain, own = own >> 31, own & 0x7FFFFFFF
                stream, body = body[4:][:own], body[4 + own :]
                streams.append(stream if plain else zstandard.decompress(stream, max_output_size=1 << 22))
            raw = bytearray()
            for parts in zip(*streams, strict=True):
                rotated = int.from_bytes(bytes(parts), "big")
                raw += (
                    (rotated >> 1 | (rotated & 1) << 8 * word - 1).to_bytes(word, "little")
                    if word > 1
                    else bytes(parts)
                )
            assert len(raw) == count
            sums.append((place, zlib.crc32(bytes(raw), len(sums))))
            files[entry["name"]] += bytes(raw)
            place += HEAD.size + size
    return files, sums


def seal_pack(files: dict[str, bytes]) -> None:
    """Make a pack file's checksums right, as far as it can be read."""
    with suppress(Exception):
        content = bytearray(files[PACKED])
        magic, version, length, _ = START.unpack_from(content)
        content[: START.size] = START.pack(magic, version, length, zlib.crc32(bytes(content[START.size :][:length])))
        files[PACKED] = bytes(content)
        for place, crc in unpacked(bytes(content))[1]:
            content[place + 8 : place + 12] = crc.to_bytes(4, "little")
        files[PACKED] = bytes(content)


def seal_archives(files: dict[str, bytes]) -> None:
    """An archive whose records can be read is written anew."""
    for name in sorted(name for name in files if name.endswith(".pt")):
        with suppress(Exception):
            files[name] = _archive(_records(files[name]))


OF_PACK = [(flip_anywhere, 5), (overwrite_anywhere, 3), (mutate.cut_or_grow, 2), (forge_list, 4)]
OF_PUBLISHED = [(flip_anywhere, 4), (mutate.cut_or_grow, 2), (forge_record, 8), (mutate.edit_config, 3)]
OF_PUBLISHED += [(mutate.spoil_text, 1)]
