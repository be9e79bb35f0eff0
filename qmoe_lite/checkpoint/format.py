"""What lies on disk: the parts of a projection's experts, how they are packed, and what config.json says of them.

FORMAT.md beside this file is the specification; whatever changes here changes there, and `FORMAT` with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codes import code_from_config
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.errors import CheckpointError, FormatError

FORMAT = 2
METHOD = "qmoe"  # quant_method in config.json
ALIGNMENT = 16  # bytes; where an expert's codes may start
PARTS = ("codes", "expert_offsets", "row_codewords", "fewest_codewords", "levels", "checksums")
PARTS_OF = {"tunstall": PARTS, "paper": PARTS}  # by kind of code


def parts_of(codebook: Codebook) -> tuple[str, ...]:
    """Return the names of the tensors that a projection with such a code has."""
    return PARTS_OF[codebook.kind]


def tensor_name(projection: str, part: str) -> str:
    """Return the name of a part's tensor; `projection` with or without the name of its experts module."""
    return f"{projection}_{part}"


def checksum(packed: PackedMatrix) -> int:
    """Return the CRC-32 of one expert's matrix: its codes, row lengths and levels."""
    fewest = torch.tensor([packed.fewest_codewords], dtype=torch.int32)
    crc = 0
    for part in (packed.codes, packed.row_codewords, fewest, packed.levels):
        crc = zlib.crc32(part.contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return crc


def pack_experts(matrices: list[PackedMatrix]) -> dict[str, Tensor]:
    """Lay the matrices of a layer's experts side by side, as they are stored.

    Parameters
    ----------
    matrices : list of PackedMatrix, one an expert
        Of one shape and codebook.

    Returns
    -------
    dict
        "codes" uint8 (bytes,), "expert_offsets" int64 (E + 1,), "row_codewords" (E, R), uint8 or, where one expert
        needs it, uint16, "fewest_codewords" int32 (E,), "levels" (E, R, L), "checksums" int64 (E,).
    """
    if any(packed.row_codewords.dtype == torch.uint16 for packed in matrices):
        matrices = [replace(packed, row_codewords=packed.row_codewords.to(torch.uint16)) for packed in matrices]
    row_codewords = torch.stack([packed.row_codewords.view(torch.uint8) for packed in matrices])  # uint16 has no stack
    offsets = [0]
    for packed in matrices:
        offsets.append(offsets[-1] + -(-len(packed.codes) // ALIGNMENT) * ALIGNMENT)
    codes = torch.zeros(offsets[-1], dtype=torch.uint8)
    for packed, start in zip(matrices, offsets[:-1], strict=True):
        codes[start : start + len(packed.codes)] = packed.codes
    return {
        "codes": codes,
        "expert_offsets": torch.tensor(offsets, dtype=torch.int64),
        "row_codewords": row_codewords.view(matrices[0].row_codewords.dtype),
        "fewest_codewords": torch.tensor([p.fewest_codewords for p in matrices], dtype=torch.int32),
        "levels": torch.stack([p.levels for p in matrices]),
        "checksums": torch.tensor([checksum(p) for p in matrices], dtype=torch.int64),
    }


def quantization_config(
    codebooks: Mapping[str, Mapping[str, dict[str, Any]]],
    *,
    recipe: str | None = None,
    grid: dict[str, Any] | None = None,
    level_dtype: torch.dtype | None = None,
    versions: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Make the `quantization_config` of config.json; what is None is left out.

    Parameters
    ----------
    codebooks : dict, experts module to projection to codebook
        As `Codebook.to_config` returns them; equal ones are stored once.
    recipe : str, optional
        Name of the recipe.
    grid : dict, optional
        As `Grid.to_config` returns it.
    level_dtype : torch dtype, optional
        Of all levels.
    versions : dict, optional
        Of qmoe-lite and what it stands on.
    """
    table: list[dict[str, Any]] = []
    used: dict[str, dict[str, int]] = {}
    for experts, by_projection in codebooks.items():
        used[experts] = {}
        for projection, book in by_projection.items():
            if book not in table:
                table.append(book)
            used[experts][projection] = table.index(book)
    entries = {
        "quant_method": METHOD,
        "format": FORMAT,
        "recipe": recipe,
        "grid": grid,
        "level_dtype": level_dtype and str(level_dtype).removeprefix("torch."),
        "codebooks": table,
        "layers": used,
        "versions": versions,
    }
    return {name: value for name, value in entries.items() if value is not None}


def quantization_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the `quantization_config` of a compressed model's config.json.

    Raises
    ------
    CheckpointError
        The model is not compressed by qmoe.
    FormatError
        It is of a newer format.
    """
    directory, settings = checkpoint.directory, checkpoint.config.get("quantization_config") or {}
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        raise CheckpointError(f"{directory} is not compressed by qmoe. Run: qmoe compress {directory} OUT")
    if (found := settings.get("format")) != FORMAT:
        remedy = "Upgrade qmoe-lite" if isinstance(found, int) and found > FORMAT else "Compress the model again"
        raise FormatError(f"{directory} has format {found}; this qmoe-lite reads {FORMAT}. {remedy}.")
    return settings  # type: ignore[no-any-return]


def codebooks_of(checkpoint: Checkpoint) -> dict[str, dict[str, Codebook]]:
    """Return the codebook of each experts module's projections.

    Raises
    ------
    CheckpointError
        As `quantization_of`.
    FormatError
        The table is damaged, or a codebook does not match its hash.
    """
    settings = quantization_of(checkpoint)
    try:
        books = [code_from_config(entry) for entry in settings["codebooks"]]
        return {
            name: {projection: books[number] for projection, number in used.items()}
            for name, used in settings["layers"].items()
        }
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        path = checkpoint.directory
        raise FormatError(f"{path}/config.json has a damaged quantization_config. Fetch it again.") from error


def check_alphabets(experts: str, codebooks: Mapping[str, Codebook]) -> None:
    """Raise FormatError where the projections of an experts module have digits of different alphabets."""
    if len({book.digits for book in codebooks.values()}) > 1:
        raise FormatError(f"{experts} mixes codebooks of three and of four digits. Fetch the file again.")
