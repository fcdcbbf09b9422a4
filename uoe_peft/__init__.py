"""Unlearn one expert of a Mixture-of-Experts language model, as a PEFT adapter that can be switched off.

The public names, in the order in which data flows. Importing the package registers the method with PEFT, so that
`get_peft_model`, `PeftModel.from_pretrained` and the other loaders know it.
"""

from uoe_peft.moe import find_moe_blocks
from uoe_peft.attribution import ExpertAttribution, attribute_experts
from uoe_peft.tuner import UOEConfig, UOEModel
from uoe_peft.training import UnlearningConfig, UnlearningTrainer
from uoe_peft.evaluation import UnlearningReport, evaluate_unlearning

__version__ = "0.1.0"

__all__ = [
    "find_moe_blocks",
    "attribute_experts",
    "ExpertAttribution",
    "UOEConfig",
    "UOEModel",
    "UnlearningConfig",
    "UnlearningTrainer",
    "evaluate_unlearning",
    "UnlearningReport",
]
