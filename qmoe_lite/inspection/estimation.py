"""What compressing a model will take, and running the result: before any weight is read.

The result says of each figure whether it was read, measured or assumed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qmoe_lite.checkpoint.headers import read_headers
from qmoe_lite.compression.choice import choose
from qmoe_lite.compression.rate import check_rate
from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.shares import Sensitivity, layers_of
from qmoe_lite.compression.spill import check_folder
from qmoe_lite.devices import find_device
from qmoe_lite.inspection.anatomy import Anatomy, anatomy_of, directory_of
from qmoe_lite.inspection.fitting import anonymous_bytes, doubts, obstacles, room_for
from qmoe_lite.inspection.memory_model import Need, compressed_bytes, need_of, rows_of
from qmoe_lite.inspection.sampled_bits import bits_of_grid
from qmoe_lite.inspection.speeds import Speeds, measure
from qmoe_lite.inspection.time_model import Running, running, seconds_of
from qmoe_lite.offload.sizes import parse_size
from qmoe_lite.quantization.grid import Grid

_WHOLE = "full"
KERNEL_BYTES = 200_000_000  # of compiled kernels and their compiler, where none has run yet


@dataclass(frozen=True)
class Compressing:
    """What a compression takes.

    Attributes
    ----------
    samples, tokens : int
        For calibration.
    memory_bytes : int
        At the peak, anonymous.
    memory_parts : dict, part to bytes
        What it is made of.
    stage : str
        Where the peak is.
    disk_bytes : int
        At OUT, at most.
    gpu_bytes : int or None
        At most; None on the CPU.
    activation_bytes : int
        Of all samples; part of the memory, or with --spill on a disk.
    seconds : float or None
        On this machine if nothing else runs; None where nothing was measured.
    seconds_now : float or None
        If the machine stays as busy with other work as it was while it was measured.
    phases : dict, phase to seconds
        What they are made of.
    obstacles, doubts : list of str
        Why it cannot run here, or may not.
    """

    samples: int
    tokens: int
    memory_bytes: int
    memory_parts: dict[str, int]
    stage: str
    disk_bytes: int
    gpu_bytes: int | None
    activation_bytes: int
    seconds: float | None
    seconds_now: float | None
    phases: dict[str, float]
    obstacles: list[str]
    doubts: list[str]


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found.

    Attributes
    ----------
    model, model_type, device : str
    grid : str
        Word of the grid.
    rate : float or None
        Bits a weight that were asked for.
    parameters, dense_bytes, compressed_bytes : dict
        Of "experts" and "others".
    bits_per_weight : float
        Stored, of the experts.
    compressing : Compressing
    running : Running
        Of the compressed model.
    measured : dict
        Speeds of this machine; empty where none was measured.
    read, assumed : list of str
        What the other figures rest on.
    """

    model: str
    model_type: str
    device: str
    grid: str
    rate: float | None
    parameters: dict[str, int]
    dense_bytes: dict[str, int]
    compressed_bytes: dict[str, int]
    bits_per_weight: float
    compressing: Compressing
    running: Running
    measured: dict[str, Any] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def estimate(
    model: str | Path,
    *,
    rate: float | None = None,
    grid: Grid | None = None,
    recipe: str = "default",
    samples: int | None = None,
    sequence_length: int = 512,
    validation_samples: int = 8,
    batch_size: int | None = None,
    activations: str = "float32",
    products: str = "float32",
    tune: str | None = None,
    sensitivity: Sensitivity | str | Path | None = None,
    device: str | torch.device = "auto",
    expert_cache: int | str | None = None,
    out: str | Path | None = None,
    spill: str | Path | None = None,
    family: str | None = None,
    measuring: bool = True,
) -> Estimate:
    """Estimate what compressing a model takes on this machine, and running the result.

    Parameters
    ----------
    model : path or str
        A directory with a config.json, with or without weights; or a name on the hub, of which config.json and the
        headers of the shards are fetched.
    rate, grid, recipe, samples, sequence_length, validation_samples, batch_size
        As `compress` takes them.
    activations, products, tune, sensitivity, device, family
        As `compress` takes them. Of the command's `--tune full`, here "full", what comes first is estimated.
    expert_cache : int or str, optional
        Memory for experts when the model runs, such as "4GiB"; by default what they take, or what there is.
    out : path or str, optional
        Where it is to be written; by default in the current directory.
    spill : path or str, optional
        Folder for the activations, as `compress` takes it.
    measuring : bool
        Measure this machine's speed for 10 to 30 seconds; else there are no times.

    Returns
    -------
    Estimate

    Raises
    ------
    CheckpointError, FormatError, UnsupportedFamilyError, SettingError, DeviceError
        As `compress`.
    """
    settings = Settings(
        recipe=recipe,
        samples=samples,
        sequence_length=sequence_length,
        validation_samples=validation_samples,
        batch_size=batch_size,
        activations=activations,
        products=products,
        tune=None if tune == _WHOLE else tune,
        sensitivity=layers_of(sensitivity),
        rate=None if rate is None else check_rate(rate),
        device=str(find_device(device)),
    )
    settings.check()
    check_folder(spill)
    headers = read_headers(model)
    anatomy = anatomy_of(headers, family == "auto")
    grid, settings = choose(grid, settings, anatomy.family.model_type, len(anatomy.layers))
    read, assumed = list(anatomy.read), list(anatomy.assumed)
    if tune == _WHOLE:
        assumed.append("training the whole model afterwards is not counted")
    bits = settings.rate or bits_of_grid(headers, anatomy, grid, read, assumed)
    target = None if out is None else Path(out)
    speeds: Speeds | None = None
    before = anonymous_bytes()
    if measuring:
        speeds = measure(anatomy, settings, grid, headers.shards, directory_of(headers))
        program = anonymous_bytes()
        assumed.append("the program takes as much memory as this one does now")
    else:
        program = before + KERNEL_BYTES
        assumed.append(f"compiled kernels take {KERNEL_BYTES / 1e6:.0f} MB")
    need = need_of(anatomy, settings, grid, bits, spill is not None)
    room = room_for(target, None if spill is None else Path(spill))
    assumed.append("the text is long enough, and its tokens spread evenly over the experts")
    if settings.recipe != "nearest":
        assumed.append("blocks add their experts' outputs, as most families do")
    phases = {} if speeds is None else seconds_of(anatomy, settings, headers, speeds, room.memory, assumed)
    what = need, program, room, anatomy, settings, grid
    stops, maybe = list(obstacles(*what)), list(doubts(*what))
    experts, others = compressed_bytes(anatomy, bits)
    budget = None if expert_cache is None else parse_size(expert_cache, "expert_cache")
    return Estimate(
        str(model),
        anatomy.family.model_type,
        settings.device,
        grid.word,
        settings.rate,
        {"experts": anatomy.experts, "others": anatomy.others},
        {"experts": anatomy.expert_bytes, "others": anatomy.other_bytes},
        {"experts": experts, "others": others},
        bits,
        _compressing(anatomy, settings, need, program, phases, 0.0 if speeds is None else speeds.load, stops, maybe),
        running(anatomy, experts, others, budget, room.memory, settings.device, speeds, program, assumed),
        {} if speeds is None else asdict(speeds),
        read,
        assumed,
    )


def _compressing(
    anatomy: Anatomy,
    settings: Settings,
    need: Need,
    program: int,
    phases: dict[str, float],
    load: float,
    stops: list[str],
    maybe: list[str],
) -> Compressing:
    rows = rows_of(anatomy, settings)
    calibrated = settings.recipe != "nearest"
    return Compressing(
        rows.samples if calibrated else 0,
        rows.samples * sum(rows.tokens) if calibrated else 0,
        need.memory + program,
        {"the program": program, **need.parts},
        need.stage,
        need.disk,
        need.gpu,
        need.activations,
        math.fsum(phases.values()) if phases else None,
        (1 + load) * math.fsum(phases.values()) if phases else None,
        phases,
        stops,
        maybe,
    )
