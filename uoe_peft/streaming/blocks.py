"""What a module of experts computes, from a few of its experts at a time: bit for bit what it computes from all.

The module's own code multiplies. It is given the pairs of a token and one of its experts as if each were a token that
is sent to this expert alone, so that no sum is taken in it; what experts put out is weighted and added up here, in the
order in which the module would.

Letters: E experts, T tokens, K experts per token, P pairs of a token and an expert, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

Order = Literal["slot", "expert"]
"""How a token's experts are added up: in the order of its K slots at once, or expert by expert, the lowest first."""


@dataclass(frozen=True)
class ExpertsCall:
    """What a module of experts is called with.

    Attributes:
        hidden_states: Shape `(T, H)`.
        index: Experts of each token. Shape `(T, K)`.
        weights: What their outputs are multiplied by. Shape `(T, K)`.
    """

    hidden_states: Tensor
    index: Tensor
    weights: Tensor

    def detached(self) -> ExpertsCall:
        """The same, without its graph."""
        return ExpertsCall(self.hidden_states.detach(), self.index.detach(), self.weights.detach())

    def no_outputs(self) -> Tensor:
        """Room for what the experts put out. Shape `(T, K, H)`."""
        return self.hidden_states.new_zeros(*self.index.shape, self.hidden_states.shape[-1])


def addition_order(implementation: str | None) -> Order | None:
    """The order of one of transformers' ways to run experts; None where it is not known."""
    match implementation:
        case "grouped_mm" | "batched_mm":
            return "slot"
        case "eager" | None:
            return "expert"
        case _:
            return None


def experts_with_tokens(calls: Iterable[ExpertsCall], num_experts: int) -> list[int]:
    """The experts to which any of the calls sends a token, rising; classes that compute nothing are left out."""
    found = {int(expert_idx) for call in calls for expert_idx in call.index.unique()}
    return sorted(expert_idx for expert_idx in found if 0 <= expert_idx < num_experts)


@torch.no_grad()
def run_block(
    experts: nn.Module, call: ExpertsCall, expert_indices: Sequence[int], outputs: Tensor, *, order: Order
) -> None:
    """Put what some of the experts make of their tokens, unweighted, into the outputs of all.

    Args:
        experts: Holds these experts alone.
        call: Of the module that holds all.
        expert_indices: Their indices there, rising.
        outputs: Shape `(T, K, H)`.
        order: Of the pairs that an expert multiplies at once, which is part of how a product is rounded.
    """
    some = torch.as_tensor(expert_indices, device=call.index.device)
    place = torch.searchsorted(some, call.index.long().contiguous()).clamp_(max=len(some) - 1)  # (T, K)
    # Where an expert's tokens are added one expert after the other, they lie slot by slot; else token by token.
    is_here = some[place] == call.index
    if order == "expert":
        slot, token = is_here.T.nonzero(as_tuple=True)  # (P,) each
    else:
        token, slot = is_here.nonzero(as_tuple=True)
    if len(token):
        inputs = call.hidden_states[token]  # (P, H)
        outputs[token, slot] = cast(
            Tensor, experts.forward(inputs, place[token, slot, None], inputs.new_ones(len(token), 1))
        )


def add_up(call: ExpertsCall, outputs: Tensor, *, order: Order) -> Tensor:
    """The output of a module of experts.

    Args:
        call: Autograd reaches its weights.
        outputs: Of each token's experts, unweighted. Shape `(T, K, H)`.
        order: In which the module adds them up.

    Returns:
        Shape `(T, H)`.
    """
    if order == "slot":
        weighted = outputs.flatten(0, 1) * call.weights.reshape(-1).unsqueeze(-1)  # (T * K, H)
        return weighted.view(outputs.shape).sum(dim=1).to(call.hidden_states.dtype)
    total = torch.zeros_like(call.hidden_states)
    for expert_idx in call.index.unique():
        slot, token = (call.index == expert_idx).T.nonzero(as_tuple=True)
        weighted = outputs[token, slot] * call.weights[token, slot, None]
        total.index_add_(0, token, weighted.to(total.dtype))
    return total
