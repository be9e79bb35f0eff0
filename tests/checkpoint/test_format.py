"""FORMAT.md says all that a reader needs: one that is written from it alone reads what `compress` wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from pathlib import Path

import naive
import numpy as np
import pytest
import torch

import qmoe_lite as qm
from qmoe_lite.checkpoint import format as on_disk
from qmoe_lite.checkpoint.stack import ExpertStack
from qmoe_lite.errors import FormatError

TEXT = (Path(on_disk.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
DIGIT = {"0": 0, "+": 1, "-": -1}
LEVELS = [[-0.5, 0.75], [-1.0, 1.5]]
ITEMSIZE = {"U8": 1, "U16": 2, "I32": 4, "I64": 8, "BF16": 2}
LETTER = {"U8": "B", "U16": "H", "I32": "i", "I64": "q"}


def blocks() -> list[list[list[str]]]:
    """The example's two blocks of lines of words."""
    parts = TEXT.partition("## Example")[2].split("```")[1::2]
    return [[line.split() for line in part.strip().splitlines()] for part in parts]


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
        assert (self.settings["quant_method"], self.settings["format"]) == ("qmoe", 3 if windows else 2)
        self.tensors = {}
        for file in directory.glob("*.safetensors"):
            content = file.read_bytes()
            size = int.from_bytes(content[:8], "little")
            for name, entry in json.loads(content[8 : 8 + size]).items():
                if name != "__metadata__":
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

    def dense(self, layer: str, projection: str, expert: int, columns: int) -> np.ndarray:
        number = self.settings["layers"][layer][projection]
        if self.settings["codebooks"][number]["kind"] == "windows":
            return self.dense_windows(layer, projection, expert, columns)
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

    def dense_windows(self, layer: str, projection: str, expert: int, columns: int) -> np.ndarray:
        book = self.settings["codebooks"][self.settings["layers"][layer][projection]]
        bits, name = book["bits"], f"{layer}.{projection}"
        (fewest,) = self.numbers(name, "fewest_codewords", expert)
        counts = [fewest + above for above in self.numbers(name, "row_codewords", expert)]
        (start,) = self.numbers(name, "expert_offsets", expert)
        assert start % 16 == 0
        stream = self.part(name, "codes")[start:][: -(-(sum(counts) * bits + 2) // 8) + 8]
        _, levels = self.part(name, "levels", expert)
        _, scales = self.part(name, "column_scales", expert)
        if not scales:
            _, scales = self.part(f"{layer}.gate_proj", "column_scales", expert)
        starts = self.numbers(name, "exception_starts", expert)
        listed = range(starts[0], starts[-1])
        positions = struct.unpack_from(f"<{len(listed)}H", self.part(name, "exception_positions"), 2 * starts[0])
        values = struct.unpack_from(f"<{len(listed)}b", self.part(name, "exception_values"), starts[0])
        summed = stream + self.part(name, "row_codewords", expert)[1] + struct.pack("<i", fewest) + levels + scales
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


def read_bfloat16(content: bytes) -> np.ndarray:
    return (np.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4")


def read_kinds(book: dict) -> list[int]:
    """The kinds of a dictionary's nodes, off its entry in config.json."""
    packed = base64.b64decode(book["trees"])
    assert hashlib.sha256(packed).hexdigest() == book["sha256"]
    each, number = (book["clip"] + 1).bit_length(), int.from_bytes(packed, "little")
    assert number >> each * book["nodes"] == 0
    return [number >> each * i & (1 << each) - 1 for i in range(book["nodes"])]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "switch_transformers"])
def test_a_reader_of_the_specification_reads_what_compress_wrote(directory, model_type):
    path = directory(model_type)
    reader = Reader(path)
    modules = {name: m for name, m in qm.load(path).named_modules() if isinstance(m, qm.PackedExperts)}
    assert modules.keys() == reader.settings["layers"].keys()
    name, module = list(modules.items())[-1]
    projection = module.layer.projections[-1]
    for expert in (0, module.num_experts - 1):
        found = reader.dense(name, projection, expert, module.layer.shapes[projection][1])
        assert np.array_equal(found, module.dense(expert, projection).double().numpy())


def test_the_examples_bytes_are_those_that_are_written():
    matrices, tensors = blocks()
    book = qm.Codebook.fit([1, 14, 1], bits=8)
    levels = torch.tensor(LEVELS, dtype=torch.bfloat16)
    digits = [np.array([[DIGIT[sign] for sign in row] for row in rows], np.int8) for _, _, *rows in matrices]
    packed = [qm.encode(each, levels, book) for each in digits]
    found = on_disk.pack_experts(packed)
    assert [name for name, *_ in tensors] == list(on_disk.parts_of(book))
    for name, *hexadecimal in tensors:
        assert found[name].view(torch.uint8).numpy().tobytes().hex(" ") == " ".join(hexadecimal), name
    assert naive.tunstall([1, 14, 1], 8)[0x69] == (0, 0, 0, 0, 0, 0, 0, -1, -1)
    assert book.to_config()["sha256"].startswith("80cdf1b7")
    stack = ExpertStack("experts.wi", 2, (2, 12), book, found)
    for expert, expected in enumerate(digits):
        assert torch.equal(qm.decode(stack.checked(expert))[0], torch.from_numpy(expected))


def test_windows_are_stored_as_specified():
    rng = np.random.default_rng(2)
    experts = [np.rint(rng.standard_t(3, (35, 4000)) * spread).astype(np.int16) for spread in (0.4, 3)]
    experts[1][[3, 20, 34], [0, 7, 3999]] = 900, -32767, 32767
    dictionary = qm.Dictionary.fit(np.concatenate(experts), longest=8)
    steps = torch.from_numpy(rng.random((2, 35, 1), dtype=np.float32)).to(torch.bfloat16)
    scales = torch.from_numpy(rng.random((2, 4000), dtype=np.float32)).to(torch.bfloat16)
    packed = [qm.encode(*parts[:2], dictionary, parts[2]) for parts in zip(experts, steps, scales, strict=True)]
    found = on_disk.pack_experts(packed)
    assert list(found) == list(on_disk.parts_of(dictionary))

    book = dictionary.to_config()
    trees, class_of = naive.window_trees(read_kinds(book), book["bits"], book["clip"], book["starts"], book["quarters"])
    starts, positions, values = (found[f"exception_{name}"].numpy() for name in ("starts", "positions", "values"))
    block_rows = 65536 // 4000
    for expert, digits in enumerate(experts):
        counts = found["row_codewords"][expert].numpy().astype(int) + int(found["fewest_codewords"][expert])
        begin, size = int(found["expert_offsets"][expert]), (int(counts.sum()) * book["bits"] + 2 + 7) // 8 + 8
        codes = found["codes"][begin : begin + size].numpy().tobytes()
        exceptions = []
        for block in range(3):
            for i in range(starts[expert, block], starts[expert, block + 1]):
                row, column = divmod(int(positions[i]), 4000)
                exceptions.append((block * block_rows + row, column, int(values[i])))
        back = naive.decode_windows(codes, counts, trees, class_of, book["bits"], 4000, exceptions)
        assert (np.array(back) == digits).all()
        expected = digits * steps[expert].float().numpy() * scales[expert].float().numpy()
        assert (packed[expert].dense().numpy() == expected).all()
        own = slice(starts[expert, 0], starts[expert, -1])
        rest = starts[expert] - starts[expert, 0], positions[own], values[own]
        stored = (found["row_codewords"][expert], found["fewest_codewords"][expert], steps[expert], scales[expert])
        summed = codes + b"".join(part.reshape(-1).view(torch.uint8).numpy().tobytes() for part in stored)
        assert zlib.crc32(summed + b"".join(part.tobytes() for part in rest)) == int(found["checksums"][expert])


def test_every_part_and_field_is_specified(directory):
    settings = json.loads((directory() / "config.json").read_text())["quantization_config"]
    dictionary = qm.Dictionary.fit_counts([3, 1]).to_config()
    parts = {part for some in on_disk.PARTS_OF.values() for part in some}
    for name in {*dictionary, *settings, *settings["codebooks"][0], *parts}:
        assert f"`{name}`" in TEXT, name
    assert f"version {on_disk.FORMAT}" in TEXT.splitlines()[0]


def test_equal_codebooks_are_stored_once_and_what_is_unknown_is_left_out():
    one, two = ({"kind": "tunstall", "bits": bits} for bits in (8, 9))
    made = on_disk.quantization_config({"a": {"wi": one, "wo": two}, "b": {"wi": two, "wo": dict(one)}}, recipe="x")
    assert made["codebooks"] == [one, two]
    assert made["layers"] == {"a": {"wi": 0, "wo": 1}, "b": {"wi": 1, "wo": 0}}
    assert list(made) == ["quant_method", "format", "recipe", "codebooks", "layers"]


def test_a_stack_checks_an_expert_whose_codes_lie_elsewhere():
    book = qm.Codebook.fit([1, 14, 1], bits=8)
    matrix = qm.encode(np.eye(2, 12, dtype=np.int8), torch.tensor(LEVELS, dtype=torch.bfloat16), book)
    parts = on_disk.pack_experts([matrix] * 3)
    codes = parts.pop("codes")
    stack = ExpertStack("experts.wi", 3, (2, 12), book, parts, codes_bytes=len(codes))
    start, used = stack.span(1)
    whole = stack.matrix(1, codes[start : start + used].clone())
    stack.check_sum(1, whole)
    stack.check_codes(1, whole)
    assert stack.valid.tolist() == [False, True, False]
    spoilt = stack.matrix(2, codes[start : start + used] ^ 1)
    with pytest.raises(FormatError, match=r"expert 2 of experts\.wi is damaged \(checksum\)"):
        stack.check_sum(2, spoilt)
    parts["expert_offsets"][0] = 8
    with pytest.raises(FormatError, match=r"expert 0 of experts\.wi does not lie inside its codes"):
        stack.span(0)
