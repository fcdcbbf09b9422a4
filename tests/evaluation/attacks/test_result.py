"""What is made of scores."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.evaluation.attacks.conftest import Recorder
from uoe_peft.evaluation.attacks.result import AttackResult, baseline, measured, strongest


def test_scores_become_plain_floats() -> None:
    score = Recorder(lambda call: {"forget_x": np.float32(0.5), "retain_x": 1})
    scores = measured(score, None)  # type: ignore[arg-type]
    assert scores == {"forget_x": 0.5, "retain_x": 1.0}
    assert {type(value) for value in scores.values()} == {float}


def test_a_plain_question_is_asked_without_arguments() -> None:
    score = Recorder(lambda call: {"forget_x": 0.5})
    measured(score, None)  # type: ignore[arg-type]
    measured(score, None, column="other")  # type: ignore[arg-type]
    assert score.asked == [{}, {"column": "other"}]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "begins with"),
        ({"retain_x": 1.0}, "begins with"),
        ({"forget_x": float("nan")}, "finite"),
        ({"forget_x": 1.0, "retain_x": float("inf")}, "retain_x"),
    ],
)
def test_scores_that_say_nothing_are_refused(scores: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measured(Recorder(lambda call: scores), None)  # type: ignore[arg-type]


def test_known_scores_are_not_measured_again() -> None:
    score = Recorder(lambda call: {"forget_x": 0.5})
    assert baseline(score, None, {"forget_x": 0.1}) == {"forget_x": 0.1}  # type: ignore[arg-type]
    assert not score.models
    assert baseline(score, None, None) == {"forget_x": 0.5}  # type: ignore[arg-type]


def test_each_forget_score_counts_where_it_is_highest() -> None:
    curve = [
        {"step": 0, "forget_a": 0.1, "forget_b": 0.0, "retain": 0.9},
        {"step": 1, "forget_a": 0.7, "forget_b": 0.2, "retain": 0.8},
        {"step": 2, "forget_a": 0.7, "forget_b": 0.4, "retain": 0.3},
        {"step": 3, "forget_a": 0.2, "forget_b": 0.1, "retain": 0.2},
    ]
    assert strongest(curve) == {"step": 1, "forget_a": 0.7, "forget_b": 0.4, "retain": 0.8}


def test_other_names_along_the_curve_are_refused() -> None:
    with pytest.raises(ValueError, match="same names"):
        strongest([{"forget_a": 0.1}, {"forget_b": 0.1}])


def test_a_result_is_plain_json() -> None:
    result = AttackResult("x", before={"forget_a": 0.5}, after={"forget_a": 1.0}, curve=({"step": 1, "forget_a": 1.0},))
    assert json.loads(json.dumps(result.to_dict())) == {
        "name": "x",
        "before": {"forget_a": 0.5},
        "after": {"forget_a": 1.0},
        "curve": [{"step": 1, "forget_a": 1.0}],
        "settings": {},
    }
