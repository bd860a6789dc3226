"""What speaks against a result is said beside it."""

import numpy as np
import pytest

from hf_tgpt.evaluation.metrics import classification_metrics
from hf_tgpt.training.results import judge

NAMES = ["cat", "dog", "fox"]
LEARNED = [{"train_accuracy": 0.9}]


def judged(answers, labels, zero_shot=0.0, history=LEARNED, names=NAMES):
    logits = np.eye(len(names))[answers]
    return judge(zero_shot, classification_metrics(logits, np.array(labels)), np.array(answers), history, names)


def test_a_result_that_holds_is_left_alone():
    assert judged([0, 1, 2, 2], [0, 1, 2, 1], zero_shot=0.75) == []
    assert judged([0, 1, 2, 2], [0, 1, 2, 1], zero_shot=0.75, history=[]) == []  # zero-shot itself has no history


@pytest.mark.parametrize(
    ("remark", "case"),
    [
        ("is worse than zero-shot (0.667 against 0.800), so", dict(answers=[0, 1, 1], labels=[0, 1, 2], zero_shot=0.8)),
        ("Every test picture is classified as 'dog'", dict(answers=[1, 1, 1], labels=[0, 1, 2])),
        (
            "not learned its training pictures (accuracy 0.340 in the last epoch, 0.333 by chance)",
            dict(answers=[0, 1, 2], labels=[0, 1, 2], history=[{"train_accuracy": 0.9}, {"train_accuracy": 0.34}]),
        ),
        ("There is only one class, so every answer is right", dict(answers=[0, 0], labels=[0, 0], names=["cat"])),
        ("Of 3 classes 1 could not be tested", dict(answers=[0, 1], labels=[0, 1])),
    ],
)
def test_what_speaks_against_a_result_is_one_sentence(remark, case):
    (said,) = judged(**case)
    assert remark in said


def test_few_right_answers_of_many_classes_are_not_taken_for_one_answer():
    assert not any("Every test picture" in said for said in judged([0, 2, 1], [0, 1, 2]))
