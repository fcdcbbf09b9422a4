"""Adapter on and off -> metrics on the forget and the retain set -> report."""

from uoe_peft.evaluation.evaluate import evaluate_unlearning
from uoe_peft.evaluation.report import AnswerScores, UnlearningReport

__all__ = ["AnswerScores", "UnlearningReport", "evaluate_unlearning"]
