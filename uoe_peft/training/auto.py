"""`target_experts="auto"`: the experts that attribution finds on the sets that training will see."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl.chat_template_utils import clone_chat_template

from uoe_peft.attribution import attribute_experts
from uoe_peft.data import PairedDataset
from uoe_peft.data.tokenization import ProcessingClass, text_tokenizer
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.setup import pair_sets, prepare_set
from uoe_peft.tuner import UOEConfig

logger = logging.getLogger(__name__)


def resolve_auto(
    config: UOEConfig,
    model: PreTrainedModel | PeftModel,
    forget: Dataset | IterableDataset,
    retain: Dataset | IterableDataset | None,
    processing_class: ProcessingClass,
    args: UnlearningConfig,
    *,
    formatting_func: Callable[..., Any] | None = None,
) -> tuple[UOEConfig, PairedDataset]:
    """`target_experts="auto"`: what attribution finds on the very tokens that training will see.

    Args:
        config: Whose target experts are to be found.
        model: The model to attribute on.
        forget: The forget set.
        retain: The retain set, or None.
        processing_class: Tokenizer or processor; it gets the settings that `args` names.
        args: How sets are read, and how experts are scored.
        formatting_func: As in `SFTTrainer`.

    Returns:
        A copy of the config with the target experts, the same in every process; and the training set.

    Raises:
        ValueError: The model has an adapter already, or `attribution_score="contrast"` without a retain set.
        UnsupportedModelError: The model has no routed experts.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            f"the model has the adapters {sorted(model.peft_config)} already; pass it without peft_config to train "
            "them, or pass the base model, model.unload()"
        )
    settle_tokenizer(model, processing_class, args)
    paired = pair_sets(forget, retain, processing_class, args, formatting_func=formatting_func)
    kept = paired.retain
    if kept is None and retain is not None:  # training does without, attribution need not
        kept = prepare_set(retain, processing_class, args, name="retain", formatting_func=formatting_func)
    attribution = attribute_experts(
        model,
        paired.forget,
        processing_class=processing_class,
        score=args.attribution_score,
        gate=args.attribution_gate,
        retain_dataset=kept,
        batch_size=args.per_device_train_batch_size,
        max_length=args.max_length,
        seed=args.seed,
        show_progress=not args.disable_tqdm,
    )
    resolved = copy(config)
    found = [sorted(attribution.top(args.num_target_experts)), attribution.metadata()]
    # Two processes may round differently, and must not train different experts.
    resolved.target_experts, resolved.attribution = broadcast_object_list(found)
    logger.info('target_experts="auto" is %s\n%s', resolved.target_experts, attribution.summary())
    return resolved, paired


def settle_tokenizer(model: PreTrainedModel, processing_class: ProcessingClass, args: UnlearningConfig) -> None:
    """Give the tokenizer the end-of-sequence token and the chat template that the options name.

    `SFTTrainer` does the same, but after it has wrapped the model in an adapter.

    Raises:
        ValueError: The token is not in the vocabulary, or the chat template comes with tokens that are not.
    """
    tokenizer = text_tokenizer(processing_class)
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token={args.eos_token!r} is not in the tokenizer's vocabulary; name one that is")
        tokenizer.eos_token = args.eos_token
    path = args.chat_template_path
    if path is None:
        return
    if Path(path).is_file() and path.endswith((".jinja", ".j2")):
        processing_class.chat_template = Path(path).read_text(encoding="utf-8")
        return
    _, _, added = clone_chat_template(model, tokenizer, path)
    if added:
        raise ValueError(
            f"chat_template_path={path!r} adds {len(added)} tokens to the vocabulary, which no expert can learn; pass "
            "a file of the template alone, named *.jinja"
        )
