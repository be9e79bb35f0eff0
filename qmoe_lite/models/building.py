"""Dense models as transformers builds them, without weights."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from qmoe_lite.errors import CheckpointError, UnsupportedFamilyError, first_line


class Built(Protocol):
    """What must be known of a family to build its models; see `Family`."""

    @property
    def model_type(self) -> str: ...

    @property
    def experts_class(self) -> str | None: ...

    @property
    def seq2seq(self) -> bool: ...


class Placeholder(nn.Module):
    """Stands for an experts module while a model is built; holds nothing."""

    def __init__(self, config: Any) -> None:
        super().__init__()


_building = threading.RLock()


@contextmanager
def experts_replaced(family: Built) -> Iterator[None]:
    """Let transformers build placeholders, in this thread, where experts modules would be slow to build.

    Not by transformers' register_patch_mapping, which stays in force when an exception passes through from_pretrained.
    One thread at a time is let in: while it builds a model, transformers replaces functions of torch and methods of its
    own for the whole process (tie_weights, torch.linspace, ..), and two threads that do so at once put back each
    other's replacements.
    """
    with _building:
        if family.experts_class is None:
            yield
            return
        module = importlib.import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
        original, owner = getattr(module, family.experts_class), threading.get_ident()

        def build(config: Any) -> nn.Module:
            return Placeholder(config) if threading.get_ident() == owner else original(config)

        setattr(module, family.experts_class, build)
        try:
            yield
        finally:
            setattr(module, family.experts_class, original)


def auto_class(family: Built, config: Any) -> Any:
    """Return the transformers class that loads and builds models of a family.

    Parameters
    ----------
    family : Family
        Of the model.
    config : mapping or transformers configuration
        Where a family has models of text alone and of pictures too, `architectures` says which it is.

    Raises
    ------
    UnsupportedFamilyError
        No model of this type writes text.
    """
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    if family.model_type == "llama4":
        importlib.import_module("qmoe_lite.models.llama4")
    if family.seq2seq:
        return transformers.AutoModelForSeq2SeqLM
    named = config.get("architectures") if isinstance(config, Mapping) else config.architectures
    with_pictures = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(family.model_type, ())
    with_pictures = (with_pictures,) if isinstance(with_pictures, str) else with_pictures
    registered = CONFIG_MAPPING[family.model_type] if family.model_type in CONFIG_MAPPING else None  # noqa: SIM401 - no `get` there
    writes = registered in transformers.AutoModelForCausalLM._model_mapping
    if not writes and with_pictures:
        return transformers.AutoModelForImageTextToText
    own = (*with_pictures, auto.MODEL_MAPPING_NAMES.get(family.model_type))
    if with_pictures and set(named or ()).intersection(own):  # the last one is without a head
        return transformers.AutoModelForImageTextToText
    if not writes:
        reason = "transformers has no model of it that writes text"
        raise UnsupportedFamilyError(f"model type {family.model_type} is not supported: {reason}.")
    return transformers.AutoModelForCausalLM


def class_of_saved(family: Built, config: Any) -> Any:
    """Return the transformers class that loads a compressed model as it was saved.

    That is `auto_class`, but for a model that was saved with another head, or without one.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    wanted = auto_class(family, config)
    named = config.get("architectures") if isinstance(config, Mapping) else config.architectures
    for known, other in (
        (auto.MODEL_MAPPING_NAMES, transformers.AutoModel),
        (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, transformers.AutoModelForSequenceClassification),
        (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, transformers.AutoModelForTokenClassification),
    ):
        if named and named == [known.get(family.model_type)]:
            return other
    return wanted


def empty_copy(model: Any) -> Any:
    """Build a model once more, by its own configuration, without weights and dense, on the meta device."""
    from transformers.initialization import no_init_weights

    with _building, torch.device("meta"), no_init_weights():
        return type(model)(model.config)


def skeleton(family: Built, config: Any, dtype: torch.dtype) -> nn.Module:
    """Build the model without any weights, on the meta device.

    Raises
    ------
    CheckpointError
        transformers cannot build it from this configuration.
    """
    from transformers.initialization import no_init_weights

    try:
        with experts_replaced(family), torch.device("meta"), no_init_weights():
            return auto_class(family, config).from_config(config, dtype=dtype).eval()  # type: ignore[no-any-return]
    except UnsupportedFamilyError:
        raise
    except Exception as error:  # a configuration that is out of order fails anywhere in the model's own code
        text = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"config.json makes no {family.model_type} model ({text}). Fetch it again.") from error


def read_config(directory: str) -> Any:
    """Read config.json through transformers.

    Raises
    ------
    CheckpointError
        transformers refuses it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # transformers raises ValueError, OSError and its validators' own
        raise CheckpointError(f"{directory}/config.json is refused by transformers: {first_line(error)}.") from error
