"""Text that models write: its tokens, how it streams, and what the command says about it."""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import tiny
import torch
from reciters import TEMPLATE, byte_tokenizer, chain, make_random, reciter, save_endless
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from qmoe_lite.cli._models import open_model
from qmoe_lite.cli.generate import _Shown
from qmoe_lite.errors import NotFiniteError, SettingError
from qmoe_lite.text.generation import Sampling, encode_prompt, generate, generate_batch

RECITED = " 中é\t😀\nz"  # no byte twice, so that each byte has one successor


@pytest.fixture(scope="module")
def reciting():
    """A model that answers anything that ends in x by RECITED, and its tokenizer."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("x" + RECITED)["input_ids"]
    model = reciter(chain(*ids, 256), len(tokenizer))
    model.generation_config.eos_token_id = [257, 256]
    return model, tokenizer


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    return save_endless(tmp_path_factory.mktemp("endless") / "model")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """The same with a chat template."""
    return save_endless(tmp_path_factory.mktemp("chatty") / "model", chat_template=TEMPLATE)


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def random_causal(request):
    """A random causal model, and a tokenizer without a begin token."""
    tokenizer = tiny.make_tokenizer()
    return make_random(request.param, tokenizer), tokenizer


@pytest.fixture
def warned():
    """What transformers logs at the level of a warning or above."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def opened(monkeypatch):
    """The models that commands open, each after `opened.then(model)`."""
    found = SimpleNamespace(models=[], then=lambda model: None)

    def open_and_keep(*options):
        model, tokenizer = open_model(*options)
        found.models.append(model)
        found.then(model)
        return model, tokenizer

    monkeypatch.setattr("qmoe_lite.cli._models.open_model", open_and_keep)
    return found


def theirs(model, ids: list[int], **options: object) -> list[int]:
    """The new tokens of transformers' own generate."""
    tokens = torch.tensor([ids])
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0].tolist()
    return out[1:] if model.config.is_encoder_decoder else out[len(ids) :]


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_tokens_are_those_of_transformers_generate(random_causal, drawn):
    model, tokenizer = random_causal
    prompt = "router expert token"
    ids = tokenizer(prompt)["input_ids"]
    if drawn:
        sampling = Sampling(20, temperature=1.5, top_p=0.9, top_k=9, repetition_penalty=1.1, seed=5)
        torch.manual_seed(5)
        options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 9, "repetition_penalty": 1.1}
    else:
        sampling, options = Sampling(20), {"do_sample": False}
    wanted = theirs(model, ids, max_new_tokens=20, **options)
    assert generate(model, tokenizer, prompt, sampling=sampling).token_ids == tuple(wanted)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "compressed"])
def test_seq2seq_tokens_are_those_of_transformers_generate(switch, compressed, packed):
    model, tokenizer = open_model(str(compressed[0] if packed else switch))
    prompt = "router <extra_id_0> token"
    ids = [*tokenizer(prompt)["input_ids"], tokenizer.eos_token_id]  # this tokenizer does not add it
    made = generate(model, tokenizer, prompt, sampling=Sampling(12))
    assert made.token_ids == tuple(theirs(model, ids, max_new_tokens=12, do_sample=False))
    assert made.prompt_tokens == 4


def test_the_same_seed_draws_the_same_text_and_another_seed_another(random_causal):
    model, tokenizer = random_causal

    def drawn(seed):
        return generate(model, tokenizer, "router", sampling=Sampling(30, temperature=1.0, seed=seed)).token_ids

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_without_top_k_every_token_can_be_drawn():
    """Where nothing is said transformers draws among 50."""
    model = reciter({}, 258)
    torch.nn.init.normal_(model.lm_head.weight, std=1e-3)
    made = generate(model, byte_tokenizer(), "x", sampling=Sampling(900, temperature=1.0))
    assert len(set(made.token_ids)) > 200


def test_a_generation_config_neither_warns_nor_interferes(random_causal, warned):
    model, tokenizer = random_causal
    wanted = generate(model, tokenizer, "router expert", sampling=Sampling(20))
    before = model.generation_config
    loud = {"do_sample": True, "temperature": 0.3, "top_k": 3, "num_beams": 3, "max_length": 5, "min_p": 0.2}
    model.generation_config = GenerationConfig(repetition_penalty=3.0, no_repeat_ngram_size=1, max_time=1e-9, **loud)
    kept = model.generation_config
    warned.clear()
    try:
        made = generate(model, tokenizer, "router expert", sampling=Sampling(20))
        assert model.generation_config is kept
    finally:
        model.generation_config = before
    assert made.token_ids == wanted.token_ids
    assert [record.getMessage() for record in warned] == []


def test_a_missing_pad_token_does_not_warn(reciting, warned):
    model, tokenizer = reciting
    assert tokenizer.pad_token_id is None
    generate(model, tokenizer, "x", sampling=Sampling(40, temperature=0.7))
    assert [record.getMessage() for record in warned] == []


def test_text_comes_out_in_whole_characters_and_words_while_the_model_runs(reciting):
    model, tokenizer = reciting
    forwards, seen = [], []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        made = generate(model, tokenizer, "x", write=lambda text: seen.append((text, len(forwards))))
    finally:
        handle.remove()
    # after the tokens of: space; the 3 bytes of 中; 2 of é and the tab; 4 of 😀 and the newline; z and the end
    assert seen == [(" ", 1), ("中", 4), ("é\t", 7), ("😀\n", 12), ("z", 14)]
    assert made.text == RECITED
    assert made.finish_reason == "eos"
    assert made.token_ids[-1] == 256
    assert len(forwards) == len(made.token_ids) == len(RECITED.encode()) + 1
    assert 0 < made.first_token_seconds <= made.seconds
    assert made.tokens_per_second == pytest.approx(14 / made.seconds)


def test_a_text_that_is_cut_ends_for_its_length(reciting):
    model, tokenizer = reciting
    made = generate(model, tokenizer, "x", sampling=Sampling(7))
    assert (made.text, made.finish_reason, len(made.token_ids)) == (" 中é\t", "length", 7)


def test_any_of_several_end_tokens_ends_the_text_and_is_not_shown(reciting):
    _, tokenizer = reciting
    model = reciter(chain(*tokenizer("xab")["input_ids"], 257), len(tokenizer))
    assert model.generation_config.eos_token_id is None
    model.generation_config.eos_token_id = [256, 257]
    made = generate(model, tokenizer, "x")
    assert (made.text, made.finish_reason) == ("ab", "eos")


def test_the_tokenizers_end_token_counts_where_the_model_names_none(reciting):
    _, tokenizer = reciting
    made = generate(reciter(chain(*tokenizer("xa")["input_ids"], 256), len(tokenizer)), tokenizer, "x")
    assert (made.text, made.finish_reason) == ("a", "eos")


def test_special_tokens_of_a_causal_model_are_not_shown(reciting):
    _, tokenizer = reciting
    x, a, b = tokenizer("xab")["input_ids"]
    made = generate(reciter(chain(x, a, 257, b, 256), len(tokenizer)), tokenizer, "x")
    assert (made.text, len(made.token_ids)) == ("ab", 4)


def test_spaces_after_the_prompt_and_before_a_line_are_kept():
    """Llama's decoder drops the first space of what it decodes."""
    tokens = ["▁a", "▁if", ":", "<0x0A>", "▁▁▁", "▁go", "<0xC3>", "<0xA9>", "</s>"]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_tokens(["a"])  # as the metaspace would make it
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    model = reciter(chain(len(tokenizer) - 1, 1, 2, 3, 4, 5, 6, 7, 8), len(tokenizer))
    seen: list[str] = []
    made = generate(model, tokenizer, "a", write=seen.append)
    assert made.text == " if:\n    goé"
    assert seen == [" ", "if:\n", "   ", " ", "goé"]


def test_sentinels_are_part_of_an_answer(switch):
    model, tokenizer = open_model(str(switch))
    answer = iter(tokenizer.convert_tokens_to_ids(["<extra_id_1>", "<pad>", "expert", "</s>"]))
    model.lm_head.register_forward_hook(lambda _, __, logits: torch.zeros_like(logits).index_fill(-1, next_id(), 1.0))

    def next_id():
        return torch.tensor([next(answer)])

    made = generate(model, tokenizer, "router <extra_id_0>")
    assert (made.text, made.finish_reason, len(made.token_ids)) == ("<extra_id_1> expert", "eos", 4)


def test_two_threads_write_one_after_another_and_greedy_text_leaves_the_seed_alone(switch):
    model, tokenizer = open_model(str(switch))
    alone = generate(model, tokenizer, "router expert", sampling=Sampling(6))
    own = model.generation_config
    torch.manual_seed(11)
    wanted = torch.rand(1)
    torch.manual_seed(11)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda n: generate(model, tokenizer, "router expert", sampling=Sampling(n)), (6, 3, 6)))
    assert [each.token_ids for each in made] == [alone.token_ids, alone.token_ids[:3], alone.token_ids]
    assert model.generation_config is own
    assert torch.equal(torch.rand(1), wanted)


def test_the_expert_capacity_stays_as_it_is(switch):
    model, tokenizer = open_model(str(switch))
    routers = [m for m in model.modules() if hasattr(m, "expert_capacity")]
    for router in routers:
        router.expert_capacity = 2
    prompt = " ".join(tiny.WORDS)
    ids = encode_prompt(model, tokenizer, prompt)
    wanted = theirs(model, ids, max_new_tokens=5, do_sample=False)
    assert generate(model, tokenizer, prompt, sampling=Sampling(5)).token_ids == tuple(wanted)
    assert {router.expert_capacity for router in routers} == {2}


PROMPTS = ["router expert token", "gate", tiny.make_text(5, 12)]


QUICK = {"deepseek_v3", "qwen3_moe", "switch"}  # attention, routing and sides that differ; the others take as long


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in [*tiny.CAUSAL, "switch"]]
)
def any_compressed(request, compressed, compressed_causal):
    """A compressed model of each family, in which one word often ends a text early."""
    directory = compressed[0] if request.param == "switch" else compressed_causal(request.param)
    model, tokenizer = open_model(str(directory))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("token")]
    return model, tokenizer


def test_a_batch_gives_what_its_prompts_give_alone(any_compressed):
    """Padded, and the longest in chunks."""
    model, tokenizer = any_compressed
    alone = [generate(model, tokenizer, prompt, sampling=Sampling(8)) for prompt in PROMPTS]
    seen = ["" for _ in PROMPTS]
    ended = []

    def write(number, text):
        assert number not in ended
        seen[number] += text
        if not text:
            ended.append(number)

    made = generate_batch(model, tokenizer, PROMPTS, sampling=Sampling(8), prefill_chunk=7, write=write)
    for wanted, found, text in zip(alone, made, seen, strict=True):
        assert (found.token_ids, found.text, text) == (wanted.token_ids, wanted.text, wanted.text)
        assert (found.prompt_tokens, found.finish_reason) == (wanted.prompt_tokens, wanted.finish_reason)
    assert sorted(ended) == [0, 1, 2]


def test_padding_counts_for_no_repetition_penalty(random_causal):
    """Padded with the end token, a short prompt would be kept from ending."""
    model, tokenizer = random_causal
    sampling = Sampling(12, repetition_penalty=2.0)
    alone = [generate(model, tokenizer, prompt, sampling=sampling).token_ids for prompt in PROMPTS]
    assert [made.token_ids for made in generate_batch(model, tokenizer, PROMPTS, sampling=sampling)] == alone


def test_texts_of_a_batch_end_one_by_one(reciting):
    model, tokenizer = reciting
    seen = []
    made = generate_batch(model, tokenizer, ["x", "z"], write=lambda *piece: seen.append(piece))
    assert [(one.text, one.finish_reason) for one in made] == [(RECITED, "eos"), ("", "eos")]
    assert made[1].token_ids == (256,)
    assert seen[:2] == [(0, " "), (1, "")]
    assert seen[-1] == (0, "")
    assert made[1].seconds < made[0].seconds


def test_a_long_prompt_is_taken_in_chunks_and_gives_the_same_logits(random_causal):
    model, tokenizer = random_causal
    prompt = tiny.make_text(2, 45)
    widths, logits = [], []
    hooks = [
        model.model.register_forward_pre_hook(
            lambda _, __, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
        ),
        model.register_forward_hook(lambda _, __, out: logits.append(out.logits[0, -1])),
    ]
    try:
        whole = generate(model, tokenizer, prompt, sampling=Sampling(3))
        assert widths == [45, 1, 1]
        wanted, logits[:], widths[:] = logits[0], [], []
        chunked = generate(model, tokenizer, prompt, sampling=Sampling(3), prefill_chunk=10)
        assert widths == [10, 10, 10, 10, 5, 1, 1]
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(logits[4], wanted, rtol=1e-4, atol=1e-4)
    assert chunked.token_ids == whole.token_ids


def test_the_prompt_at_fault_is_named(reciting):
    model, tokenizer = reciting
    with pytest.raises(SettingError, match=r"^prompt 2 of 3: the prompt is empty"):
        generate_batch(model, tokenizer, ["x", "", "x"])
    with pytest.raises(SettingError, match="there is no prompt"):
        generate_batch(model, tokenizer, [])
    with pytest.raises(SettingError, match="prefill_chunk is 0"):
        generate(model, tokenizer, "x", prefill_chunk=0)


def test_a_model_that_puts_out_nan_is_an_error(reciting):
    _, tokenizer = reciting
    model = reciter({}, len(tokenizer))
    model.lm_head.weight.data[3, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="outputs NaN"):
        generate(model, tokenizer, "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": 1e-30}, r"0 \(greedy\), or at least 0.001"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": 1 << 63}, "below 2"),
        ({"top_p": 0.5}, "do nothing at temperature 0"),
        ({"top_k": 5}, "do nothing at temperature 0"),
    ],
)
def test_sampling_names_the_option_that_is_out_of_range(options, message):
    with pytest.raises(SettingError, match=message):
        Sampling(**options).check()


def test_prompt_and_new_tokens_must_fit_the_positions(random_causal):
    model, tokenizer = random_causal
    assert generate(model, tokenizer, "router " * 60, sampling=Sampling(4)).prompt_tokens == 60
    with pytest.raises(SettingError, match="60 tokens, and 5 new ones do not fit: the model has 64"):
        generate(model, tokenizer, "router " * 60, sampling=Sampling(5))


def test_relative_positions_have_no_limit(switch):
    model, tokenizer = open_model(str(switch))
    model.config.max_position_embeddings = 128  # some checkpoints have it all the same
    assert generate(model, tokenizer, "router " * 600, sampling=Sampling(2)).prompt_tokens == 601


def test_ids_beyond_the_vocabulary_are_refused(reciting):
    _, tokenizer = reciting
    with pytest.raises(SettingError, match="the tokenizer produces id 87, the model knows 80"):
        generate(reciter({}, 80), tokenizer, "x")


def test_an_empty_prompt_begins_a_text_only_where_a_token_does(reciting):
    model, tokenizer = reciting
    with pytest.raises(SettingError, match="the prompt is empty"):
        generate(model, tokenizer, "")
    begins = byte_tokenizer(bos_token="<|end|>")
    assert encode_prompt(model, begins, "") == [257]


def test_a_begin_token_that_the_tokenizer_adds_is_kept(reciting):
    model, _ = reciting
    tokenizer = byte_tokenizer(bos_token="<|end|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", None, [("<|end|>", 257)])
    assert encode_prompt(model, tokenizer, "x") == [257, *byte_tokenizer()("x")["input_ids"]]


def test_the_chat_template_wraps_the_prompt(reciting):
    model, _ = reciting
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    assert tokenizer.decode(encode_prompt(model, tokenizer, "hi", chat=True, system="be")) == "[s]be[u]hix"
    assert tokenizer.decode(encode_prompt(model, tokenizer, "hi", chat=True)) == "[u]hix"
    assert generate(model, tokenizer, "", chat=True).text == RECITED  # the template ends in x
    with pytest.raises(SettingError, match="needs the chat template"):
        encode_prompt(model, tokenizer, "hi", system="be")


def test_a_template_that_refuses_a_message_is_named(reciting):
    model, _ = reciting
    tokenizer = byte_tokenizer(chat_template="{{ raise_exception('no system role here') }}")
    with pytest.raises(SettingError, match=r"refuses the messages: no system role here\. Some take no system message"):
        encode_prompt(model, tokenizer, "hi", chat=True, system="be")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "compressed"])
def test_the_command_prints_the_text_and_its_speed_when_asked(run, switch, compressed, packed):
    directory = compressed[0] if packed else switch
    arguments = ["generate", directory, "--prompt", "router <extra_id_0>", "--max-new-tokens", 6]
    code, printed, noted = run(*arguments)
    assert (code, noted) == (0, "qmoe: cut by --max-new-tokens.\n")
    model, tokenizer = open_model(str(directory))
    assert printed == generate(model, tokenizer, "router <extra_id_0>", sampling=Sampling(6)).text + "\n"
    code, again, noted = run(*arguments, "--stats")
    assert (code, again) == (0, printed)
    assert re.fullmatch(r"qmoe: 6 tokens in \d+\.\d\d s, \d+\.\d tokens/s, the first after .* s", noted.splitlines()[1])


def test_several_prompts_stand_one_below_the_other(run, endless):
    long = "y" * 80
    code, printed, noted = run(
        "generate", endless, "--prompt", "x", "--prompt", f"\n{long}\nx", "--max-new-tokens", 4, "--stats"
    )
    assert (code, printed) == (0, f"[1] x\n y y\n\n[2] {long[:73]}...\n y y\n")
    assert noted.startswith("qmoe: cut by --max-new-tokens (1, 2 of 2).\nqmoe: 8 tokens in ")


def test_several_prompts_give_a_json_array(run, endless, tmp_path):
    (tmp_path / "a").write_text("x\n")
    (tmp_path / "b").write_text(" x")
    files = ["--prompt-file", tmp_path / "a", "--prompt-file", tmp_path / "b"]
    code, printed, noted = run("generate", endless, *files, "--max-new-tokens", 4, "--json")
    assert (code, noted) == (0, "")
    assert [(one["prompt"], one["text"], one["prompt_tokens"]) for one in json.loads(printed)] == [
        ("x", " y y", 1),
        (" x", " y y", 2),
    ]


def test_a_text_waits_until_those_before_it_have_ended(capsys):
    shown = _Shown(["a", "b", "c"])
    shown.write(1, "two ")
    shown.write(2, "three")
    assert capsys.readouterr().out == "[1] a\n"
    shown.write(1, "")
    shown.write(0, "one")
    assert capsys.readouterr().out == "one"
    shown.write(0, "")
    assert capsys.readouterr().out == "\n\n[2] b\ntwo \n\n[3] c\nthree"


def test_an_interrupt_shows_what_other_prompts_have(capsys):
    with _Shown(["a", "b", "c"]) as shown:
        shown.write(0, "one")
        shown.write(2, "three")
    assert capsys.readouterr().out == "[1] a\none\n\n[3] c\nthree\n"


def test_the_command_prints_one_json_document(run, endless):
    code, printed, noted = run("generate", endless, "--prompt", "x", "--max-new-tokens", 4, "--json")
    assert (code, noted) == (0, "")
    found = json.loads(printed)
    rates = {name: found.pop(name) for name in ("seconds", "first_token_seconds", "tokens_per_second")}
    assert found == {"prompt": "x", "text": " y y", "tokens": 4, "prompt_tokens": 1, "finish_reason": "length"}
    assert all(value > 0 for value in rates.values())


def test_a_chat_template_that_is_not_used_is_mentioned_in_one_line(run, chatty):
    options = ["--max-new-tokens", 3]
    code, printed, noted = run("generate", chatty, "--prompt", "x", *options)
    assert (code, printed) == (0, " y \n")
    assert len(noted.splitlines()) == 2
    assert "has a chat template. --chat applies it" in noted
    assert "chat template" not in run("generate", chatty, "--prompt", "x", "--no-chat", *options)[2]
    code, printed, noted = run("generate", chatty, "--prompt", "hi", "--chat", "--system", "be", *options)
    assert (code, printed) == (0, " y \n")
    assert "chat template" not in noted


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "compressed"])
def test_the_model_runs_in_the_dtype_that_was_asked_for(run, switch, compressed, opened, packed):
    directory = compressed[0] if packed else switch
    options = ["--prompt", "router <extra_id_0>", "--max-new-tokens", 6]
    code, printed, noted = run("generate", directory, *options, "--dtype", "bfloat16")
    assert code == 0, noted
    assert opened.models[0].dtype == torch.bfloat16
    model, tokenizer = open_model(str(directory))
    made = generate(model.to(torch.bfloat16), tokenizer, "router <extra_id_0>", sampling=Sampling(6))
    assert printed == made.text + "\n"


@pytest.mark.parametrize("options", [["--prompt", "-"], ["--prompt-file", "-"], []])
def test_a_dash_or_no_prompt_at_all_reads_standard_input(run, endless, monkeypatch, options):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é x\n".encode())))
    code, printed, noted = run("generate", endless, *options, "--json", "--max-new-tokens", 2)
    assert code == 0, noted
    assert json.loads(printed)["prompt"] == "é x"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_gives_the_prompt_less_its_last_newline(run, endless, tmp_path, mark):
    (tmp_path / "prompt.txt").write_bytes(mark + b"one\n x\r\n")
    code, printed, _ = run("generate", endless, "--prompt-file", tmp_path / "prompt.txt", "--json", "--seed", 1)
    assert code == 0
    assert json.loads(printed)["prompt"] == "one\n x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}", "--prompt", "x"], "no config.json"),
        (["{model}", "--prompt", ""], "the prompt is empty"),
        (["{model}", "--prompt", "\udcff"], "the prompt is not UTF-8"),
        (["{model}", "--prompt-file", "{tmp}/none"], "none cannot be read: No such file"),
        (["{model}", "--prompt-file", "{tmp}"], "cannot be read: Is a directory"),
        (["{model}", "--prompt-file", "{tmp}/latin"], "latin is not UTF-8 text"),
        (["{model}", "--prompt", "x", "--top-p", "0.5"], "do nothing at temperature 0"),
        (["{model}", "--prompt", "x", "--max-new-tokens", "1048576"], "do not fit: the model has 1048576 positions"),
        (["{switch}", "--prompt", "x", "--chat"], "the tokenizer has no chat template"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(run, tmp_path, endless, switch, arguments, message):
    (tmp_path / "latin").write_bytes(b"\xe9")
    places = {"tmp": tmp_path, "model": endless, "switch": switch}
    code, printed, noted = run("generate", *(a.format(**places) for a in arguments))
    assert (code, printed) == (1, "")
    assert len(noted.splitlines()) == 1
    assert noted.startswith("qmoe: ")
    assert message in noted


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prompt", "x", "--prompt-file", "y"],
        ["--prompt", "x", "--system", "y"],
        ["--prompt", "x", "--dtype", "int8"],
        ["--prompt", "x", "--top-p", "1.5"],
        ["--prompt", "x", "--max-new-tokens", "0"],
    ],
)
def test_wrong_usage_is_exit_code_2(run, endless, monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    code, printed, noted = run("generate", endless, *arguments)
    assert (code, printed) == (2, "")
    assert "--" in noted


def test_the_command_has_help_and_an_example(run):
    code, printed, _ = run("generate", "--help")
    assert code == 0
    assert "Example: qmoe generate" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_an_interrupt_keeps_what_was_printed(run, endless, opened):
    def interrupt_the_fifth_pass(model):
        passes = itertools.count(1)
        model.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT) if next(passes) == 5 else None)

    opened.then = interrupt_the_fifth_pass
    code, printed, noted = run("generate", endless, "--prompt", "x")
    assert (code, printed, noted) == (130, " y \n", "qmoe: interrupted.\n")


def test_an_interrupt_before_the_first_word_prints_nothing(run, endless, opened):
    opened.then = lambda model: signal.raise_signal(signal.SIGINT)
    assert run("generate", endless, "--prompt", "x") == (130, "", "qmoe: interrupted.\n")


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly(endless):
    """The text also arrives while the model is still at work: this one would go on for minutes."""
    command = [sys.executable, "-m", "qmoe_lite", "generate", endless, "--prompt", "x", "--max-new-tokens", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(4) == b" y y"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1
