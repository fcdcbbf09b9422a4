"""Many requests: one adapter after another, adapters that become one, and the gate that chooses per prompt."""

from uoe_peft.requests.prompt_gate import PromptGate, generate_gated
from uoe_peft.requests.regression import add_regression_mean
from uoe_peft.requests.sequence import add_request, retain_with_requests
from uoe_peft.requests.withdrawal import WithdrawableTrainer, withdrawn

__all__ = [
    "PromptGate",
    "WithdrawableTrainer",
    "add_regression_mean",
    "add_request",
    "generate_gated",
    "retain_with_requests",
    "withdrawn",
]
