"""Looks at every byte of a compressed directory and says all that is wrong with it; no model is loaded.

Loading checks a tensor when it is first used and stops at the first fault. Here one fault does not end the search:
each is a `Finding`. Tensors are read and not mapped, so that a file that is cut meanwhile is one too: dense ones a
piece at a time, experts at most two projections of a layer at a time, and nothing is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from qmoe_lite.checkpoint import format as on_disk
from qmoe_lite.checkpoint.config_file import check_named
from qmoe_lite.checkpoint.finding import find_model
from qmoe_lite.checkpoint.format import PARTS_OF, check_alphabets, parts_of, quantization_of, tensor_name
from qmoe_lite.checkpoint.reader import Checkpoint, of_experts
from qmoe_lite.checkpoint.report import FILE_NAME, read_report
from qmoe_lite.checkpoint.stack import ExpertStack
from qmoe_lite.checkpoint.weight_file import THREADS, page_memory
from qmoe_lite.coding.codes import Code, code_from_config
from qmoe_lite.coding.narrow import dtype_of_levels
from qmoe_lite.compression.calibration import open_tokenizer
from qmoe_lite.compression.settings import Progress
from qmoe_lite.errors import CheckpointError, FormatError, NotFiniteError, QMoEError, first_line
from qmoe_lite.inspection.contents import inspect_model, short_name
from qmoe_lite.inspection.findings import FileFault, Finding, Verification, of_no_tensor
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.building import read_config
from qmoe_lite.models.family import Family, family_of
from qmoe_lite.models.skeletons import check_numbers, dense_faults, state_of_saved


def verify(directory: str | Path) -> list[Finding]:
    """Check everything in a compressed directory; nothing is loaded.

    Compared are config.json, index, shards and report with each other, the bytes of all tensors with their checksums,
    shapes and dtypes with what the configuration promises, codebooks with their hashes; each expert's codes are walked,
    dense tensors and levels are searched for NaN and infinity, and the tokenizer is opened.

    Parameters
    ----------
    directory : path or str
        What `compress` wrote, or what save_pretrained made of it, or its name on the Hugging Face hub.

    Returns
    -------
    list of Finding
        All of them; with none of severity "error" the model is sound.

    Raises
    ------
    CheckpointError
        It is no model directory, or one of a model that is not compressed.
    """
    return verify_model(directory).findings


def verify_model(directory: str | Path, progress: Callable[[Progress], None] | None = None) -> Verification:
    """Do what `verify` does, and report how much was looked at.

    Parameters
    ----------
    directory : path or str
        As for `verify`.
    progress : callable, optional
        Called with a `Progress`, counted in dense tensors and matrices of experts.

    Raises
    ------
    CheckpointError
        As `verify`.
    """
    return _Search(find_model(directory), progress or (lambda event: None)).run()


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise FileFault(file.name, str(error)) from error


@dataclass(frozen=True)
class _Projection:
    layer: MoELayer
    projection: str
    codebook: Code

    @property
    def name(self) -> str:
        return f"{self.layer.experts}.{self.projection}"

    @property
    def tensors(self) -> dict[str, str]:
        """Names of its tensors, by part."""
        return {part: tensor_name(self.name, part) for part in parts_of(self.codebook)}


@dataclass
class _Search:
    path: Path
    progress: Callable[[Progress], None]
    findings: list[Finding] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)  # tensors, by their names in the files, that cannot be read
    unreadable: set[str] = field(default_factory=set)  # files of which that was said
    spoilt: set[str] = field(default_factory=set)  # projections of which an expert is damaged
    sums: dict[str, FormatError | None] = field(default_factory=dict)  # experts' tensors that were read: is one damaged
    firsts: dict[str, ExpertStack] = field(default_factory=dict)  # of the stage that was looked at last
    tensors: int = 0
    experts: int = 0
    bytes: int = 0
    done: int = 0
    total: int = 0

    def run(self) -> Verification:
        started = time.perf_counter()
        faults: list[CheckpointError] = []
        try:
            checkpoint = Checkpoint(self.path, faults)
        except CheckpointError as error:  # which file holds which tensor is not known
            self.error("", "", error)
        else:
            self.look_at(checkpoint, faults)
        seconds = round(time.perf_counter() - started, 3)
        return Verification(str(self.path), self.findings, self.tensors, self.experts, self.bytes, seconds)

    def look_at(self, checkpoint: Checkpoint, faults: list[CheckpointError]) -> None:
        for fault in faults:
            self.error("", "config.json", fault)
        settings = None
        if not faults:
            try:
                settings = quantization_of(checkpoint)
            except FormatError as error:
                self.error("quantization_config", "config.json", error)
        self.look_at_files(checkpoint)
        family = config = None
        if settings is not None:
            with self.found("model_type", "config.json"):
                check_named(self.path)
                family = family_of(checkpoint.config.get("model_type"), auto=True)
        layers: list[MoELayer] | None = None
        if family is not None:
            with self.found("", "config.json"):
                check_numbers(checkpoint)
                config = read_config(str(self.path))
                checkpoint.know_as(family.views(config, checkpoint))
                layers = family.layers(config)
                self.look_at_dense_shapes(family, config, layers, checkpoint)
        here = [name for name in checkpoint.names if checkpoint.stored_name(name) not in self.lost]
        dense = [name for name in here if not of_experts(name)]
        self.total = len(dense) + sum(layer.matrices for layer in layers or ())
        self.tensors = len(here)
        pool = ThreadPoolExecutor(THREADS)  # zlib lets go of the interpreter's lock
        try:
            work = {name: pool.submit(self.look_at_tensor, checkpoint, name) for name in dense}
            if settings is not None:
                books = self.look_at_codebooks(settings, checkpoint)
                if family is not None and layers is not None:
                    self.look_at_experts(family, config, layers, books, settings, checkpoint)
            left = [name for name in here if name not in work and name not in self.sums]
            work |= {name: pool.submit(self.look_at_tensor, checkpoint, name) for name in left}
            self.collect(here, work, checkpoint)
        finally:  # Ctrl-C is not to wait for all that is left
            pool.shutdown(cancel_futures=True)
        self.look_at_the_rest(layers is not None)

    # -- findings

    def error(self, name: str, file: str, error: Exception) -> None:
        """Take note of an error; one that nobody foresaw is one too."""
        if isinstance(error, FileFault):
            if error.file in self.unreadable:
                return
            self.unreadable.add(error.file)
            name, file = "", error.file  # not that of another tensor of the projection
        text = str(error)
        if not isinstance(error, QMoEError):
            text = f"it could not be checked: {type(error).__name__}: {first_line(error)}. Fetch the file again."
        self.findings.append(Finding("error", name, file, " ".join(text.split())))

    def note(self, name: str, file: str, text: str) -> None:
        self.findings.append(Finding("note", name, file, text))

    @contextmanager
    def found(self, name: str, file: str) -> Iterator[None]:
        """Turn what goes wrong inside into a finding."""
        try:
            yield
        except Exception as error:
            self.error(name, file, error)

    def step(self, place: str) -> None:
        self.done += 1
        self.progress(Progress(self.done, max(self.total, self.done), place))

    # -- what is looked at

    def look_at_files(self, checkpoint: Checkpoint) -> None:
        """Compare the shards with the index. Names are those in the files."""
        named: dict[str, set[str]] = {}
        for name in checkpoint.names:
            named.setdefault(checkpoint.file_of(name).name, set()).add(name)
        for file, names in sorted(named.items()):
            try:
                held = checkpoint.stored_in(file)
            except CheckpointError as error:
                self.error("", file, error)
                self.lost |= names
                continue
            for name in sorted(names - held):
                self.error(name, file, CheckpointError(f"{file} lacks {name}, which the index names. Fetch it again."))
            for name in sorted(held - names):
                self.note(name, file, f"{file} holds {name}, which the index does not name: it is not loaded.")
            self.lost |= names - held
        unused = {file.name for file in self.path.glob("*.safetensors")} - named.keys()
        if "model.safetensors" in named:
            unused |= {file.name for file in self.path.glob("model.safetensors.index.json")}
        for file in sorted(unused):
            self.note("", file, of_no_tensor(file))
        if not checkpoint.has_checksums:
            text = "dense tensors carry no checksums, as transformers saved the model: they were not compared."
            self.note("", "", text)

    def look_at_dense_shapes(self, family: Family, config: Any, layers: list[MoELayer], checkpoint: Checkpoint) -> None:
        """Compare all tensors' names, and dense ones' shapes and dtypes, with those that the configuration promises."""
        needed = state_of_saved(family, config)
        for name, error in dense_faults(family, config, needed, checkpoint):
            if name not in checkpoint:
                self.error(name, "", error)
            elif checkpoint.stored_name(name) not in self.lost:
                self.error(name, checkpoint.file_of(name).name, error)
        promised = {name: tensor.dtype for name, tensor in needed.items() if not of_experts(name)}
        projections = [f"{layer.experts}.{projection}" for layer in layers for projection in layer.projections]
        parts = {tensor_name(each, part) for each in projections for some in PARTS_OF.values() for part in some}
        for name in checkpoint.names:
            file = checkpoint.file_of(name).name
            if checkpoint.stored_name(name) in self.lost or name in parts:
                continue
            if name not in promised:
                self.note(name, file, f"{name} in {file} is no part of the model: it is not loaded.")
                continue
            with self.found(name, file):
                expected, found = promised[name], checkpoint.meta(name).dtype
                if expected.is_floating_point != found.is_floating_point:
                    raise FormatError(f"{name} in {file} is {found}; the model has {expected}. Fetch the file again.")

    def look_at_tensor(self, checkpoint: Checkpoint, name: str) -> None:
        """Raise FormatError for another checksum, NotFiniteError for NaN or infinity in a dense tensor."""
        dtype, finite = checkpoint.meta(name).dtype, True
        searched = not of_experts(name) and dtype.is_floating_point
        with _reading(checkpoint.file_of(name)):
            for piece in checkpoint.pieces(name):
                if searched and finite:
                    value = torch.frombuffer(piece, dtype=dtype)
                    least, most = (value.to(torch.bfloat16) if value.itemsize == 1 else value).aminmax()  # NaN is both
                    finite = bool(least.isfinite() and most.isfinite())
        if not finite:
            raise NotFiniteError(f"{name} in {checkpoint.file_of(name)} holds NaN or infinity. Fetch it again.")

    def read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """Read a tensor of experts. If its checksum differs, `collect` says so, unless one of them is named first."""
        self.sums[name] = None
        with _reading(checkpoint.file_of(name)):
            place = checkpoint.place(name)
            memory = page_memory(place.length)[: place.length]
            try:
                for _ in checkpoint.pieces(name, memory):
                    pass
            except FormatError as error:
                self.sums[name] = error
        return torch.from_numpy(memory).view(place.dtype).view(place.shape)

    def look_at_codebooks(self, settings: dict[str, Any], checkpoint: Checkpoint) -> list[Code | None]:
        """Make the codebooks of config.json; None for one that does not match its hash."""
        books: list[Code | None] = []
        listed = settings.get("codebooks")
        with self.found("codebooks", "config.json"):
            on_disk.check_number_of_codes(listed, checkpoint)
            for number, entry in enumerate(listed if isinstance(listed, list) else []):
                books.append(None)
                with self.found(f"codebooks[{number}]", "config.json"):
                    books[number] = code_from_config(entry)
        return books

    def look_at_experts(
        self,
        family: Family,
        config: Any,
        layers: list[MoELayer],
        books: list[Code | None],
        settings: dict[str, Any],
        checkpoint: Checkpoint,
    ) -> None:
        """Compare each expert with its checksum, and walk its codes."""
        todo: list[_Projection] = []
        used = named if isinstance(named := settings.get("layers"), dict) else {}
        for name in sorted(used.keys() - {layer.experts for layer in layers}):
            text = f"config.json says that {name} is compressed, which the model lacks. Fetch it again."
            self.error(name, "config.json", FormatError(text))
        for layer in layers:
            own: dict[str, Code] = {}
            for projection in layer.projections:
                name = f"{layer.experts}.{projection}"
                try:
                    book = on_disk.code_at(books, used[layer.experts][projection])
                except (KeyError, IndexError, TypeError):
                    text = f"config.json names no codebook for {name}. Fetch it again."
                    self.error(name, "config.json", FormatError(text))
                else:
                    own |= {projection: book} if book is not None else {}
            with self.found(layer.experts, "config.json"):
                check_alphabets(layer.experts, own)
                family.activation(config, layer.experts)
                whole = (_Projection(layer, projection, book) for projection, book in own.items())
                todo += [each for each in whole if self.complete(each, checkpoint)]
        with ThreadPoolExecutor(1) as reader:
            reads = (reader.submit(self.read_projection, each, checkpoint) for each in todo)
            ahead = next(reads, None)  # one projection is read while another is walked
            for each in todo:
                assert ahead is not None
                read, ahead = ahead, next(reads, None)
                self.look_at_projection(each, read, settings.get("level_dtype"), checkpoint)

    def complete(self, projection: _Projection, checkpoint: Checkpoint) -> bool:
        """Return whether all tensors of a projection are there."""
        names = projection.tensors.values()
        absent = [each for each in names if each not in checkpoint]
        for each in absent:
            text = f"the index does not name {each}, which the model needs. Fetch the directory again."
            self.error(each, "", CheckpointError(text))
        return not absent and not any(checkpoint.stored_name(each) in self.lost for each in names)

    def read_projection(self, projection: _Projection, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Read all tensors of a projection of a layer."""
        return {part: self.read(checkpoint, name) for part, name in projection.tensors.items()}

    def look_at_projection(
        self,
        projection: _Projection,
        read: Future[dict[str, Tensor]],
        level_dtype: str | None,
        checkpoint: Checkpoint,
    ) -> None:
        layer, name = projection.layer, projection.name
        file = checkpoint.file_of(projection.tensors["codes"]).name
        with self.found(name, file):
            shape = layer.shapes[projection.projection]
            first = self.firsts.get(f"{layer.experts}.{layer.first_of_stage(projection.projection)}")
            stack = ExpertStack(name, layer.count, shape, projection.codebook, read.result(), first=first)
            self.firsts = {name: stack} if first is None else self.firsts
            found = str(dtype_of_levels(stack.parts["levels"])).removeprefix("torch.")
            if level_dtype not in (None, found):
                text = f"{name}_levels in {file} is {found}; config.json says {level_dtype}. Fetch the file again."
                self.error(projection.tensors["levels"], file, FormatError(text))
            for expert in range(layer.count):
                try:
                    stack.checked(expert)
                except Exception as error:
                    self.spoilt.add(name)
                    self.error(stack.name_of(expert), file, error)
                self.experts += 1
                self.step(short_name(layer.block))

    def collect(self, names: list[str], work: dict[str, Future[None]], checkpoint: Checkpoint) -> None:
        """Take note of what the threads ran into; not of a tensor whose damaged experts are named already."""
        for name in names:
            error = work[name].exception() if name in work else self.sums[name]
            with suppress(Exception):  # the thread has met it too
                self.bytes += checkpoint.meta(name).nbytes
            if isinstance(error, Exception) and not name.startswith(tuple(f"{each}_" for each in self.spoilt)):
                self.error(name, checkpoint.file_of(name).name, error)
            if not of_experts(name):
                self.step("dense tensors")

    def look_at_the_rest(self, configured: bool) -> None:
        """Open the tokenizer, which takes a configuration; compare the report with the directory, if that is sound."""
        if configured:
            try:
                open_tokenizer(self.path)
            except CheckpointError as error:
                self.note("", "", f"{error} The model loads; no text is generated or evaluated without a tokenizer.")
        with self.found("", "generation_config.json"), suppress(OSError):  # there need be none
            GenerationConfig.from_pretrained(self.path)
        with self.found("", FILE_NAME):
            if read_report(self.path) is None:
                self.note("", FILE_NAME, "there is no report of the compression: errors per layer are not known.")
            elif all(finding.severity != "error" for finding in self.findings):
                inspect_model(self.path)
