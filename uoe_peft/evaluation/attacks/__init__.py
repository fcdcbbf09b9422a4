"""Attacks that a forgetting must stand: each takes a model and a score, and gives the scores before and after."""

from uoe_peft.evaluation.attacks.gcg import gcg
from uoe_peft.evaluation.attacks.prompts import few_shot, paraphrase, prefix
from uoe_peft.evaluation.attacks.quantization import quantization
from uoe_peft.evaluation.attacks.relearning import relearning
from uoe_peft.evaluation.attacks.restoring import expert_restored, router_restored, scale_sweep
from uoe_peft.evaluation.attacks.result import AttackResult, Score, Scores
from uoe_peft.evaluation.attacks.routing import expert_forcing, shared_path, silenced_expert
from uoe_peft.evaluation.attacks.run import AdapterAttack, AttackName, run_attack
from uoe_peft.evaluation.attacks.soft_prompt import soft_prompt

__all__ = [
    "AdapterAttack",
    "AttackName",
    "AttackResult",
    "Score",
    "Scores",
    "expert_forcing",
    "expert_restored",
    "few_shot",
    "gcg",
    "paraphrase",
    "prefix",
    "quantization",
    "relearning",
    "router_restored",
    "run_attack",
    "scale_sweep",
    "shared_path",
    "silenced_expert",
    "soft_prompt",
]
