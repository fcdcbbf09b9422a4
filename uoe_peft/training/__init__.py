"""Unlearning on TRL's trainer: `UnlearningConfig` and `UnlearningTrainer`."""

from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.trainer import UnlearningTrainer

__all__ = ["UnlearningConfig", "UnlearningTrainer"]
