"""The transformers quantizer behind from_pretrained.

transformers builds the model on the meta device and asks the quantizer to change it before weights are loaded: each
experts module is replaced by a `PackedExperts` with empty buffers, and from_pretrained fills them with maps of the
files. transformers fills what a checkpoint lacks with random numbers and only warns, so names and shapes are compared
first; checksums when a tensor is first used (see `dense_checks`).

Imported by transformers' own import (see `_hook`), so numba and the kernels wait until a compressed model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qmoe_lite.errors import CheckpointError, DeviceError, FormatError

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
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        for device in devices:
            if device is not None and str(device) not in ("auto", "cpu"):
                message = f"device_map asks for {device}; a compressed model is loaded on the CPU. "
                raise DeviceError(message + "Use device_map='cpu' and model.to(..), or qmoe_lite.load(device=..).")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from qmoe_lite.models.building import auto_class
        from qmoe_lite.models.experts import empty_experts
        from qmoe_lite.models.skeletons import check_dense, open_checkpoint

        if not checkpoint_files:
            raise CheckpointError("a compressed model is loaded from its directory, not from a state_dict.")
        family, checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent)
        if {Path(file).name for file in checkpoint_files} != set(checkpoint.files):
            raise CheckpointError(f"{checkpoint.directory} holds other weight files besides; load the main ones.")
        wanted = auto_class(family, checkpoint.config)
        if not isinstance(model, wanted._model_mapping.get(type(model.config), ())):
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
        from qmoe_lite.models.pushing import carry_card

        packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
        for name, module in packed.items():
            for part, buffer in module.named_buffers():
                # from_pretrained leaves a buffer that it could not fill uninitialised, and says nothing
                if not getattr(buffer, "_is_hf_initialized", False):
                    raise FormatError(f"{name}.{part} was not loaded. Load the directory that qmoe compress wrote.")
        checkpoint = self._checkpoint
        del self._checkpoint  # the model keeps the quantizer, and a copy of it cannot have open files
        family = family_of(model.config.model_type, auto=True)
        family.tie(model, checkpoint)
        guard = SizeGuard([checkpoint.directory / name for name in checkpoint.files])
        stacks = family.stacks(model.config)
        for module in (model, *(model.get_submodule(stack.name) for stack in stacks)):  # each may be run by itself
            module.register_forward_pre_hook(guard)
            module.register_state_dict_pre_hook(guard)
        for module in packed.values():
            module.guard = guard
        check_before_use(model, checkpoint, [block for stack in stacks for block in stack.blocks], guard)
        carry_card(model, checkpoint.directory)
        return model.requires_grad_(False)

    def is_serializable(self) -> bool:
        """Report that save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Report that adapters can: gradients pass through the experts, which stay as they are."""
        return True
