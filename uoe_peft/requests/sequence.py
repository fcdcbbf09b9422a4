"""One request after another: each has an adapter of its own, trained while the earlier ones are on and frozen.

Deltas add up in float32 and are never written into the base, so that any request can be withdrawn: delete its adapter,
and the others' deltas are what they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from datasets import Dataset, concatenate_datasets
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from uoe_peft.data import tokenize_dataset, tokenize_with_alternatives
from uoe_peft.data.tokenization import ProcessingClass
from uoe_peft.tuner import UOEConfig, UOEModel


def add_request(model: PreTrainedModel | PeftModel, config: UOEConfig, adapter_name: str) -> PeftModel:
    """Put the adapter of a further request on a model, on top of those that are active, which stay on and are frozen.

    `UnlearningTrainer(model=..., peft_config=None)` then trains this adapter alone. Under `reference="current"`, its
    default, losses compare with the model as it is now, earlier requests forgotten; under "base" with the base model.
    Attribute before, on the model as it is.

    Args:
        model: A base model, or one with UOE adapters.
        config: Of the new adapter, with experts; it is not changed.
        adapter_name: Name of the request, new to the model.

    Returns:
        The model, all earlier active adapters and the new one active, the new one alone trainable.

    Raises:
        TypeError: The model has adapters of another method.
        ValueError: The name is taken, experts are to be found by the trainer ("auto"), or an active adapter is merged:
            what is in the weights cannot be told from the base.
    """
    if config.target_experts == "auto":
        raise ValueError(
            'target_experts="auto" attributes on a base model only; pass attribute_experts(model, ...).top(1), which '
            "looks at the model with the earlier requests forgotten"
        )
    if not isinstance(model, PeftModel):
        return cast(PeftModel, get_peft_model(model, config, adapter_name=adapter_name))
    tuner = model.base_model
    if not isinstance(tuner, UOEModel):
        raise TypeError(f"the model has adapters of {type(tuner).__name__}, expected UOE adapters or a base model")
    if adapter_name in model.peft_config:
        raise ValueError(f"the model has an adapter {adapter_name!r} already; name the request otherwise")
    if model.get_model_status().merged_adapters:
        raise ValueError("an adapter is merged; call unmerge_adapter() first, so that its request can be withdrawn")
    earlier = list(model.active_adapters) if model.get_model_status().enabled else []
    model.add_adapter(adapter_name, config)
    tuner.set_adapter([*earlier, adapter_name])
    for name in earlier:
        tuner.set_requires_grad(name, False)
    return model


def retain_with_requests(
    retain_dataset: Dataset,
    requests: Sequence[Dataset],
    processing_class: ProcessingClass,
    *,
    retain_share: float = 0.5,
    max_length: int | None = 1024,
    seed: int = 0,
) -> Dataset:
    """What a further request must keep: the retain set, and that earlier requests are answered by their alternatives.

    Questions of an earlier forget set, with the alternative in place of each answer, become retain rows: to keep what
    the model says to them now is to keep them forgotten. Where a request's text is gone there is nothing to pass; the
    reference, which has its adapter on, then is all that remembers it.

    Args:
        retain_dataset: As for the trainer.
        requests: Earlier forget sets, with questions of their own (see `tokenize_with_alternatives`).
        processing_class: Tokenizer, or a processor that holds one.
        retain_share: The least share of the result that the retain set makes, in [0, 1): where there are fewer of its
            rows they are repeated, as often as all rows alike. Else a fifth request is trained on refusals mostly, and
            refuses what should be kept.
        max_length: Longest example in tokens; None for no limit.
        seed: Of alternatives that a set does not bring.

    Returns:
        Columns `input_ids` and `labels`, the retain rows first.

    Raises:
        ValueError: `retain_share` is out of range, or the retain set is empty.
        TypeError, ValueError: As in `tokenize_dataset` and `tokenize_with_alternatives`.
    """
    if not 0 <= retain_share < 1:
        raise ValueError(f"retain_share must be in [0, 1), got {retain_share}")
    kept = [tokenize_dataset(retain_dataset, processing_class, max_length=max_length, name="retain")]
    for place, request in enumerate(requests):
        _, declined = tokenize_with_alternatives(
            request, processing_class, max_length=max_length, seed=seed + place, name=f"earlier forget ({place})"
        )
        kept.append(declined)
    num_declined = sum(len(rows) for rows in kept[1:])
    wanted = retain_share / (1 - retain_share) * num_declined
    kept = [kept[0]] * max(1, math.ceil(wanted / len(kept[0]))) + kept[1:]
    return concatenate_datasets([rows.select_columns(["input_ids", "labels"]) for rows in kept])
