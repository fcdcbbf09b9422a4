"""Unlearn one expert of a Mixture-of-Experts language model, as a PEFT adapter that can be switched off.

The public names, in the order in which data flows. Importing the package registers the method with PEFT, so that
`get_peft_model`, `PeftModel.from_pretrained` and the other loaders know it. A name is imported when it is first used:
the import itself takes milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from uoe_peft.registration import register_with_peft

if TYPE_CHECKING:
    from uoe_peft.moe import find_moe_blocks
    from uoe_peft.attribution import ExpertAttribution, attribute_experts
    from uoe_peft.tuner import UOEConfig, UOEModel
    from uoe_peft.streaming import StreamedModel
    from uoe_peft.dense import NeuronGroups, cluster_neurons, factorize, load_factorized, to_dense
    from uoe_peft.training import UnlearningConfig, UnlearningTrainer, solve_unlearning
    from uoe_peft.evaluation import UnlearningReport, calibrate_scale, evaluate_unlearning
    from uoe_peft.export import export_lora, merge_checkpoint, unmerge_checkpoint
    from uoe_peft.requests import PromptGate

__version__ = "0.1.0"

_ROOM_OF = {
    "find_moe_blocks": "moe",
    "attribute_experts": "attribution",
    "ExpertAttribution": "attribution",
    "UOEConfig": "tuner",
    "UOEModel": "tuner",
    "StreamedModel": "streaming",
    "UnlearningConfig": "training",
    "UnlearningTrainer": "training",
    "solve_unlearning": "training",
    "evaluate_unlearning": "evaluation",
    "UnlearningReport": "evaluation",
    "calibrate_scale": "evaluation",
    "merge_checkpoint": "export",
    "unmerge_checkpoint": "export",
    "export_lora": "export",
    "PromptGate": "requests",
    "NeuronGroups": "dense",
    "cluster_neurons": "dense",
    "factorize": "dense",
    "load_factorized": "dense",
    "to_dense": "dense",
}

__all__ = [
    "find_moe_blocks",
    "attribute_experts",
    "ExpertAttribution",
    "UOEConfig",
    "UOEModel",
    "StreamedModel",
    "UnlearningConfig",
    "UnlearningTrainer",
    "solve_unlearning",
    "evaluate_unlearning",
    "UnlearningReport",
    "calibrate_scale",
    "merge_checkpoint",
    "unmerge_checkpoint",
    "export_lora",
    "PromptGate",
    "NeuronGroups",
    "cluster_neurons",
    "factorize",
    "load_factorized",
    "to_dense",
]

register_with_peft()


def __getattr__(name: str) -> Any:
    """A public name, imported from its room at first use (PEP 562)."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value  # the next time it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
