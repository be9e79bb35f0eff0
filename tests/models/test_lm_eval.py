"""lm-evaluation-harness on a compressed model: the documented line, and what it asks of transformers."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoQuantizationConfig

import qmoe_lite as qm

ROOT = Path(__file__).parents[2]
CHOICES = ["token row", "level digit"]
QUESTIONS = ["expert router", "code book", "block layer", "gate weight", "router level", "digit token"]
TASK = """
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def documented() -> list[str]:
    """Return the command of cli/README.md as its words."""
    joined = (ROOT / "cli" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    [line] = re.findall(r"^    (python -c \"import qmoe_lite; .*)$", joined, re.MULTILINE)
    return shlex.split(line)


def preferred(model, tokenizer, question: str) -> int:
    """Return which choice the model holds for likelier."""
    found = []
    for choice in CHOICES:
        ids = tokenizer(f"{question} {choice}", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            chances = model(input_ids=ids).logits.float().log_softmax(-1)[0, 1:-1]
        found.append(chances.gather(1, ids[0, 2:, None]).sum())
    return int(found[1] > found[0])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs pip install 'lm_eval[hf]'")
def test_the_documented_line_scores_the_compressed_model(tmp_path, compressed_causal, tokenizer):
    directory = compressed_causal("mixtral")
    model = qm.load(directory)
    answers = [preferred(model, tokenizer, question) for question in QUESTIONS]
    answers[0] = 1 - answers[0]  # all but the first are right by the model's own lights
    rows = [
        {"question": question, "choices": CHOICES, "answer": answer}
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ours.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    command = [word.replace("qwen3-qmoe", str(directory)).replace("arc_easy", "ours") for word in documented()]
    command[0] = sys.executable
    more = ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json")]
    done = subprocess.run([*command, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [result] = tmp_path.glob("out*.json")
    assert json.loads(result.read_text())["results"]["ours"]["acc,none"] == pytest.approx(5 / 6)


def test_what_it_asks_of_transformers_gives_the_compressed_model(compressed_causal):
    """As lm_eval.models.huggingface.HFLM does: the settings of config.json are handed over, and a device map."""
    directory = compressed_causal("mixtral")
    settings = AutoConfig.from_pretrained(directory).quantization_config
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            quantization_config=AutoQuantizationConfig.from_dict(settings),
            device_map={"": "cpu"},
            dtype="auto",
            trust_remote_code=False,
        )
    ids = torch.arange(3, 13)[None]
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, qm.load(directory, device="cpu")(input_ids=ids).logits)
