"""The checkpoints that the paper's authors published (switch-*_qmoe on the hub), in the layout of their own program.

`noexp.pt` holds all tensors but the experts', `exp00.pt`, `exp01.pt`, .. those of a sparse layer each, `sizes.pt` the
codewords of each matrix. A matrix NAME is stored as NAME.w_comp (int16: the 16 bits of a codeword of
`Codebook.paper()`), NAME.row_off (int32: where each row begins, and the end), NAME.ter_minmax (bfloat16: the values of
-1 and +1 of the first row, of the second, ..) and an empty NAME.weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.checkpoint.pickles import check_sums
from qmoe_lite.checkpoint.reader import Checkpoint, of_experts
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.parts import MAX_COLUMNS
from qmoe_lite.coding.stream import PADDING_BYTES, shorten_counts
from qmoe_lite.coding.validation import validate
from qmoe_lite.errors import CheckpointError, FormatError

MODEL_TYPE = "switch_transformers"
_DENSE_FILE, _SIZES_FILE = "noexp.pt", "sizes.pt"
_DTYPES = {"w_comp": torch.int16, "row_off": torch.int32, "ter_minmax": torch.bfloat16}
_FETCH = "Fetch the file again."


class PublishedCheckpoint(Checkpoint):
    """Such a checkpoint: its dense tensors as `Checkpoint` gives them, its experts' matrices by `matrix`.

    Parameters
    ----------
    directory : Path

    Attributes
    ----------
    config : dict
        Of config.json, as transformers takes it: that of the largest model marks what is sparse in a way of its own.

    Raises
    ------
    CheckpointError
        A file is missing, damaged, or holds more than tensors; or a tensor is in two of them.
    """

    def __init__(self, directory: Path) -> None:
        self.sizes: dict[str, int] = {}
        super().__init__(directory)
        if (found := self.config.get("model_type")) != MODEL_TYPE:
            raise CheckpointError(f"{directory}/config.json is of model type {found}; published were {MODEL_TYPE}.")
        self._settle_config()

    def _find_weights(self, variant: str | None) -> None:
        self._kind = "bin"
        numbers = sorted(int(m[1]) for f in self.directory.iterdir() if (m := re.fullmatch(r"exp(\d+)\.pt", f.name)))
        if not numbers and not (self.directory / _DENSE_FILE).exists():
            text = f"{self.directory} has neither {_DENSE_FILE} nor exp00.pt: it is no checkpoint of the paper's."
            raise CheckpointError(f"{text} Name the directory that was fetched from the hub.")
        expected = (f"exp{number:02d}.pt" for number in range(max(numbers, default=0) + 1))  # a forged one may be large
        for file_name in chain((_DENSE_FILE,), expected):
            names = self._tensors_in(file_name)
            if twice := next((name for name in names if name in self._file_of), None):
                raise CheckpointError(f"{twice} is in {self._file_of[twice]} and in {file_name}. {_FETCH}")
            self._file_of |= dict.fromkeys(names, file_name)
            self.close(file_name)
        sizes = self._open_checked(_SIZES_FILE)
        if not isinstance(sizes, dict) or not all(isinstance(k, str) and type(v) is int for k, v in sizes.items()):
            text = f"{self.directory / _SIZES_FILE} does not name numbers of codewords."
            raise CheckpointError(f"{text} {_FETCH}")
        self.sizes = sizes

    def _tensors_in(self, file_name: str) -> Iterable[str]:
        """Return the names of a file's tensors; raise CheckpointError unless it holds plain ones alone."""
        found = self._open_checked(file_name)
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and _is_plain(value) for name, value in found.items()
        ):
            text = f"{self.directory / file_name} holds other things than plain tensors by name."
            raise CheckpointError(f"{text} {_FETCH}")
        return found.keys()

    def _open_checked(self, file_name: str) -> Any:
        """Open a small file once its checksums were compared, a layer's without: that is `check_sums`."""
        if file_name in (_DENSE_FILE, _SIZES_FILE) and (self.directory / file_name).is_file():
            check_sums(self.directory / file_name)
        return self._open(file_name)

    def check_sums(self, file_name: str) -> None:
        """Compare all of a layer's file with its checksums; raise CheckpointError for a damaged one."""
        check_sums(self.directory / file_name)

    def close(self, file_name: str) -> None:
        """Let a file go; it is opened again when it is needed."""
        self._open_files.pop(file_name, None)

    def _settle_config(self) -> None:
        """Say that every block is sparse as transformers says it, where the names of the experts do."""
        config = dict(self.config)
        full = config.pop("is_full_sparse", None) is not None  # the published program asks no more
        for stack, blocks in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
            count = config.get(blocks) or config.get("num_layers")
            if type(step := config.get(f"{stack}_sparse_step", 1)) is not int:
                text = f"{self.directory}/config.json has {stack}_sparse_step {step!r}; expected a whole number."
                raise CheckpointError(f"{text} {_FETCH}")
            named = {m[1] for name in self.sizes if (m := re.match(rf"{stack}\.block\.(\d+)\.", name))}
            if full or (type(count) is int and len(named) == count):
                config |= {f"{stack}_sparse_step": 1, f"num_sparse_{stack}_layers": count}
        config["architectures"] = config.get("architectures") or ["SwitchTransformersForConditionalGeneration"]
        self.config = config

    @property
    def dense_names(self) -> list[str]:
        """Names of the tensors outside the experts."""
        return [name for name in self.names if not of_experts(name)]

    def check_matrices(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Compare the experts' tensors with those that are needed; none is read.

        Parameters
        ----------
        shapes : dict, name of a matrix to (rows, columns)
            All that the model has.

        Raises
        ------
        CheckpointError
            One is missing, is of another dtype or shape, or is not needed; or sizes.pt differs.
        """
        held = {name for name in self.names if of_experts(name)}
        for name in shapes:
            for part in _DTYPES:
                if f"{name}.{part}" not in held:
                    text = f"{self.directory} lacks {name}.{part}: a file exp??.pt is missing, or config.json is of"
                    raise CheckpointError(f"{text} another model. Fetch the whole directory again.")
            held -= {f"{name}.{part}" for part in (*_DTYPES, "weight")}
            if name not in self.sizes:
                raise CheckpointError(f"{self.directory / _SIZES_FILE} does not name {name}. {_FETCH}")
        extra = sorted(held) or sorted(self.sizes.keys() - shapes.keys())
        if extra:
            text = f"{self.directory} holds {extra[0]}, which config.json does not account for."
            raise CheckpointError(f"{text} Fetch the whole directory again.")

    def matrix(self, name: str, shape: tuple[int, int]) -> PackedMatrix:
        """Return one expert's matrix as it is stored, its codewords unchanged, once it has passed every check.

        Parameters
        ----------
        name : str
            "encoder.block.1.layer.1.mlp.experts.expert_0.wi".
        shape : tuple of int
            Rows and columns.

        Raises
        ------
        FormatError
            Its tensors are of other dtypes or shapes, sizes.pt or its row offsets contradict its codewords, or these
            do not decode to exactly its rows.
        """
        file = self.file_of(f"{name}.w_comp")
        words, offsets, values = (self.tensor(f"{name}.{part}") for part in _DTYPES)
        (rows, columns), count = shape, words.numel()
        for part, tensor, expected in (
            ("w_comp", words, (count,)),
            ("row_off", offsets, (rows + 1,)),
            ("ter_minmax", values, (2 * rows,)),
        ):
            found = tuple(tensor.shape)
            if tensor.dtype != _DTYPES[part] or found != expected or not tensor.is_contiguous():
                text = f"{name}.{part} in {file} is {tensor.dtype} {found}; expected {_DTYPES[part]} {expected}."
                raise FormatError(f"{text} {_FETCH}")
        if self.sizes[name] != count:
            text = f"{self.directory / _SIZES_FILE} says that {name} has {self.sizes[name]} codewords; {file.name} has"
            raise FormatError(f"{text} {count}. Fetch both again.")
        starts = offsets.to(torch.int64)
        counts = starts.diff()
        if int(starts[0]) != 0 or int(starts[-1]) != count:
            text = f"{name}.row_off in {file} goes from {int(starts[0])} to {int(starts[-1])}; expected 0 to {count}."
            raise FormatError(f"{text} {_FETCH}")
        if (wrong := (counts < 1) | (counts > min(columns, MAX_COLUMNS))).any():
            row = int(wrong.nonzero()[0])
            text = f"{name}.row_off in {file}: row {row} has {int(counts[row])} codewords; expected 1 to {columns}."
            raise FormatError(f"{text} {_FETCH}")
        codes = torch.zeros(2 * count + PADDING_BYTES, dtype=torch.uint8)
        codes[: 2 * count] = words.view(torch.uint8)
        row_codewords, fewest = shorten_counts(counts)
        levels = values.view(rows, 2).clone()
        packed = PackedMatrix(codes, row_codewords, levels, Codebook.paper(), columns, fewest_codewords=fewest)
        try:
            validate(packed)
        except FormatError as error:
            raise FormatError(f"{name} in {file}: {error}") from error
        return packed

    def stored_bytes(self, shapes: dict[str, tuple[int, int]]) -> int:
        """Return the bytes of the experts' tensors in these files."""
        return sum(2 * self.sizes[name] + 4 * (rows + 1) + 4 * rows for name, (rows, _) in shapes.items())


def _is_plain(value: Any) -> bool:
    """Return whether a value is a tensor that lies in the file as it is, on the CPU."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return value.is_contiguous() and not value.is_quantized
