"""Activations on disk: the same result, nothing left, and one line for what goes wrong."""

from __future__ import annotations

import errno
import os

import pytest
import tiny
import torch
from checks import Killed, bytes_of

import qmoe_lite as qm
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.errors import FormatError, OutputError, SettingError

SMALL = {"samples": 24, "sequence_length": 32, "validation_samples": 2, "tune": "none", "codeword_bits": 10}


@pytest.fixture
def settings(tmp_path, text_file):
    (tmp_path / "spill").mkdir()
    return {"calibration": text_file, "spill": tmp_path / "spill", "grid": qm.MinMaxTernary(torch.bfloat16), **SMALL}


def test_a_run_with_its_activations_on_disk_writes_the_same_bytes(tmp_path, switch, compressed, settings):
    seen = []
    report = qm.compress(
        switch, tmp_path / "out", progress=lambda event: seen.append(os.listdir(tmp_path / "spill")), **settings
    )
    assert bytes_of(tmp_path / "out") == bytes_of(compressed[0])
    assert report.to_json() | {"seconds": 0} == compressed[1].to_json() | {"seconds": 0}
    assert seen == [[], []], "files have no names: nothing is left whatever ends the run"


@pytest.mark.slow
def test_experts_whose_outputs_are_put_into_a_buffer_of_their_own(tmp_path, tokenizer, settings):
    model = tiny.make_causal(tmp_path / "model", tokenizer, "granitemoe")
    settings |= {"group_size": 3, "grid": None, "activations": "bfloat16"}
    qm.compress(model, tmp_path / "whole", **{**settings, "spill": None})
    with pytest.raises(Killed):
        qm.compress(model, tmp_path / "out", progress=killed_in_the_second_layer, **settings)
    qm.compress(model, tmp_path / "out", **{**settings, "spill": str(settings["spill"])})
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def killed_in_the_second_layer(event):
    if event.group == 1 and event.done > 1:
        raise Killed


def test_work_begun_on_disk_goes_on_in_memory(tmp_path, switch, compressed, settings):
    def kill(event):
        raise Killed

    with pytest.raises(Killed):
        qm.compress(switch, tmp_path / "out", progress=kill, group_size=2, **settings)
    qm.compress(switch, tmp_path / "out", group_size=2, **{**settings, "spill": None})
    assert bytes_of(tmp_path / "out") == bytes_of(compressed[0])


def test_what_is_saved_of_one_is_loaded_by_the_other(tmp_path):
    values = torch.randn(3, 5, 9)
    for first, second in ((None, tmp_path), (tmp_path, None)):
        buffer, other = ListBuffer(3, 5, 9, spill=first), ListBuffer(3, 5, 9, spill=second)
        buffer.write(slice(0, 3), values)
        buffer.save(tmp_path / "a.zst")
        other.load(tmp_path / "a.zst")
        assert torch.equal(other.rows, values.view(15, 9))
        other.zero()
        assert not other.rows.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_gathered_and_added_to_as_in_memory(tmp_path, dtype):
    buffers = [ListBuffer(40, 25, 16, dtype, spill) for spill in (None, tmp_path)]
    generator = torch.Generator().manual_seed(0)
    for start in range(0, 40, 8):
        part = slice(start, start + 8)
        values = torch.randn(8, 25, 16, generator=generator)
        for buffer in buffers:
            buffer.write(part, values)
    for count in (1, 7, 300, 1000, 0):
        rows = torch.randperm(1000, generator=generator)[:count].sort().values
        values = torch.randn(count, 16, generator=generator)
        for buffer in buffers:
            buffer.add(rows, values)
        found, expected = (buffer.gather(rows) for buffer in buffers)
        assert torch.equal(found, expected)
    assert torch.equal(buffers[0].rows, buffers[1].rows)
    assert torch.equal(*(buffer.read(slice(3, 9)) for buffer in buffers))


def test_a_disk_without_room_is_one_line_before_the_work(tmp_path, switch, settings, monkeypatch):
    def full(file, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError) as error:
        qm.compress(switch, tmp_path / "out", **settings)
    assert str(error.value) == (
        f"0.00 GB of activations cannot be kept in {tmp_path}/spill: No space left on device. Name another folder, "
        f"with more room, by --spill; finished work is kept."
    )
    assert not list((tmp_path / "spill").iterdir())


def test_damage_on_the_disk_is_found(tmp_path):
    buffer = ListBuffer(2, 4, 3, spill=tmp_path)
    buffer.write(slice(0, 2), torch.ones(2, 4, 3))
    file = buffer._rows._file
    os.pwrite(file, b"\x01", 5 * 12 + 3)
    assert torch.equal(buffer.gather(torch.tensor([4, 6])), torch.ones(2, 3))
    message = r"activations in .* were damaged on the disk \(row 5\)"
    for look in (lambda: buffer.gather(torch.tensor([1, 5])), lambda: buffer.read(slice(1, 2)), lambda: buffer.rows):
        with pytest.raises(FormatError, match=message):
            look()
    os.ftruncate(file, 60)
    with pytest.raises(OutputError, match=r"cannot be read in .*: the file has become shorter"):
        buffer.gather(torch.tensor([7]))


def test_a_folder_that_is_not_there_is_refused(tmp_path, switch, run, settings):
    (tmp_path / "spill").rmdir()
    with pytest.raises(SettingError, match=r"spill is .*/spill, which is no directory. Make it, or name another"):
        qm.compress(switch, tmp_path / "out", **settings)
    code, _, err = run("compress", switch, tmp_path / "out", "--recipe", "nearest", "--spill", tmp_path / "spill")
    assert (code, "which is no directory" in err) == (1, True)
    assert not list(tmp_path.iterdir())
