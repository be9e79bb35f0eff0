"""What lies on disk: the parts of a projection's experts, how they are packed, and what config.json says of them.

FORMAT.md beside this file is the specification; whatever changes here changes there, and `FORMAT` with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.coding.codes import Code, code_from_config
from qmoe_lite.coding.dictionary import KIND, Dictionary
from qmoe_lite.coding.narrow import pack_numbers, pack_scales
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.parts import EXCEPTION_PARTS
from qmoe_lite.errors import CheckpointError, FormatError

_Any = TypeVar("_Any")
FORMAT = 4  # of what holds a dictionary's codes; directories without any are still written as format 2
FORMATS = (2, 3, 4)  # that are read
METHOD = "qmoe"  # quant_method in config.json
ALIGNMENT = 16  # bytes; where an expert's codes may start
PARTS = ("codes", "expert_offsets", "row_codewords", "fewest_codewords", "levels", "checksums")
WINDOW_PARTS = (*PARTS, "column_scales", *EXCEPTION_PARTS)
_CHECKSUM_BYTES = 8
PARTS_OF = {"tunstall": PARTS, "paper": PARTS, KIND: WINDOW_PARTS}  # by kind of code


def parts_of(codebook: Code) -> tuple[str, ...]:
    """Return the names of the tensors that a projection with such a code has."""
    return PARTS_OF[codebook.kind]


def tensor_name(projection: str, part: str) -> str:
    """Return the name of a part's tensor; `projection` with or without the name of its experts module."""
    return f"{projection}_{part}"


def checksum(packed: PackedMatrix, crc: int = 0) -> int:
    """Return the CRC-32 of one expert's matrix: codes, row lengths, levels; of a dictionary's, all its tensors.

    `crc` is that of the codes, where they are no longer in the matrix.
    """
    codes, row_codewords, *others = packed.tensors.values()
    fewest = torch.tensor([packed.fewest_codewords], dtype=torch.int32)
    for part in (codes, row_codewords, fewest, *others):
        if part.numel():
            crc = zlib.crc32(part.contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return crc


def pack_experts(matrices: list[PackedMatrix], *, shares_scales: bool = False) -> dict[str, Tensor]:
    """Lay the matrices of a layer's experts side by side, as they are stored.

    Parameters
    ----------
    matrices : list of PackedMatrix, one an expert
        Of one shape and codebook.
    shares_scales : bool
        The column scales are those of the stage's first projection, and stored there.

    Returns
    -------
    dict
        "codes" uint8 (bytes,), "expert_offsets" int64 (E + 1,), "row_codewords" (E, R), uint8 or, where one expert
        needs it, uint16, "fewest_codewords" int32 (E,), "levels" (E, R, L), "checksums" int64 (E,). Of a dictionary
        besides "column_scales" bfloat16 (E, C), or (E, 0) where they are shared, "exception_starts" int32
        (E, blocks + 1), "exception_positions" uint16 (N,) and "exception_values" int8 (N,); there "row_codewords",
        "levels" and "column_scales" are uint8 (E, bytes) where that is shorter, see `coding.narrow`.
    """
    matrices = _alike(matrices)
    offsets = _offsets(matrices)
    codes = torch.zeros(offsets[-1], dtype=torch.uint8)
    for packed, start in zip(matrices, offsets[:-1], strict=True):
        codes[start : start + len(packed.codes)] = packed.codes
    sums = torch.tensor([checksum(p) for p in matrices], dtype=torch.int64)
    stored = {"codes": codes, "checksums": sums} | _small_parts(matrices, shares_scales)
    return {part: stored[part] for part in parts_of(matrices[0].codebook)}


def bytes_of_experts(matrices: list[PackedMatrix], *, shares_scales: bool = False) -> int:
    """Return the bytes of what `pack_experts` makes of these experts, were they all."""
    matrices = _alike(matrices)
    small = _small_parts(matrices, shares_scales)
    return sum(tensor.nbytes for tensor in small.values()) + _offsets(matrices)[-1] + _CHECKSUM_BYTES * len(matrices)


def _alike(matrices: list[PackedMatrix]) -> list[PackedMatrix]:
    """Return the matrices with row lengths of one dtype, and with column scales where their code is a dictionary."""
    if any(packed.row_codewords.dtype == torch.uint16 for packed in matrices):
        matrices = [replace(packed, row_codewords=packed.row_codewords.to(torch.uint16)) for packed in matrices]
    if isinstance(matrices[0].codebook, Dictionary):  # every matrix that is read has scales: its checksum counts them
        ones = torch.ones(matrices[0].columns, dtype=torch.bfloat16)
        matrices = [p if p.column_scales is not None else replace(p, column_scales=ones) for p in matrices]
    return matrices


def _offsets(matrices: list[PackedMatrix]) -> list[int]:
    offsets = [0]
    for packed in matrices:
        offsets.append(offsets[-1] + -(-len(packed.codes) // ALIGNMENT) * ALIGNMENT)
    return offsets


def _small_parts(matrices: list[PackedMatrix], shares_scales: bool) -> dict[str, Tensor]:
    """Return all parts but the codes and checksums."""
    row_codewords = torch.stack([packed.row_codewords.view(torch.uint8) for packed in matrices])  # uint16 has no stack
    stored = {
        "expert_offsets": torch.tensor(_offsets(matrices), dtype=torch.int64),
        "row_codewords": row_codewords.view(matrices[0].row_codewords.dtype),
        "fewest_codewords": torch.tensor([p.fewest_codewords for p in matrices], dtype=torch.int32),
        "levels": torch.stack([p.levels for p in matrices]),
    }
    if not isinstance(matrices[0].codebook, Dictionary):
        return stored
    if stored["row_codewords"].dtype == torch.uint8:
        stored["row_codewords"] = torch.from_numpy(pack_numbers(stored["row_codewords"].numpy()))
    stored |= _window_tensors(matrices, shares_scales)
    scales = {"levels": stored["levels"][:, :, 0], "column_scales": stored["column_scales"]}
    narrow = {part: pack_scales(tensor) for part, tensor in scales.items()}
    return stored | {part: tensor for part, tensor in narrow.items() if tensor is not None}


def _window_tensors(matrices: list[PackedMatrix], shares_scales: bool) -> dict[str, Tensor]:
    """Return what a dictionary's matrices have besides; exceptions of all experts in one list."""
    columns = 0 if shares_scales else matrices[0].columns
    scales = [p.column_scales[:columns] for p in matrices if p.column_scales is not None]
    starts, positions, values = ([p.tensors[name] for p in matrices] for name in EXCEPTION_PARTS)
    before = torch.tensor([0, *(len(part) for part in positions)]).cumsum(0)
    if int(before[-1]) > torch.iinfo(torch.int32).max:
        raise FormatError(f"{int(before[-1])} exceptions do not fit the format. Compress at a lower rate.")
    return {
        "column_scales": torch.stack(scales),
        "exception_starts": torch.stack(starts) + before[:-1, None].to(torch.int32),
        "exception_positions": torch.cat([part.view(torch.int16) for part in positions]).view(torch.uint16),
        "exception_values": torch.cat(values),
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
        "format": FORMAT if any(book.get("kind") == KIND for book in table) else FORMATS[0],
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
    if (found := settings.get("format")) not in FORMATS:
        remedy = "Upgrade qmoe-lite" if isinstance(found, int) and found > FORMAT else "Compress the model again"
        known = f"{', '.join(map(str, FORMATS[:-1]))} and {FORMATS[-1]}"
        raise FormatError(f"{directory} has format {found}; this qmoe-lite reads {known}. {remedy}.")
    return settings  # type: ignore[no-any-return]


def codebooks_of(checkpoint: Checkpoint) -> dict[str, dict[str, Code]]:
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
        entries, layers = settings["codebooks"], settings["layers"]
        check_number_of_codes(entries, checkpoint)
        books = [code_from_config(entry) for entry in entries]
        return {
            name: {projection: code_at(books, number) for projection, number in used.items()}
            for name, used in layers.items()
        }
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        path = checkpoint.directory
        raise FormatError(f"{path}/config.json has a damaged quantization_config. Fetch it again.") from error


def check_number_of_codes(entries: Any, checkpoint: Checkpoint) -> None:
    """Raise FormatError where config.json has more codes than projections: to build one takes up to half a second."""
    if isinstance(entries, list) and len(entries) * len(PARTS) > len(checkpoint.sources):
        raise FormatError(f"config.json has {len(entries):,} codes, more than there are projections. Fetch it again.")


def code_at(codes: list[_Any], number: Any) -> _Any:
    """Return the code of such a number; IndexError where there is none, TypeError where it is no number."""
    if type(number) is not int:
        raise TypeError
    if number < 0:
        raise IndexError
    return codes[number]


def check_alphabets(experts: str, codebooks: Mapping[str, Code]) -> None:
    """Raise FormatError where the projections of an experts module have digits of different alphabets."""
    if len({KIND if isinstance(book, Dictionary) else book.digits for book in codebooks.values()}) > 1:
        raise FormatError(f"{experts} mixes codes of different digits. Fetch the file again.")
