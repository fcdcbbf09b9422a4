"""Suites: which questions are asked, and what for."""

from uoe_peft.evaluation.suites.options import load_option_files, option_set
from uoe_peft.evaluation.suites.questions import muse_suite, rwku_suite
from uoe_peft.evaluation.suites.suite import QuestionSet, SetRole, Suite, plain_suite
from uoe_peft.evaluation.suites.testbed import testbed_suite
from uoe_peft.evaluation.suites.tofu import tofu_suite

__all__ = [
    "QuestionSet",
    "SetRole",
    "Suite",
    "load_option_files",
    "muse_suite",
    "option_set",
    "plain_suite",
    "rwku_suite",
    "testbed_suite",
    "tofu_suite",
]
