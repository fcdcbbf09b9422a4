"""Adapter on and off -> metrics on the forget and the retain set -> report."""

from uoe_peft.evaluation.calibration import Calibration, calibrate_scale
from uoe_peft.evaluation.evaluate import evaluate_unlearning
from uoe_peft.evaluation.report import AnswerScores, AttackRun, UnlearningReport, ValueScores, Verdict
from uoe_peft.evaluation.score import SuiteScore
from uoe_peft.evaluation.suites import (
    QuestionSet,
    Suite,
    load_option_files,
    muse_suite,
    option_set,
    plain_suite,
    rwku_suite,
    testbed_suite,
    tofu_suite,
)
from uoe_peft.evaluation.switching import scaled

__all__ = [
    "AnswerScores",
    "AttackRun",
    "Calibration",
    "QuestionSet",
    "Suite",
    "SuiteScore",
    "UnlearningReport",
    "ValueScores",
    "Verdict",
    "calibrate_scale",
    "evaluate_unlearning",
    "load_option_files",
    "muse_suite",
    "option_set",
    "plain_suite",
    "rwku_suite",
    "scaled",
    "testbed_suite",
    "tofu_suite",
]
