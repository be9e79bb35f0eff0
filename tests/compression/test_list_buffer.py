"""The activation buffer and the assignment of tokens to experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.errors import FormatError, ShapeError
from qmoe_lite.models.routing import Assignment


@pytest.fixture(params=["memory", "disk"])
def place(request, tmp_path):
    return None if request.param == "memory" else tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_by_sample_is_read_by_row(place, dtype):
    buffer = ListBuffer(5, 3, 7, dtype, place)
    values = torch.randn(5, 3, 7)
    for i in range(5):
        buffer.write(slice(i, i + 1), values[i : i + 1])
    assert torch.equal(buffer.read(slice(1, 4)), values[1:4].to(dtype).float())
    rows = torch.tensor([14, 0, 7])
    assert torch.equal(buffer.gather(rows), values.view(15, 7)[rows].to(dtype).float())
    assert buffer.nbytes == 15 * 7 * dtype.itemsize


def test_adding_touches_the_named_rows_only(place):
    buffer = ListBuffer(2, 4, 3, spill=place)
    buffer.write(slice(0, 2), torch.ones(2, 4, 3))
    buffer.add(torch.tensor([6, 1]), torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    expected = torch.ones(8, 3)
    expected[6] += torch.tensor([1.0, 2, 3])
    expected[1] += torch.tensor([4.0, 5, 6])
    assert torch.equal(buffer.rows, expected)


def test_a_wrong_shape_is_refused():
    with pytest.raises(ShapeError):
        ListBuffer(2, 4, 3).write(slice(0, 1), torch.ones(1, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_activations_come_back(tmp_path, dtype):
    buffer, other = ListBuffer(3, 5, 9, dtype), ListBuffer(3, 5, 9, dtype)
    buffer.write(slice(0, 3), torch.randn(3, 5, 9))
    buffer.save(tmp_path / "a.zst")
    other.load(tmp_path / "a.zst")
    assert torch.equal(buffer.rows, other.rows)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other size"])
def test_damaged_activations_are_refused(tmp_path, damage):
    buffer, file = ListBuffer(3, 5, 9), tmp_path / "a.zst"
    buffer.write(slice(0, 3), torch.randn(3, 5, 9))
    buffer.save(file)
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0x10
    file.write_bytes(data)
    target = ListBuffer(3, 5, 8 if damage == "other size" else 9)
    with pytest.raises(FormatError, match="--restart"):
        target.load(file)


def test_a_full_disk_is_told_of_as_the_system_says_it():
    buffer = ListBuffer(3, 5, 9)
    buffer.rows.zero_()
    with pytest.raises(OSError, match="No space left on device"):
        buffer.save(Path("/dev/full"))


def test_tokens_are_grouped_by_expert_in_order_without_dropped_ones():
    index = torch.tensor([[2, 0], [0, -1], [2, 1], [-1, -1], [0, 2]])
    weights = torch.arange(10.0).view(5, 2)
    assigned = Assignment.group(index, weights, 4)
    for expert in range(4):
        pairs = [(t, weights[t, k].item()) for t in range(5) for k in range(2) if index[t, k] == expert]
        rows, gates = assigned.of_expert(expert)
        assert list(zip(rows.tolist(), gates.tolist(), strict=True)) == pairs
