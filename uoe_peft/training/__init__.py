"""Unlearning on TRL's trainer: `UnlearningConfig`, `UnlearningTrainer`; afterwards `correct_routers`."""

from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.router_correction import RouterCorrection, correct_routers
from uoe_peft.training.trainer import UnlearningTrainer

__all__ = ["RouterCorrection", "UnlearningConfig", "UnlearningTrainer", "correct_routers"]
