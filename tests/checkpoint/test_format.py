"""FORMAT.md says all that a reader needs: one that is written from it alone reads what `compress` wrote."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import naive
import numpy as np
import pytest
import torch
from specified import Reader, read_kinds, read_lengths, read_scales

import qmoe_lite as qm
from qmoe_lite.checkpoint import format as on_disk
from qmoe_lite.checkpoint.reader import Place
from qmoe_lite.checkpoint.stack import ExpertStack, index_bytes
from qmoe_lite.errors import FormatError

TEXT = (Path(on_disk.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
DIGIT = {"0": 0, "+": 1, "-": -1}
NARROW = ("row_codewords", "levels", "column_scales")
LEVELS = [[-0.5, 0.75], [-1.0, 1.5]]


def blocks() -> list[list[list[str]]]:
    """The example's two blocks of lines of words."""
    parts = TEXT.partition("## Example")[2].split("```")[1::2]
    return [[line.split() for line in part.strip().splitlines()] for part in parts]


def bytes_of(*tensors: torch.Tensor) -> bytes:
    return b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "switch_transformers"])
def test_a_reader_of_the_specification_reads_what_compress_wrote(directory, model_type):
    path = directory(model_type)
    reader = Reader(path)
    modules = {name: m for name, m in qm.load(path).named_modules() if isinstance(m, qm.PackedExperts)}
    assert modules.keys() == reader.settings["layers"].keys()
    name, module = list(modules.items())[-1]
    projection = module.layer.projections[-1]
    for expert in (0, module.num_experts - 1):
        found = reader.dense(name, projection, expert, module.layer.shapes[projection])
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
    assert on_disk.bytes_of_experts(packed) == sum(part.nbytes for part in found.values())
    shared = on_disk.pack_experts(packed, shares_scales=True)
    assert on_disk.bytes_of_experts(packed, shares_scales=True) == sum(part.nbytes for part in shared.values())

    book = dictionary.to_config()
    trees, class_of = naive.window_trees(read_kinds(book), book["bits"], book["clip"], book["starts"], book["quarters"])
    starts, positions, values = (found[f"exception_{name}"].numpy() for name in ("starts", "positions", "values"))
    block_rows = 65536 // 4000
    kinds = {torch.uint8: "U8", torch.uint16: "U16", torch.bfloat16: "BF16"}
    for expert, digits in enumerate(experts):
        row = {name: (kinds[found[name].dtype], bytes_of(found[name][expert])) for name in NARROW}
        lengths = read_lengths(*row["row_codewords"], 35)
        assert read_scales(*row["levels"], 35) == bytes_of(steps[expert])
        assert read_scales(*row["column_scales"], 4000) == bytes_of(scales[expert])
        counts = np.frombuffer(lengths, np.uint8).astype(int) + int(found["fewest_codewords"][expert])
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
        summed = codes + lengths + bytes_of(found["fewest_codewords"][expert], steps[expert], scales[expert])
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


def test_steps_that_take_as_many_bytes_as_there_are_rows_are_counted_unpacked():
    """Eight numbers of 5 bits and their header are 8 bytes."""
    small = {"row_codewords": (2, 8), "levels": (2, 8), "column_scales": (2, 0)}
    places = {part: Place(Path("f"), 0, shape[0] * shape[1], torch.uint8, shape) for part, shape in small.items()}
    assert index_bytes(places, (8, 64)) == 16 + 16 + 2 * 8 * (2 + 4)
