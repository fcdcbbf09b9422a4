"""Any attack by its name."""

from __future__ import annotations

from typing import Any, Literal, get_args

from uoe_peft.evaluation.attacks.gcg import gcg
from uoe_peft.evaluation.attacks.prompts import few_shot, paraphrase, prefix
from uoe_peft.evaluation.attacks.quantization import quantization
from uoe_peft.evaluation.attacks.relearning import relearning
from uoe_peft.evaluation.attacks.restoring import expert_restored, router_restored, scale_sweep
from uoe_peft.evaluation.attacks.result import AttackResult, CausalLM, Score, Scores
from uoe_peft.evaluation.attacks.routing import expert_forcing, shared_path, silenced_expert
from uoe_peft.evaluation.attacks.soft_prompt import soft_prompt

AdapterAttack = Literal["router_restored", "expert_restored", "scale_sweep"]
"""Attacks that need an adapter; the others work on any model (those on experts: on any MoE model)."""

AttackName = Literal[
    "relearning",
    "int8",
    "int4",
    "paraphrase",
    "few_shot",
    "prefix",
    "soft_prompt",
    "gcg",
    "expert_forcing",
    "silenced_expert",
    "shared_path",
    AdapterAttack,
]


def run_attack(
    name: AttackName, model: CausalLM, *, score: Score, before: Scores | None = None, **options: Any
) -> AttackResult:
    """Runs an attack and leaves the model as it was, bit for bit, also where it fails.

    Args:
        name: Which attack.
        model: The model; it must be an adapter's for the names in `AdapterAttack`.
        score: Measures forget and retain.
        before: Scores of the model as it is, so that many attacks need not measure them again; None: they are measured.
        options: The attack's own arguments: see the function of its name ("int8" and "int4": `quantization`). All
            models that are compared should get the same.

    Returns:
        What the attack's function returns.

    Raises:
        ValueError: There is no such attack.
        Exception: As the attack's function.
    """
    match name:
        case "relearning":
            return relearning(model, score=score, before=before, **options)
        case "int8":
            return quantization(model, score=score, before=before, bits=8, **options)
        case "int4":
            return quantization(model, score=score, before=before, bits=4, **options)
        case "paraphrase":
            return paraphrase(model, score=score, before=before, **options)
        case "few_shot":
            return few_shot(model, score=score, before=before, **options)
        case "prefix":
            return prefix(model, score=score, before=before, **options)
        case "soft_prompt":
            return soft_prompt(model, score=score, before=before, **options)
        case "gcg":
            return gcg(model, score=score, before=before, **options)
        case "expert_forcing":
            return expert_forcing(model, score=score, before=before, **options)
        case "silenced_expert":
            return silenced_expert(model, score=score, before=before, **options)
        case "shared_path":
            return shared_path(model, score=score, before=before, **options)
        case "router_restored":
            return router_restored(model, score=score, before=before, **options)
        case "expert_restored":
            return expert_restored(model, score=score, before=before, **options)
        case "scale_sweep":
            return scale_sweep(model, score=score, before=before, **options)
        case _:
            raise ValueError(f"there is no attack {name!r}; there are {', '.join(get_args(AttackName))}")
