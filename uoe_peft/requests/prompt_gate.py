"""Which of many adapters a prompt needs, decided before the first edited layer.

What a prompt looks like there is the mean, over its tokens, of what the router of the lowest edited layer is multiplied
with: attention has mixed the tokens, and no adapter has changed anything yet. Requests and all else are Gaussians with
one shared covariance (a Mahalanobis distance to each mean), so that the log-odds of request i against all else are
linear:

    score_i(x) = (μ_i - μ_0)ᵀ Σ⁻¹ x - (μ_iᵀ Σ⁻¹ μ_i - μ_0ᵀ Σ⁻¹ μ_0) / 2

and a gate is d + 1 numbers a request. That a prompt is told from others by its hidden states is O3's idea
(https://arxiv.org/abs/2407.10223), which keeps a detector and an adapter for each request.

Letters: P prompts, S their padded length, R requests, d size of a router's input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from uoe_peft.checkpoints import read_record
from uoe_peft.data import IGNORE_INDEX, tokenize_dataset
from uoe_peft.data.tokenization import ProcessingClass
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.inputs.routers import record_router_input
from uoe_peft.moe.interventions import run_until_routed
from uoe_peft.moe.routing import select_blocks
from uoe_peft.tuner import UOEConfig

BASE = "__base__"  # PEFT's name for no adapter in a mixed batch
_FORMAT = "uoe_peft.prompt_gate/1"


@dataclass(frozen=True, eq=False)
class PromptGate:
    """A linear gate over what prompts look like below every edit.

    Attributes:
        adapters: Names of the R adapters, one for each request.
        layer_idx: Decoder layer whose router's input is read.
        weight: Shape `(R, d)`, float32.
        bias: Shape `(R,)`, float32.
    """

    adapters: tuple[str, ...]
    layer_idx: int
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        requests: Mapping[str, Dataset],
        other_dataset: Dataset,
        *,
        processing_class: ProcessingClass,
        layer_idx: int | None = None,
        ridge: float = 0.1,
        batch_size: int = 32,
        max_length: int | None = 1024,
    ) -> PromptGate:
        """Learn to tell the prompts of requests from all else: one pass up to a layer, and a solve of d x d.

        Args:
            model: The model, with adapters or without.
            requests: By the name of its adapter, the forget set of each request; its prompts are read.
            other_dataset: Prompts that need no adapter, such as the retain set.
            processing_class: Tokenizer, or a processor that holds one.
            layer_idx: Whose router's input is read; None: that of the lowest layer that an adapter of the model edits,
                without adapters the lowest layer that has experts.
            ridge: Damping of the covariance, > 0, as a share of its mean eigenvalue.
            batch_size: Prompts in a batch.
            max_length: Longest prompt in tokens; None for no limit.

        Raises:
            ValueError: There is no request, one is called like PEFT's base, a set has no row with a prompt, the layer
                lies above an edit, or a number is out of range.
            UnsupportedModelError: The model has no routed experts, or cannot be watched.
        """
        if not requests or BASE in requests:
            raise ValueError(f"requests must name an adapter each, and none {BASE!r}, got {sorted(requests)}")
        if not 0 < ridge < float("inf"):
            raise ValueError(f"ridge must be > 0 and finite, got {ridge}")
        layer_idx = _checked_layer(model, layer_idx)
        sets = {BASE: other_dataset, **requests}
        features = {}
        for name, rows in sets.items():
            prompts = _prompts(rows, processing_class, max_length=max_length, name=name)
            batches = (_padded(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size))
            features[name] = torch.cat([prompt_features(model, layer_idx, *batch).cpu().double() for batch in batches])
        weight, bias = _discriminant(features.pop(BASE), list(features.values()), ridge=ridge)
        return cls(tuple(features), layer_idx, weight.float(), bias.float())

    def scores(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Log-odds of each request against all else.

        Args:
            model: The model that the gate was fitted on, with adapters on or off.
            input_ids: Prompts. Shape `(P, S)`.
            attention_mask: 0 where padding is, on either side. Shape `(P, S)`.

        Returns:
            Shape `(P, R)`, float32, on the CPU.

        Raises:
            ValueError: The gate is of a model of another width, or a prompt has no tokens.
        """
        features = prompt_features(model, self.layer_idx, input_ids, attention_mask).cpu()
        if features.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"the gate is of a model whose routers read {self.weight.shape[1]} numbers, this one's read "
                f"{features.shape[1]}; fit one on this model"
            )
        return features @ self.weight.T + self.bias

    def choose(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, threshold: float = 0.0
    ) -> list[str]:
        """The adapter that each prompt needs, as PEFT's `adapter_names`: the likeliest request, or the base.

        Args:
            model: As in :meth:`scores`.
            input_ids: As in :meth:`scores`.
            attention_mask: As in :meth:`scores`.
            threshold: Log-odds that a request must exceed; higher, and fewer prompts are taken for a request.

        Returns:
            P names, "__base__" where no request's score is above the threshold.
        """
        best, place = self.scores(model, input_ids, attention_mask).max(dim=1)
        return [
            self.adapters[i] if value > threshold else BASE
            for value, i in zip(best.tolist(), place.tolist(), strict=True)
        ]

    def without(self, adapter_name: str) -> PromptGate:
        """The gate with one request withdrawn: its prompts are taken for another request, or for all else.

        Raises:
            ValueError: The gate does not know the adapter, or no other one.
        """
        if adapter_name not in self.adapters:
            raise ValueError(f"the gate knows no adapter {adapter_name!r}; it has {list(self.adapters)}")
        kept = [place for place, name in enumerate(self.adapters) if name != adapter_name]
        if not kept:
            raise ValueError(f"{adapter_name!r} is the gate's only request; without it there is nothing to choose")
        return PromptGate(tuple(self.adapters[i] for i in kept), self.layer_idx, self.weight[kept], self.bias[kept])

    def save(self, path: str | Path) -> None:
        """Write the gate to a safetensors file of `4 R (d + 1)` bytes and a header."""
        header = json.dumps({"adapters": self.adapters, "layer_idx": self.layer_idx})
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        save_file(tensors, str(path), metadata={"format": _FORMAT, "gate": header})

    @classmethod
    def load(cls, path: str | Path) -> PromptGate:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no such file, is truncated, or holds values that are not finite.
        """
        metadata, tensors = read_record(path, kind=_FORMAT, writer="PromptGate.save")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError(f"{path} holds NaN or infinite values; fit the gate again")
        header = json.loads(metadata["gate"])
        return cls(tuple(header["adapters"]), header["layer_idx"], tensors["weight"], tensors["bias"])


def generate_gated(
    model: PeftModel,
    gate: PromptGate,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    threshold: float = 0.0,
    **options: Any,
) -> Tensor:
    """`model.generate` with the adapter that each prompt needs, in one mixed batch.

    Args:
        model: A model with the gate's adapters, in evaluation mode.
        gate: Chooses.
        input_ids: Prompts, padded on the left. Shape `(P, S)`.
        attention_mask: 0 where padding is. Shape `(P, S)`.
        threshold: As in `PromptGate.choose`.
        options: Further arguments of `generate`.

    Returns:
        Prompts and what follows them. Shape `(P, S + new tokens)`.

    Raises:
        ValueError: The model lacks one of the gate's adapters.
    """
    missing = sorted(set(gate.adapters) - set(model.peft_config))
    if missing:
        raise ValueError(f"the gate chooses among adapters that the model lacks: {missing}; load them first")
    names = gate.choose(model, input_ids, attention_mask, threshold=threshold)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    return cast(Tensor, model.generate(**inputs, adapter_names=names, **options))


@torch.no_grad()
def prompt_features(model: nn.Module, layer_idx: int, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean, over a prompt's tokens, of what a layer's router is multiplied with.

    Args:
        model: The model; the pass ends at the layer.
        layer_idx: A decoder layer with experts.
        input_ids: Shape `(P, S)`.
        attention_mask: 0 where padding is, which does not count. Shape `(P, S)`.

    Returns:
        Shape `(P, d)`, float32.

    Raises:
        ValueError: A prompt has no tokens, or the layer no experts.
        UnsupportedModelError: The model has no routed experts, or cannot be watched.
    """
    if not bool((attention_mask.sum(dim=1) > 0).all()):
        raise ValueError("a prompt has no tokens that count; attention_mask must have a 1 in every row")
    (block,) = select_blocks(model, [layer_idx])
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    with evaluation_mode(model), record_router_input(block) as recorded, run_until_routed(model, layer_idx) as run:
        run(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
        inputs = recorded().float()
    inputs = inputs.view(*input_ids.shape, -1)  # (P, S, d)
    counted = attention_mask.to(inputs.device, inputs.dtype)[..., None]
    return (inputs * counted).sum(dim=1) / counted.sum(dim=1)


def _discriminant(other: Tensor, requests: list[Tensor], *, ridge: float) -> tuple[Tensor, Tensor]:
    """Weights and biases of the log-odds. Args: prompts' features, shape `(P, d)` each."""
    classes = [other, *requests]
    means = torch.stack([rows.mean(dim=0) for rows in classes])  # (1 + R, d)
    centred = torch.cat([rows - mean for rows, mean in zip(classes, means, strict=True)])
    covariance = centred.T @ centred / len(centred)
    scale = float(covariance.diagonal().mean()) or 1.0  # sets of one prompt each have no scatter
    damped = covariance + ridge * scale * torch.eye(len(covariance), dtype=covariance.dtype)
    directions = torch.linalg.solve(damped, means.T).T  # (1 + R, d)
    constants = -(directions * means).sum(dim=1) / 2
    return directions[1:] - directions[0], constants[1:] - constants[0]


def _checked_layer(model: nn.Module, layer_idx: int | None) -> int:
    """The layer that is read.

    Raises:
        ValueError: It lies above the lowest edited one.
    """
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    pairs = [pair for config in configs if isinstance(config, UOEConfig) for pair in config.target_experts]
    lowest = min((layer for layer, _ in cast(list[tuple[int, int]], pairs)), default=None)
    if layer_idx is None:
        return find_moe_blocks(model)[0].layer_idx if lowest is None else lowest
    if lowest is not None and layer_idx > lowest:
        raise ValueError(
            f"layer {layer_idx} lies above layer {lowest}, which an adapter edits: what a prompt looks like there "
            f"depends on which adapters are on; read a layer up to {lowest}"
        )
    return layer_idx


def _prompts(
    dataset: Dataset, processing_class: ProcessingClass, *, max_length: int | None, name: str
) -> list[list[int]]:
    """Token ids in front of each row's first answer.

    Raises:
        ValueError: No row has a prompt.
    """
    rows = tokenize_dataset(dataset, processing_class, max_length=max_length, name=name)
    prompts = []
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        first = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
        prompts += [ids[:first]] if first else []
    if not prompts:
        raise ValueError(f"no row of {name!r} has a prompt in front of its answer; pass 'prompt' and 'completion'")
    return prompts


def _padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on the right."""
    length = max(map(len, prompts))
    ids = torch.tensor([own + [0] * (length - len(own)) for own in prompts])
    mask = torch.tensor([[1] * len(own) + [0] * (length - len(own)) for own in prompts])
    return ids, mask
