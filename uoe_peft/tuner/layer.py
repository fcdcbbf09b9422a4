"""The layers that UOE puts on experts: stacked in one module, or modules of their own.

Letters: E experts of a layer, T tokens, N of them routed to one expert, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uoe_peft.moe import ExpertStorage, RoutedTokens, expert_storage, is_quantised, plain
from uoe_peft.tuner.config import UOEConfig
from uoe_peft.tuner.delta import SliceKey
from uoe_peft.tuner.merging import UOELayer


class UOEExpertsLayer(UOELayer):
    """Deltas of experts that are stored stacked in one module.

    The wrapped module runs untouched, with whatever kernel the model uses; then the tokens routed to an edited expert
    get the difference that the deltas make: `y[t] += weight[t] * (FFN(h[t]; W + delta) - FFN(h[t]; W))`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self._gathered: dict[int, ExpertStorage] = {}  # of sharded stacks: the experts that are edited, whole

    def update_layer(self, adapter_name: str, config: UOEConfig, *, indices: Sequence[int], **kwargs: Any) -> None:
        """Add an adapter, as in the base class; of sharded stacks its experts are fetched first, once for all passes.

        Fetched when it is needed, a process whose tokens miss the expert would leave the others waiting.
        """
        storage = self.storage
        if storage.is_sharded:
            self._gathered |= {i: storage.gathered(i) for i in indices if i not in self._gathered}
        super().update_layer(adapter_name, config, indices=indices, **kwargs)

    def _holding(self, index: int) -> tuple[ExpertStorage, int]:
        """What holds an expert's weights in this process, and the expert's index there."""
        own = self._gathered.get(index)
        return (self.storage, index) if own is None else (own, 0)

    @property
    def storage(self) -> ExpertStorage:
        """Access to the wrapped module's experts, whichever module that is now."""
        storage = expert_storage(self.get_base_layer())
        assert storage is not None
        return storage

    def _read(self, base_layer: nn.Module, name: str) -> Any:
        if name in self.storage.weight_attributes and self.applied_adapters():
            raise RuntimeError(
                f"{name} of {type(base_layer).__name__} was read past the adapters {self.applied_adapters()}, whose "
                "deltas are added where the module is called: a kernel that takes the weights themselves (as with "
                "use_kernels=True) would forget nothing. Call merge_adapter() first, or load the model without such "
                "kernels; read the base's weights from get_base_layer()"
            )
        return super()._read(base_layer, name)

    def base_parameter(self, projection: str, index: int) -> Tensor:
        """The stack of all experts' matrices."""
        return self.storage.parameter(projection, index)

    def base_slice(self, projection: str, index: int) -> Tensor:
        """One expert's matrix as it lies in memory."""
        storage, own = self._holding(index)
        return storage.weight(projection, own)

    def slice_shape(self, projection: str, index: int) -> tuple[int, int]:
        """Rows and columns of an expert's matrix."""
        return self.storage.shape(projection)

    def is_transposed(self, projection: str) -> bool:
        """Whether the module stores `(in, out)` rather than `(out, in)`."""
        return self.storage.is_transposed(projection)

    def _cancel_last_projection(self, adapter_name: str) -> None:
        deltas = cast(nn.ParameterDict, self.uoe_delta[adapter_name])
        projection = self.storage.projections[-1]
        slices = [self.original_slice((projection, index)) for index in self.target_indices[adapter_name]]
        deltas[projection].copy_(torch.stack(slices).neg())

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The experts' output, corrected at the tokens that are routed to an edited expert."""
        groups = self.applied_groups(adapter_names)
        result = cast(Tensor, self.base_layer(*args, **kwargs))
        if not groups:
            return result
        storage = self.storage
        for group in groups:
            keys = self.edited_keys(group.adapters)
            for index in sorted({index for _, index in keys}):
                tokens = storage.routed_tokens(index, args, kwargs)
                if group.samples is not None:
                    num_tokens = storage.num_tokens(args, kwargs)
                    tokens = _of_samples(tokens, group.mask(num_tokens, tokens.token.device))
                # Under autograd the path runs without tokens, too: data-parallel training waits for every gradient.
                if len(tokens.token) or torch.is_grad_enabled():
                    result = self._add_correction(result, index, tokens, keys)
        return result

    def _add_correction(
        self, result: Tensor, index: int, tokens: RoutedTokens, keys: Mapping[SliceKey, list[str]]
    ) -> Tensor:
        """The experts' output with one expert's outputs computed from edited matrices."""
        storage, own = self._holding(index)
        base = {projection: storage.weight(projection, own) for projection in storage.projections}
        edited = {key[0]: self.edited_slice(key, adapters) for key, adapters in keys.items() if key[1] == index}
        after = storage.forward_expert(tokens.hidden_states, own, {**base, **edited})  # (N, H)
        before = storage.forward_expert(tokens.hidden_states, own, base)  # (N, H)
        correction = (tokens.weight * (after - before)).to(result.dtype)
        flat = result.reshape(-1, result.shape[-1])
        return flat.index_add(0, tokens.row, correction).view_as(result)


def _of_samples(tokens: RoutedTokens, mask: Tensor) -> RoutedTokens:
    """Only the tokens of certain samples. Args: mask: whether each of the batch's T tokens counts. Shape `(T,)`."""
    keep = mask[tokens.token]
    return replace(
        tokens,
        token=tokens.token[keep],
        row=tokens.row[keep],
        hidden_states=tokens.hidden_states[keep],
        weight=tokens.weight[keep],
    )


class UOELinearLayer(UOELayer):
    """The delta of a linear module, where an expert is a module of its own: `y = W x + delta x`.

    The wrapped module is called as it is, so that it may be quantised in any form.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, writes_output: bool) -> None:
        """Wrap a linear module.

        Args:
            base_layer: The module.
            adapter_name: Name of the first adapter.
            writes_output: Whether its output is the expert's.
        """
        super().__init__(base_layer, adapter_name)
        self.writes_output = writes_output

    def base_parameter(self, projection: str, index: int) -> Tensor:
        """The module's weight; there is one slice, whatever the index."""
        return cast(Tensor, self.get_base_layer().weight)

    def base_slice(self, projection: str, index: int) -> Tensor:
        """The module's weight, dequantised where it can be."""
        return plain(self.base_parameter(projection, index))

    def slice_shape(self, projection: str, index: int) -> tuple[int, int]:
        """Of the matrix that the weight stands for: quantised weights are packed."""
        base = cast(nn.Linear, self.get_base_layer())
        return base.out_features, base.in_features

    def _cancel_last_projection(self, adapter_name: str) -> None:
        if self.writes_output:
            for projection, delta in cast(nn.ParameterDict, self.uoe_delta[adapter_name]).items():
                delta[0].copy_(self.original_slice((projection, self.target_indices[adapter_name][0])).neg())

    @property
    def weight(self) -> Tensor:
        """The module's weight, edited: experts may multiply with it themselves. A quantised one is the base's."""
        base = super().weight
        keys = {} if is_quantised(base) else self.edited_keys(self.applied_adapters())
        return next((self.edited_slice(key, adapters) for key, adapters in keys.items()), base)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The module's output with the deltas' added."""
        groups = self.applied_groups(adapter_names)
        result = cast(Tensor, self.base_layer(x, *args, **kwargs))
        for group in groups:
            if group.samples is not None:
                raise ValueError(
                    "adapter_names is not supported where experts are separate modules: an expert does not see which "
                    "sample its tokens are of"
                )
            for (projection, index), adapters in self.edited_keys(group.adapters).items():
                for adapter_name in adapters:
                    delta = self.get_delta_weight(adapter_name, projection, index)
                    result = result + F.linear(x.to(delta.dtype), delta).to(result.dtype)
        return result
