"""Attacks that a forgetting must stand: each takes a model and a score, and gives the scores before and after."""

from uoe_peft.evaluation.attacks.result import AttackResult, Score, Scores

__all__ = ["AttackResult", "Score", "Scores"]
