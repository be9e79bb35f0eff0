"""The transformers quantizer behind from_pretrained.

transformers builds the model on the meta device and asks the quantizer to change it before weights are loaded: each
experts module is replaced by a `PackedExperts` with empty buffers, and from_pretrained fills them with maps of the
files. transformers fills what a checkpoint lacks with random numbers and only warns, so names and shapes are compared
first; checksums when a tensor is first used (see `dense_checks`).

A dense model is compressed first. transformers calls its hooks under a default device and dtype of its own, with parts
of torch and of itself replaced; `update_weight_conversions` comes when all that is undone and no weight is read yet.

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

from qmoe_lite.errors import CheckpointError, DeviceError, FormatError

_MOST_MADE = 1 << 29  # bytes of tensors that a model makes itself, such as the angles of its positions
_PLACED_BY_TRANSFORMERS = ("auto", "balanced", "balanced_low_0", "sequential")

# imported anew in a process (reload, a fresh sys.modules), the classes take the place of the earlier ones
AUTO_QUANTIZATION_CONFIG_MAPPING.pop("qmoe", None)
AUTO_QUANTIZER_MAPPING.pop("qmoe", None)


@register_quantization_config("qmoe")
class QMoEConfig(QuantizationConfigMixin):
    """How a model is compressed, or to be compressed: every entry is an attribute.

    Of a compressed model it is the `quantization_config` of config.json. Given to from_pretrained with a dense model,
    it has that one compressed first, as GPTQConfig does: what `qmoe_lite.compress` writes is then loaded.

    Parameters
    ----------
    dataset : path, str or list of str
        Calibration text: what `qmoe_lite.compress` takes as `calibration`, or the texts themselves. By default the
        package's own.
    out : path, optional
        Directory for the compressed model, which stays; an interrupted run resumes there. By default a temporary one,
        which goes with the model: save_pretrained keeps it.
    rate, samples, sequence_length, ..
        All else that `qmoe_lite.compress` takes by name.
    """

    def __init__(self, **settings: Any) -> None:
        self.quant_method = "qmoe"  # type: ignore[assignment]
        self.__dict__.update(settings)


@register_quantizer("qmoe")
class QMoEQuantizer(HfQuantizer):
    """Puts PackedExperts into a model that from_pretrained loads."""

    pre_quantized: bool
    quantization_config: QMoEConfig
    variant: str | None = None  # of the weight files, as from_pretrained was told
    _placed_by: str | None = None  # a device_map that lets transformers choose devices

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise DeviceError for a device_map with anything but the CPU.

        "auto" and the like name no device yet. transformers asks again when they do: GPUs are then in order, on which
        the experts go with their blocks; but not a part of the model on the CPU or on disk beside them.
        """
        devices = [str(each) for each in (device_map.values() if isinstance(device_map, dict) else [device_map])]
        if isinstance(device_map, str) and device_map in _PLACED_BY_TRANSFORMERS:
            self._placed_by = device_map
            return
        if (named := self._placed_by) is not None:
            if len(set(devices)) > 1 and {"cpu", "disk"}.intersection(devices):
                text = f"device_map={named!r} leaves a part of the model on the CPU or on disk: "
                raise DeviceError(f"{text}the GPUs have too little memory. Use qmoe_lite.load(expert_cache=..).")
            devices = [each for each in devices if each == "disk"]
        for device in devices:
            if device not in ("None", "cpu"):
                message = f"device_map asks for {device}; a compressed model is loaded on the CPU. "
                raise DeviceError(message + "Use device_map='cpu' and model.to(..), or qmoe_lite.load(device=..).")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("a compressed model is loaded from its directory, not from a state_dict.")
        if self.pre_quantized:
            self._replace_experts(model, checkpoint_files)
        else:
            self._dense_files = checkpoint_files

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Compress a dense model, once nothing of torch is replaced; the result's files are loaded in place of its own.

        The list of files is the one that from_pretrained goes on to read.
        """
        if not self.pre_quantized:
            from qmoe_lite.models.compressing import compress_for
            from qmoe_lite.models.skeletons import open_checkpoint

            files = self._dense_files
            del self._dense_files
            settings = {name: value for name, value in vars(self.quantization_config).items() if name != "quant_method"}
            _, checkpoint = open_checkpoint(compress_for(model, Path(files[0]), settings))
            files[:] = [str(checkpoint.directory / name) for name in checkpoint.files]
            self.quantization_config = QMoEConfig(**checkpoint.config["quantization_config"])
            self.pre_quantized = True
            with torch.device("meta"):
                self._replace_experts(model, files)
        return super().update_weight_conversions(weight_conversions, model)

    def _replace_experts(self, model: Any, checkpoint_files: list[str]) -> None:
        from qmoe_lite.checkpoint.finding import variant_of
        from qmoe_lite.models.building import read_config
        from qmoe_lite.models.experts import empty_experts
        from qmoe_lite.models.placing import put
        from qmoe_lite.models.skeletons import check_dense, open_checkpoint
        from qmoe_lite.models.within import Within

        first = Path(checkpoint_files[0])
        self.variant = variant_of(first.name)
        family, checkpoint = open_checkpoint(first.parent, variant=self.variant)
        if {Path(file).name for file in checkpoint_files} != set(checkpoint.files):
            raise CheckpointError(f"{checkpoint.directory} holds other weight files besides; load the main ones.")
        config = read_config(str(checkpoint.directory))  # a text model's own is a part of it
        config = model.config if type(model.config) is type(config) else config
        made = empty_experts(family, checkpoint, config)
        within = Within.find(family, checkpoint, model, [experts.layer for experts in made])
        for experts in made:
            name = within.name(experts.layer.experts)
            put(model, name, experts)
            owner = model.get_submodule(name.rpartition(".")[0])
            owner._is_hf_initialized = True  # Switch's own initialisation would look for dense experts in it
        checkpoint.know_as({within.name(name): view for name, view in checkpoint.views.items()})
        check_dense(family, model, checkpoint, within.new_head(model, checkpoint))
        own = ((module, name) for module in model.modules() for name in module._non_persistent_buffers_set)
        size = sum(getattr(module, name).nbytes for module, name in own if getattr(module, name) is not None)
        if size > _MOST_MADE:  # of numbers in config.json alone: no file has these
            text = f"{checkpoint.directory}/config.json asks for tables of {size:,} bytes (at most {_MOST_MADE:,})"
            raise CheckpointError(f"{text}. Fetch it again.")
        self._loading = family, checkpoint, within, family.stacks(config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from qmoe_lite.checkpoint.weight_file import SizeGuard
        from qmoe_lite.models.dense_checks import check_before_use
        from qmoe_lite.models.experts import PackedExperts
        from qmoe_lite.models.pushing import carry_card

        packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
        for name, module in packed.items():
            for part, buffer in module.named_buffers():
                # from_pretrained leaves a buffer that it could not fill uninitialised, and says nothing
                if not getattr(buffer, "_is_hf_initialized", False):
                    raise FormatError(f"{name}.{part} was not loaded. Load the directory that qmoe compress wrote.")
        family, checkpoint, within, stacks = self._loading
        del self._loading  # the model keeps the quantizer, and a copy of it cannot have open files
        family.tie(model, checkpoint)
        guard = SizeGuard([checkpoint.directory / name for name in checkpoint.files])
        owners = (model.get_submodule(within.name(stack.name)) for stack in stacks)
        for module in dict.fromkeys((model, *owners)):  # each may be run by itself
            module.register_forward_pre_hook(guard)
            module.register_state_dict_pre_hook(guard)
        for module in packed.values():
            module.guard = guard
        check_before_use(model, checkpoint, [within.name(each) for stack in stacks for each in stack.blocks], guard)
        carry_card(model, checkpoint.directory)
        model.requires_grad_(False)
        for name in within.new_head(model, checkpoint):
            model.get_parameter(name).requires_grad_(True)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from qmoe_lite.models.dequantizing import dequantize

        return dequantize(model, dtype)

    def is_serializable(self) -> bool:
        """Report that save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Report that adapters can: gradients pass through the experts, which stay as they are."""
        return True
