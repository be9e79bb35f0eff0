"""Says of a damaged directory whether the library does what it must: the exact result, or an error in one line.

What is exact is said by `specified.Reader`, which is written from FORMAT.md alone. `refused`, `as before` (nothing of
the result changed) and `as it says` (other weights, those that the files now hold) are right, as is `cannot run`:
another configuration, of which transformers makes a model whose own code then fails. All else is a fault.
"""

from __future__ import annotations

import heapq
import json
import os
import resource
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import mutate
import mutate_files
import naive
import numpy as np
import specified
import tiny
import torch

import qmoe_lite as qm
from qmoe_lite.checkpoint.atomic import write_json, write_tensors
from qmoe_lite.checkpoint.format import pack_experts, quantization_config, tensor_name
from qmoe_lite.errors import QMoEError

PUBLISHED = Path(__file__).parent / "data" / "published_format"
CODES = ("fitted", "rated", "symmetric", "paper", "two-bit", "windows", "packed", "published")
RIGHT = ("refused", "as before", "as it says", "cannot run")
SECONDS = 20.0  # of processor time that a mutant may take: far more than any needs, on any machine
MEMORY = 1 << 30  # bytes that it may allocate at a time
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
FLOATS |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
TOKENS = torch.tensor([[4, 9, 5, 12, 7]])


class Outcome(NamedTuple):
    """What became of a mutant, and in which words."""

    kind: str
    text: str

    @property
    def right(self) -> bool:
        return self.kind in RIGHT


class Fault(AssertionError):
    """The library did what it must not."""


class Unrunnable(Exception):
    """transformers takes a configuration, and cannot run the model that it makes of it."""


# -- directories


def make_directories(base: Path) -> dict[str, Path]:
    """Make a tiny compressed directory of each code, of an encoder-decoder or of a causal model."""
    tokenizer = tiny.make_tokenizer()
    switch = tiny.make_switch(base / "switch", tokenizer, num_experts=2, d_model=16, d_ff=24)
    layers = {"num_experts": 3, "num_hidden_layers": 2, "mlp_only_layers": [0], "hidden_size": 16}
    causal = tiny.make_causal(base / "causal", tokenizer, "qwen3_moe", **layers, num_attention_heads=2)
    made = {name: base / name for name in CODES}
    qm.compress(switch, made["fitted"], recipe="nearest")
    qm.compress(causal, made["rated"], recipe="nearest", rate=2.0)
    for name, source in (("symmetric", "fitted"), ("windows", "fitted"), ("paper", "rated"), ("two-bit", "rated")):
        shutil.copytree(made[source], made[name])
        recode(made[name], name)
    made["packed"].mkdir()
    qm.pack(made["windows"], made["packed"] / mutate_files.PACKED)
    shutil.copytree(PUBLISHED, made["published"], ignore=shutil.ignore_patterns("*.npz"))
    return made


def recode(directory: Path, name: str) -> None:
    """Put digits of another code in the place of all a compressed model's experts; other tensors stay."""
    rng = np.random.default_rng(0)
    index = json.loads((directory / mutate.INDEX).read_text())
    model = qm.load(directory)
    codes: dict[str, dict[str, Any]] = {}
    for experts in (module for module in model.modules() if isinstance(module, qm.PackedExperts)):
        layer = experts.layer
        codes[layer.experts] = {}
        file = directory / index["weight_map"][f"{layer.experts}.{layer.projections[0]}_codes"]
        header, _ = mutate.parse(file.read_bytes())
        assert all(key.startswith(layer.experts) for key in header if key != "__metadata__")
        tensors: dict[str, torch.Tensor] = {}
        for projection in layer.projections:
            matrices = [draw(rng, name, layer.shapes[projection]) for _ in range(layer.count)]
            stored = pack_experts(matrices)
            tensors |= {tensor_name(f"{layer.experts}.{projection}", part): t for part, t in stored.items()}
            codes[layer.experts][projection] = matrices[0].codebook.to_config()
        for key in header:
            index["weight_map"].pop(key, None)
            index["metadata"]["crc32"].pop(key, None)
        index["metadata"]["crc32"] |= write_tensors(file, tensors)
        index["weight_map"] |= dict.fromkeys(tensors, file.name)
    write_json(directory / mutate.INDEX, index)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantization_config(codes, level_dtype=torch.bfloat16)
    write_json(directory / "config.json", config)
    (directory / "qmoe_report.json").unlink()


@cache
def code_of(name: str) -> Any:
    if name == "windows":  # of the shape for which other tests compile kernels
        digits = np.rint(np.random.default_rng(0).normal(0, 0.8, 20000)).astype(np.int16)
        return qm.Dictionary.fit(digits, clip=3, longest=8)
    return {"symmetric": qm.Codebook.fit([1, 8, 1], bits=8), "two-bit": qm.Codebook.fit([8, 2, 1, 1], bits=8)}.get(
        name
    ) or qm.Codebook.paper()


def draw(rng: Any, name: str, shape: tuple[int, int]) -> qm.PackedMatrix:
    """A matrix of some code; digits of windows have exceptions and column scales."""
    code, (rows, columns) = code_of(name), shape
    width = {"symmetric": 1, "paper": 2, "two-bit": 3, "windows": 1}[name]
    levels = torch.from_numpy(rng.uniform(0.1, 1, (rows, width)).astype(np.float32)).bfloat16()
    if name == "windows":
        digits = np.rint(rng.normal(0, 0.8, shape)).astype(np.int16)
        digits[rng.random(shape) < 0.02] = 500
        scales = torch.from_numpy(rng.uniform(0.5, 2, columns).astype(np.float32)).bfloat16()
        return qm.encode(digits, levels, code, column_scales=scales)
    lowest, count = code.lowest_digit, code.digits
    shares = [0.7 if lowest + i == 0 else 0.3 / (count - 1) for i in range(count)]
    digits = rng.choice(np.arange(lowest, lowest + count), shape, p=shares).astype(np.int8)
    if name == "paper":
        levels[:, 0] *= -1
    return qm.encode(digits, levels, code)


# -- what is exact


def heap_tunstall(counts: tuple[int, ...], bits: int) -> list[tuple[int, ...]]:
    """What `naive.tunstall` finds, in integers and off a heap: its search takes minutes for 13 bits."""
    alphabet, counts = naive.ALPHABETS[len(counts)], tuple(max(count, 1) for count in counts)
    total, size = sum(counts), 1
    longest = naive.LONGEST[len(counts)]
    # a string's probability as a numerator over total ** longest
    heap: list[tuple[int, int, tuple[int, ...]]] = [(-(total**longest), 0, ())]
    done: list[tuple[int, ...]] = []
    while heap and size + len(counts) - 1 <= 2**bits:
        share, length, string = heapq.heappop(heap)
        if length >= longest or sum(digit != 0 for digit in string) >= 7:
            done.append(string)
            continue
        size += len(counts) - 1
        for digit, count in zip(alphabet, counts, strict=True):
            heapq.heappush(heap, (share // total * count, length + 1, (*string, digit)))
    return sorted([*done, *(string for *_, string in heap)])


@lru_cache(maxsize=64)
def strings_of(kind: str, counts: tuple[int, ...], bits: int, sha256: str) -> list[tuple[int, ...]]:
    made = naive.paper_dictionary() if kind == "paper" else heap_tunstall(counts, bits)
    table = specified.table_of(made, len(counts), bits)
    assert specified.hashlib.sha256(table).hexdigest() == sha256
    return made


class Reader(specified.Reader):
    """The same, faster: codes are kept."""

    def strings(self, number: int) -> list[tuple[int, ...]]:
        book = self.settings["codebooks"][number]
        return strings_of(book["kind"], tuple(book["counts"]), book["bits"], book["sha256"])


class Seen(NamedTuple):
    """What a model was found to hold: logits, weights of experts, other tensors."""

    logits: torch.Tensor
    experts: dict[tuple[str, str, int], torch.Tensor]
    dense: dict[str, torch.Tensor]
    config: Any


def look(directory: Path, **placement: Any) -> Seen:
    """Load a directory and use all of it."""
    model = qm.load(directory, **placement)
    more = {"decoder_input_ids": TOKENS[:, :3]} if model.config.is_encoder_decoder else {}
    try:
        with torch.no_grad():
            logits = model(input_ids=TOKENS, **more).logits
    except QMoEError:
        raise
    except Exception as error:
        if Path(qm.__file__).parent in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents:
            raise
        raise Unrunnable(f"{type(error).__name__}: {error}") from error
    experts = {}
    for name, module in model.named_modules():
        if isinstance(module, qm.PackedExperts):
            for projection, expert in product(module.layer.projections, range(module.num_experts)):
                experts[name, projection, expert] = module.dense(expert, projection)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".experts." not in name}
    return Seen(logits, experts, dense, model)


class Original(NamedTuple):
    """A directory in order: files, what is seen in it, or what comes of unpacking it."""

    name: str
    files: dict[str, bytes]
    seen: Any

    def damage(self, seed: int) -> mutate.Mutant:
        if self.name == "packed":
            return mutate.Mutant(self.files, seed, mutate_files.OF_PACK, mutate_files.seal_pack)
        if self.name == "published":
            return mutate.Mutant(self.files, seed, mutate_files.OF_PUBLISHED, mutate_files.seal_archives)
        return mutate.Mutant(self.files, seed)


def original_of(name: str, directory: Path) -> Original:
    files = {file.name: file.read_bytes() for file in sorted(directory.iterdir())}
    if name == "packed":
        return Original(name, files, mutate_files.unpacked(files[mutate_files.PACKED])[0])
    return Original(name, files, (look_at_import if name == "published" else look)(directory))


@contextmanager
def memory_limited() -> Iterator[None]:
    """Let no more memory be allocated than a mutant may take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def judge(original: Original, seed: int, place: Path, thorough: bool = True) -> tuple[mutate.Mutant, Outcome]:
    """Damage a directory, and say what became of it.

    Parameters
    ----------
    original : Original
    seed : int
        Of the damage.
    place : Path
        Where the mutant is written; there is nothing there before or afterwards.
    thorough : bool
        Whether each is verified too, and run with a budget.
    """
    with memory_limited():
        mutant = original.damage(seed)
    if mutant.files == original.files:
        return mutant, Outcome("as before", "not a byte differs")
    mutant.write(place)
    try:
        with memory_limited():
            judges = {"packed": _judge_pack, "published": _judge_published}
            outcome = judges.get(original.name, _judge)(original, mutant, place, seed, thorough)
    except Fault as fault:
        outcome = Outcome("wrong", str(fault))
    except MemoryError as error:
        outcome = Outcome("memory", repr(error))
    except Exception as error:
        kind = "memory" if "allocate memory" in str(error) else "exception"
        outcome = Outcome(kind, f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(place)
    return mutant, outcome


def _judge(original: Original, mutant: mutate.Mutant, place: Path, seed: int, thorough: bool) -> Outcome:
    began = time.process_time()
    try:
        seen, refusal = _look(place)
    except Unrunnable as error:
        return _unrunnable(original, mutant, error)
    if thorough and not _verify(place) and seen is None:
        raise Fault(f"verify calls sound what load refuses: {refusal}")
    if thorough and seed % 4 == 0:
        other, reason = _look(place, offload="disk", expert_cache="1MiB", ram_cache="1MiB")
        if (other is None) != (seen is None) or (other and seen and not _same(other.logits, seen.logits)):
            raise Fault(f"with a budget: {reason or 'logits'}; without: {refusal or 'logits, and others'}")
    if time.process_time() - began > SECONDS:
        began = time.process_time()
        _look(place)  # kernels may have been compiled: other tokens for an expert need others
        if (took := time.process_time() - began) > SECONDS:
            return Outcome("slow", f"{took:.1f} s of processor time; {refusal or 'it loads'}")
    return Outcome("refused", refusal) if seen is None else _compare(original, mutant, place, seen)


def _unrunnable(original: Original, mutant: mutate.Mutant, error: Unrunnable) -> Outcome:
    if not _other_config(original, mutant):
        raise Fault(f"with the configuration that there was it does not run: {error}")
    return Outcome("cannot run", str(error)[:300])


def _judge_pack(original: Original, mutant: mutate.Mutant, place: Path, seed: int, thorough: bool) -> Outcome:
    beside, out = sorted(place.parent.iterdir()), place / "out"
    try:
        qm.unpack(place / mutate_files.PACKED, out, threads=1)
    except QMoEError as error:
        if out.exists() or {each.name for each in place.iterdir()} - mutant.files.keys():
            raise Fault("something is left of a file that was refused") from error
        return Outcome("refused", _one_line(error))
    if sorted(place.parent.iterdir()) != beside:
        raise Fault("something was written outside")
    found = {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    if found == original.seen:
        return Outcome("as before", "")
    if not mutant.sealed and not any(done.startswith("forge_list") for done in mutant.done):
        raise Fault("the files differ, and no checksum was made right")
    if found != mutate_files.unpacked(mutant.files[mutate_files.PACKED])[0]:
        raise Fault("the files are not what the pack file says")
    return Outcome("as it says", "other files")


def look_at_import(place: Path) -> Seen:
    """Import a directory of the published format, and use all that came of it."""
    out = place.parent / "imported"
    try:
        qm.import_qmoe(place, out)
        return look(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _judge_published(original: Original, mutant: mutate.Mutant, place: Path, seed: int, thorough: bool) -> Outcome:
    began = time.process_time()
    try:
        seen = look_at_import(place)
    except QMoEError as error:
        return Outcome("refused", _one_line(error))
    except Unrunnable as error:
        return _unrunnable(original, mutant, error)
    if time.process_time() - began > SECONDS:
        return Outcome("slow", f"{time.process_time() - began:.1f} s of processor time")
    before = original.seen
    if all(_same(t, seen.experts[key]) for key, t in before.experts.items() if key in seen.experts) and all(
        _same(t, seen.dense[key]) for key, t in before.dense.items()
    ):
        return Outcome("as before", "")
    if not mutant.sealed and not any(done.startswith("forge_record") for done in mutant.done):
        raise Fault("weights differ, and no checksum was made right")
    held: dict[str, Any] = {}
    for name in mutant.files:
        if name.startswith("exp"):
            held |= torch.load(place / name, weights_only=True)
    for (name, projection, expert), weight in seen.experts.items():
        words, offsets, levels = (
            held[f"{name}.expert_{expert}.{projection}.{part}"] for part in ("w_comp", "row_off", "ter_minmax")
        )
        strings, values = naive.paper_dictionary(), levels.float().view(-1, 2).numpy()
        rows = [[d for w in words[a:b].tolist() for d in strings[w & 0xFFFF]] for a, b in pairwise(offsets.tolist())]
        digits = np.array([row[: weight.shape[1]] for row in rows])
        if not _same(weight.float(), torch.from_numpy(naive.dequantize(digits, values)).float()):
            raise Fault(f"{projection} of expert {expert} of {name} is not what the files say")
    return Outcome("as it says", "other weights")


def _look(place: Path, **placement: Any) -> tuple[Seen | None, str]:
    """Return what is seen, or in which words it is refused."""
    try:
        return look(place, **placement), ""
    except QMoEError as error:
        return None, _one_line(error)


def _one_line(error: QMoEError) -> str:
    text = str(error)
    if not text or "\n" in text or len(text) > 2000:
        raise Fault(f"an error is not one line: {text[:500]!r}") from error
    return f"{type(error).__name__}: {text}"


def _verify(place: Path) -> list[str]:
    """Return the errors that verify finds."""
    try:
        return [str(finding) for finding in qm.verify(place) if finding.severity == "error"]
    except QMoEError as error:
        return [_one_line(error)]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7e37), b.nan_to_num(7e37))


def _compare(original: Original, mutant: mutate.Mutant, place: Path, seen: Seen) -> Outcome:
    """Compare what a model holds with what the files say."""
    before = original.seen
    unchanged = seen.experts.keys() == before.experts.keys() and seen.dense.keys() == before.dense.keys()
    unchanged = unchanged and all(_same(t, seen.experts[key]) for key, t in before.experts.items())
    unchanged = unchanged and all(_same(t, seen.dense[key]) for key, t in before.dense.items())
    if unchanged and _same(before.logits, seen.logits):
        return Outcome("as before", "")
    if unchanged and _other_config(original, mutant):
        return Outcome("as it says", "another configuration of the same weights")
    if unchanged:
        raise Fault("all weights are as before, the logits are not")
    if not (mutant.sealed or _other_config(original, mutant) or _other_headers(original, mutant)):
        raise Fault("weights differ, and no checksum was made right")
    reader = Reader(place)
    for (name, projection, expert), weight in seen.experts.items():
        expected = torch.from_numpy(np.asarray(reader.dense(name, projection, expert, tuple(weight.shape))))
        if not _same(weight.float(), expected.float()):
            raise Fault(f"{projection} of expert {expert} of {name} is not what the files say")
    _compare_products(seen)
    for name, tensor in seen.dense.items():
        if name in reader.tensors:
            kind, _, content = reader.tensors[name]
            stored = torch.frombuffer(bytearray(content), dtype=FLOATS[kind]).view(tensor.shape)
            if not _same(tensor, stored.to(tensor.dtype)):
                raise Fault(f"{name} is not what the files say")
    return Outcome("as it says", "other weights")


def _compare_products(seen: Seen) -> None:
    """Compare products straight from the codewords with those of the weights."""
    for (name, projection, expert), weight in seen.experts.items():
        x = torch.linspace(-1, 1, weight.shape[1])
        found = qm.decode_matmul(seen.config.get_submodule(name).packed(expert, projection), x).double()
        exact, size = weight.double() @ x.double(), weight.double().abs() @ x.double().abs()
        if torch.isfinite(found).all() and not ((found - exact).abs() <= 1e-5 * size + 1e-30).all():
            raise Fault(f"{projection} of expert {expert} of {name} is multiplied otherwise than it is decoded")


def _other_config(original: Original, mutant: mutate.Mutant) -> bool:
    """Whether config.json says something else outside quantization_config."""
    old, new = (json.loads(files["config.json"]) for files in (original.files, mutant.files))
    for each in (old, new):
        each.pop("quantization_config", None)
    return json.dumps(old) != json.dumps(new)  # False is not 0 here


def _other_headers(original: Original, mutant: mutate.Mutant) -> bool:
    """Whether dtypes, shapes or places of tensors are others, or codes: the checksums are those of bytes."""

    def said(files: dict[str, bytes]) -> Any:
        headers = {name: mutate.parse(files[name])[0] for name in files if name.endswith(".safetensors")}
        return headers, json.loads(files["config.json"])["quantization_config"]

    return bool(said(original.files) != said(mutant.files))
