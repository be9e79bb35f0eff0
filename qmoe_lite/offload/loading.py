"""`load`: a compressed model by transformers' from_pretrained, and with a runner where experts have a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qmoe_lite.errors import CheckpointError, QMoEError, first_line


def load(
    directory: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    expert_cache: int | str | list[int | str] | None = None,
    ram_cache: int | str | None = None,
    offload: str | None = None,
    devices: list[str] | None = None,
) -> Any:
    """Load a compressed model.

    Parameters
    ----------
    directory : path or str
        What `compress` wrote, or its name on the Hugging Face hub.
    device : str or torch device
        Of everything but the experts, and of these too unless `devices` names others: "auto" is the first GPU that can
        be used (see `devices.find_device`), but the CPU where experts have a budget; else the CPU.
    dtype : torch dtype, optional
        Of everything but the experts; by default as config.json says.
    expert_cache, ram_cache : int or str, optional
        Bytes, or sizes such as "4GiB", that experts may take where they are multiplied, and in memory.
    offload : "ram", "disk" or None
        Where the other experts wait: each in memory once it was read, or on disk, within a budget that must be given.
        With none of these three, nothing limits them: the experts are mapped from the files, and the system keeps in
        memory what it has room for.
    devices : list of str, optional
        GPUs to spread the experts over, such as ["cuda:0", "cuda:1"]; `expert_cache` may then be a list too.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode; its experts modules are `PackedExperts` whose codes are mapped from the files. The same as
        `AutoModelForCausalLM.from_pretrained(directory)`, or AutoModelForSeq2SeqLM's, and `offload.attach` where a
        budget is given.

    Raises
    ------
    CheckpointError
        No compressed model, or a tensor is missing.
    FormatError
        A damaged file, or one of a newer format.
    DeviceError
        A GPU that cannot be used, or has too little memory.
    SettingError
        As `offload.attach`.

    Notes
    -----
    No weights are read but those that `dtype` or `device` changes. Each expert is compared with its checksum before it
    is first multiplied, and goes with it into what is saved; each dense tensor before it is first used, saved or
    copied: FormatError is raised where a file is damaged. What is done with a parameter without calling a module of the
    model, such as moving it, goes unnoticed; `qmoe_lite.verify` compares everything.

    Several threads may load at once; their models are built one after another. transformers' from_pretrained is not
    made for threads: while it builds a model, it replaces functions of torch and of its own, and torch's default dtype,
    for the whole process. So no thread should call it while another one loads. A process that forks after kernels ran
    cannot run any in the child, whose calls raise QMoEError: OpenMP forbids it. Start processes by spawn, such as a
    DataLoader's workers (multiprocessing_context="spawn").
    """
    from qmoe_lite.checkpoint.finding import find_model
    from qmoe_lite.checkpoint.format import quantization_of
    from qmoe_lite.devices import find_device, moved
    from qmoe_lite.models.building import class_of_saved, experts_replaced
    from qmoe_lite.models.skeletons import open_checkpoint
    from qmoe_lite.offload.runner import attach

    budgets = {"expert_cache": expert_cache, "ram_cache": ram_cache, "offload": offload, "devices": devices}
    given = any(value is not None for value in budgets.values())
    where = find_device("cpu" if given and str(device) == "auto" else device)
    if given and where.type != "cpu":
        devices = devices or [str(where)]
    path = find_model(directory)
    family, checkpoint = open_checkpoint(path)
    quantization_of(checkpoint)
    try:
        with experts_replaced(family):  # thousands of dense experts take seconds to build, even on meta
            model = class_of_saved(family, checkpoint.config).from_pretrained(path, dtype=dtype or "auto")
    except QMoEError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is refused by transformers: {first_line(error)}.") from error
    if given:
        attach(model, expert_cache=expert_cache, ram_cache=ram_cache, offload=offload, devices=devices)
    return moved(model, where, path)  # with a runner all but the experts, which it holds
