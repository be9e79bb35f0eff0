"""What compressing a model holds in memory and on disk, by the sizes of what the driver keeps.

`compression.run` takes one block at a time: its dense part, then its experts a group at a time, while the samples'
activations wait in list buffers. Each function here says what one of these stages holds; the peak is the largest stage
on top of what all of them hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from qmoe_lite.compression.calibration import noise_counts, window_length
from qmoe_lite.compression.expert_runner import GATHERED_TOKENS, KEPT_BYTES
from qmoe_lite.compression.group_sizes import expert_bytes, groups_of
from qmoe_lite.compression.layer_parts import LAYER_SAMPLE
from qmoe_lite.compression.layer_sensitivity import amounts
from qmoe_lite.compression.losses import SLICE_VALUES
from qmoe_lite.compression.run_samples import samples_for, twins_for
from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.shares import MEASURED
from qmoe_lite.inspection.anatomy import Anatomy, BlockParts
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.quantization.grid import Grid, UniformGrid

TENSOR_BYTES = 2000  # of names, places and checks of one tensor of the dense model
_DENSE_SHARD = 2 << 30
_LOGITS = 4  # tensors of a slice of logits: products, logits, their softmax, what becomes of it
_HEAD_ROWS = 1 << 14  # of the head that are made float32 at a time
_ROUTING_BYTES = 12  # of a token's place and weight at one of its experts
_GROUPING_BYTES = 60  # of the same while tokens are grouped by expert
_SAMPLE_DIGITS = 1 << 22
_KEPT = 1.3  # bytes of a layer's groups on disk, over those of its codes in memory
_LEAST = 0.8  # share of the rate that the experts take in any case


@dataclass(frozen=True)
class Rows:
    """How many samples a run has, and their tokens in each stack.

    Attributes
    ----------
    samples : int
        For Hessians.
    all : int
        With those for validation, which go through the model twice, and with the twins.
    tokens : list of int
        Of a sample, by stack.
    twins : int
        Of samples that are tuned on: they go through the dense model.
    """

    samples: int
    all: int
    tokens: list[int]
    twins: int = 0

    @property
    def validation(self) -> int:
        return self.all - self.samples - self.twins


def rows_of(anatomy: Anatomy, settings: Settings) -> Rows:
    """Return the samples that a run takes, if the text is long enough."""
    samples = samples_for(anatomy.layers, settings)
    kept = min(settings.validation_samples, (samples + settings.validation_samples) // 8)
    tokens = [settings.sequence_length]
    if anatomy.family.seq2seq:
        length = window_length(settings.sequence_length)
        masked, spans = noise_counts(length)
        tokens = [length - masked + spans + 1, masked + spans + 1]
    twins = min(samples, twins_for(anatomy.layers, settings))
    return Rows(samples, samples + 2 * kept + twins, tokens, twins)


def rows_measured(anatomy: Anatomy, settings: Settings, rows: Rows) -> Rows | None:
    """Return the samples, and their copies for each layer, by which it is measured what layers lose; None if it is not.

    Samples are those of the dense model; as many as `validation` are copied for all layers together.
    """
    if settings.sensitivity != MEASURED:
        return None
    given = settings.sequence_length
    length, windows, samples = amounts(anatomy.layers, given, rows.samples, anatomy.family.seq2seq)
    tokens = [each * length // given for each in rows.tokens]
    return Rows(samples, samples + windows * len(anatomy.layers), tokens)


def compressed_bytes(anatomy: Anatomy, bits: float) -> tuple[int, int]:
    """Return the bytes of experts and of all others in a compressed model."""
    return math.ceil(anatomy.experts * bits / 8), anatomy.kept_bytes


@dataclass(frozen=True)
class Need:
    """What a compression needs.

    Attributes
    ----------
    always : dict, part to bytes
        Held from the first block to the last.
    stages : dict, stage to (part to bytes)
        Held in it besides; the largest decides.
    certain : int
        Bytes of memory that are touched in any case.
    disk : int
        Bytes at OUT.
    certain_disk : int
        Bytes of them in any case.
    gpu : int or None
        Bytes on the GPU.
    activations : int
        Bytes of the activations of all samples, in memory or in the folder of --spill.
    """

    always: dict[str, int]
    stages: dict[str, dict[str, int]]
    certain: int
    disk: int
    certain_disk: int
    gpu: int | None
    activations: int

    @property
    def stage(self) -> str:
        """The one that takes most."""
        return max(self.stages, key=lambda name: sum(self.stages[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """What the peak is made of."""
        return self.always | self.stages[self.stage]

    @property
    def memory(self) -> int:
        """Bytes at the peak, beyond what the program itself takes."""
        return sum(self.parts.values())


def need_of(anatomy: Anatomy, settings: Settings, grid: Grid, bits: float, spilled: bool = False) -> Need:
    """Work out what a compression needs.

    Parameters
    ----------
    anatomy : Anatomy
        Of the dense model.
    settings, grid
        As `choice.choose` returned them.
    bits : float
        Stored bits a weight that the experts will take.
    spilled : bool
        The activations of all samples are on a disk.
    """
    calibrated, rows = settings.recipe != "nearest", rows_of(anatomy, settings)
    cpu = settings.device == "cpu"
    always = {"names and places of tensors": TENSOR_BYTES * anatomy.tensors}
    stages: dict[str, dict[str, int]] = {}
    group = max((_group(anatomy, layer, settings) for layer in anatomy.layers), key=lambda g: g[1])
    writing = max(_layer_codes(layer, grid, bits) for layer in anatomy.layers)
    device_parts: list[int] = []
    certain = group[0] if cpu else 0
    measured = rows_measured(anatomy, settings, rows)
    several = [rows] if measured is None else [rows, measured]
    buffers = max(_buffers(anatomy, settings, each) for each in several) if calibrated else 0
    if calibrated:
        always["outside the blocks, float32"] = 4 * anatomy.outside
        if not spilled:
            always["activations of all samples"] = buffers
            certain += _buffers(anatomy, settings, replace(rows, all=rows.samples, twins=0))
        always["routing of all samples"] = _routing(anatomy, rows)
        certain += 4 * anatomy.outside
        blocks = [
            (_dense(anatomy, block, settings, rows, number), block)
            for number, stack in enumerate(anatomy.stacks)
            for block in stack
        ]
        (weights, passing, grouping), _ = max(blocks, key=lambda each: sum(each[0]))
        stages["a block's dense part"] = {"grouping of tokens by expert": grouping}
        if cpu:
            stages["a block's dense part"] |= {"block in float32": weights, "one batch in it": passing}
        device_parts.append(weights + passing)
        if cpu:
            stages["logits of validation samples"] = {"logits": _logits(anatomy, rows)}
        else:
            device_parts.append(_logits(anatomy, rows) + 4 * anatomy.vocabulary * anatomy.hidden)
    stages["a group of experts"] = {"codes of the layer": writing[0]} | ({"the group": group[1]} if cpu else {})
    stages["writing a layer"] = {"codes of the layer, and what they are put together from": writing[1]}
    stages["writing what is not in experts"] = {"tensors": min(_DENSE_SHARD, anatomy.kept_bytes)}
    device_parts.append(group[1])
    experts, others = compressed_bytes(anatomy, bits)
    saved = _saved(anatomy, settings, rows) + int(_KEPT * writing[0]) if calibrated else 0
    least = min(bits, _LEAST * (settings.rate or 0.2))
    return Need(
        always,
        stages,
        certain,
        experts + others + saved,
        compressed_bytes(anatomy, least)[0] + others,
        None if cpu else max(device_parts),
        buffers,
    )


def _width(settings: Settings) -> int:
    return 4 if settings.activations == "float32" else 2


def _buffers(anatomy: Anatomy, settings: Settings, rows: Rows) -> int:
    """Bytes of the list buffers at their largest: hidden states, experts' inputs, the encoder's output."""
    most = before = 0
    for stack, tokens in zip(anatomy.stacks, rows.tokens, strict=True):
        of_each = rows.all * tokens * _width(settings)
        inputs = max((_columns(block.layer) for block in stack if block.layer is not None), default=0)
        hidden = of_each * anatomy.hidden
        lack = 4 * rows.twins * tokens * anatomy.hidden
        most, before = max(most, before + hidden + of_each * inputs + lack), before + hidden
    return most


def _columns(layer: MoELayer) -> int:
    return layer.shapes[layer.projections[0]][1]


def _pairs(anatomy: Anatomy, rows: Rows) -> int:
    """Pairs of a token and one of its experts, in one layer."""
    return rows.all * max(rows.tokens) * max(layer.top_k for layer in anatomy.layers)


def _routing(anatomy: Anatomy, rows: Rows) -> int:
    flags = 3 * rows.all * max(rows.tokens)
    return _ROUTING_BYTES * _pairs(anatomy, rows) + flags


def _logits(anatomy: Anatomy, rows: Rows) -> int:
    values = min(SLICE_VALUES, rows.tokens[-1] * anatomy.vocabulary)
    return 4 * (_LOGITS * values + min(_HEAD_ROWS, anatomy.vocabulary) * anatomy.hidden)


def _saved(anatomy: Anatomy, settings: Settings, rows: Rows) -> int:
    """Bytes of the activations that a run resumes from: two blocks' while the older ones are replaced."""
    first, *others = (rows.all * tokens * anatomy.hidden * _width(settings) for tokens in rows.tokens)
    return max([2 * first, *(first + 2 * other for other in others)])


def _dense(anatomy: Anatomy, block: BlockParts, settings: Settings, rows: Rows, stack: int) -> tuple[int, int, int]:
    """Bytes of a block in float32; of one batch while it passes through; of grouping all tokens afterwards."""
    passing = batch_bytes(anatomy, block, settings, rows, stack)
    top_k = 0 if block.layer is None else block.layer.top_k
    return 4 * block.weights, passing, _GROUPING_BYTES * rows.all * rows.tokens[stack] * top_k


def batch_bytes(anatomy: Anatomy, block: BlockParts, settings: Settings, rows: Rows, stack: int) -> int:
    """Bytes that one batch takes while it passes through a block without its experts."""
    samples, tokens = min(settings.batch, rows.all), rows.tokens[stack]
    of_batch = samples * tokens
    passing = 4 * of_batch * (10 * anatomy.hidden + 3 * block.widest)
    if getattr(anatomy.config.get_text_config(), "_attn_implementation", None) == "eager":
        passing += 3 * 4 * samples * anatomy.heads * tokens * max(rows.tokens[: stack + 1])
    if block.layer is not None:  # logits and shares of all experts; a one-hot row of int64 for each token of a Switch
        passing += of_batch * block.layer.count * (32 if anatomy.family.seq2seq else 12)
    return passing


def _group(anatomy: Anatomy, layer: MoELayer, settings: Settings) -> tuple[int, int]:
    """Bytes that solving a group of experts takes in any case, and at its peak."""
    experts = len(groups_of(layer, settings)[0])
    first, last = layer.stages
    columns, inner = _columns(layer), layer.shapes[last[0]][1]
    wide = max(layer.shapes[name][0] * layer.shapes[name][1] for name in layer.projections)
    solving = experts * expert_bytes(layer, settings) + 24 * wide
    if settings.recipe == "nearest":
        return 4 * experts * wide, solving
    rows = rows_of(anatomy, settings)
    many = 2 * rows.all * max(rows.tokens) * layer.top_k // layer.count
    passing = 4 * min(settings.chunk, many) * (columns + 3 * sum(layer.shapes[name][0] for name in first))
    passing = max(passing, 4 * min(GATHERED_TOKENS, many) * columns)
    kept = min(KEPT_BYTES, 4 * many * inner) + 8 * inner * inner + 2 * experts * layer.weights // layer.count
    solving = max(solving, kept)  # where a group is solved once, its experts are run one after another
    if settings.tune != "none":  # what one last projection is solved for, and all of them; a dense expert
        solving += 12 * inner * inner + 4 * (experts + 3) * layer.shapes[last[0]][0] * inner
        solving += 4 * layer.weights // layer.count
    of_inputs = 1 if layer.top_k >= layer.count else experts  # experts that all get every token share a Hessian
    sure = 4 * experts * wide + max(8 * columns * columns * of_inputs, 8 * inner * inner * experts)
    return sure, solving + passing + 4 * LAYER_SAMPLE * columns


def _layer_codes(layer: MoELayer, grid: Grid, bits: float) -> tuple[int, int]:
    """Bytes of a layer's digits or codes when its last group is done, and while the layer is put together."""
    codes = layer.weights * bits / 8
    widest = layer.count * max(rows * columns for rows, columns in layer.shapes.values()) * bits / 8
    if isinstance(grid, UniformGrid):
        return int(codes), int(codes + widest)
    digits = layer.weights / (5 if grid.alphabet == 3 else 4)  # so many of them in a byte
    return int(digits), int(max(digits + min(layer.weights, len(layer.shapes) * _SAMPLE_DIGITS), 0) + widest + codes)


def folder_of(out: Path) -> Path:
    """Return the folder that is there of those in which OUT is to be made."""
    return next(each for each in (out.resolve(), *out.resolve().parents) if each.is_dir())
