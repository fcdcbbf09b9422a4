"""Which weights unlearning may move: weight attribution (WAGLE), and keeping the others exactly where they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from uoe_peft.data import Batch
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.training.objective.forward import forward_answers
from uoe_peft.tuner import UOELayer

Masks = dict[str, Tensor]
"""By name of a trainable parameter: True where it may move. Bool, of the parameter's shape."""

MASK_FILE = "weight_mask.pt"


def weight_attribution_mask(
    model: nn.Module,
    forget: Iterable[Batch],
    retain: Iterable[Batch] | None,
    *,
    ratio: float,
    mu: float = 1.0,
) -> Masks:
    """The trainable weights that move the forget loss most and the retain loss least.

    The `ratio` of all trainable weights with the largest `S = |(θ - g_r / mu) ⊙ g_f|`, g_f and g_r the gradients of the
    mean cross-entropy over the answer tokens of the forget and the retain set: https://arxiv.org/abs/2410.17509. For a
    full delta of UOE, θ is the weight that it edits, base and delta together; for any other parameter its own value.

    A fresh low-rank delta is refused: one of its factors is zero, so that the other has no gradient, would score zero
    and never move again. What a mask means for weights that are products of factors, WAGLE does not say.

    Args:
        model: A causal language model; what has `requires_grad` is scored.
        forget: Batches of the forget set.
        retain: Batches of the retain set; None leaves g_r out.
        ratio: Share of the trainable weights to keep, in (0, 1].
        mu: Curvature of the retain loss, > 0, the diagonal estimate that WAGLE takes as one number.

    Returns:
        A mask for each trainable parameter; together they are True at `ratio` of the weights, at least at one.

    Raises:
        ValueError: `ratio` or `mu` is out of range; nothing is trainable; parameters are sharded; a gradient is not
            finite; an adapter has a parameter without any gradient on the forget set.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    if not mu > 0:
        raise ValueError(f"mu must be > 0, got {mu}")
    parameters = trainable_parameters(model)
    values = edited_weights(model)
    with evaluation_mode(model, gradients=True):
        forget_gradients = _mean_gradients(model, forget, parameters.values())
        retain_gradients = {} if retain is None else _mean_gradients(model, retain, parameters.values())
    _check_reached(model, parameters, forget_gradients, values)
    scores = {}
    for name, parameter in parameters.items():
        direction = values.get(parameter, parameter.detach().float())
        if parameter in retain_gradients:
            direction = direction - retain_gradients[parameter] / mu
        scores[name] = (direction * forget_gradients[parameter]).abs()
        if not scores[name].isfinite().all():
            raise ValueError(f"the gradient of {name} is NaN or infinite; check the checkpoint and the dtype")
    return _largest(scores, ratio)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name.

    Raises:
        ValueError: There are none, or they are sharded over processes, so that no process sees a whole one.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the model has no trainable parameter to mask; set requires_grad or add an adapter")
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor) or parameter.numel() == 0:
            raise ValueError(f"cannot mask {name}: it is sharded over processes; train without FSDP or ZeRO-3")
    return parameters


def edited_weights(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """What each full UOE delta makes of the weights that it edits: base and delta together, in float32."""
    weights = {}
    for layer in model.modules():
        if not isinstance(layer, UOELayer):
            continue
        for adapter_name, deltas in layer.uoe_delta.items():
            for projection, delta in cast(nn.ParameterDict, deltas).items():
                slices = [
                    layer.base_slice(projection, index).float() for index in layer.target_indices[adapter_name]
                ]  # M of them
                weights[delta] = torch.stack(slices) + delta.detach().float() * layer.scaling[adapter_name]
    return weights


def _check_reached(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[nn.Parameter, Tensor],
    full_deltas: Collection[nn.Parameter],
) -> None:
    """Refuse parameters of adapters that a mask would freeze for ever because they have no gradient yet."""
    if not isinstance(model, PeftModel):
        return
    unreached = [name for name, p in parameters.items() if p not in full_deltas and not gradients[p].any()]
    if unreached:
        raise ValueError(
            f"weight_mask_ratio would freeze {unreached[0]} for ever: it has no gradient on the forget set, as a "
            "factor of a low-rank delta whose other factor is still zero. Train full deltas "
            "(UOEConfig(delta_type='full', router_delta_type='full')), or without weight_mask_ratio"
        )


def _mean_gradients(
    model: nn.Module, batches: Iterable[Batch], parameters: Iterable[nn.Parameter]
) -> dict[nn.Parameter, Tensor]:
    """Gradients of the mean cross-entropy over all answer tokens, in float32; the parameters' `grad` is not touched."""
    wanted = list(parameters)
    total = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in wanted}
    num_tokens = 0
    for batch in batches:
        log_probs = forward_answers(model, batch).log_probs
        num_tokens += len(log_probs)
        gradients = torch.autograd.grad(-log_probs.sum(), wanted, allow_unused=True)
        for parameter, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                total[parameter] += gradient.float()
    return {parameter: gradient / max(num_tokens, 1) for parameter, gradient in total.items()}


def _largest(scores: Mapping[str, Tensor], ratio: float) -> Masks:
    """True at the largest `ratio` of all scores together, on the scores' own devices."""
    device = next(iter(scores.values())).device
    flat = torch.cat([score.flatten().to(device) for score in scores.values()])
    number = max(1, round(ratio * len(flat)))
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(number).indices] = True
    parts = kept.split([score.numel() for score in scores.values()])
    return {
        name: part.view_as(score).to(score.device) for (name, score), part in zip(scores.items(), parts, strict=True)
    }


class KeepMasked(TrainerCallback):
    """Holds masked weights where they were when training began, to the bit and under any optimiser.

    Their gradients are zero, so that clipping does not see them. After each step their values are put back, since
    weight decay and momentum move weights that have no gradient. The mask is kept in checkpoints.
    """

    def __init__(self, model: nn.Module, compute: Callable[[], Masks]) -> None:
        """Hold weights of a model.

        Args:
            model: The trained model, not what a launcher wraps it in.
            compute: Called when training begins anew.
        """
        self.model, self._compute = model, compute
        self.masks: Masks | None = None
        self._held: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, mask, value at the start
        self._handles: list[RemovableHandle] = []

    def load(self, checkpoint: Path) -> None:
        """Take the mask of a checkpoint.

        Raises:
            FileNotFoundError: The checkpoint was saved without a mask.
        """
        path = checkpoint / MASK_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{checkpoint} has no {MASK_FILE}: it was trained without weight_mask_ratio")
        self.masks = torch.load(path, map_location="cpu", weights_only=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compute the mask, unless it came with a checkpoint, and hold what it leaves out."""
        if self.masks is None:
            self.masks = self._compute()
        parameters = trainable_parameters(self.model)
        if parameters.keys() != self.masks.keys():
            raise ValueError(f"the mask is of {sorted(self.masks)}, the model trains {sorted(parameters)}")
        for name, parameter in parameters.items():
            mask = self.masks[name].to(parameter.device)
            self._held.append((parameter, mask, parameter.detach().clone()))
            self._handles.append(parameter.register_hook(lambda gradient, mask=mask: gradient.where(mask, 0)))

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put masked weights back."""
        for parameter, mask, value in self._held:
            parameter.copy_(torch.where(mask, parameter, value))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the mask into the checkpoint."""
        folder = Path(cast(str, args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and self.masks is not None and folder.is_dir():
            torch.save({name: mask.cpu() for name, mask in self.masks.items()}, folder / MASK_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._held, self.masks = [], [], None
