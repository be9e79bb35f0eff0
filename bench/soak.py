"""Many clients at once on `qmoe serve`, for a long time, with memory for a quarter of the experts.

Each client asks for one answer after another: greedy and drawn ones, streamed or not, some of which it leaves in the
middle. Each answer is compared with that to the same prompt alone, made before by `generate` and a model without a
budget. The server's memory is sampled once a second: it must not grow.

    python bench/soak.py --minutes 30                   # a small random model, made for it
    python bench/soak.py --model DIR --share 0.25
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmoe_lite.bench._parts.common import machine_line
from qmoe_lite.bench._show.text import print_rows, print_wrapped

PROMPTS = 24
LEAVE = 0.1  # share of streamed answers that are left in the middle
SLICES = 6  # lines of the table; the last third is compared with the one before
FLAT = 0.02
WORDS = 500  # of the random model's vocabulary, one token each: a text shows each of its tokens
Asked = tuple[dict[str, Any], tuple[str, int]]  # a request, and the text and the number of tokens that it makes
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "bos_token_id": None,
    "initializer_range": 0.1,
}


def make_dense(directory: Path, **shape: Any) -> Path:
    """Make a small random Qwen3-MoE that ends no text, `SHAPE` but for what is given."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{i}" if i else "a": i for i in range(WORDS)}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", vocab_size=WORDS, **{**SHAPE, **shape})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="a").save_pretrained(directory)
    return directory


def make_model(directory: Path) -> Path:
    """Make such a model, and compress it."""
    from qmoe_lite import compress

    compress(make_dense(directory / "dense"), directory / "packed", recipe="nearest")
    return directory / "packed"


def expert_bytes(model: Path) -> int:
    """Return what the compressed experts take, by the headers of the files."""
    total = 0
    for file in model.glob("*.safetensors"):
        with open(file, "rb") as handle:
            header = json.loads(handle.read(struct.unpack("<Q", handle.read(8))[0]))
        total += sum(
            each["data_offsets"][1] - each["data_offsets"][0] for name, each in header.items() if ".experts." in name
        )
    return total


def make_requests(model: Path, seed: int) -> list[Asked]:
    """Return requests, and what `generate` makes of them, one after another: the text and its number of tokens."""
    import qmoe_lite
    from qmoe_lite.compression.calibration import open_tokenizer
    from qmoe_lite.text.generation import Sampling, generate

    draws = random.Random(seed)
    loaded, tokenizer = qmoe_lite.load(model, device="cpu"), open_tokenizer(model)
    vocabulary = [word for word in tokenizer.get_vocab() if word.isalnum() and word.isascii()]
    found = []
    for number in range(PROMPTS):
        prompt = " ".join(draws.choices(vocabulary, k=draws.choice((1, 5, 30, 120))))
        most, temperature = draws.randint(8, 64), float(number % 2)
        made = generate(loaded, tokenizer, prompt, sampling=Sampling(most, temperature, seed=number))
        body = {"prompt": prompt, "max_tokens": most, "temperature": temperature, "seed": number}
        found.append((body, (made.text, len(made.token_ids))))
    return found


@dataclass
class Tally:
    """What the clients saw, and the server's memory; times are seconds from the start.

    Attributes
    ----------
    answers : list of (float, int)
        When each came, and its tokens.
    left : int
        Answers that were left in the middle.
    wrong, failed : list of str
    memory : list of (float, int, int)
        When, and bytes: resident, and of these not a file's.
    """

    answers: list[tuple[float, int]] = field(default_factory=list)
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)


def ask(address: tuple[str, int], body: dict[str, Any], leave_after: int | None) -> tuple[str, int] | None:
    """Return an answer's text and number of tokens; None where it was left after so many pieces."""
    connection = http.client.HTTPConnection(*address, timeout=600)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise OSError(f"{answer.status}: {answer.read()[:200]!r}")
        if not body["stream"]:
            whole = json.loads(answer.read())
            return whole["choices"][0]["text"], whole["usage"]["completion_tokens"]
        text, pieces = "", 0
        for line in answer:
            data = line.removeprefix(b"data: ").strip()
            if not data or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise OSError(event["error"]["message"])
            if event["usage"]:
                return text, event["usage"]["completion_tokens"]
            text, pieces = text + event["choices"][0]["text"], pieces + 1
            if pieces == leave_after:
                return None
        raise OSError("the answer has no end")
    finally:
        connection.close()


def run_client(
    number: int,
    address: tuple[str, int],
    requests: list[Asked],
    tally: Tally,
    start: float,
    seconds: float,
) -> None:
    """Ask until the time is over."""
    draws = random.Random(number)
    while time.monotonic() - start < seconds:
        body, wanted = draws.choice(requests)
        stream = draws.random() < 0.5
        leave = draws.randint(1, 6) if stream and draws.random() < LEAVE else None
        options = {"stream_options": {"include_usage": True}} if stream else {}
        try:
            found = ask(address, {**body, "stream": stream, "user": str(number), **options}, leave)
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            tally.failed.append(f"{type(error).__name__}: {error}")
            continue
        if found is None:
            tally.left += 1
            continue
        tally.answers.append((time.monotonic() - start, found[1]))
        if found != wanted:
            tally.wrong.append(f"{body}: {found} is not {wanted}")


def memory_of(process: int) -> tuple[int, int]:
    """Return a process's resident bytes, and those of them that are no file's."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return 1024 * int(fields["VmRSS"].split()[0]), 1024 * int(fields["RssAnon"].split()[0])


def soak(model: Path, clients: int, minutes: float, share: float, seed: int) -> tuple[Tally, float]:
    """Run the server and its clients; return what they saw, and for how many seconds."""
    requests = make_requests(model, seed)
    budget = max(1, int(share * expert_bytes(model)))
    command = [sys.executable, "-m", "qmoe_lite", "serve", str(model), "--port", "0", "--expert-cache", str(budget)]
    tally = Tally()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        try:
            while " is served at " not in (line := process.stderr.readline()):
                if not line:
                    raise SystemExit(f"the server did not start: {said}")
                said = line.strip()
            host, port = line.split("://")[1].split("/")[0].split(":")
            address, seconds = (host, int(port)), 60 * minutes
            for body, _ in requests[:4]:  # kernels are compiled before the clock starts
                ask(address, {**body, "stream": False}, None)
            start = time.monotonic()
            arguments = (address, requests, tally, start, seconds)
            threads = [threading.Thread(target=run_client, args=(n, *arguments), daemon=True) for n in range(clients)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                tally.memory.append((time.monotonic() - start, *memory_of(process.pid)))
                time.sleep(1)
            took = time.monotonic() - start
            process.terminate()
            if process.wait(timeout=10) != 0:
                tally.failed.append(f"the server ended with {process.returncode}")
        finally:
            process.kill()
    return tally, took


def show(tally: Tally, took: float, title: str) -> bool:
    """Print the table; return whether all went well."""

    def mean(column: int, begin: float, end: float) -> float:
        return statistics.mean(each[column] for each in tally.memory if begin <= each[0] < end) / 1e6

    rows = []
    for number in range(SLICES):
        begin, end = took * number / SLICES, took * (number + 1) / SLICES
        tokens = [count for at, count in tally.answers if begin <= at < end]
        speed = f"{sum(tokens) / (end - begin):.1f}"
        figures = [str(len(tokens)), speed, f"{mean(1, begin, end):.1f}", f"{mean(2, begin, end):.1f}"]
        rows.append([f"{begin / 60:.1f} to {end / 60:.1f}", *figures])
    print_rows(title, ("minutes", "answers", "tokens/s", "resident MB", "of these no file's"), rows)
    growth = [mean(column, took * 2 / 3, took) / mean(column, took / 3, took * 2 / 3) - 1 for column in (1, 2)]
    print(f"memory of the last third against the one before: {growth[0]:+.2%}, without files {growth[1]:+.2%}")
    print(f"{len(tally.answers)} answers, {len(tally.wrong)} wrong, {len(tally.failed)} failed, {tally.left} left")
    for line in [*tally.wrong[:3], *tally.failed[:3]]:
        print(line[:300])
    return bool(tally.answers) and not tally.wrong and not tally.failed and max(growth) <= FLAT


def main() -> None:
    """Print a table; exit code 1 where an answer was wrong or failed, or memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="compressed directory")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--share", type=float, default=0.25, help="of the experts' bytes that fit in memory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or make_model(Path(scratch))
        tally, took = soak(model, options.clients, options.minutes, options.share, options.seed)
    print_wrapped(machine_line("torch", "transformers"))
    title = f"{options.clients} clients for {took / 60:.1f} minutes, memory for {options.share:.0%} of the experts"
    sys.exit(0 if show(tally, took, title) else 1)


if __name__ == "__main__":
    main()
