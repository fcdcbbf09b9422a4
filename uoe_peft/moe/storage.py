"""Access to single weights: those of one expert, whatever stores them, and one parameter of any module.

Letters: E experts, T tokens, N of them routed to one expert, K experts per token, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from uoe_peft.errors import UnsupportedModelError


@dataclass(frozen=True)
class RoutedTokens:
    """The tokens of one call of an experts module that are routed to one expert.

    While a graph is compiled, N is T and tokens of other experts have weight 0: shapes must not depend on the data.

    Attributes:
        token: Index of each such token in the batch, flattened to T tokens. Shape `(N,)`.
        row: Row of each such token in the call's output, flattened to `(rows, H)`. Shape `(N,)`.
        hidden_states: The expert's inputs. Shape `(N, H)`.
        weight: What the call multiplies the expert's outputs by. Shape `(N, 1)`.
    """

    token: Tensor
    row: Tensor
    hidden_states: Tensor
    weight: Tensor


class ExpertStorage(ABC):
    """Read and write access to single experts of one experts module."""

    def __init__(self, module: nn.Module, *, num_experts: int) -> None:
        self.module = module
        self.num_experts = num_experts

    @property
    @abstractmethod
    def projections(self) -> tuple[str, ...]:
        """Names of the weight matrices that every expert has, in the order in which they are applied."""

    @abstractmethod
    def parameter(self, projection: str, expert_idx: int) -> Tensor:
        """The stored parameter that holds one expert's matrix, with other experts' where they are stacked."""

    @abstractmethod
    def shape(self, projection: str) -> tuple[int, int]:
        """Rows and columns of a projection's matrix, the same for every expert."""

    @abstractmethod
    def weight(self, projection: str, expert_idx: int) -> Tensor:
        """The matrix of one expert as it lies in memory: a view, so that writing to it edits the model.

        Of a quantised parameter it is a dequantised copy, see :func:`plain`.
        """

    @abstractmethod
    def forward_expert(self, hidden_states: Tensor, expert_idx: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Output of one expert computed with other matrices than its own.

        Args:
            hidden_states: Inputs of the expert. Shape `(N, H)`.
            expert_idx: Which expert's biases and constants to use.
            weights: A matrix for each projection, in the layout of :meth:`weight`.

        Returns:
            Unweighted outputs. Shape `(N, H)`.
        """

    @property
    def is_sharded(self) -> bool:
        """Whether no process has the experts' weights as they are: FSDP, tensor or expert parallelism."""
        return any(isinstance(parameter, DTensor) for parameter in self.module.parameters())

    def gathered(self, expert_idx: int) -> ExpertStorage:
        """A copy of one expert, its only one, brought together from the processes that hold parts of it.

        Only this expert is sent, not the stack. All processes must come here together.

        Raises:
            UnsupportedModelError: Experts are stored in another way than as stacks of matrices.
        """
        raise UnsupportedModelError(
            f"the experts of a {type(self.module).__name__} are sharded over processes and not stacked, so that one of "
            "them cannot be fetched; add the adapter before they are sharded, as the Trainer's FSDP version 2 allows"
        )

    @property
    def weight_attributes(self) -> tuple[str, ...]:
        """Attributes of the module through which the weights of its experts can be read."""
        return ()

    @property
    def has_output_bias(self) -> bool:
        """Whether an expert puts out something where its last matrix is zero."""
        return False

    def is_transposed(self, projection: str) -> bool:
        """Whether :meth:`weight` has shape `(in, out)` rather than `(out, in)`."""
        return False

    def num_tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Number of tokens, T, in the batch of a call `module(*args, **kwargs)`."""
        hidden_states = next(iter((*args, *kwargs.values())))
        return int(hidden_states.shape[:-1].numel())

    def routed_tokens(self, expert_idx: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutedTokens:
        """The tokens that a call `module(*args, **kwargs)` sends to one expert.

        The contract is `(hidden_states, top_k_index, top_k_weights)`: shapes `(T, H)`, `(T, K)`, `(T, K)`.
        """
        hidden_states, top_k_index, top_k_weights = (*args, *kwargs.values())
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        if torch.compiler.is_compiling():
            every = torch.arange(flat.shape[0], device=flat.device)
            weight = torch.where(top_k_index == expert_idx, top_k_weights, 0).sum(dim=-1, keepdim=True)  # (T, 1)
            return RoutedTokens(every, every, flat, weight)
        token, position = torch.where(top_k_index == expert_idx)
        return RoutedTokens(token, token, flat[token], top_k_weights[token, position].unsqueeze(-1))


def one_of_stack(stack: Tensor, index: int) -> Tensor:
    """One slice of a tensor along its first dimension, a view; of a sharded tensor, a copy made of its parts.

    Only the slice is sent. All processes that hold parts must come here together.

    Args:
        stack: Any tensor. Shape `(E, *slice)`.
        index: Which slice.

    Returns:
        Shape `slice`.
    """
    if not isinstance(stack, DTensor):
        return stack[index]
    mesh, local, shape = stack.device_mesh, stack.to_local(), stack.shape[1:]
    over_stack = [_sharded_dim(p, stack.dim()) == 0 for p in stack.placements]
    rows = torch.arange(len(stack), device=local.device)
    placements = [p if here else Replicate() for p, here in zip(stack.placements, over_stack, strict=True)]
    # Which slices lie in this process: nothing is sent, since every process makes the same numbers.
    own = distribute_tensor(rows, mesh, placements, src_data_rank=None).to_local()
    held = (own == index).nonzero().flatten().tolist()
    part = local[held[0]] if held else local.new_zeros(local.shape[1:])
    parts = [Partial() if here else _below(p) for p, here in zip(stack.placements, over_stack, strict=True)]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part.contiguous(), mesh, parts, run_check=False, shape=shape, stride=stride).full_tensor()


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module that shares everything with another; of one that FSDP2 gave a class of its own, in the class it had."""
    own_class = type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)
    own = cast(nn.Module, object.__new__(own_class))
    own.__dict__.update(vars(module))
    return own


def _sharded_dim(placement: Any, num_dims: int) -> int | None:
    dim = getattr(placement, "dim", None)
    return None if dim is None else dim % num_dims


def _below(placement: Any) -> Any:
    """How a slice is split where the stack is split in this way, along another dimension than the first."""
    dim = getattr(placement, "dim", None)
    if dim is None or dim < 0:
        return placement
    if hasattr(placement, "split_factor"):  # halves of a fused matrix, each split by itself
        return type(placement)(dim - 1, split_factor=placement.split_factor)
    return Shard(dim - 1)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is stored in fewer bits than it is computed with."""
    has_own_dequantize = type(weight).dequantize is not Tensor.dequantize
    return has_own_dequantize or not weight.is_floating_point() or weight.dtype.itemsize == 1


def check_whole(weight: Tensor) -> None:
    """Refuse a weight that is split over processes where a forward pass reads it.

    Raises:
        UnsupportedModelError: It is split.
    """
    if isinstance(weight, DTensor):
        raise UnsupportedModelError(
            "expert or router weights are sharded where an edit reads them: FSDP must shard whole decoder layers, not "
            "the modules inside them; name the decoder layer's class as transformer_layer_cls_to_wrap in fsdp_config"
        )


def plain(weight: Tensor) -> Tensor:
    """A weight that can be added to: the weight itself, or a dequantised copy of it.

    Raises:
        UnsupportedModelError: The weight is split over processes, or quantised in a form that needs more than itself to
            be read.
    """
    check_whole(weight)
    if not is_quantised(weight):
        return weight
    if type(weight).dequantize is Tensor.dequantize:
        raise UnsupportedModelError(
            f"expert or router weights are stored as {weight.dtype}, with their scales elsewhere; load the model in "
            "bfloat16, or with dequantize=True where its quantization config has it"
        )
    return weight.dequantize()


def substituted(module: nn.Module, name: str, value: Tensor) -> nn.Module:
    """A shallow copy of a module that computes with another tensor in the place of one of its parameters.

    Everything else is shared: other parameters, buffers, hooks. The module itself is never touched, so that threads may
    run it meanwhile; `torch.func.functional_call` would swap the parameter that all of them read.

    Args:
        module: Any module.
        name: Path of the parameter in the module.
        value: What is used instead. Autograd reaches it.

    Raises:
        UnsupportedModelError: The `forward` of the module, or of one on the path, was replaced by a function that holds
            the module itself.
    """
    head, _, rest = name.partition(".")
    own = copy(module)
    own._compiled_call_impl = None  # of `module.compile()`: it would call the module itself
    if rest:
        own._modules = {**module._modules, head: substituted(module.get_submodule(head), rest, value)}
    else:
        own._parameters = {**module._parameters, head: cast(nn.Parameter, value)}
    if "forward" in vars(module):
        _rebind(module, own)
    return own


def _rebind(module: nn.Module, own: nn.Module) -> None:
    """Make methods that were put on a module, as accelerate's hooks are, methods of its copy."""
    for attribute, function in vars(module).items():
        if isinstance(function, MethodType) and function.__self__ is module:
            vars(own)[attribute] = MethodType(function.__func__, own)
        elif isinstance(function, partial) and any(arg is module for arg in function.args):
            args = (own if arg is module else arg for arg in function.args)
            vars(own)[attribute] = partial(function.func, *args, **function.keywords)
        elif attribute == "forward":
            raise UnsupportedModelError(
                f"the forward of a {type(module).__name__} was replaced by {function!r}, which cannot be made to use "
                "edited weights; make it a method of the module (types.MethodType), or merge the adapter"
            )
