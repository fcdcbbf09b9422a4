"""Greedy answers to many prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from uoe_peft.data import collate
from uoe_peft.evaluation.batching import batches_by_length
from uoe_peft.evaluation.resume import AnswerStore


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int,
    desc: str = "answers",
    store: AnswerStore | None = None,
) -> list[str]:
    """The most likely continuation, token by token, of each prompt.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Token ids; each prompt has at least one.
        tokenizer: Decodes the answers, and has the padding and end-of-sequence tokens.
        max_new_tokens: Where an answer is cut that does not end by itself.
        batch_size: Prompts a forward pass.
        desc: Title of the progress bar.
        store: Answers of the same model to some of the prompts, which are not generated again; new ones are added.

    Returns:
        The answers in the order of the prompts, up to the first end-of-sequence token, without surrounding spaces.

    Raises:
        ValueError: A prompt is empty.
    """
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ValueError(f"prompt {lengths.index(0)} is empty; a model needs a token to continue from")
    config = greedy_config(model, tokenizer, max_new_tokens=max_new_tokens)
    generate = cast(Callable[..., Tensor], model.generate)
    stored = [store.get(prompt) if store else None for prompt in prompts]
    answers = ["" if answer is None else answer for answer in stored]
    missing = [row for row, answer in enumerate(stored) if answer is None]
    with tqdm(total=len(missing), desc=desc, unit="answer", leave=False) as bar:
        for places in batches_by_length([lengths[row] for row in missing], batch_size=batch_size):
            rows = [missing[place] for place in places]
            examples = [{"input_ids": prompts[row]} for row in rows]
            batch = collate(examples, pad_token_id=config.pad_token_id, padding_side="left")
            input_ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
            output = generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
            for row, continuation in zip(rows, output[:, input_ids.shape[1] :], strict=True):
                answers[row] = _decode(continuation, tokenizer, eos_token_ids=config.eos_token_id)
            if store:
                store.add([prompts[row] for row in rows], [answers[row] for row in rows])
            bar.update(len(rows))
    return answers


def greedy_config(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int
) -> GenerationConfig:
    """Settings of plain greedy decoding, which end where the model or the tokenizer says that an answer ends.

    What a generation configuration leaves open, `generate` takes from the model's own; a chat model's would bring
    sampling or a repetition penalty, so nothing that matters is left open.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    eos_token_ids = sorted(end for end in ends if end is not None)
    pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        pad_token_id = eos_token_ids[0] if eos_token_ids else 0
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_ids,
        use_cache=True,
    )


def _decode(continuation: Tensor, tokenizer: PreTrainedTokenizerBase, *, eos_token_ids: list[int]) -> str:
    ids = continuation.tolist()
    end = next((position for position, token in enumerate(ids) if token in eos_token_ids), len(ids))
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
