"""From the paper's published checkpoints to a compressed directory of ours, expert by expert."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmoe_lite.checkpoint import atomic as files
from qmoe_lite.checkpoint.expert_file import write_experts
from qmoe_lite.checkpoint.format import quantization_config
from qmoe_lite.checkpoint.published import PublishedCheckpoint
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.report import stored_bytes, versions
from qmoe_lite.checkpoint.writer import Writer
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import decode, encode
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.compression.lock import check_free, locked
from qmoe_lite.compression.settings import Progress
from qmoe_lite.errors import CheckpointError, FormatError, NotFiniteError, OutputError, first_line
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.building import skeleton
from qmoe_lite.models.family import family_of
from qmoe_lite.models.skeletons import check_dense
from qmoe_lite.quantization.digits import count
from qmoe_lite.quantization.grid import MinMaxTernary

RECIPE = "imported"  # in config.json
_MARK = "import.json"  # in OUT.partial, which may then be discarded
_SAMPLE = 1 << 22  # digits, over all experts of a projection, that choose its codebook
_TOKENIZER = ("tokenizer.json", "spiece.model")


@dataclass(frozen=True)
class Imported:
    """What `import_qmoe` did.

    Attributes
    ----------
    source : str
    recode : bool
        Whether codewords were fitted anew.
    matrices, expert_weights : int
    published_bytes : int
        Of the experts in the source's tensors.
    expert_bytes, other_bytes : int
        Of the experts' and of all other tensors as they were written.
    published_code_bytes, code_bytes : int
        Of the experts' codewords alone, there and here.
    notes : list of str
        What is worth knowing of the result, in words.
    seconds : float
    """

    source: str
    recode: bool
    matrices: int
    expert_weights: int
    published_bytes: int
    expert_bytes: int
    other_bytes: int
    published_code_bytes: int
    code_bytes: int
    notes: list[str]
    seconds: float

    def bits_per_weight(self, size: int) -> float:
        """Return what so many bytes of experts are in bits a weight."""
        return 8 * size / self.expert_weights

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight(self.expert_bytes)}


def import_qmoe(
    src: str | Path,
    out: str | Path,
    recode: bool = False,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> Imported:
    """Make a compressed model of a checkpoint that the paper's authors published (switch-*_qmoe on the hub).

    Parameters
    ----------
    src : path or str
        Directory with config.json, noexp.pt, exp00.pt, .. and sizes.pt.
    out : path or str
        Directory to make; it appears when everything is done. Until then the work is in `OUT.partial`.
    recode : bool
        Write the digits anew, with a code fitted to each layer and projection: the same weights in fewer bits. False
        keeps the codewords as they are.
    progress : callable, optional
        Called with a `Progress` after each matrix.

    Returns
    -------
    Imported

    Raises
    ------
    OutputError
        `out` exists, another run is writing it, or it cannot be written.
    CheckpointError
        A file or tensor of the source is missing or damaged, or config.json is of another model.
    FormatError
        Row offsets or codewords that do not decode to exactly a matrix's rows.
    NotFiniteError
        A dense tensor holds NaN or infinity.

    Notes
    -----
    One expert is in memory at a time. Pickles are read as data alone: none of their code runs. An import is not
    resumed: what was begun is discarded when it ends early.

    Weights are those of the published program in every bit, but that a zero is +0. Sizes count all tensors of experts.
    """
    source, target = Path(src), Path(out)
    check_free(target)
    if not source.is_dir():
        text = f"{source} is no directory. Fetch the checkpoint first: hf download OWNER/NAME --local-dir {source}"
        raise CheckpointError(text)
    partial = target.with_name(f"{target.name}.partial")
    with locked(partial) as note:
        check_free(target)
        run = _Import(source, partial, recode, progress or (lambda event: None))
        run.notes += [] if note is None else [note]
        _claim(partial, source)
        try:
            run.write()
            _become(partial, target)
        except OutputError as error:
            reason = getattr(error.__cause__, "strerror", None) or error.__cause__
            raise OutputError(f"{target} cannot be written: {reason}. Free some space, or name another OUT.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # after Ctrl-C too; once it is OUT there is none
    return run.report(target)


class _Import:
    """One import, from an opened checkpoint to a written directory."""

    def __init__(self, source: Path, partial: Path, recode: bool, progress: Callable[[Progress], None]) -> None:
        self.started = time.perf_counter()
        self.partial, self.recode, self.progress = partial, recode, progress
        self.checkpoint = PublishedCheckpoint(source)
        self.family = family_of(self.checkpoint.config["model_type"])
        config = _read_config(self.checkpoint)
        self._check_counts(config)
        self.layers = self.family.layers(config)
        self.notes: list[str] = []
        self._check_dense(skeleton(self.family, config, torch.float32))
        self.shapes = {
            self.name_of(layer, expert, projection): shape
            for layer in self.layers
            for expert in range(layer.count)
            for projection, shape in layer.shapes.items()
        }
        self.checkpoint.check_matrices(self.shapes)
        self.writer = Writer(partial, self.checkpoint, lambda name: name, len(self.layers))
        self.code_bytes, self.done = 0, 0

    def _check_counts(self, config: Any) -> None:
        """Compare numbers with what there is, before anything is made as large as they say."""
        blocks, dense = config.num_layers + config.num_decoder_layers, len(self.checkpoint.dense_names)
        place, named = self.checkpoint.directory, len(self.checkpoint.sizes)
        if not 0 < blocks <= dense:
            text = f"{place}/config.json says that there are {blocks} blocks; noexp.pt has {dense} tensors."
            raise CheckpointError(f"{text} Fetch the whole directory again.")
        if (promised := sum(layer.matrices for layer in self.family.layers(config))) != named:
            text = f"{place}/config.json promises {promised} matrices of experts; sizes.pt names {named}."
            raise CheckpointError(f"{text} Fetch the whole directory again.")

    def name_of(self, layer: MoELayer, expert: int, projection: str) -> str:
        return self.family.weight_name(layer, expert, projection).removesuffix(".weight")

    def _check_dense(self, model: Any) -> None:
        """Compare the dense tensors with those of the model, and search them for NaN and infinity."""
        needed, place = model.state_dict(), self.checkpoint.directory
        check_dense(self.family, model, self.checkpoint)
        if extra := [name for name in self.checkpoint.dense_names if name not in needed]:
            self.checkpoint.forget(extra)
            self.notes.append(f"left out {len(extra)} tensors that the model does not have, such as {extra[0]}")
        for name in self.checkpoint.dense_names:
            value = self.checkpoint.tensor(name)
            if not value.is_floating_point():
                raise FormatError(f"{name} in {place} is {value.dtype}; expected floats. Fetch the file again.")
            if not torch.isfinite(value).all():
                raise NotFiniteError(f"{name} in {place} holds NaN or infinity. Fetch it again.")

    def write(self) -> None:
        """Write the directory."""
        sums: dict[str, int] = {}
        codebooks: dict[str, dict[str, dict[str, Any]]] = {}
        for number, layer in enumerate(self.layers):
            file_name = self.checkpoint.file_of(f"{self.name_of(layer, 0, 'wi')}.w_comp").name
            self.checkpoint.check_sums(file_name)
            books = {name: self._codebook(layer, name) if self.recode else Codebook.paper() for name in layer.shapes}
            matrices = {f"{layer.experts}.{name}": self._matrices(layer, name, book) for name, book in books.items()}
            sums |= write_experts(self.writer.layer_file(number), matrices)
            codebooks[layer.experts] = {name: book.to_config() for name, book in books.items()}
            self.checkpoint.close(file_name)
        grid = MinMaxTernary(torch.bfloat16)
        settings = quantization_config(
            codebooks, recipe=RECIPE, grid=grid.to_config(), level_dtype=torch.bfloat16, versions=versions()
        )
        self.writer.write_rest(sums, settings)
        if not any((self.partial / name).exists() for name in _TOKENIZER):
            source = self.checkpoint.directory
            self.notes.append(
                f"{source} has no tokenizer: copy spiece.model, tokenizer.json and tokenizer_config.json of the model "
                "that it was made of (google/switch-..) beside the result to generate text or evaluate"
            )

    def _read(self, layer: MoELayer, expert: int, projection: str) -> PackedMatrix:
        return self.checkpoint.matrix(self.name_of(layer, expert, projection), layer.shapes[projection])

    def _codebook(self, layer: MoELayer, projection: str) -> Codebook:
        """Fit a code to all digits of a projection of a layer."""
        rows, columns = layer.shapes[projection]
        step = min(rows, max(1, layer.count * rows * columns // _SAMPLE))
        counts, sample = np.zeros(3, dtype=np.int64), []
        for expert in range(layer.count):
            digits = _digits(self._read(layer, expert, projection))
            counts += count(digits, 3)
            sample.append(digits[expert % step :: step].copy())
            place = f"{layer.block}, {projection}: digits of expert {expert + 1} of {layer.count} counted"
            self.progress(Progress(self.done, len(self.shapes), place))
        return Codebook.choose(counts.tolist(), np.concatenate(sample))

    def _matrices(self, layer: MoELayer, projection: str, book: Codebook) -> Iterator[PackedMatrix]:
        """Read one expert's matrix after another, and write it anew where its code is another one."""
        for expert in range(layer.count):
            packed = self._read(layer, expert, projection)
            if book.kind != "paper":
                packed = encode(_digits(packed), packed.levels, book)
            self.code_bytes += int(packed.count_codewords().sum()) * book.bits // 8
            yield packed
            self.done += 1
            place = f"{layer.block}, {projection} of expert {expert + 1} of {layer.count}"
            self.progress(Progress(self.done, len(self.shapes), place))

    def report(self, out: Path) -> Imported:
        expert_bytes, other_bytes = stored_bytes(Checkpoint(out))
        return Imported(
            source=str(self.checkpoint.directory),
            recode=self.recode,
            matrices=len(self.shapes),
            expert_weights=sum(layer.weights for layer in self.layers),
            published_bytes=self.checkpoint.stored_bytes(self.shapes),
            expert_bytes=expert_bytes,
            other_bytes=other_bytes,
            published_code_bytes=2 * sum(self.checkpoint.sizes[name] for name in self.shapes),
            code_bytes=self.code_bytes,
            notes=self.notes,
            seconds=round(time.perf_counter() - self.started, 3),
        )


def _digits(packed: PackedMatrix) -> np.ndarray:
    """Return a matrix's digits, int8 (R, C), those of value zero as the digit 0.

    The published program writes the zeros of a row without negative (or positive) weights as its minimum (maximum).
    """
    digits = decode(packed)[0].numpy()
    for digit, values in zip((-1, 1), packed.levels.float().numpy().T, strict=True):
        rows = values == 0
        digits[rows] = np.where(digits[rows] == digit, np.int8(0), digits[rows])
    return digits


def _read_config(checkpoint: PublishedCheckpoint) -> Any:
    from transformers import SwitchTransformersConfig

    try:
        return SwitchTransformersConfig.from_dict(checkpoint.config)
    except Exception as error:  # its validators have their own
        text = f"{checkpoint.directory}/config.json is refused by transformers: {first_line(error)}."
        raise CheckpointError(text) from error


def _claim(partial: Path, source: Path) -> None:
    """Make OUT.partial, in the place of what an import before may have left there."""
    try:
        if partial.exists() or partial.is_symlink():
            if not (partial / _MARK).is_file() or partial.is_symlink():
                raise OutputError(f"{partial} exists and is no unfinished import. Move it, or name another OUT.")
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        (partial / _MARK).write_text(json.dumps({"source": str(source)}), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{partial} cannot be made: {error.strerror}. Name another directory.") from error


def _become(partial: Path, out: Path) -> None:
    try:
        partial.rename(out)
        (out / _MARK).unlink()
        files.sync_directory(out.parent.resolve())
    except OSError as error:
        raise OutputError(f"{partial} cannot become {out}: {error.strerror}. Move what is there.") from error
