"""Vectors before the question: where they stand, that they learn, and that nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.evaluation.attacks.conftest import Recorder, adapted, as_it_was
from uoe_peft.evaluation.attacks import soft_prompt
from uoe_peft.evaluation.generation import greedy_answers

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 3], [12, 13, 14, 4]]


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return Dataset.from_list([{"input_ids": prompt, "labels": [-100, *prompt[1:]]} for prompt in PROMPTS])


def embedded(model: PeftModel, ids: list[int]) -> Tensor:
    """The prompt's vectors and the embeddings of some tokens. Shape (1, virtual + S, H)."""
    table = model.get_base_model().get_input_embeddings().weight
    return torch.cat([model.prompt_encoder["default"].embedding.weight, table[ids]]).unsqueeze(0)


def test_logits_are_those_of_the_question_after_the_vectors(
    qwen: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    def score(model: Any) -> dict[str, float]:
        if isinstance(model, PeftModel):
            width = max(map(len, PROMPTS))
            for side in ("right", "left"):
                pads = [[0] * (width - len(prompt)) for prompt in PROMPTS]
                ids = [p + pad if side == "right" else pad + p for p, pad in zip(PROMPTS, pads, strict=True)]
                input_ids = torch.tensor(ids)
                with torch.no_grad():
                    logits = model(input_ids=input_ids, attention_mask=(input_ids > 0).long(), use_cache=False).logits
                assert logits.shape[:2] == (3, width)
                for row, prompt in enumerate(PROMPTS):
                    window = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
                    with torch.no_grad():
                        hand = qwen(inputs_embeds=embedded(model, prompt)).logits[0, 4:]
                    torch.testing.assert_close(logits[row, window], hand, atol=1e-5, rtol=1e-5)
        return {"forget_x": 0.0}

    with as_it_was(qwen):
        soft_prompt(qwen, rows, processing_class=tokenizer, score=score, num_virtual_tokens=4, steps=[1])


def test_generation_continues_the_question_after_the_vectors(
    qwen: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Prompts of unequal length in one batch, against a loop without cache or padding."""
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))

    def score(model: Any) -> dict[str, float]:
        if isinstance(model, PeftModel):
            model.get_base_model().generation_config.eos_token_id = None
            answers = greedy_answers(model, PROMPTS, tokenizer=tokenizer, max_new_tokens=4, batch_size=3)
            for prompt, answer in zip(PROMPTS, answers, strict=True):
                states, said = embedded(model, prompt), []
                for _ in range(4):
                    with torch.no_grad():
                        token = int(qwen(inputs_embeds=states).logits[0, -1].argmax())
                    if token == tokenizer.eos_token_id:
                        break
                    said.append(token)
                    states = torch.cat([states, qwen.get_input_embeddings().weight[None, None, token]], dim=1)
                assert answer == tokenizer.decode(said, skip_special_tokens=True).strip()
                assert len(words) <= qwen.config.vocab_size
        return {"forget_x": 0.0}

    soft_prompt(qwen, rows, processing_class=tokenizer, score=score, num_virtual_tokens=3, steps=[2])


def test_the_vectors_learn_and_nothing_else_does(
    qwen: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = adapted(qwen).train()
    losses: list[float] = []

    def score(given: Any) -> dict[str, float]:
        if isinstance(given, PeftModel) and given.active_peft_config.is_prompt_learning:
            trained = [name for name, parameter in given.named_parameters() if parameter.requires_grad]
            assert trained == ["prompt_encoder.default.embedding.weight"]
            with torch.no_grad():
                states = [given.get_base_model()(inputs_embeds=embedded(given, prompt)).logits for prompt in PROMPTS]
            losses.append(
                sum(
                    float(torch.nn.functional.cross_entropy(logits[0, 8:-1], torch.tensor(prompt[1:])))
                    for logits, prompt in zip(states, PROMPTS, strict=True)
                )
            )
        return {"forget_x": 0.5}

    with as_it_was(model):
        result = soft_prompt(model, rows, processing_class=tokenizer, score=score, steps=[1, 20], learning_rate=0.1)
    assert losses[1] < 0.8 * losses[0]
    assert [point["step"] for point in result.curve] == [0, 1, 20]
    assert result.settings["num_virtual_tokens"] == 8


def test_equal_seeds_give_equal_vectors(
    qwen: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    for seed in (0, 0, 1):

        def score(model: Any, seed: int = seed) -> dict[str, float]:
            found[seed].append(model.prompt_encoder["default"].embedding.weight.detach().clone())
            return {"forget_x": 0.0}

        torch.rand(1)
        soft_prompt(
            *(qwen, rows),
            processing_class=tokenizer,
            score=score,
            steps=[1],
            seed=seed,
            before={"forget_x": 0.0},
        )
    assert torch.equal(*found[0]) and not torch.equal(found[0][0], found[1][0])


def test_a_failing_score_leaves_the_model_alone(
    qwen: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = adapted(qwen)
    with as_it_was(model), pytest.raises(RuntimeError, match="the score fails"):
        soft_prompt(model, rows, processing_class=tokenizer, score=Recorder(fail_at=1), steps=[1])
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        soft_prompt(model, rows, processing_class=tokenizer, score=Recorder(), num_virtual_tokens=0)
