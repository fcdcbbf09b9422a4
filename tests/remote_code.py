"""A small model as remote code writes it: every expert is a module of its own, in a list beside its router."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

RouterKind = Literal["module", "linear"]


class ListedConfig(PreTrainedConfig):
    model_type = "listed"

    router_kind: str = "module"
    vocab_size: int = 100
    hidden_size: int = 32
    moe_intermediate_size: int = 24
    shared_intermediate_size: int = 40
    num_hidden_layers: int = 3
    num_experts: int = 6
    num_experts_per_tok: int = 2


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """The router as a module: returns indices, weights and an auxiliary loss, in DeepSeek's order."""

    def __init__(self, config: ListedConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, None]:
        scores = F.linear(hidden_states.flatten(0, -2), self.weight).softmax(dim=-1)
        weights, index = scores.topk(self.top_k, dim=-1, sorted=False)
        return index, weights, None


class ListedMoe(nn.Module):
    def __init__(self, config: ListedConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        hidden_size = config.hidden_size
        self.experts = nn.ModuleList(Mlp(hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts))
        self.router_kind = config.router_kind
        linear = nn.Linear(hidden_size, config.num_experts, bias=False)
        self.gate = linear if self.router_kind == "linear" else Gate(config)
        self.shared_experts = Mlp(hidden_size, config.shared_intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.flatten(0, -2)  # (T, H)
        index, weights = self._route(flat)
        out = torch.zeros_like(flat)
        for expert_idx, expert in enumerate(self.experts):
            token, position = torch.where(index == expert_idx)
            out = out.index_add(0, token, expert(flat[token]) * weights[token, position, None])
        return (out + self.shared_experts(flat)).view_as(hidden_states)

    def _route(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        if self.router_kind == "module":
            index, weights, _ = self.gate(flat)
            return index, weights
        weights, index = self.gate(flat).softmax(dim=-1).topk(self.top_k, dim=-1)
        return index, weights


class ListedLayer(nn.Module):
    def __init__(self, config: ListedConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size)
        self.mlp = ListedMoe(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mlp(self.norm(hidden_states))


class ListedModel(nn.Module):
    def __init__(self, config: ListedConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ListedLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class ListedForCausalLM(PreTrainedModel):
    config_class = ListedConfig

    def __init__(self, config: ListedConfig) -> None:
        super().__init__(config)
        self.model = ListedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)))


def listed_model(router_kind: RouterKind) -> ListedForCausalLM:
    """The model with its router as a module, or as a linear layer whose top-k the block takes."""
    return ListedForCausalLM(ListedConfig(router_kind=router_kind))
