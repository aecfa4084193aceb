"""The knock-out of best-of-N: its rules, its bracket, judges that fail or cannot be loaded."""

import math
import random
import sys

import pytest
import torch

from eightfold.generate.scaling import Judgement, candidate_seeds, judged, load_judge, tournament


def told(image, prompt):
    """A judge of images that are their own answers."""
    return image


def sure(answers):
    return tournament(answers, "a cat", told)


def test_rules():
    assert sure([(False, 0.1), (True, 0.1)]).winner == 1  # of different answers yes, however unsure
    assert sure([(True, 0.0), (False, 0.9)]).winner == 0
    assert sure([(True, 0.7), (True, 0.8)]).winner == 1  # of two yes the surer
    assert sure([(False, 0.8), (False, 0.7)]).winner == 1  # of two no the less sure
    assert sure([(True, 0.5), (True, 0.5)]).winner == 0
    assert sure([(False, 0.5), (False, 0.5)]).winner == 0


def test_bracket():
    """Seven images: three matches and a bye, one match and a bye, a final."""
    found = sure([(True, score) for score in (3, 1, 2, 5, 4, 0, 1)])
    assert found.rounds == (((0, 1, 0), (2, 3, 3), (4, 5, 4)), ((0, 3, 3), (4, 6, 4)), ((3, 4, 3),))
    assert found.winner == 3
    odd = sure([(True, 1), (True, 2), (True, 9)])
    assert odd.rounds == (((0, 1, 1),), ((1, 2, 2),))
    assert odd.winner == 2
    assert sure([(False, 1.0)]) == sure([(False, 1.0)])
    assert (sure([(False, 1.0)]).winner, sure([(False, 1.0)]).rounds) == (0, ())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_any_number(count):
    """Nobody beats the winner, all but the winner lose once, and the image and the prompt are asked about once."""
    draw = random.Random(count)
    answers = [(draw.random() < 0.4, draw.random()) for _ in range(count)]
    asked = []

    def judge(image, prompt):
        asked.append((image, prompt))
        return image

    found = tournament(answers, "three dogs", judge)
    assert asked == [(answer, "three dogs") for answer in answers]
    assert found.judgements == tuple(Judgement(*answer) for answer in answers)
    assert not any(other.beats(found.judgements[found.winner]) for other in found.judgements)
    losers = [first + second - winner for matches in found.rounds for first, second, winner in matches]
    assert sorted([*losers, found.winner]) == list(range(count))
    assert tournament(answers, "three dogs", judge) == found


def test_no_image():
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        sure([])


def test_a_judge_that_fails():
    def judge(image, prompt):
        if image == "broken":
            raise RuntimeError(f"no answer\nfor {prompt}")
        return image

    found = tournament(["broken", (False, 1e30), "broken", (True, 0.0), "broken"], "a cat", judge)
    assert (found.winner, found.failures) == (3, [0, 2, 4])
    assert found.judgements[0] == Judgement(False, math.inf, "RuntimeError: no answer for a cat")
    assert tournament(["broken", (False, 5.0)], "x", judge).winner == 1  # the surest no loses to every answer
    assert tournament(["broken", "broken", "broken"], "x", judge).winner == 0


@pytest.mark.parametrize(
    "answer",
    [None, True, (True,), (True, 1.0, 2), (True, math.nan), (False, math.inf), ("yes", 0.5), (True, "sure"), (2, 0.5)],
)
def test_an_answer_that_is_none(answer):
    failed = judged(lambda image, prompt: answer, None, "a cat")
    assert failed.failure == f"expected (yes, score), got {answer!r}"
    assert not failed.yes
    assert Judgement(False, 1e9).beats(failed)


def test_answers_of_torch():
    assert judged(told, (torch.tensor(True), torch.tensor(0.5)), "") == Judgement(True, 0.5)
    assert judged(told, (1, 2), "") == Judgement(True, 2.0)


def test_interrupt_is_no_failure():
    def judge(image, prompt):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(judge, None, "")


def test_candidate_seeds():
    assert list(candidate_seeds(5, 1)) == [5]
    assert [list(candidate_seeds(seed, 3)) for seed in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    assert set(candidate_seeds(0, 4)) < set(candidate_seeds(0, 16))
    with pytest.raises(ValueError, match="count: expected 1 or more, got 0"):
        candidate_seeds(0, 0)


def test_load_judge(tmp_path, monkeypatch):
    file = tmp_path / "own.judge.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Answer:\n    score: float\nnumber = 3\n"
        "def brightest(image, prompt):\n    return True, Answer(float(len(prompt))).score\n"
    )
    assert load_judge(f"{file}:brightest")(None, "four") == (True, 4.0)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_judge_module.py").write_text("def no(image, prompt): return False, 1.0\n")
    try:
        assert load_judge("some_judge_module:no")(None, "") == (False, 1.0)
    finally:
        sys.modules.pop("some_judge_module", None)
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    for path, error, line in (
        ("judge", ValueError, "judge: expected module:function or file.py:function, got 'judge'"),
        (":no", ValueError, "judge: expected module:function"),
        (f"{file}:", ValueError, "judge: expected module:function"),
        (f"{file}:darkest", ValueError, "own.judge.py has no function 'darkest'"),
        (f"{file}:number", ValueError, "own.judge.py has no function 'number'"),
        (f"{tmp_path}/absent.py:no", FileNotFoundError, "absent.py: no such file"),
        (f"{broken}:no", ValueError, "broken.py: not imported: ModuleNotFoundError: No module named 'nothing"),
        ("nothing_of_this_name:no", ValueError, "judge: nothing_of_this_name: not imported: ModuleNotFoundError"),
    ):
        with pytest.raises(error, match=line):
            load_judge(path)
