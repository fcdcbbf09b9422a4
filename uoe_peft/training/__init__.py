"""Unlearning on TRL's trainer: `UnlearningConfig`, `UnlearningTrainer`; without training: `solve_unlearning`."""

from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.solve import solve_unlearning
from uoe_peft.training.trainer import UnlearningTrainer

__all__ = ["UnlearningConfig", "UnlearningTrainer", "solve_unlearning"]
