"""Many requests: one adapter after another, adapters that become one, and the gate that chooses per prompt."""

from uoe_peft.requests.prompt_gate import PromptGate, generate_gated
from uoe_peft.requests.regression import add_regression_mean
from uoe_peft.requests.sequence import add_request, retain_with_requests
from uoe_peft.requests.split import split_by_column
from uoe_peft.requests.stored_moments import load_forget_moments, save_forget_moments
from uoe_peft.requests.trainer import RequestTrainer
from uoe_peft.requests.withdrawal import withdrawn

__all__ = [
    "PromptGate",
    "RequestTrainer",
    "add_regression_mean",
    "add_request",
    "generate_gated",
    "load_forget_moments",
    "retain_with_requests",
    "save_forget_moments",
    "split_by_column",
    "withdrawn",
]
