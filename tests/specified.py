"""A reader of compressed directories that is written from FORMAT.md alone: it shares no code with the library."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from pathlib import Path

import naive
import numpy as np

ITEMSIZE = {"U8": 1, "U16": 2, "I32": 4, "I64": 8, "BF16": 2}
LETTER = {"U8": "B", "U16": "H", "I32": "i", "I64": "q"}


def table_of(strings, alphabet, bits) -> bytes:
    slots = {3: {1: 0, -1: 1}, 4: {1: 0, 2: 1, 3: 2}}[alphabet]
    made = b""
    for code in range(1 << bits):
        string = strings[code] if code < len(strings) else ()
        fields = [alphabet * place + slots[digit] for place, digit in enumerate(string) if digit]
        made += bytes([len(string), *fields, *[alphabet - 1] * (7 - len(fields))])
    return made


class Reader:
    """Reads a directory with what FORMAT.md says, and nothing of ours."""

    def __init__(self, directory: Path) -> None:
        self.settings = json.loads((directory / "config.json").read_text())["quantization_config"]
        windows = any(book["kind"] == "windows" for book in self.settings["codebooks"])
        assert (self.settings["quant_method"], self.settings["format"]) == ("qmoe", 4 if windows else 2)
        self.tensors = {}
        index = directory / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else None
        for file in directory.glob("*.safetensors"):
            content = file.read_bytes()
            size = int.from_bytes(content[:8], "little")
            for name, entry in json.loads(content[8 : 8 + size]).items():
                if name != "__metadata__" and (weight_map is None or weight_map.get(name) == file.name):
                    first, end = entry["data_offsets"]
                    self.tensors[name] = entry["dtype"], entry["shape"], content[8 + size :][first:end]
        self._strings = {}

    def strings(self, number: int) -> list:
        if number not in self._strings:
            book = self.settings["codebooks"][number]
            made = naive.paper_dictionary() if book["kind"] == "paper" else naive.tunstall(book["counts"], book["bits"])
            table = table_of(made, len(book["counts"]), book["bits"])
            assert hashlib.sha256(table).hexdigest() == book["sha256"]
            self._strings[number] = made
        return self._strings[number]

    def part(self, projection: str, part: str, expert: int | None = None):
        dtype, (count, *_), content = self.tensors[f"{projection}_{part}"]
        if expert is None:
            return content
        each = len(content) // count
        return dtype, content[expert * each : (expert + 1) * each]

    def numbers(self, projection: str, part: str, expert: int) -> list[int]:
        dtype, content = self.part(projection, part, expert)
        return list(struct.unpack(f"<{len(content) // ITEMSIZE[dtype]}{LETTER[dtype]}", content))

    def dense(self, layer: str, projection: str, expert: int, shape: tuple[int, int]) -> np.ndarray:
        number, (_, columns) = self.settings["layers"][layer][projection], shape
        if self.settings["codebooks"][number]["kind"] == "windows":
            return self.dense_windows(layer, projection, expert, *shape)
        bits, name = self.settings["codebooks"][number]["bits"], f"{layer}.{projection}"
        (fewest,) = self.numbers(name, "fewest_codewords", expert)
        counts = [fewest + above for above in self.numbers(name, "row_codewords", expert)]
        (start,) = self.numbers(name, "expert_offsets", expert)
        assert start % 16 == 0
        stream = self.part(name, "codes")[start:][: -(-sum(counts) * bits // 8) + 8]
        summed = stream + self.part(name, "row_codewords", expert)[1] + struct.pack("<i", fewest)
        dtype, levels = self.part(name, "levels", expert)
        assert self.numbers(name, "checksums", expert) == [zlib.crc32(summed + levels)]
        assert dtype == {"bfloat16": "BF16"}[self.settings["level_dtype"]]
        values = (np.frombuffer(levels, "<u2").astype("<u4") << 16).view("<f4").reshape(len(counts), -1)
        digits = naive.decode(stream, counts, self.strings(number), bits, columns)
        return naive.dequantize(np.array(digits), values)

    def dense_windows(self, layer: str, projection: str, expert: int, rows: int, columns: int) -> np.ndarray:
        book = self.settings["codebooks"][self.settings["layers"][layer][projection]]
        bits, name = book["bits"], f"{layer}.{projection}"
        (fewest,) = self.numbers(name, "fewest_codewords", expert)
        lengths = read_lengths(*self.part(name, "row_codewords", expert), rows)
        each = "B" if len(lengths) == rows else "H"
        counts = [fewest + above for above in struct.unpack(f"<{rows}{each}", lengths)]
        (start,) = self.numbers(name, "expert_offsets", expert)
        assert start % 16 == 0
        stream = self.part(name, "codes")[start:][: -(-(sum(counts) * bits + 2) // 8) + 8]
        levels = read_scales(*self.part(name, "levels", expert), rows)
        stored = self.part(name, "column_scales", expert)
        if not stored[1]:
            stored = self.part(f"{layer}.gate_proj", "column_scales", expert)
        scales = read_scales(*stored, columns)
        starts = self.numbers(name, "exception_starts", expert)
        listed = range(starts[0], starts[-1])
        positions = struct.unpack_from(f"<{len(listed)}H", self.part(name, "exception_positions"), 2 * starts[0])
        values = struct.unpack_from(f"<{len(listed)}b", self.part(name, "exception_values"), starts[0])
        summed = stream + lengths + struct.pack("<i", fewest) + levels + scales
        summed += struct.pack(f"<{len(starts)}i", *(place - starts[0] for place in starts))
        summed += struct.pack(f"<{len(listed)}H", *positions) + struct.pack(f"<{len(listed)}b", *values)
        assert self.numbers(name, "checksums", expert) == [zlib.crc32(summed)]
        exceptions = []
        for block in range(len(starts) - 1):
            for i in range(starts[block] - starts[0], starts[block + 1] - starts[0]):
                row, column = divmod(positions[i], columns)
                exceptions.append((block * max(65536 // columns, 1) + row, column, values[i]))
        trees, class_of = naive.window_trees(read_kinds(book), bits, book["clip"], book["starts"], book["quarters"])
        digits = np.array(naive.decode_windows(stream, counts, trees, class_of, bits, columns, exceptions))
        return digits.astype(np.float32) * read_bfloat16(levels)[:, None] * read_bfloat16(scales)


def read_numbers(content: bytes, count: int) -> list[int]:
    """Numbers of fewer bits than a tensor's dtype has."""
    bits = 8 * len(content) // count
    assert bits in range(1, 17)
    assert len(content) == (count * bits + 7) // 8
    return [int.from_bytes(content, "little") >> bits * i & (1 << bits) - 1 for i in range(count)]


def read_lengths(dtype: str, content: bytes, rows: int) -> bytes:
    """Row lengths of an expert of windows as they are summed."""
    return bytes(read_numbers(content, rows)) if dtype == "U8" else content


def read_scales(dtype: str, content: bytes, count: int) -> bytes:
    """Steps or column scales of an expert of windows as they are summed: bfloat16."""
    if dtype != "U8":
        return content
    smallest, shift = struct.unpack_from("<HB", content)
    numbers = read_numbers(content[3:], count)
    patterns = [smallest + ((number - 1) << shift) if number else 0 for number in numbers]
    return struct.pack(f"<{count}H", *patterns)


def read_bfloat16(content: bytes) -> np.ndarray:
    return (np.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4")


def read_kinds(book: dict) -> list[int]:
    """The kinds of a dictionary's nodes, off its entry in config.json."""
    packed = base64.b64decode(book["trees"])
    assert hashlib.sha256(packed).hexdigest() == book["sha256"]
    each, number = (book["clip"] + 1).bit_length(), int.from_bytes(packed, "little")
    assert number >> each * book["nodes"] == 0
    return [number >> each * i & (1 << each) - 1 for i in range(book["nodes"])]
