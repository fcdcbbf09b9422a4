"""The training steps that are compared: what is trained, with which loss, and where the step starts.

A step is a forward pass, the loss on the answer tokens, backward, AdamW. All but "rmu, lora" go through the package's
`Objective`, so that LoRA and full training get its LM head and its losses, too.

- "uoe", "uoe, low rank": one expert and its router, at the target layer. "cached": from the prefix cache.
- "lora", "lora, one layer": PEFT LoRA on the experts of all layers, or of the target layer (`target_parameters`).
- "esft-like": of each layer the experts that together hold 0.2 of the affinity; full deltas, no router.
- "full": all parameters.
- "limit": what a cached step cannot fall below, forward and backward of the frozen layers from the target on.
- "rmu, ...": RMU with its retain loss, on a forget batch and a retain batch of equal size, at the output of the target
  layer. "rmu, lora" is a step as the field writes it: whole forward passes of both batches and of the base model,
  hidden states read by a hook. "rmu, lora, this trainer" goes through `Objective`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from random_models import Setting, busiest_expert, esft_experts, random_batch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uoe_peft.data import Batch
from uoe_peft.losses import answer_positions, control_direction, embed_diff_loss, rmu_loss
from uoe_peft.moe.segments import find_layers, run_from_layer, run_until_layer
from uoe_peft.training import UnlearningConfig
from uoe_peft.training.objective.objective import Objective
from uoe_peft.training.objective.reference import Reference
from uoe_peft.training.reuse.prefix_cache import PrefixCache, PrefixSource, prefix_cache
from uoe_peft.training.reuse.shortcuts import take_shortcuts
from uoe_peft.tuner import UOEConfig

Method = Literal[
    "uoe",
    "uoe, low rank",
    "uoe, cached",
    "uoe, low rank, cached",
    "lora, one layer",
    "lora",
    "esft-like",
    "full",
    "limit",
    "rmu, uoe",
    "rmu, uoe, cached",
    "rmu, lora, this trainer",
    "rmu, lora",
]

RANK = 16
ESFT_SHARE = 0.2
# Fixed, so that the forget loss asks the base model nothing.
RMU_COEFFICIENT = 20.0

Batches = dict[str, Batch]


def is_rmu(method: Method) -> bool:
    """Whether a step is one of RMU, on two batches."""
    return method.startswith("rmu")


def with_adapter(method: Method, base: PreTrainedModel, setting: Setting) -> nn.Module:
    """The model that a method trains; frozen weights are shared with `base`."""
    if method == "full":
        return copy.deepcopy(base).requires_grad_(True)
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    if method == "limit":
        return model.requires_grad_(False)
    return get_peft_model(model, _peft_config(method, base, setting))


def _peft_config(method: Method, base: PreTrainedModel, setting: Setting) -> PeftConfig:
    layer_idx, ids = setting.target_layer, random_batch(setting)["input_ids"]
    projections = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    match method.removeprefix("rmu, "):
        case "uoe" | "uoe, cached":
            return UOEConfig(target_experts=[(layer_idx, busiest_expert(base, ids, layer_idx))])
        case "uoe, low rank" | "uoe, low rank, cached":
            pair = (layer_idx, busiest_expert(base, ids, layer_idx))
            return UOEConfig(target_experts=[pair], delta_type="low_rank", r=RANK)
        case "esft-like":
            return UOEConfig(target_experts=esft_experts(base, ids, share=ESFT_SHARE), train_router=False)
        case "lora, one layer":
            projections = [f"layers.{layer_idx}.{projection}" for projection in projections]
    return LoraConfig(r=RANK, target_modules=[], target_parameters=projections, lora_dropout=0.0)


def training_step(method: Method, model: nn.Module, setting: Setting, stack: ExitStack) -> Callable[[], None]:
    """A step of a method; what it keeps on disk or in place is given back when `stack` closes."""
    batches = {"forget": random_batch(setting)}
    if is_rmu(method):
        batches["retain"] = random_batch(setting, seed=1)
    if method == "rmu, lora":
        return _optimised(model, _plain_rmu_loss(model, setting, batches))
    cache = _prefix_cache(model, batches, stack) if method.endswith("cached") else None
    with nullcontext() if cache is None else cache.serve(model):
        objective = _prepared(_objective(method, model, setting), batches, cached=cache is not None)
    loss = _objective_loss(objective, batches)
    if method == "limit":
        return _limit_step(model, setting, batches["forget"], loss)
    step = _optimised(model, loss)
    return step if cache is None else _served(step, cache, model)


def _objective(method: Method, model: nn.Module, setting: Setting) -> Objective:
    # Gradient ascent is cross-entropy with its sign turned.
    losses: dict[str, Any] = {"forget_loss": "grad_ascent", "retain_loss": "none"}
    if is_rmu(method):
        losses = {"forget_loss": "rmu", "retain_loss": "embed_diff", "rmu_coefficient": RMU_COEFFICIENT}
    on_cpu = not setting.device.startswith("cuda")
    args = UnlearningConfig(output_dir="outputs/unused", use_cpu=on_cpu, report_to=[], **losses)
    reference = Reference(model, setting.target_layer if is_rmu(method) else None)
    return Objective(args, reference, targets={}, direction=_direction(model, setting))


def _direction(model: Any, setting: Setting) -> Tensor:
    return control_direction(model.config.hidden_size, seed=0).to(setting.device)


def _optimised(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def _prepared(objective: Objective, batches: Batches, *, cached: bool) -> Objective:
    """As the trainer makes it before its first step."""
    num_answer_tokens = int(answer_positions(batches["forget"]["labels"]).sum())
    objective = take_shortcuts(objective, batches["forget"], num_answer_tokens=num_answer_tokens)
    needs = objective.reference_needs(examples_come_again=True, on_disk=True) if cached else {}
    for role, need in needs.items():
        objective.reference.precompute([batches[role]], need=need)
    return objective


def _objective_loss(objective: Objective, batches: Batches) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        # As at a step that is not logged: RMU does not look at likelihoods then.
        step = objective.step(objective.reference.model, batches, None, {}, with_likelihood=False)
        return step.loss(objective.args)

    return loss


def _prefix_cache(model: nn.Module, batches: Batches, stack: ExitStack) -> PrefixCache:
    ids = batches["forget"]["input_ids"]
    source = PrefixSource(model, len(ids), 0, place=_placed_as(ids), context=torch.no_grad)
    return stack.enter_context(
        prefix_cache(source, [row for batch in batches.values() for row in batch["input_ids"].tolist()])
    )


def _placed_as(tensor: Tensor) -> Callable[[Batch], Batch]:
    return lambda batch: {name: values.to(tensor.device) for name, values in batch.items()}


def _served(step: Callable[[], None], cache: PrefixCache, model: nn.Module) -> Callable[[], None]:
    def served() -> None:
        with cache.serve(model):
            step()

    return served


def _limit_step(model: nn.Module, setting: Setting, batch: Batch, loss: Callable[[], Tensor]) -> Callable[[], None]:
    layers = find_layers(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        state: Any = run_until_layer(model, setting.target_layer, inputs)

    def step() -> None:
        entering = state.detach().requires_grad_(True)
        with run_from_layer(layers, setting.target_layer, entering):
            loss().backward()

    return step


# ---- RMU as the field writes it ----


def _plain_rmu_loss(model: Any, setting: Setting, batches: Batches) -> Callable[[], Tensor]:
    assert isinstance(model, PeftModel)
    layer = find_layers(model).get_submodule(str(setting.target_layer))
    direction = _direction(model, setting)

    def hidden(batch: Batch) -> Tensor:
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        handle.remove()
        return seen[0][answer_positions(batch["labels"])]

    def loss() -> Tensor:
        forget = rmu_loss(hidden(batches["forget"]), direction, coefficient=RMU_COEFFICIENT)
        kept = hidden(batches["retain"])
        with torch.no_grad(), model.disable_adapter():
            base = hidden(batches["retain"])
        return forget + embed_diff_loss(kept, base)

    return loss
