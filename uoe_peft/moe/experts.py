"""How an experts module stores its experts, and what one of them computes.

Letters: E experts, M of them edited, T tokens, N of them routed to one expert, K experts per token, H hidden size,
I expert intermediate size.

Three ways of storing experts are known, each found by its structure and never by a family's name:

| layout | storage of a projection |
|---|---|
| stacked | one 3-D parameter of shape `(E, out, in)`, or `(E, in, out)` where the module says `is_transposed` |
| flattened | one 2-D parameter of shape `(E * I, H)` in an inner module (dbrx) |
| listed | an `nn.ModuleList` or `nn.ModuleDict` of MLPs that hold `nn.Linear` modules |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from uoe_peft.moe.storage import (
    ExpertStorage,
    RoutedTokens,
    check_whole,
    one_of_stack,
    plain,
    shallow_copy,
    substituted,
)


class StackedExperts(ExpertStorage):
    """Experts as 3-D parameters: the contract of `transformers`' `use_experts_implementation`."""

    def __init__(self, module: nn.Module) -> None:
        self._up_name = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
        up, down = cast(Tensor, getattr(module, self._up_name)), cast(Tensor, module.down_proj)
        super().__init__(module, num_experts=down.shape[0])
        # Modules outside the contract carry no flag: there the hidden size is the dimension that both stacks share.
        shapes_say_transposed = down.shape[2] == up.shape[1] and down.shape[1] != up.shape[2]
        self._transposed = bool(getattr(module, "is_transposed", shapes_say_transposed))

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the module owns the stacks of this layout; shared experts may be stacked too, in three parts."""
        stacks = {name for name, p in module._parameters.items() if p is not None and p.dim() == 3}
        up_names = stacks & {"gate_up_proj", "up_proj", "gate_proj"}
        return "down_proj" in stacks and up_names in ({"gate_up_proj"}, {"up_proj"})

    @property
    @override
    def projections(self) -> tuple[str, ...]:
        return self._up_name, "down_proj"

    @override
    def parameter(self, projection: str, expert_idx: int) -> Tensor:
        return cast(Tensor, getattr(self.module, projection))

    @override
    def shape(self, projection: str) -> tuple[int, int]:
        _, rows, columns = self.parameter(projection, 0).shape
        return rows, columns

    @override
    def weight(self, projection: str, expert_idx: int) -> Tensor:
        stack = self.parameter(projection, expert_idx)
        check_whole(stack)
        return plain(stack[expert_idx])

    @override
    def is_transposed(self, projection: str) -> bool:
        return self._transposed

    @override
    def gathered(self, expert_idx: int) -> StackedExperts:
        own = shallow_copy(self.module)
        own._parameters = {
            name: p if p is None else nn.Parameter(one_of_stack(p.detach(), expert_idx)[None], requires_grad=False)
            for name, p in self.module._parameters.items()
        }
        return StackedExperts(own)

    @property
    @override
    def weight_attributes(self) -> tuple[str, ...]:
        return self.projections

    @property
    @override
    def has_output_bias(self) -> bool:
        norm = getattr(self.module, "post_expert_norm", None)
        biases = (getattr(self.module, "down_proj_bias", None), getattr(norm, "bias", None))
        return any(bias is not None for bias in biases)

    @override
    def forward_expert(self, hidden_states: Tensor, expert_idx: int, weights: Mapping[str, Tensor]) -> Tensor:
        hidden = self._linear(hidden_states, self._up_name, expert_idx, weights)  # (N, 2I) or (N, I)
        hidden = self._activate(hidden)  # (N, I)
        hidden = self._linear(hidden, "down_proj", expert_idx, weights)  # (N, H)
        if getattr(self.module, "has_post_expert_norm", False):
            hidden = cast(nn.Module, self.module.post_expert_norm)(hidden)
        return hidden

    @override
    def num_tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        rows = super().num_tokens(args, kwargs)
        return rows if len(args) + len(kwargs) > 1 else rows // self.num_experts

    @override
    def routed_tokens(self, expert_idx: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutedTokens:
        if len(args) + len(kwargs) > 1:
            return super().routed_tokens(expert_idx, args, kwargs)
        # Dense contract (llama4): one input of shape (E * T, H) holds all tokens for every expert in turn, already
        # weighted, and zero where a token is not routed to the expert.
        (hidden_states,) = (*args, *kwargs.values())
        num_tokens = self.num_tokens(args, kwargs)
        own = hidden_states[expert_idx * num_tokens : (expert_idx + 1) * num_tokens]  # (T, H)
        every = torch.arange(num_tokens, device=own.device)
        token = every if torch.compiler.is_compiling() else every[own.any(dim=-1)]  # (N,)
        return RoutedTokens(token, token + expert_idx * num_tokens, own[token], own.new_ones(len(token), 1))

    def _linear(self, x: Tensor, projection: str, expert_idx: int, weights: Mapping[str, Tensor]) -> Tensor:
        weight = weights[projection].transpose(0, 1) if self._transposed else weights[projection]
        bias = getattr(self.module, f"{projection}_bias", None)
        return F.linear(x, weight, None if bias is None else bias[expert_idx])

    def _activate(self, hidden: Tensor) -> Tensor:
        act_fn = getattr(self.module, "act_fn", None)
        if self._up_name == "up_proj":
            return cast(Tensor, cast(nn.Module, act_fn)(hidden))
        if hasattr(self.module, "_apply_gate"):
            return cast(Tensor, self.module._apply_gate(hidden))  # type: ignore[operator]
        gate, up = hidden.chunk(2, dim=-1)
        return cast(Tensor, cast(nn.Module, act_fn)(gate) * up)


class FlattenedExperts(ExpertStorage):
    """Experts as row blocks of 2-D parameters in `module.mlp`, which takes the blocks as arguments (dbrx)."""

    _NAMES = ("w1", "v1", "w2")  # the argument order of the inner module's forward

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, num_experts=cast(int, module.num_experts))
        self._mlp = cast(nn.Module, module.mlp)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the module has an inner module with the three flattened parameters."""
        mlp = module._modules.get("mlp")
        return (
            mlp is not None
            and hasattr(module, "num_experts")
            and all(name in mlp._parameters for name in FlattenedExperts._NAMES)
        )

    @property
    @override
    def projections(self) -> tuple[str, ...]:
        return self._NAMES

    @override
    def parameter(self, projection: str, expert_idx: int) -> Tensor:
        return cast(Tensor, getattr(self._mlp, projection))  # (E * I, H)

    @override
    def shape(self, projection: str) -> tuple[int, int]:
        rows, columns = self.parameter(projection, 0).shape
        return rows // self.num_experts, columns

    @override
    def weight(self, projection: str, expert_idx: int) -> Tensor:
        flat = plain(self.parameter(projection, expert_idx))
        return flat.view(self.num_experts, -1, flat.shape[-1])[expert_idx]  # (I, H)

    @override
    def is_transposed(self, projection: str) -> bool:
        return projection == "w2"  # (I, H) maps I to H, unlike w1 and v1

    @property
    @override
    def weight_attributes(self) -> tuple[str, ...]:
        return ("mlp",)

    @override
    def forward_expert(self, hidden_states: Tensor, expert_idx: int, weights: Mapping[str, Tensor]) -> Tensor:
        w1, v1, w2 = (weights[name] for name in self._NAMES)
        return cast(Tensor, self._mlp(hidden_states, w1, v1, w2))


class ListedExperts(ExpertStorage):
    """Experts as separate MLP modules: remote code, older checkpoints, layers quantised expert by expert."""

    def __init__(self, module: nn.Module) -> None:
        by_name = _listed_experts(module)
        self._experts = list(by_name.values())
        self._child_names = list(by_name)
        super().__init__(module, num_experts=len(self._experts))
        linear = (name for name, m in self._experts[0].named_modules() if isinstance(m, nn.Linear))
        self._names = tuple(name.removesuffix(".base_layer") for name in linear)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the module lists two or more modules of one class that hold two or three linear layers each."""
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return False
        experts = list(_listed_experts(module).values())
        if len(experts) < 2 or len({type(expert) for expert in experts}) > 1:
            return False
        return 2 <= sum(isinstance(m, nn.Linear) for m in experts[0].modules()) <= 3

    @property
    @override
    def projections(self) -> tuple[str, ...]:
        return self._names

    def linear_name(self, projection: str, expert_idx: int) -> str:
        """Path of an expert's linear module inside the list."""
        return f"{self._child_names[expert_idx]}.{projection}"

    @override
    def parameter(self, projection: str, expert_idx: int) -> Tensor:
        return cast(Tensor, unwrap(self._experts[expert_idx].get_submodule(projection)).weight)

    @override
    def shape(self, projection: str) -> tuple[int, int]:
        linear = cast(nn.Linear, unwrap(self._experts[0].get_submodule(projection)))
        return linear.out_features, linear.in_features  # of the matrix: quantised weights may be packed

    @override
    def weight(self, projection: str, expert_idx: int) -> Tensor:
        return plain(self.parameter(projection, expert_idx))

    @property
    @override
    def has_output_bias(self) -> bool:
        return unwrap(self._experts[0].get_submodule(self._names[-1])).bias is not None

    @override
    def forward_expert(self, hidden_states: Tensor, expert_idx: int, weights: Mapping[str, Tensor]) -> Tensor:
        expert = self._experts[expert_idx]
        for name, weight in weights.items():
            expert = substituted(expert, f"{name}.weight", weight)
        return cast(Tensor, expert(hidden_states))


def _listed_experts(module: nn.Module) -> dict[str, nn.Module]:
    """The children that can be experts, unwrapped: a list may hold a dropout, too."""
    children = {name: unwrap(child) for name, child in module.named_children()}
    return {name: child for name, child in children.items() if any(isinstance(m, nn.Linear) for m in child.modules())}


def unwrap(module: nn.Module) -> nn.Module:
    """The module under any adapter wrappers (PEFT keeps what it wraps in `base_layer`)."""
    while "base_layer" in module._modules:
        module = module.get_submodule("base_layer")
    return module


def expert_storage(module: nn.Module) -> ExpertStorage | None:
    """The storage of an experts module, or None if the module holds no experts that can be told apart."""
    for storage in (StackedExperts, FlattenedExperts, ListedExperts):
        if storage.fits(module):
            return storage(module)
    return None
