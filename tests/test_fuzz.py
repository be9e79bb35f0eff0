"""300 damaged directories, of every code: each is refused in one line, or gives exactly what its files say.

`python bench/fuzz.py` runs ten thousand. `python bench/fuzz.py --replay CODE:SEED` shows one again.
"""

from __future__ import annotations

import functools
import itertools

import judge
import mutate
import pytest

CODES = judge.CODES


@pytest.fixture(scope="session")
def original(made_once):
    """Give a function: the name of a code -> a directory of it, in order."""

    def make(place):
        place.mkdir()
        judge.make_directories(place)

    base = made_once("fuzz", make)
    return functools.cache(lambda name: judge.original_of(name, base / name))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' about a configuration that is out of order
@pytest.mark.parametrize("batch", range(4))
@pytest.mark.parametrize("code", CODES)
def test_mutants_are_refused_or_exact(original, tmp_path, code, batch):
    mine = itertools.islice(itertools.count(CODES.index(code), len(CODES)), 10 * batch, 10 * batch + 10)
    for seed in mine:
        mutant, outcome = judge.judge(original(code), seed, tmp_path / "mutant", thorough=seed % 4 == 0)
        assert outcome.right, f"python bench/fuzz.py --replay {code}:{seed}\n{mutant.done}\n{outcome}"


def test_a_seed_is_always_the_same_damage(original):
    files = original("fitted").files
    made = [mutate.Mutant(files, seed) for seed in (3, 3, 4)]
    assert made[0].files == made[1].files
    assert made[0].done == made[1].done
    assert made[0].files != made[2].files


def test_checksums_made_right_are_right(original):
    """What is sealed and not damaged is what it was."""
    for code in CODES[:6]:
        files = dict(original(code).files)
        mutate.seal(files)
        for name, content in original(code).files.items():
            if name.endswith(".json"):
                assert mutate.json.loads(files[name]) == mutate.json.loads(content)
            else:
                assert files[name] == content


def test_the_judge_sees_what_is_wrong(original, tmp_path, monkeypatch):
    """A decoder that errs, an exception of another kind, an error of two lines, are faults."""
    one = original("fitted")
    harmless = next(s for s in range(0, 600) if not mutate.Mutant(one.files, s).done[0].startswith(("cut", "spoil")))
    look = judge.look
    wrong = {
        "wrong": lambda place, **given: one.seen._replace(logits=one.seen.logits + 1),
        "exception": lambda place, **given: [][1],
        "memory": lambda place, **given: bytearray(2 * judge.MEMORY),
    }
    for kind, does in wrong.items():
        monkeypatch.setattr(judge, "look", does)
        assert judge.judge(one, harmless, tmp_path / "mutant", thorough=False)[1].kind == kind
    monkeypatch.setattr(judge, "look", look)
