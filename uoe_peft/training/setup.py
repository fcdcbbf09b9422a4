"""What must be settled before training: the sets, the tokenizer, the model, and which options apply to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from uoe_peft.data import PairedDataset, tokenize_dataset, tokenize_with_alternatives
from uoe_peft.data.tokenization import ProcessingClass, materialise
from uoe_peft.dense import is_factorized, load_factorized
from uoe_peft.moe.passes import find_streamed
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.objective.anchor import Targets, find_targets
from uoe_peft.training.reuse.offload import check_can_leave

logger = logging.getLogger(__name__)

# Whole distributions are too large to be kept from before training.
_NEEDS_ADAPTER = ("undial", "kl")


def check_sets(args: UnlearningConfig, forget: Any, retain: Any) -> None:
    """Refuse missing and empty sets before a model is loaded.

    Raises:
        ValueError: There is no forget set, a set is empty, or a retain loss has no retain set.
    """
    if forget is None:
        raise ValueError("train_dataset, the forget set, is required")
    for name, dataset in (("forget", forget), ("retain", retain)):
        if dataset is not None:
            materialise(dataset, name=name)
    if retain is None and args.needs_retain:
        raise ValueError(
            f"retain_loss={args.retain_loss!r} needs a retain set; pass retain_dataset, or set retain_loss='none'"
        )


def check_arguments(args: UnlearningConfig, given: Mapping[str, Any]) -> None:
    """Refuse what `SFTTrainer` takes and unlearning would not use.

    Args:
        args: `dataset_kwargs` is looked at.
        given: Further arguments of the trainer.

    Raises:
        TypeError: `args` is of another class, as TRL's own.
        ValueError: One of them is there.
    """
    if not isinstance(args, UnlearningConfig):
        raise TypeError(
            f"args must be an UnlearningConfig, which names the losses, got {type(args).__name__}; it takes all that "
            "SFTConfig takes"
        )
    instead = {
        "data_collator": "rows are padded role by role; set pad_to_multiple_of or pad_token instead",
        "compute_loss_func": "the loss is what forget_loss and retain_loss name",
    }
    for name, advice in instead.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} is not used in unlearning: {advice}")
    if cast(dict[str, Any], args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise ValueError(
            "dataset_kwargs={'skip_prepare_dataset': True} is not used in unlearning; sets with the columns "
            "'input_ids' and 'labels' are taken as they are, but for truncation to max_length"
        )


def prepare_set(
    dataset: Dataset | IterableDataset,
    processing_class: ProcessingClass,
    args: UnlearningConfig,
    *,
    name: str,
    formatting_func: Callable[..., Any] | None = None,
) -> Dataset:
    """A set as token ids and labels; see `tokenize_dataset`."""
    dataset = materialise(dataset, name=name)
    # Sets of a dict come here twice in `evaluate`: the second time they are token ids.
    if formatting_func is not None and "input_ids" not in dataset.column_names:
        dataset = dataset.map(
            lambda row: {args.dataset_text_field: formatting_func(row)},
            # The other columns go: 'prompt' or 'messages' would be read before the text.
            remove_columns=dataset.column_names,
            num_proc=args.dataset_num_proc,
            # `datasets` knows a function by its name, and would hand out what it wrote before it was changed.
            keep_in_memory=True,
            load_from_cache_file=False,
        )
    return tokenize_dataset(
        dataset,
        processing_class,
        max_length=args.max_length,
        completion_only=args.completion_only_loss is not False,
        name=name,
        text_field=args.dataset_text_field,
        truncation_mode=cast(Any, args.truncation_mode),
        num_proc=args.dataset_num_proc,
    )


def pair_sets(
    forget: Dataset | IterableDataset,
    retain: Dataset | IterableDataset | None,
    processing_class: ProcessingClass,
    args: UnlearningConfig,
    *,
    formatting_func: Callable[..., Any] | None = None,
) -> PairedDataset:
    """The training set: forget rows, their retain partners, and alternative answers where a loss needs them.

    The retain set is shuffled in any case, see `retain_index`; the forget set where `shuffle_dataset` asks for it.

    Raises:
        ValueError: A set cannot be used, see `tokenize_dataset`; it has no questions to give other answers to; or it
            does not fill the one batch that `dataloader_drop_last` would leave.
    """
    extra = {}
    if args.shuffle_dataset:
        forget = materialise(forget).shuffle(seed=args.seed)
    if args.needs_alternatives:
        if formatting_func is not None:
            raise ValueError(
                f"formatting_func cannot be used with forget_loss={args.forget_loss!r} and alternative_weight="
                f"{args.alternative_weight}, which need the question and the answer apart; give the sets as prompt and "
                "completion"
            )
        tokenized, extra["alternative"] = tokenize_with_alternatives(
            materialise(forget),
            processing_class,
            max_length=args.max_length,
            completion_only=args.completion_only_loss is not False,
            truncation_mode=cast(Any, args.truncation_mode),
            seed=args.seed,
            num_proc=args.dataset_num_proc,
        )
    else:
        tokenized = prepare_set(forget, processing_class, args, name="forget", formatting_func=formatting_func)
    _check_a_batch_is_left(tokenized, args)
    kept = None
    if retain is not None and args.needs_retain:
        kept = prepare_set(retain, processing_class, args, name="retain", formatting_func=formatting_func)
        _warn_of_overlap(tokenized, kept)
    return PairedDataset(tokenized, kept, seed=args.seed, extra=extra)


def _check_a_batch_is_left(forget: Dataset, args: UnlearningConfig) -> None:
    batch_size = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(forget) < batch_size:
        raise ValueError(
            f"dataloader_drop_last=True leaves out the last batch, and the {len(forget)} rows of the forget set do not "
            f"fill one of {batch_size}: nothing would be trained; leave it out, or lower per_device_train_batch_size"
        )


def _warn_of_overlap(forget: Dataset, retain: Dataset) -> None:
    forget_rows = {tuple(ids) for ids in forget["input_ids"]}
    shared = sum(tuple(ids) in forget_rows for ids in retain["input_ids"])
    if shared:
        logger.warning("%d rows of the retain set are in the forget set, too; they pull both ways", shared)


def load_tokenizer(model: str | PreTrainedModel | PeftModel, args: UnlearningConfig) -> ProcessingClass:
    """The tokenizer that was saved with a model.

    Raises:
        ValueError: The model does not say where it was loaded from.
    """
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError("the model does not say where it was loaded from; pass processing_class")
    return cast(ProcessingClass, AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code))


def load_model(
    model: str | PreTrainedModel | PeftModel, args: UnlearningConfig, quantization_config: Any = None
) -> PreTrainedModel:
    """The model to attribute on: loaded if it is a name, and on the device that training will use."""
    if isinstance(model, str):
        set_seed(args.seed)
        options: dict[str, Any] = {"dtype": torch.float32, **cast(dict[str, Any], args.model_init_kwargs or {})}
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        options.setdefault("trust_remote_code", args.trust_remote_code)
        model = (load_factorized if is_factorized(model) else AutoModelForCausalLM.from_pretrained)(model, **options)
    placed = any(
        getattr(model, said, None)
        for said in ("hf_device_map", "is_quantized", "is_distributed_loading_by_transformers")
    )
    return cast(PreTrainedModel, model if placed else cast(nn.Module, model).to(args.device))


def check_model(model: nn.Module, args: UnlearningConfig) -> None:
    """Refuse a model that cannot be trained, or not with these options.

    Raises:
        ValueError: Adapters are merged, nothing is trainable, layers cannot leave the device, a loss needs an adapter
            and there is none, or the anchor would get no gradient.
    """
    merged = sorted({name for module in model.modules() for name in getattr(module, "merged_adapters", ())})
    if merged:
        raise ValueError(f"the adapters {merged} are merged, so they cannot be trained; call unmerge_adapter() first")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of the model is trainable; load an adapter to go on training with "
            "PeftModel.from_pretrained(..., is_trainable=True)"
        )
    if args.offload_prefix:
        check_can_leave(model)
    if args.relearner_steps:
        _check_relearner(model, args)
    for name, loss in (("forget_loss", args.forget_loss), ("retain_loss", args.retain_loss)):
        if loss in _NEEDS_ADAPTER and not isinstance(model, PeftModel):
            raise ValueError(
                f"{name}={loss!r} compares whole distributions with the base model's, which a model that is trained in "
                "full no longer has; train an adapter (peft_config=...) or choose another loss"
            )
    checkpointing = cast(dict[str, Any], args.gradient_checkpointing_kwargs or {})
    anchored = args.anchor_weight > 0 and find_targets(model)
    if anchored and args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise ValueError(
            "the router anchor gets no gradient through reentrant gradient checkpointing; pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False} or anchor_weight=0"
        )


def _check_relearner(model: nn.Module, args: UnlearningConfig) -> None:
    """Refuse weights that nobody can train back in this process, and what would be asked of a base that he moved."""
    checkpointing = args.gradient_checkpointing and "gradient_checkpointing=True, whose graph serves once"
    reasons = {
        "several processes or devices": args.world_size > 1 or args.n_gpu > 1,
        "fsdp or deepspeed": bool(args.fsdp or args.deepspeed),
        "fp16, whose gradients are scaled": args.fp16,
        "forget_loss='undial', which asks the base in every pass": args.forget_loss == "undial",
        str(checkpointing): bool(checkpointing),
        "a model that is read from disk layer by layer": find_streamed(model) is not None,
        "weights that are not float32, in which most of his steps would be rounded away": any(
            parameter.dtype != torch.float32 or parameter.is_meta for parameter in model.parameters()
        ),
    }
    found = [reason for reason, given in reasons.items() if given]
    if found:
        raise ValueError(f"relearner_steps={args.relearner_steps} does not go with {'; '.join(found)}")


def say_what_is_off(args: UnlearningConfig, targets: Targets) -> None:
    """Log which options do not apply, or not as one would think.

    Args:
        args: The options.
        targets: Target experts of the model; empty for models without a UOE adapter.
    """
    if args.router_aux_loss_coef == 0:
        logger.info("router_aux_loss_coef is 0: load balancing would work against the router anchor")
    else:
        logger.warning("router_aux_loss_coef is not applied to unlearning: it works against the router anchor")
    if args.anchor_weight > 0 and not targets:
        logger.info("no UOE adapter: the router anchor does not apply")
    if args.retain_token_weights == "trace" and not targets:
        logger.warning("no UOE adapter: retain_token_weights='trace' does not apply, all retain tokens count alike")
    parts = args.gradient_accumulation_steps * args.world_size
    of_whole_batch = {
        "anchor_reduction='mean_gate'": args.anchor_reduction == "mean_gate" and args.anchor_weight > 0,
        "retain_token_weights='trace'": args.retain_token_weights == "trace" and args.needs_retain,
    }
    for option, chosen in of_whole_batch.items():
        if chosen and targets and parts > 1:
            logger.warning(
                "%s is computed on each of the %d parts of a batch and averaged, which differs from its value on the "
                "whole batch; one process and gradient_accumulation_steps=1 give that",
                *(option, parts),
            )
