"""Damages small compressed directories at random; the same seed gives the same damage.

A mutant is a directory in memory: a dict from file name to bytes. In half of them all checksums are computed anew, as
somebody would who means it, so that only the structure can betray what is wrong. `judge` says what must follow.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import specified

INDEX = "model.safetensors.index.json"
PARTS = ("codes", "expert_offsets", "row_codewords", "fewest_codewords", "levels", "checksums")
WINDOW_PARTS = ("column_scales", "exception_starts", "exception_positions", "exception_values")
DTYPES = {  # of safetensors: NumPy's of the same size
    **{"BOOL": "u1", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1", "U16": "u2"},
    **{"I16": "i2", "BF16": "u2", "F16": "u2", "U32": "u4", "I32": "i4", "F32": "u4", "U64": "u8", "I64": "i8"},
    **{"F64": "u8", "C64": "u8", "F4": "u1"},
}
NUMBERS = [0, -1, 1, 2, 3, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64]
NASTY = [
    *(*NUMBERS, -(2**31), -(2**63), 10**30, -(10**30), 10**4000, 0.5, -0.0, 1e308, -1e-320, float("nan"), float("inf")),
    *(None, True, False, "", "0", "1e9", "x" * 3000, "\x00", "\x1b[2J", "a\nb", "../x", "/etc/passwd", "\ud800"),
    *([], {}, [[]], [None], [1, 2, 3], {"a": 1}, {"": None}, ["model"], [0] * 5000),
]
PLACES = [
    "../x.safetensors",
    "/etc/passwd",
    "..",
    ".",
    "",
    "config.json",
    "model.safetensors",
    "x" * 300,
    "a/b",
    "\x00",
]
FLOATS = {"BF16": [0x7FC0, 0x7F80, 0xFF80, 0, 0x8000, 1, 0x7F7F, 0xFF7F, 0xBF80], "I64": NUMBERS[:16]}


def parse(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def build(header: dict[str, Any] | str, data: bytes) -> bytes:
    """Write a safetensors file with this header, whatever it says."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


class Mutant:
    """A directory's files, some of which are damaged.

    Attributes
    ----------
    files : dict, name to bytes
    done : list of str
        What was done to them.
    sealed : bool
        Whether checksums were computed anew.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        seed: int,
        changes: list[tuple[Callable[[Any], str], int]] | None = None,
        make_right: Callable[[dict[str, bytes]], None] | None = None,
    ) -> None:
        self.files, self.done = dict(files), []
        self.rng = random.Random(seed)
        self.sealed = self.rng.random() < 0.5
        for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
            which, weights = zip(*(changes or zip(CHANGES, WEIGHTS, strict=True)), strict=True)
            change = self.rng.choices(which, weights)[0]
            name = change.__name__
            try:
                self.done.append(f"{name}: {change(self)}")
            except Exception:  # what was done before may have left nothing to do
                self.done.append(f"{name}: nothing, after the damage before")
        if self.sealed:
            (make_right or seal)(self.files)

    def write(self, directory: Path) -> Path:
        """Put the files into a directory."""
        directory.mkdir()
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        return directory

    @property
    def shards(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".safetensors"))

    def pick(self) -> tuple[str, str, dict[str, Any], bytearray]:
        """Draw a tensor, three times out of four one of experts: file, name, header, data."""
        held = [(file, name) for file in self.shards for name in parse(self.files[file])[0] if name != "__metadata__"]
        experts = [each for each in held if ".experts." in each[1]]
        file, name = self.rng.choice(experts if experts and self.rng.random() < 0.75 else held)
        header, data = parse(self.files[file])
        return file, name, header, bytearray(data)

    def pick_part(self, *parts: str) -> tuple[str, str, dict[str, Any], bytearray]:
        """Draw a part of a projection's experts."""
        held = [(file, name) for file in self.shards for name in parse(self.files[file])[0] if name.endswith(parts)]
        file, name = self.rng.choice([each for each in held if ".experts." in each[1]])
        header, data = parse(self.files[file])
        return file, name, header, bytearray(data)

    def json_of(self, name: str) -> Any:
        return json.loads(self.files[name])

    def put_json(self, name: str, value: Any) -> None:
        self.files[name] = json.dumps(value).encode("utf-8", "surrogatepass")


# -- bytes


def flip_bits(m: Mutant) -> str:
    file, name, header, data = m.pick()
    first, end = header[name]["data_offsets"]
    bits = [m.rng.randrange(8 * first, 8 * end) for _ in range(m.rng.choice([1, 1, 2, 9]))]
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    m.files[file] = build(header, bytes(data))
    return f"bits {[bit - 8 * first for bit in bits]} of {name}"


def overwrite(m: Mutant) -> str:
    file, name, header, data = m.pick()
    first, end = header[name]["data_offsets"]
    start = m.rng.randrange(first, end)
    stop = min(start + m.rng.choice([1, 2, 4, 8, 64, 1 << 20]), end)
    value = m.rng.choice([bytes(stop - start), b"\xff" * (stop - start), m.rng.randbytes(stop - start)])
    data[start:stop] = value
    m.files[file] = build(header, bytes(data))
    return f"bytes {start - first} to {stop - first} of {name} are {value[:4].hex()} .."


def cut_or_grow(m: Mutant) -> str:
    file = m.rng.choice(sorted(m.files))
    content = m.files[file]
    match m.rng.randrange(5):
        case 0:
            del m.files[file]
            return f"{file} is missing"
        case 1:
            m.files[file] = b""
        case 2:
            m.files[file] = content + m.rng.choice([b"\0", b"}", m.rng.randbytes(16), bytes(5000)])
        case 3:
            m.files[file] = bytes(len(content))
        case 4:
            m.files[file] = content[: m.rng.randrange(len(content))]
    return f"{file} has {len(m.files[file])} bytes of {len(content)}"


def swap_files(m: Mutant) -> str:
    one, two = m.rng.sample(m.shards, 2)
    m.files[one], m.files[two] = m.files[two], m.files[one]
    return f"{one} for {two}"


# -- headers of safetensors files


def forge_header(m: Mutant) -> str:
    file, name, header, data = m.pick()
    field = m.rng.choice(["dtype", "shape", "data_offsets", "size"])
    entry = header[name]
    if field == "dtype":
        entry["dtype"] = m.rng.choice([*DTYPES, "F128", 7, None])
    elif field == "shape":
        shape = list(entry["shape"])
        place = m.rng.randrange(max(len(shape), 1))
        shape[place : place + 1] = m.rng.choice(
            [[m.rng.choice(NASTY)], [], [1, *shape[place : place + 1]], [2**32] * 2]
        )
        entry["shape"] = shape if m.rng.random() < 0.9 else m.rng.choice(NASTY)
    elif field == "data_offsets":
        offsets: list[Any] = list(entry["data_offsets"])
        place = m.rng.randrange(2)
        offsets[place] = m.rng.choice([offsets[place] + m.rng.choice([-8, -2, -1, 1, 2, 8]), m.rng.choice(NASTY)])
        entry["data_offsets"] = offsets if m.rng.random() < 0.9 else m.rng.choice(NASTY)
    else:
        content = bytearray(m.files[file])
        size = m.rng.choice([0, 1, 7, 100, len(content), 10**8 + 1, 2**31, 2**40, 2**63, 2**64 - 1])
        content[:8] = size.to_bytes(8, "little")
        m.files[file] = bytes(content)
        return f"header of {size} bytes in {file}"
    m.files[file] = build(header, bytes(data))
    return f"{field} of {name} is {str(entry[field])[:60]!r}"


def forge_entry(m: Mutant) -> str:
    """An entry is missing, there twice, of another name, or of another's bytes."""
    file, name, header, data = m.pick()
    others = [other for other in header if other not in (name, "__metadata__")]
    match m.rng.randrange(6):
        case 0:
            del header[name]
            what = "is missing"
        case 1:
            entry = json.dumps(header[m.rng.choice(others)] if others else {"dtype": "U8", "shape": [2**60]})
            text = json.dumps(header)
            doubled = (
                text[:-1] + f", {json.dumps(name)}: {entry}}}"
                if m.rng.random() < 0.5
                else ("{" + f"{json.dumps(name)}: {entry}, " + text[1:])
            )
            m.files[file] = build(doubled, bytes(data))
            return f"{name} is there twice"
        case 2:
            header = {(name + "x" if key == name else key): value for key, value in header.items()}
            what = "has another name"
        case 3:
            other = m.rng.choice(others)
            header[name], header[other] = header[other], header[name]
            what = f"and {other} have changed places"
        case 4:
            header[name] = m.rng.choice([None, 7, [], {}, {"dtype": "U8"}, "x"])
            what = f"is {header[name]!r}"
        case _:
            header["__metadata__"] = m.rng.choice([None, 7, {"format": 7}, {"format": "tf"}, {"x": "y" * 5000}])
            what = "stands beside strange metadata"
    m.files[file] = build(header, bytes(data))
    return f"{name} {what}"


def replace_tensor(m: Mutant) -> str:
    """A file in order whose tensor has another dtype or shape."""
    file, name, header, data = m.pick()
    tensors = {
        key: (value["dtype"], value["shape"], bytes(data[slice(*value["data_offsets"])]))
        for key, value in header.items()
        if key != "__metadata__"
    }
    dtype, shape, content = tensors[name]
    array = np.frombuffer(content, DTYPES[dtype]).reshape(shape)
    match m.rng.randrange(6):
        case 0:
            dtype = m.rng.choice([other for other in DTYPES if other not in (dtype, "F4")])
            array = array.astype(DTYPES[dtype])
        case 1:
            array = array.T
        case 2:
            array = array[: m.rng.randrange(len(array))]
        case 3:
            array = np.concatenate([array, array])
        case 4:
            array = array.reshape(m.rng.choice([(-1,), (1, *array.shape), (*array.shape, 1)]))
        case _:
            array = array[..., : m.rng.choice([0, 1, 2])]
    array = np.ascontiguousarray(array)
    tensors[name] = dtype, list(array.shape), array.tobytes()
    entries, body = {"__metadata__": {"format": "pt"}}, b""
    for key, (kind, dims, part) in tensors.items():
        entries[key] = {"dtype": kind, "shape": dims, "data_offsets": [len(body), len(body) + len(part)]}
        body += part
    m.files[file] = build(entries, body)
    return f"{name} is {dtype} {list(array.shape)}"


def swap_tensors(m: Mutant) -> str:
    """Two tensors of the same size have each other's bytes."""
    file, name, header, data = m.pick()
    first, end = header[name]["data_offsets"]
    same = [
        other
        for other, entry in header.items()
        if other not in (name, "__metadata__") and entry["data_offsets"][1] - entry["data_offsets"][0] == end - first
    ]
    start, stop = header[other := m.rng.choice(same)]["data_offsets"]
    data[first:end], data[start:stop] = data[start:stop], data[first:end]
    m.files[file] = build(header, bytes(data))
    return f"{name} and {other} have each other's bytes"


# -- what a tensor's numbers mean


def forge_numbers(m: Mutant) -> str:
    """Numbers that a reader must not believe: places, lengths, levels."""
    parts = ["expert_offsets", "row_codewords", "fewest_codewords", "levels", "checksums", *WINDOW_PARTS]
    file, name, header, data = m.pick_part(*(m.rng.choice(parts), "levels", "row_codewords"))
    entry = header[name]
    first, end = entry["data_offsets"]
    array = np.frombuffer(bytes(data[first:end]), DTYPES[entry["dtype"]]).copy()
    place = m.rng.randrange(len(array))
    before = int(array[place])
    bounds = np.iinfo(array.dtype)
    value = m.rng.choice(
        [before + m.rng.choice([-16, -1, 1, 16, 256]), m.rng.choice(FLOATS.get(entry["dtype"], NUMBERS))]
    )
    value = min(max(m.rng.choice([value, value, bounds.min, bounds.max]), bounds.min), bounds.max)
    array[place if m.rng.random() < 0.7 else slice(None)] = value
    data[first:end] = array.tobytes()
    m.files[file] = build(header, bytes(data))
    return f"number {place} of {name} is {value} for {before}"


def shuffle_numbers(m: Mutant) -> str:
    """Numbers of a tensor in another order."""
    file, name, header, data = m.pick()
    first, end = header[name]["data_offsets"]
    array = np.frombuffer(bytes(data[first:end]), DTYPES[header[name]["dtype"]]).copy()
    np.random.default_rng(m.rng.randrange(2**32)).shuffle(array)
    data[first:end] = array.tobytes()
    m.files[file] = build(header, bytes(data))
    return f"{name} is shuffled"


# -- JSON


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values inside a JSON value, containers too."""
    found = [path] if path else []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [each for key, child in inside for each in leaves(child, (*path, key))]


def edit_json(m: Mutant, name: str, below: str = "") -> str:
    """A value is another, is missing, or has another's place."""
    content = m.json_of(name)
    paths = [path for path in leaves(content) if not below or (path[0] == below and len(path) > 1)]
    path = m.rng.choice(paths)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    match m.rng.randrange(4):
        case 0:
            del holder[path[-1]]
            what = "is missing"
        case 1:
            other = m.rng.choice(paths)
            value = content
            for key in other:
                value = value[key]
            holder[path[-1]] = value
            what = f"is that of {'.'.join(map(str, other))[:60]}"
        case _:
            before, value = holder[path[-1]], m.rng.choice(NASTY)
            if type(before) is int and m.rng.random() < 0.5:
                value = m.rng.choice([before - 1, before + 1, 2 * before, before // 2, -before])
            holder[path[-1]] = value
            what = f"is {str(value)[:40]!r} for {str(before)[:40]!r}"
    m.put_json(name, content)
    return f"{'.'.join(map(str, path))[:80]} in {name} {what}"


def edit_code(m: Mutant) -> str:
    return edit_json(m, "config.json", "quantization_config")


def edit_config(m: Mutant) -> str:
    return edit_json(m, "config.json")


def edit_index(m: Mutant) -> str:
    if m.rng.random() < 0.6:
        return edit_json(m, INDEX)
    content = m.json_of(INDEX)
    name = m.rng.choice(sorted(content["weight_map"]))
    content["weight_map"][name] = m.rng.choice([*PLACES, *m.shards, *NASTY])
    m.put_json(INDEX, content)
    return f"{name} lies in {str(content['weight_map'][name])[:40]!r}"


def edit_others(m: Mutant) -> str:
    others = [name for name in m.files if name.endswith(".json") and name not in ("config.json", INDEX)]
    return edit_json(m, m.rng.choice(sorted(others)))


def edit_dictionary(m: Mutant) -> str:
    """Trees whose nodes are of other kinds, or codes of other counts; `seal` may make their sums right."""
    config = m.json_of("config.json")
    book = m.rng.choice(config["quantization_config"]["codebooks"])
    if "trees" not in book:
        place = m.rng.randrange(len(book["counts"]))
        book["counts"][place] = m.rng.choice([0, 1, book["counts"][place] + 1, 2**62, 2**63])
        what = f"counts {book['counts']}"
    else:
        trees = bytearray(base64.b64decode(book["trees"]))
        for _ in range(m.rng.choice([1, 1, 2, 20])):
            trees[m.rng.randrange(len(trees))] ^= 1 << m.rng.randrange(8)
        if m.rng.random() < 0.2:
            trees = trees[: m.rng.randrange(len(trees))] if m.rng.random() < 0.5 else trees + trees
            book["nodes"] = m.rng.choice([book["nodes"], 2 * book["nodes"], len(trees) * 2])
        book["trees"] = base64.b64encode(bytes(trees)).decode()
        what = f"{len(trees)} bytes of trees"
    m.put_json("config.json", config)
    return f"a code of {what}"


def exchange_codes(m: Mutant) -> str:
    """Projections take other codes."""
    config = m.json_of("config.json")
    settings = config["quantization_config"]
    layer = m.rng.choice(sorted(settings["layers"]))
    projection = m.rng.choice(sorted(settings["layers"][layer]))
    number = m.rng.randrange(-1, len(settings["codebooks"]) + 1)
    settings["layers"][layer][projection] = number
    m.put_json("config.json", config)
    return f"{layer}.{projection} takes code {number}"


def spoil_text(m: Mutant) -> str:
    """JSON that no honest program writes."""
    name = m.rng.choice(sorted(name for name in m.files if name.endswith(".json")))
    content = m.files[name]
    match m.rng.randrange(7):
        case 0:
            place = m.rng.randrange(len(content))
            m.files[name] = content[:place] + m.rng.randbytes(1) + content[place + 1 :]
            return f"byte {place} of {name}"
        case 1:
            depth = m.rng.choice([200, 5000, 100_000])
            m.files[name] = b"[" * depth + b"]" * depth
            return f"{name} is {depth} deep"
        case 2:
            inner = b'{"a":' * 5000 + b"1" + b"}" * 5000
            m.files[name] = content.rstrip()[:-1] + b', "deep": ' + inner + b"}"
            return f"{name} has something deep in it"
        case 3:
            key = m.rng.choice(sorted(m.json_of(name)))
            m.files[name] = content.rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(m.rng.choice(NASTY))}}}".encode()
            return f"{key} is twice in {name}"
        case 4:
            m.files[name] = content.decode().encode(m.rng.choice(["utf-16", "utf-8-sig", "utf-32"]))
            return f"{name} is in another encoding"
        case 5:
            m.files[name] = m.rng.choice(
                [b"null", b"[]", b"{}", b"1", b'"x"', b"NaN", b"\xff\xfe", b"{" + b" " * 10**6]
            )
            return f"{name} is {m.files[name][:8]!r}"
        case _:
            m.files[name] = content.replace(b": 1", b": 1" + b"0" * m.rng.choice([20, 400, 5000]), 1)
            return f"{name} has a number of many digits"


CHANGES = [
    *(flip_bits, overwrite, cut_or_grow, swap_files, forge_header, forge_entry, replace_tensor, swap_tensors),
    *(forge_numbers, shuffle_numbers, edit_code, edit_config, edit_index, edit_others, edit_dictionary),
    *(exchange_codes, spoil_text),
]
WEIGHTS = [12, 8, 5, 1, 7, 6, 7, 5, 14, 4, 12, 4, 5, 1, 6, 3, 4]


# -- checksums


def seal(files: dict[str, bytes]) -> None:
    """Compute all checksums anew, as far as what there is can still be read."""
    with suppress(Exception):
        _seal_codes(files)
    sums: dict[str, int] = {}
    for file in sorted(name for name in files if name.endswith(".safetensors")):
        try:
            header, data = parse(files[file])
            body = bytearray(data)
            books = _books(files)
            for name in [name for name in header if name.endswith("_checksums")]:
                try:
                    known = name.removesuffix("_checksums")
                    _seal_experts(known, header, body, books, _shape(files, known))
                except Exception:
                    continue
            files[file] = files[file][: len(files[file]) - len(data)] + bytes(body)
            for name, entry in header.items():
                if name != "__metadata__":
                    first, end = entry["data_offsets"]
                    sums[name] = zlib.crc32(bytes(body[first:end]))
        except Exception:
            continue
    with suppress(Exception):
        index = json.loads(files[INDEX])
        index["metadata"]["crc32"] = {name: sums.get(name, crc) for name, crc in index["metadata"]["crc32"].items()}
        files[INDEX] = json.dumps(index).encode("utf-8", "surrogatepass")


def _books(files: dict[str, bytes]) -> dict[str, int]:
    """Bits of each projection's codewords; less than 0 where they are windows."""
    try:
        settings = json.loads(files["config.json"])["quantization_config"]
        return {
            f"{layer}.{projection}": book["bits"] if book["kind"] != "windows" else -book["bits"]
            for layer, used in settings["layers"].items()
            for projection, number in used.items()
            for book in [settings["codebooks"][number]]
        }
    except Exception:
        return {}


def _shape(files: dict[str, bytes], projection: str) -> tuple[int, int]:
    """Rows and columns of a projection's matrices."""
    config = json.loads(files["config.json"])
    hidden = config["hidden_size"] if "hidden_size" in config else config["d_model"]
    inner = config["moe_intermediate_size"] if "moe_intermediate_size" in config else config["d_ff"]
    return (hidden, inner) if projection.endswith(("wo", "down_proj")) else (inner, hidden)


def _seal_experts(
    name: str, header: dict[str, Any], body: bytearray, books: dict[str, int], shape: tuple[int, int]
) -> None:
    """Write the checksums of a projection's experts."""

    def raw(part: str) -> bytes:
        return bytes(body[slice(*header[f"{name}_{part}"]["data_offsets"])])

    def rows(part: str) -> list[bytes]:
        content, count = raw(part), min(header[f"{name}_{part}"]["shape"][0], 1000)
        each = len(content) // count
        return [content[i * each : (i + 1) * each] for i in range(count)]

    bits = books.get(name.replace("block_sparse_moe", "mlp"), 8)
    offsets = struct.unpack(f"<{len(raw('expert_offsets')) // 8}q", raw("expert_offsets"))
    fewest = struct.unpack(f"<{len(raw('fewest_codewords')) // 4}i", raw("fewest_codewords"))
    kind = header[f"{name}_row_codewords"]["dtype"]
    sums = []
    for expert, lengths in enumerate(rows("row_codewords")):
        level = rows("levels")[expert]
        if bits < 0:
            lengths = specified.read_lengths(kind, lengths, shape[0])
            level = specified.read_scales(header[f"{name}_levels"]["dtype"], level, shape[0])
        counts = np.frombuffer(lengths, "<u1" if kind == "U8" else "<u2").astype(int) + fewest[expert]
        used = -(-(int(counts.sum()) * abs(bits) + (2 if bits < 0 else 0)) // 8) + 8
        start = offsets[expert]
        parts = raw("codes")[start : start + used], lengths, struct.pack("<i", fewest[expert]), level
        crc = zlib.crc32(b"".join(parts))
        if bits < 0:
            scales, entry = rows("column_scales")[expert], header[f"{name}_column_scales"]
            if not scales:
                entry = header[f"{name.rpartition('.')[0]}.gate_proj_column_scales"]
                each = (entry["data_offsets"][1] - entry["data_offsets"][0]) // entry["shape"][0]
                scales = bytes(body[entry["data_offsets"][0] + expert * each :][:each])
            scales = specified.read_scales(entry["dtype"], scales, shape[1])
            starts = np.frombuffer(rows("exception_starts")[expert], "<i4")
            crc = zlib.crc32(scales + (starts - starts[0]).astype("<i4").tobytes(), crc)
            crc = zlib.crc32(raw("exception_positions")[2 * starts[0] : 2 * starts[-1]], crc)
            crc = zlib.crc32(raw("exception_values")[starts[0] : starts[-1]], crc)
        sums.append(crc)
    entry = header[f"{name}_checksums"]
    body[slice(*entry["data_offsets"])] = struct.pack(f"<{len(sums)}q", *sums)[: len(raw("checksums"))].ljust(
        len(raw("checksums")), b"\0"
    )


def _seal_codes(files: dict[str, bytes]) -> None:
    """Give each code in config.json the hash of what it says."""
    from qmoe_lite.coding.codebook import Codebook
    from qmoe_lite.errors import QMoEError

    config = json.loads(files["config.json"])
    for book in config["quantization_config"]["codebooks"]:
        if "trees" in book:
            book["sha256"] = hashlib.sha256(base64.b64decode(book["trees"])).hexdigest()
        elif book.get("kind") == "tunstall":
            try:
                book["sha256"] = Codebook.fit(book["counts"], bits=book["bits"]).to_config()["sha256"]
            except QMoEError:
                continue
    files["config.json"] = json.dumps(config).encode("utf-8", "surrogatepass")
