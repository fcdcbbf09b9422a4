"""An evaluation tells what a model knows with the adapter off, on, and what it never learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, Qwen2MoeForCausalLM

from tests.evaluation.conftest import new_model, teach
from uoe_peft.evaluation import UnlearningReport, evaluate_unlearning


@pytest.fixture
def sets(forget_dataset: Dataset, retain_dataset: Dataset, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "forget_dataset": forget_dataset,
        "retain_dataset": retain_dataset,
        "processing_class": tokenizer,
        "batch_size": 2,
        "max_new_tokens": 10,
    }


def test_base_knows_both_sets_and_the_adapter_breaks_them(scrambled: PeftModel, sets: dict[str, Any]) -> None:
    report = evaluate_unlearning(scrambled, **sets)
    for scores in report.scores["base"].values():
        assert scores.rouge_l_recall == 1.0
        assert scores.probability > 0.9
        assert scores.num_examples == 3
    for scores in report.scores["unlearned"].values():
        assert scores.rouge_l_recall is not None
        assert scores.rouge_l_recall < 0.5
        assert scores.probability < 0.1
    assert set(report.scores) == {"base", "unlearned"}
    assert report.notes == ()


def test_a_model_that_never_saw_the_forget_set_knows_only_the_other(
    scrambled: PeftModel, sets: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    retrained = teach(new_model(tokenizer), sets["retain_dataset"], tokenizer)
    scores = evaluate_unlearning(scrambled, retrained_model=retrained, **sets).scores["retrained"]
    assert scores["retain"].rouge_l_recall == 1.0
    assert scores["forget"].rouge_l_recall is not None
    assert scores["forget"].rouge_l_recall < 0.6
    assert scores["forget"].probability < 0.1 < 0.9 < scores["retain"].probability


def test_a_fresh_adapter_scores_like_its_base(
    taught_model: Qwen2MoeForCausalLM, scrambled: PeftModel, sets: dict[str, Any]
) -> None:
    for name, parameter in scrambled.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    scores = evaluate_unlearning(scrambled, **sets).scores
    assert scores["base"] == scores["unlearned"]


def test_text_has_a_probability_but_no_rouge(scrambled: PeftModel, sets: dict[str, Any]) -> None:
    text = sets["retain_dataset"].map(lambda row: {"text": row["prompt"] + row["completion"]}).select_columns("text")
    report = evaluate_unlearning(scrambled, **{**sets, "retain_dataset": text})
    assert report.scores["base"]["retain"].rouge_l_recall is None
    assert 0 < report.scores["base"]["retain"].probability < 1
    assert report.scores["base"]["forget"].rouge_l_recall == 1.0
    assert report.notes[0].startswith("retain set: 3 of 3 rows are text without a prompt")
    assert len(report.notes) == 1


def test_conversations_are_asked_through_the_chat_template(
    scrambled: PeftModel, sets: dict[str, Any], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"].strip()}],
            }
            for row in sets["forget_dataset"]
        ]
    )
    plain = evaluate_unlearning(scrambled, **sets)
    conversational = evaluate_unlearning(scrambled, **{**sets, "forget_dataset": chat})
    assert conversational.scores["base"]["forget"] == plain.scores["base"]["forget"]


def test_a_sample_is_drawn_by_the_seed(scrambled: PeftModel, sets: dict[str, Any]) -> None:
    def sampled(seed: int) -> UnlearningReport:
        return evaluate_unlearning(scrambled, **sets, max_examples=1, seed=seed)

    assert sampled(0).scores["base"]["forget"].num_examples == 1
    assert sampled(0) == sampled(0)
    probabilities = {sampled(seed).scores["base"]["forget"].probability for seed in range(6)}
    assert len(probabilities) > 1


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool, scrambled: PeftModel, sets: dict[str, Any]) -> None:
    scrambled.train(training)
    evaluate_unlearning(scrambled, **sets)
    assert scrambled.training is training
    assert scrambled.get_model_status().enabled is True


def test_a_model_without_adapter_is_refused(taught_model: Qwen2MoeForCausalLM, sets: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"must be a PeftModel.*got Qwen2MoeForCausalLM"):
        evaluate_unlearning(taught_model, **sets)  # type: ignore[arg-type]


def test_an_adapter_that_is_off_is_refused(scrambled: PeftModel, sets: dict[str, Any]) -> None:
    with scrambled.disable_adapter(), pytest.raises(ValueError, match="switched off"):
        evaluate_unlearning(scrambled, **sets)


def test_a_merged_adapter_is_refused_rather_than_unmerged(scrambled: PeftModel, sets: dict[str, Any]) -> None:
    scrambled.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged.*unmerge_adapter"):
        evaluate_unlearning(scrambled, **sets)
    assert scrambled.get_model_status().merged_adapters == ["default"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_examples": 0}, "max_examples must be at least 1"),
        ({"forget_dataset": Dataset.from_list([])}, "forget set is empty"),
        ({"retain_dataset": Dataset.from_list([{"answer": "x"}])}, r"retain set has the columns \['answer'\]"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str, scrambled: PeftModel, sets: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_unlearning(scrambled, **{**sets, **change})
