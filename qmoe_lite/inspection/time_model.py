"""How long compressing and running take, by what was measured of this machine and the work that there is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qmoe_lite.checkpoint.headers import Headers
from qmoe_lite.compression.group_sizes import groups_of
from qmoe_lite.compression.layer_parts import LAYER_SAMPLE, last_sample
from qmoe_lite.compression.run_samples import TUNED_TOKENS
from qmoe_lite.compression.settings import Settings
from qmoe_lite.inspection.anatomy import Anatomy, BlockParts
from qmoe_lite.inspection.memory_model import Rows, batch_bytes, rows_measured, rows_of
from qmoe_lite.inspection.speeds import Speeds, inner_work, scaled_expert, scaled_tuning, token_work
from qmoe_lite.models.blocks import MoELayer

_START = 3.0  # seconds: the skeleton, the tokenizer, the text
# solves of groups for the rate and the dead zone, besides one each, on the first and last layer: 3 to 5 were counted
# where a layer is one group, 4 to 5 where it is several, 5 to 8 where those are single experts
_AGAIN, _AGAIN_OF_SEVERAL = 4, 5
_DENSE = 2.0  # operations a weight and token: what dense experts put out
_CHECKSUM = 1.5e9  # bytes a second
_BLOCK_OVERHEAD, _TOKEN_OVERHEAD = 1e-3, 2.5e-3  # seconds of transformers' own code: a block, the loop around them


@dataclass(frozen=True)
class Running:
    """What the compressed model takes to run, a token at a time.

    Attributes
    ----------
    budget_bytes : int
        Memory for experts.
    memory_bytes : int
        With everything else, without the keys and values of a context.
    resident : float
        Share of the experts that fits the budget.
    gpu_bytes : int or None
        On a GPU, with all experts there.
    tokens_per_second : float or None
    parts : dict, part to seconds
        Of a token.
    """

    budget_bytes: int
    memory_bytes: int
    resident: float
    gpu_bytes: int | None
    tokens_per_second: float | None
    parts: dict[str, float]


def seconds_of(
    anatomy: Anatomy,
    settings: Settings,
    headers: Headers,
    speeds: Speeds,
    memory: int,
    assumed: list[str],
) -> dict[str, float]:
    """Return the seconds of each phase of a compression.

    Parameters
    ----------
    anatomy, settings, headers, speeds
        What is compressed, and where.
    memory : int
        Bytes that there are: files that fit are read from the disk once.
    assumed : list of str
        Takes a line for each assumption.
    """
    rows = rows_of(anatomy, settings)
    size = anatomy.expert_bytes + anatomy.other_bytes
    measured = rows_measured(anatomy, settings, rows)
    times = 1 if size < memory // 2 else 2 + (measured is not None)
    phases = {"start": _START + speeds.start, "reading": times * size / speeds.disk + size / _CHECKSUM}
    assumed.append(f"{_START:.0f} s to start besides kernels; checksums of {_CHECKSUM / 1e9:g} GB/s")
    assumed.append(f"the dense files are read from the disk {('once', 'twice', 'three times')[times - 1]}")
    calibrated = settings.recipe != "nearest"
    if calibrated:
        phases["dense parts"] = _dense(anatomy, settings, rows, speeds)
    if measured is not None:
        phases["what layers lose alone"] = _alone(anatomy, settings, measured, speeds)
    solving = tokens = tuning = 0.0
    for number, stack in enumerate(anatomy.stacks):
        for layer in (block.layer for block in stack if block.layer is not None):
            own, of_token = scaled_expert(speeds, layer.shapes)
            solving += layer.count * own
            if calibrated:
                pairs = (rows.all - rows.twins) * rows.tokens[number] * layer.top_k
                tuning += _tuning(layer, settings, rows, number, speeds)
                first, last = _of_layer(layer, settings, rows, number)
                work = first * 2.0 * layer.shapes[layer.projections[0]][1] ** 2 * len(groups_of(layer, settings))
                again = (work + last * layer.count * inner_work(layer.shapes)) / token_work(layer.shapes)
                tokens += (pairs + again) * of_token
    groups = [len(groups_of(layer, settings)) for layer in anatomy.layers]
    codes = sum(1 + (several > 1) for several in groups)
    if calibrated and settings.rate is not None:
        layer, again = anatomy.layers[0], _AGAIN_OF_SEVERAL if max(groups) > 1 else _AGAIN
        group, (own, of_token) = len(groups_of(layer, settings)[0]), scaled_expert(speeds, layer.shapes)
        seen = rows.samples * rows.tokens[0] * layer.top_k / layer.count + _of_layer(layer, settings, rows, 0)[1]
        solving += again * group * (own + seen * inner_work(layer.shapes) / token_work(layer.shapes) * of_token)
        codes += again
        assumed.append(f"{again} groups of experts are solved once more for the rate")
    phases["layers: choosing codes"] = codes * speeds.layer
    phases["experts: Hessians and outputs"] = tokens
    phases["experts: solving and encoding"] = solving
    phases["experts: tuning"] = tuning
    if calibrated:
        saved = sum(
            rows.all
            * count
            * anatomy.hidden
            * (4 if settings.activations == "float32" else 2)
            * sum(block.layer is not None for block in stack)
            for stack, count in zip(anatomy.stacks, rows.tokens, strict=True)
        )
        phases["saving activations"] = saved / speeds.save
        head = 2.0 * rows.validation * rows.tokens[-1] * anatomy.head
        phases["judging"] = head / speeds.multiply
    return {name: seconds for name, seconds in phases.items() if seconds}


def _alone(anatomy: Anatomy, settings: Settings, rows: Rows, speeds: Speeds) -> float:
    """Seconds of measuring what layers lose alone; behind the samples run the copies of the layers until then."""
    seconds, copies, copied = 0.0, 0, rows.validation // len(anatomy.layers)
    for number, stack in enumerate(anatomy.stacks):
        tokens = rows.tokens[number]
        for block in stack:
            layer = block.layer
            copies += copied if layer is not None else 0
            seconds += _block(anatomy, block, settings, rows, number, rows.samples + copies, speeds)
            if layer is not None:
                own, of_token = scaled_expert(speeds, layer.shapes)
                pairs, again = (samples * tokens * layer.top_k for samples in (rows.samples, copies))
                work = _DENSE * (pairs + again) * layer.weights / layer.count
                met = 1 - (1 - layer.top_k / layer.count) ** (copied * tokens)  # experts that a copy meets are solved
                seconds += met * (layer.count * own + pairs * of_token) + work / speeds.multiply
    head = 2.0 * (copies + copied) * rows.tokens[-1] * anatomy.head
    return seconds + head / speeds.multiply


def _tuning(layer: MoELayer, settings: Settings, rows: Rows, stack: int, speeds: Speeds) -> float:
    """Seconds of tuning a layer, besides its twins' way through the block."""
    if not rows.twins:
        return 0.0
    seen, twins = (samples * rows.tokens[stack] * layer.top_k for samples in (rows.samples, rows.twins))
    tuned = min(seen, twins, TUNED_TOKENS * layer.count)
    own, of_token = scaled_tuning(speeds, layer.shapes)
    seconds = layer.count * own + tuned * of_token
    if settings.tune == "block":  # which solves a group before it runs it: its first matrices are used twice
        *first, _ = layer.shapes.values()
        seconds += 2.0 * sum(map(math.prod, first)) * (seen - tuned) / speeds.multiply
    return seconds


def _of_layer(layer: MoELayer, settings: Settings, rows: Rows, stack: int) -> tuple[int, int]:
    """Return how many tokens of the layer enter a group's first Hessian, and each expert's of its last projection."""
    tokens = rows.samples * rows.tokens[stack]
    own, sample = tokens * layer.top_k / layer.count, min(LAYER_SAMPLE, tokens) if settings.blend_tokens else 0
    first, last = (layer.shapes[names[0]][1] for names in layer.stages)
    return sample if own < first else 0, last_sample(sample, last) if own < last else 0


def _dense(anatomy: Anatomy, settings: Settings, rows: Rows, speeds: Speeds) -> float:
    """Seconds of all samples' way through the blocks without their experts."""
    every = ((number, block) for number, stack in enumerate(anatomy.stacks) for block in stack)
    return sum(_block(anatomy, block, settings, rows, number, rows.all, speeds) for number, block in every)


def _block(
    anatomy: Anatomy, block: BlockParts, settings: Settings, rows: Rows, stack: int, samples: int, speeds: Speeds
) -> float:
    """Seconds of some samples' way through a block without its experts."""
    tokens = rows.tokens[stack]
    work = 2.0 * samples * tokens * (block.weights + 2.0 * tokens * anatomy.hidden)
    moved = 2.0 * batch_bytes(anatomy, block, settings, rows, stack) * samples / settings.batch
    return work / speeds.multiply + moved / speeds.vector


def running(
    anatomy: Anatomy,
    experts: int,
    others: int,
    budget: int | None,
    memory: int,
    device: str,
    speeds: Speeds | None,
    program: int,
    assumed: list[str],
) -> Running:
    """Work out what the compressed model takes to run, a token at a time.

    Parameters
    ----------
    anatomy : Anatomy
        Of the dense model.
    experts, others : int
        Bytes of the compressed model.
    budget : int or None
        Memory for experts; None takes what they need, or what there is.
    memory : int
        Bytes that there are.
    device : str
        Where it runs.
    speeds : Speeds or None
        Of this machine.
    program : int
        Bytes that a program takes anyway.
    assumed : list of str
        Takes a line for each assumption.
    """
    budget = max(min(experts, memory - others - program), 0) if budget is None else budget
    resident = min(1.0, budget / experts) if experts else 1.0
    parts: dict[str, float] = {}
    if speeds is not None and device == "cpu":
        stack = anatomy.stacks[-1]
        width = anatomy.dtype.itemsize
        parts["dense parts"] = (sum(block.weights for block in stack) + anatomy.head) * width / speeds.vector
        parts["transformers' own code"] = _TOKEN_OVERHEAD + _BLOCK_OVERHEAD * len(stack)
        used = sum(b.layer.top_k * b.layer.weights / b.layer.count for b in stack if b.layer is not None)
        bits = 8 * experts / anatomy.experts  # codewords are walked: what was measured had others
        parts["experts from codes"] = used * speeds.codes * max(bits / speeds.bits, 0.5)
        if resident < 1.0:
            parts["experts from disk"] = used * bits / 8 * (1 - resident) / speeds.disk
            assumed.append("routing is even, the worst case for a cache, and nothing is read ahead")
        own = f"{1000 * _BLOCK_OVERHEAD:g} ms of a block and {1000 * _TOKEN_OVERHEAD:g} ms of a token"
        assumed.append(f"{own} in transformers' own code")
    elif speeds is not None:
        assumed.append("the speed of running on a GPU is not estimated")
    assumed.append("keys and values of a context are not counted")
    seconds = sum(parts.values())
    gpu = None if device == "cpu" else experts + others
    return Running(
        budget, min(budget, experts) + others + program, resident, gpu, 1 / seconds if seconds else None, parts
    )
