"""Inputs and comparisons that several test files share."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qmoe_lite.bench.kill import untimed


def draw_digits(rng, shares, shape):
    """Independent digits, int8: -1, 0, +1 where there are three shares, 0 to 3 where there are four."""
    shares = np.asarray(shares, dtype=float)
    lowest = -1 if len(shares) == 3 else 0
    return (rng.choice(len(shares), size=shape, p=shares / shares.sum()) + lowest).astype(np.int8)


def naive_packets(packed):
    """Words (packets, 4) and row starts by the format's description, one codeword after another."""
    book, bits = packed.codebook, packed.codebook.bits
    stream = int.from_bytes(packed.codes.numpy().tobytes(), "little")
    lengths = [int(entry) & 255 for entry in book.table]
    shortest = min(range(len(lengths)), key=lambda code: (lengths[code] == 0, lengths[code]))
    words, starts, at = [], [0], 0
    for count in packed.count_codewords().tolist():
        codes = [stream >> bits * (at + i) & (1 << bits) - 1 for i in range(count)]
        at += count
        column, each = 0, 112 // bits
        codes += [shortest] * (-count % each)
        for first in range(0, len(codes), each):
            own = codes[first : first + each]
            packet = column + sum(code << 16 + bits * i for i, code in enumerate(own))
            words.append([packet >> 32 * i & 0xFFFFFFFF for i in range(4)])
            column += sum(lengths[code] for code in own)
        starts.append(len(words))
    return words, starts


def naive_windows(codes, counts, dictionary):
    """Each row's windows, read from the stream as a string of zeros and ones."""
    text = "".join(f"{byte:08b}"[::-1] for byte in codes.tolist())
    windows, at = [], 0
    for count in counts.tolist():
        row = [
            int(text[i : i + dictionary.bits + 2][::-1], 2)
            for i in range(at, at + count * dictionary.bits, dictionary.bits)
        ]
        windows.append(row)
        at += count * dictionary.bits
    return windows


def naive_window_packets(windows, dictionary):
    """Words (packets, 4) and row starts by the description, from strings of zeros and ones."""
    bits, each, words, starts = dictionary.bits, (128 - 18) // dictionary.bits, [], [0]
    for row in windows:
        column = 0
        for first in range(0, len(row), each):
            own = row[first : first + each]
            text = f"{column:016b}"[::-1] + f"{own[0] & 3:02b}"[::-1]
            text += "".join(f"{window >> 2:0{bits}b}"[::-1] for window in own)
            words.append([int(text.ljust(128, "0")[i : i + 32][::-1], 2) for i in range(0, 128, 32)])
            column += sum(int(dictionary.lengths[window]) for window in own)
        starts.append(len(words))
    return words, starts


@functools.cache
def window_book(longest):
    """A dictionary of strings of so many digits: 8 of large ones, 16 or 32 of small ones."""
    from qmoe_lite.coding.dictionary import Dictionary

    digits = np.rint(np.random.default_rng(longest).normal(0, 1.2 if longest == 8 else 0.3, 20000)).astype(np.int16)
    return Dictionary.fit(digits, clip=4 if longest == 8 else 2, longest=longest)


def draw_windows(rng, dictionary, shape, scales=None, outliers=0.01):
    """A matrix of a code of windows, some of whose digits are exceptions; column scales drawn unless given."""
    import qmoe_lite as qm

    rows, columns = shape
    digits = np.rint(rng.normal(0, dictionary.clip / 4, shape)).astype(np.int16)
    far = rng.random(shape) < outliers
    digits[far] = rng.integers(-300, 301, int(far.sum()))
    steps = torch.from_numpy(rng.uniform(0.3, 1, (rows, 1)) / columns**0.5).bfloat16()
    if scales is None:
        scales = torch.from_numpy(rng.uniform(0.5, 2, columns)).bfloat16()
    return qm.encode(digits, steps, dictionary, column_scales=scales)


def recode_in_windows(directory, seed=0, shares=True):
    """Put digits of codes of windows, of 8 or 32 a string, in the place of all a compressed model's experts.

    `shares`: gate and up projection have the same column scales.
    """
    import qmoe_lite as qm
    from qmoe_lite.checkpoint.format import pack_experts, quantization_config, tensor_name

    rng, files, books = np.random.default_rng(seed), sorted(directory.glob("*.safetensors*")), {}
    model = qm.load(directory, dtype=torch.float32)
    tensors = {name: t.clone() for file in files if file.suffix != ".json" for name, t in load_file(file).items()}
    for experts in (module for module in model.modules() if isinstance(module, qm.PackedExperts)):
        layer, matrices = experts.layer, {}
        books[layer.experts] = {}
        for number, projection in enumerate(layer.projections):
            name, first = f"{layer.experts}.{projection}", layer.first_of_stage(projection) if shares else projection
            dictionary = window_book((8, 32)[number % 2])
            matrices[projection] = [
                draw_windows(
                    rng,
                    dictionary,
                    layer.shapes[projection],
                    None if first == projection else matrices[first][expert].column_scales,
                )
                for expert in range(layer.count)
            ]
            for part in [part for part in tensors if part.startswith(f"{name}_")]:
                del tensors[part]
            stored = pack_experts(matrices[projection], shares_scales=first != projection)
            tensors |= {tensor_name(name, part): tensor for part, tensor in stored.items()}
            books[layer.experts][projection] = dictionary.to_config()
    for file in files:
        file.unlink()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantization_config(books)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def run_experts(first, last, activation, x, index, weights):
    """Send tokens through all experts of a layer on a GPU in one turn; None where shared memory is too small."""
    from qmoe_lite.cuda.experts import ExpertsCall

    call = ExpertsCall(first, last, activation, x, index, weights, last.experts)
    if not call.fits:
        return None
    call.gather()
    return call.total()


class Killed(Exception):
    """Ends a run in the middle, as a signal would."""


def bytes_of(directory) -> dict[str, str]:
    """SHA-256 of each weight file of a directory."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.glob("*.safetensors"))}


def changed_copy(switch, target, **config):
    """Copy a model directory; some settings of its config.json changed."""
    shutil.copytree(switch, target)
    if config:
        old = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**old, **config}))
    return target


def layers_of(model) -> list[str]:
    """Names of a model's compressed layers."""
    import qmoe_lite as qm

    return [name for name, module in model.named_modules() if isinstance(module, qm.PackedExperts)]


def logits_of(model) -> torch.Tensor:
    """Logits of two short prompts, the same for every model."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 15, (2, 11), generator=generator)
    decoder_ids = torch.randint(3, 15, (2, 7), generator=generator)
    more = {"decoder_input_ids": decoder_ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def outputs(model, seed=3, tokens=11):
    """Logits of a prompt of two rows, then of three single tokens."""
    ids = torch.randint(3, 15, (2, tokens), generator=torch.Generator().manual_seed(seed))
    steps = [ids, *(ids[:1, i : i + 1] for i in range(3))]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            found = [model(input_ids=ids[: len(step)], decoder_input_ids=step).logits for step in steps]
        else:
            found = [model(input_ids=step).logits for step in steps]
    return torch.cat([logits.flatten() for logits in found])


def everything_of(directory):
    """SHA-256 of each file; of the report all but the time."""
    found = {file.name: file.read_bytes() for file in directory.iterdir()}
    report = untimed(json.loads(found.pop("qmoe_report.json")))
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} | {"report": report}
