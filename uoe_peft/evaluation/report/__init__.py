"""What an evaluation found: a value, and its tables and page."""

from uoe_peft.evaluation.report.report import (
    MODELS,
    AnswerScores,
    AttackRun,
    ModelName,
    SetName,
    UnlearningReport,
    ValueScores,
    Verdict,
)

__all__ = [
    "MODELS",
    "AnswerScores",
    "AttackRun",
    "ModelName",
    "SetName",
    "UnlearningReport",
    "ValueScores",
    "Verdict",
]
