"""The transformers quantizer behind from_pretrained, and `load`, which calls from_pretrained.

transformers builds the model on the meta device and asks the quantizer to change it before weights are loaded: each
experts module is replaced by a `PackedExperts` with empty buffers, and from_pretrained fills them with maps of the
files. transformers fills what a checkpoint lacks with random numbers and only warns, so names and shapes are compared
first; checksums when a tensor is first used (see `_dense_checks`).

Imported by transformers' own import (see `_hook`), so numba and the kernels wait until a compressed model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qmoe_lite.errors import CheckpointError, DeviceError, FormatError, QMoEError, first_line

# imported anew in a process (reload, a fresh sys.modules), the classes take the place of the earlier ones
AUTO_QUANTIZATION_CONFIG_MAPPING.pop("qmoe", None)
AUTO_QUANTIZER_MAPPING.pop("qmoe", None)


@register_quantization_config("qmoe")
class QMoEConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed model's config.json: every entry is an attribute."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method = "qmoe"  # type: ignore[assignment]
        self.__dict__.update(settings)


@register_quantizer("qmoe")
class QMoEQuantizer(HfQuantizer):
    """Puts PackedExperts into a model that from_pretrained loads."""

    requires_calibration = True  # a dense model cannot be compressed by from_pretrained

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise DeviceError for a device_map with anything but the CPU.

        "auto" names no device yet; where it finds a GPU, the experts are moved there with the rest.
        """
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        for place in places:
            if place is not None and str(place) not in ("auto", "cpu"):
                message = f"device_map asks for {place}; a compressed model is loaded on the CPU. "
                raise DeviceError(message + "Use device_map='cpu' and model.to(..), or qmoe_lite.load(device=..).")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from qmoe_lite.models.experts import empty_experts
        from qmoe_lite.models.skeletons import auto_class, check_dense, open_checkpoint

        if not checkpoint_files:
            raise CheckpointError("a compressed model is loaded from its directory, not from a state_dict.")
        family, checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent)
        if {Path(file).name for file in checkpoint_files} != set(checkpoint.files):
            raise CheckpointError(f"{checkpoint.directory} holds other weight files besides; load the main ones.")
        wanted = auto_class(family)
        if not isinstance(model, wanted._model_mapping[type(model.config)]):
            raise CheckpointError(
                f"a compressed model is loaded by {wanted.__name__} or qmoe_lite.load, not as {type(model).__name__}."
            )
        for experts in empty_experts(family, checkpoint, model.config):
            parent, _, child = experts.layer.experts.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, experts)
            owner._is_hf_initialized = True  # Switch's own initialisation would look for dense experts in it
        check_dense(family, model, checkpoint)
        self._checkpoint = checkpoint

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from qmoe_lite.checkpoint.weight_file import SizeGuard
        from qmoe_lite.models.dense_checks import check_before_use
        from qmoe_lite.models.experts import PackedExperts
        from qmoe_lite.models.family import family_of

        packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
        for name, module in packed.items():
            for part, buffer in module.named_buffers():
                # from_pretrained leaves a buffer that it could not fill uninitialised, and says nothing
                if not getattr(buffer, "_is_hf_initialized", False):
                    raise FormatError(f"{name}.{part} was not loaded. Load the directory that qmoe compress wrote.")
        checkpoint = self._checkpoint
        del self._checkpoint  # the model keeps the quantizer, and a copy of it cannot have open files
        family = family_of(model.config.model_type)
        family.tie(model, checkpoint)
        guard = SizeGuard([checkpoint.directory / name for name in checkpoint.files])
        stacks = family.stacks(model.config)
        for module in (model, *(model.get_submodule(stack.name) for stack in stacks)):  # each may be run by itself
            module.register_forward_pre_hook(guard)
            module.register_state_dict_pre_hook(guard)
        for module in packed.values():
            module.guard = guard
        check_before_use(model, checkpoint, [block for stack in stacks for block in stack.blocks], guard)
        return model.requires_grad_(False)

    def is_serializable(self) -> bool:
        """Tell that save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell that adapters can: gradients pass through the experts, which stay as they are."""
        return True


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
    for the whole process. So no thread should call it while another one loads. A process that forks after a model ran
    cannot run it in the child: OpenMP forbids it. Load the model there.
    """
    from qmoe_lite.checkpoint.reader import find_model
    from qmoe_lite.devices import find_device, moved
    from qmoe_lite.models.experts import quantization_of
    from qmoe_lite.models.skeletons import auto_class, experts_replaced, open_checkpoint
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
            model = auto_class(family).from_pretrained(path, dtype=dtype or "auto")
    except QMoEError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is refused by transformers: {first_line(error)}.") from error
    if given:
        attach(model, expert_cache=expert_cache, ram_cache=ram_cache, offload=offload, devices=devices)
    return moved(model, where, path)  # with a runner all but the experts, which it holds
