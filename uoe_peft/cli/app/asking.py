"""One question to a model with its adapter off or on: the answer, and the experts that each token was sent to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uoe_peft.evaluation.generation import greedy_config
from uoe_peft.moe.routing import LayerRouting, record_routing


@dataclass(frozen=True)
class Answer:
    """What a model said, token by token.

    Attributes:
        text: The answer without special tokens and surrounding spaces.
        tokens: Text of each token, those of the prompt first.
        num_prompt_tokens: How many of them are the prompt's.
        experts: Of each edited layer, by decoder layer index: for each token its experts, the heaviest first, each with
            the weight that the layer gives its output.
        edited: The edited experts of each of these layers.
    """

    text: str
    tokens: tuple[str, ...]
    num_prompt_tokens: int
    experts: Mapping[int, tuple[Mapping[int, float], ...]]
    edited: Mapping[int, frozenset[int]]

    def reached(self, layer_idx: int) -> tuple[bool, ...]:
        """Of each token, whether an edited expert of the layer worked on it."""
        return tuple(bool(self.edited[layer_idx] & set(experts)) for experts in self.experts[layer_idx])


def encode_question(question: str, tokenizer: PreTrainedTokenizerBase, *, template: str | None = None) -> Tensor:
    """Token ids of the prompt around a question. Shape `(1, S)`.

    Args:
        question: As a user types it.
        tokenizer: Of the model; without `template` its chat template is used, and where it has none the question as it
            is.
        template: The prompt, with `{question}` where the question goes.

    Raises:
        ValueError: The question is empty, or the template has no place for it.
    """
    question = question.strip()
    if not question:
        raise ValueError("the question is empty; type one, or click a sample")
    if template is not None:
        if "{question}" not in template:
            raise ValueError(f"the prompt needs {{question}} where the question goes, got {template!r}")
        # Not `format`: a question may hold braces, and so may the rest of the template.
        return _ids(tokenizer(template.replace("{question}", question), return_tensors="pt"))
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question}]
        return _ids(
            tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        )
    return _ids(tokenizer(question, return_tensors="pt"))


def _ids(encoded: object) -> Tensor:
    return cast(Mapping[str, Tensor], encoded)["input_ids"]


@torch.inference_mode()
def ask(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    *,
    forgetting: bool,
    max_new_tokens: int,
) -> Answer:
    """A greedy answer and its routing.

    Args:
        model: A model in evaluation mode with at least one active UOE adapter.
        tokenizer: Of the model.
        input_ids: The prompt. Shape `(1, S)`.
        forgetting: Whether the adapters are on.
        max_new_tokens: Where an answer is cut that does not end by itself.

    Raises:
        ValueError: The model has no active UOE adapter, or `input_ids` holds more than one row.
    """
    edited = edited_experts(model)
    if input_ids.ndim != 2 or len(input_ids) != 1:
        raise ValueError(f"input_ids must be one prompt, of shape (1, S), got shape {tuple(input_ids.shape)}")
    generate = cast(Callable[..., Tensor], model.generate)
    prompt = input_ids.to(model.device)
    config = greedy_config(model, tokenizer, max_new_tokens=max_new_tokens)
    with nullcontext() if forgetting else model.disable_adapter():
        tokens = generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        # Once more from the start: while generating, the last token is never given to the model.
        with record_routing(model, layer_indices=sorted(edited), device=torch.device("cpu")) as trace:
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    ids = tokens[0].tolist()
    return Answer(
        text=str(tokenizer.decode(ids[prompt.shape[1] :], skip_special_tokens=True)).strip(),
        tokens=tuple(str(tokenizer.decode([token])) for token in ids),
        num_prompt_tokens=prompt.shape[1],
        experts={layer_idx: tuple(_experts_of_tokens(trace[layer_idx])) for layer_idx in sorted(edited)},
        edited=edited,
    )


def edited_experts(model: PeftModel) -> dict[int, frozenset[int]]:
    """The edited experts of each edited layer, of all active adapters.

    Raises:
        ValueError: The model has no active UOE adapter.
    """
    edited: dict[int, frozenset[int]] = {}
    for name in model.active_adapters:
        for layer_idx, expert_idx in getattr(model.peft_config[name], "target_experts", None) or ():
            edited[layer_idx] = edited.get(layer_idx, frozenset()) | {expert_idx}
    if not edited:
        raise ValueError(f"none of the active adapters, {list(model.active_adapters)}, is a UOE adapter with experts")
    return edited


def _experts_of_tokens(routing: LayerRouting) -> list[dict[int, float]]:
    tokens = []
    for index, weights in zip(routing.top_k_index.tolist(), routing.top_k_weights.tolist(), strict=True):
        chosen = sorted(zip(weights, index, strict=True), reverse=True)
        tokens.append({expert_idx: weight for weight, expert_idx in chosen if weight != 0})  # 0: cancelled
    return tokens
