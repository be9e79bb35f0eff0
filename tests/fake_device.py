"""GPUs that are none, for the GPU tier: what is put off until it is waited for shows what was not waited for."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import naive
import numpy as np
import torch
from checks import naive_packets, naive_window_packets, naive_windows

from qmoe_lite.coding.codes import bytes_of_stream
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.offload.gpu_device import Repack


class Mark(int):
    """The event of the end of what was computed; a plain number is that of a copy."""


MATRICES = {}  # that were read, by code and bytes


@functools.cache
def strings(codebook):
    return naive.strings_of(codebook.table.tolist(), codebook.digits)


class FakeDevice:
    """Copies and lays out nothing before its event is waited for, as a stream may; computes at once, on the CPU.

    Packets are made and read by their description alone, from the memory that the tier says.
    """

    def __init__(self, name="fake:0", memory=1 << 30, fails_at=()):
        self.name, self.device, self.memory = name, torch.device("cpu"), memory
        self.turns = self.copies = 0
        self._fails_at = set(fails_at)
        self._pending = []
        self._used = {}  # place in memory, to the mark after what was computed from it
        self._marks = self._reached = 0  # the last mark, and the last one that a copy begun so far waits for

    def allocate(self, size):
        if size > self.memory:
            raise torch.OutOfMemoryError("fake out of memory")
        assert not self._used, "memory is given back before what was computed from it is done"
        return torch.full((size,), 0x55, dtype=torch.uint8)

    def stage(self, size):
        return torch.full((size,), 0x33, dtype=torch.uint8)

    def fill(self, copies, repacks, after):
        self._reached = max(self._reached, after or 0)  # copies are in order
        for target in [target for _, target in copies] + [repack.words for repack in repacks]:
            begin, end = target.data_ptr(), target.data_ptr() + target.nbytes
            last = max((mark or 10**9 for at, mark in self._used.items() if begin <= at < end), default=0)
            assert self._reached >= last, "the slot is overwritten before what was computed from it is done"
        self.copies += 1
        self._pending.append((self.copies, copies, repacks))
        return self.copies

    def wait(self, event):
        assert not isinstance(event, Mark), "what is computed is in order as it is"
        while self._pending and self._pending[0][0] <= event:
            _, copies, repacks = self._pending.pop(0)
            for source, target in copies:
                target.copy_(source)
            for each in repacks:
                self.repack(*each)

    def waited(self):
        return None

    def repack(self, codes, offsets, firsts, starts, words, codebook):
        """Lay out by the description."""
        counts = firsts[0].diff()
        if isinstance(codebook, Dictionary):
            own = codes[int(offsets) :][: bytes_of_stream(codebook, int(counts.sum()))]
            made, expected = naive_window_packets(naive_windows(own, counts, codebook), codebook)
            assert starts.tolist() == expected
            words.view(torch.int32).copy_(torch.tensor(made).to(torch.int32).view(-1, 4))
            return
        one = SimpleNamespace(codes=codes[int(offsets) :], codebook=codebook, count_codewords=lambda: counts)
        made, expected = naive_packets(one)
        assert starts.tolist() == expected
        words.view(torch.int32).copy_(torch.tensor(made).to(torch.int32).view(-1, 4))

    def finish(self, event):
        if not isinstance(event, Mark):
            return self.wait(event)
        self._used = {at: mark for at, mark in self._used.items() if not 0 < mark <= event}

    def mark(self):
        self._marks += 1
        for at, mark in self._used.items():
            self._used[at] = mark or self._marks
        return Mark(self._marks)

    def take_turn(self, packets, slots):
        """Note that an expert's memory is read until the next mark."""
        self.turns += 1
        if self.turns in self._fails_at:
            raise torch.OutOfMemoryError("fake out of memory")
        for each in packets.values():
            parts = each.words, each.starts, each.scales if hasattr(each, "dictionary") else each.levels
            for slot in slots:
                for part, stride in zip(parts, each.strides, strict=False):
                    self._used[part[slot * stride :].data_ptr()] = 0

    def begin(self, experts, packets, x, index, weights):
        return FakeCall(self, experts, packets, x, index, weights)

    def matrix(self, packets, slot):
        """Read a slot's matrix by the description."""
        read = window_matrix if hasattr(packets, "dictionary") else level_matrix
        return read(packets, slot)


def level_matrix(packets, slot):
    """The matrix in a slot of digits that have levels."""
    words, starts, levels = packets.strides
    book = packets.codebook
    own = packets.starts[slot * starts :][: packets.rows + 1].tolist()
    quads = packets.words[slot * words :][: own[-1]]
    own_levels = packets.levels[slot * levels :][: packets.rows * packets.levels_each]
    key = book, quads.numpy().tobytes(), own_levels.view(torch.uint8).numpy().tobytes()
    if key not in MATRICES:
        digits = naive.digits_of_packets(quads.tolist(), own, strings(book), book.bits, packets.columns)
        dense = naive.dequantize(np.array(digits), own_levels.view(packets.rows, -1).tolist())
        MATRICES[key] = torch.from_numpy(dense).float()
    return MATRICES[key]


def window_matrix(packets, slot):
    """The matrix in a slot of codes of windows, one window and one exception after another."""
    words, rows, scales, listed = (slot * stride for stride in packets.strides)
    book, count = packets.dictionary, packets.rows
    own, beyond = (part[rows:][: count + 1].tolist() for part in (packets.starts, packets.exception_starts))
    quads, exceptions = packets.words[words:][: own[-1]], packets.exceptions[listed:][: beyond[-1]]
    steps, factors = packets.steps[rows:][:count], packets.scales[scales:][: packets.columns]
    parts = quads, torch.tensor(beyond), exceptions, steps, factors
    key = book, *(part.numpy().tobytes() for part in parts)
    if key not in MATRICES:
        table, lengths = book.digits_table.tolist(), book.lengths.tolist()
        digits = []
        for row in range(count):
            held = []
            for quad in quads[own[row] : own[row + 1]].tolist():
                bits = sum(word << 32 * i for i, word in enumerate(quad))
                assert bits & 0xFFFF == len(held), "a packet begins where the one before ended"
                found = [bits >> 16 + book.bits * i & (4 << book.bits) - 1 for i in range((128 - 18) // book.bits)]
                held += [digit for window in found for digit in table[window][: lengths[window]]]
            for word in exceptions[beyond[row] : beyond[row + 1]].tolist():
                held[word & 0xFFFF] += word >> 16
            digits.append(held[: packets.columns])
        MATRICES[key] = torch.tensor(digits).float() * steps[:, None] * factors
    return MATRICES[key]


class FakeCall:
    """Each pair of a token and an expert on its own, so that nothing depends on which others have their turn."""

    def __init__(self, device, experts, packets, x, index, weights):
        self.device, self.experts, self.packets = device, experts, packets
        self.x, self.index, self.weights = x.float(), index, weights.float()
        self.y = torch.zeros(*index.shape, x.shape[1])
        self.written = torch.zeros(index.shape, dtype=torch.bool)

    def turn(self, places, sizes, activation):
        self.device.take_turn(self.packets, places.values())
        first, (last,) = self.experts.layer.stages
        for expert, slot in places.items():
            mine = self.index == expert
            assert sizes[expert] == mine.sum() > 0
            assert not self.written[mine].any(), "an expert has two turns"
            self.written |= mine
            matrices = {name: self.device.matrix(each, slot) for name, each in self.packets.items()}
            for token, k in mine.nonzero().tolist():
                inside = activation([matrices[name] @ self.x[token] for name in first])
                self.y[token, k] = self.weights[token, k] * (matrices[last] @ inside)

    def total(self):
        named = (self.index >= 0) & (self.index < self.experts.num_experts)
        assert torch.equal(self.written, named), "every expert has its turn"
        return self.y.sum(1)


class EmulatedDevice(FakeDevice):
    """The same order of things, with the kernels' own Python."""

    def repack(self, *given):
        Repack(*given).run()

    def begin(self, experts, packets, x, index, weights):
        call = experts.begin_call(packets, x, index, weights)
        turn = call.turn

        def noted(places, *rest):
            self.take_turn(packets, places.values())
            turn(places, *rest)

        call.turn = noted
        return call
