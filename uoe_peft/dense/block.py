"""A dense feed-forward layer whose neurons are in groups, in the form of a Mixture-of-Experts block.

Letters: T tokens, H hidden size, I neurons, E groups of i = I / E neurons.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from uoe_peft.dense.layers import PROJECTIONS


class GroupedExperts(nn.Module):
    """The groups, stacked as transformers stacks experts: `gate_up_proj (E, H, 2i)` and `down_proj (E, i, H)`.

    In this orientation the down projections of all groups lie in memory as one matrix, so that the sum over all neurons
    is one product, rounded once, as in the dense layer.

    Args:
        mlp: The dense layer.
        neurons: The neurons of each group. Shape `(E, i)`.
        fingerprint: Of the layer's groups; an adapter remembers it.
    """

    is_transposed = True

    def __init__(self, mlp: nn.Module, neurons: Tensor, *, fingerprint: str) -> None:
        super().__init__()
        gate, up, down = (cast(nn.Linear, mlp.get_submodule(name)) for name in PROJECTIONS)
        self.num_experts = len(neurons)
        self.neurons_fingerprint = fingerprint
        self.act_fn = cast(Any, mlp).act_fn
        with torch.no_grad():
            neurons = neurons.to(down.weight.device)
            # Rows of gate and up: (I, H) -> (E, H, i) each, side by side.
            stacks = [linear.weight[neurons].transpose(1, 2) for linear in (gate, up)]
            self.gate_up_proj = _as_parameter(torch.cat(stacks, dim=2), like=gate.weight)
            self.down_proj = _as_parameter(down.weight.T[neurons].contiguous(), like=down.weight)
            if gate.bias is not None:
                biases = torch.cat([gate.bias[neurons], up.bias[neurons]], dim=1)
                self.gate_up_proj_bias = _as_parameter(biases, like=gate.bias)  # (E, 2i)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the groups' outputs. Shapes `(T, H)`, `(T, K)`, `(T, K)` to `(T, H)`."""
        weights = top_k_weights.new_zeros(len(hidden_states), self.num_experts)
        weights = weights.scatter(1, top_k_index, top_k_weights)  # (T, E)
        neurons = self._activations(hidden_states) * weights.T.unsqueeze(-1)  # (E, T, i)
        return neurons.transpose(0, 1).flatten(1) @ self.down_proj.flatten(0, 1)

    def shares(self, hidden_states: Tensor) -> Tensor:
        """How much of what the layer computes for a token comes from each group: the router's scores of this block.

        The sum over a group's neurons of `|activation| * norm(what the neuron writes)`, over that of all neurons.

        Args:
            hidden_states: Inputs of the layer. Shape `(T, H)`.

        Returns:
            Shape `(T, E)`, float32, sum 1 over the groups; 0 for a token that no neuron is active for.
        """
        norms = self.down_proj.detach().float().norm(dim=2)  # (E, i)
        neurons = self._activations(hidden_states).float().abs()  # (E, T, i)
        effect = torch.einsum("eti,ei->te", neurons, norms)
        return effect / effect.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    def _activations(self, hidden_states: Tensor) -> Tensor:
        """Activations of all neurons. Shape `(E, T, i)`."""
        products = hidden_states @ self.gate_up_proj  # (E, T, 2i)
        if hasattr(self, "gate_up_proj_bias"):
            products = products + self.gate_up_proj_bias.unsqueeze(1)
        gate, up = products.chunk(2, dim=-1)
        return cast(Tensor, self.act_fn(gate) * up)


class AllGroups(nn.Module):
    """Stands where a router stands: every token uses every group with weight 1, and there is nothing to decide."""

    uses_all_experts = True

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.num_experts, self.hidden_size = num_experts, hidden_size

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`top_k_index` and `top_k_weights`, shape `(T, E)` each."""
        index = torch.arange(self.num_experts, device=hidden_states.device).expand(len(hidden_states), -1)
        return index, hidden_states.new_ones(index.shape)


class GroupedMLP(nn.Module):
    """A dense feed-forward layer as a block of groups; it computes the same, up to rounding.

    Args:
        mlp: The dense layer. Its weights move into the groups, and back by :meth:`dense`.
        neurons: The neurons of each group. Shape `(E, i)`.
        fingerprint: Of the layer's groups.
    """

    def __init__(self, mlp: nn.Module, neurons: Tensor, *, fingerprint: str) -> None:
        super().__init__()
        down = cast(nn.Linear, mlp.get_submodule("down_proj"))
        self.router = AllGroups(len(neurons), down.out_features)
        self.experts = GroupedExperts(mlp, neurons, fingerprint=fingerprint)
        self.bias = down.bias  # of the whole output, so of no group
        self.neurons = neurons  # no buffer: of a model without weights it is needed, too
        self.train(mlp.training)
        # In a tuple, so that it is no part of the model meanwhile: it has no weights.
        self._emptied = (mlp,)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shape `(..., H)` to `(..., H)`."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        index, weights = self.router(flat)
        out = self.experts(flat, index, weights).view(hidden_states.shape)
        return cast(Tensor, out if self.bias is None else out + self.bias)

    def empty_dense(self) -> None:
        """Let go of the dense layer's weights, which the groups hold now."""
        for name in PROJECTIONS:
            linear = cast(nn.Linear, self._emptied[0].get_submodule(name))
            linear.weight = _on_meta(linear.weight)
            linear.bias = None if linear.bias is None else _on_meta(linear.bias)

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """The dense layer with the groups' weights, every neuron in its place."""
        (mlp,), experts = self._emptied, self.experts
        order = self.neurons.flatten().to(experts.down_proj.device)
        gate, up = experts.gate_up_proj.chunk(2, dim=2)  # (E, H, i) each
        rows = {
            "gate_proj": gate.transpose(1, 2).flatten(0, 1),
            "up_proj": up.transpose(1, 2).flatten(0, 1),
            "down_proj": experts.down_proj.flatten(0, 1),
        }
        for name, grouped in rows.items():
            weight = torch.empty_like(grouped).index_copy_(0, order, grouped)  # (I, H)
            weight = weight.T.contiguous() if name == "down_proj" else weight
            source = experts.down_proj if name == "down_proj" else experts.gate_up_proj
            cast(nn.Linear, mlp.get_submodule(name)).weight = _as_parameter(weight, like=source)
        if hasattr(experts, "gate_up_proj_bias"):
            for name, part in zip(PROJECTIONS, experts.gate_up_proj_bias.chunk(2, dim=1), strict=False):
                bias = torch.empty_like(part.flatten()).index_copy_(0, order, part.flatten())
                cast(nn.Linear, mlp.get_submodule(name)).bias = _as_parameter(bias, like=experts.gate_up_proj_bias)
        cast(nn.Linear, mlp.get_submodule("down_proj")).bias = self.bias
        mlp.train(self.training)
        return mlp


def _as_parameter(values: Tensor, *, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=like.requires_grad)


def _on_meta(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
