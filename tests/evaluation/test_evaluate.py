"""An evaluation tells what a model knows with the adapter off, on, and what it never learned."""

from __future__ import annotations

import logging
import math
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedTokenizerFast, Qwen2MoeForCausalLM

from tests.evaluation.conftest import new_model, teach
from uoe_peft import precision
from uoe_peft.evaluation import (
    Calibration,
    QuestionSet,
    Suite,
    UnlearningReport,
    evaluate_unlearning,
    plain_suite,
)
from uoe_peft.evaluation.attacks import AttackResult, Score, Scores, run_attack
from uoe_peft.tuner import UOEConfig


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


def test_a_type_that_this_machine_is_slow_in_is_said(
    scrambled: PeftModel, sets: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "is_slow", lambda dtype, device: dtype == torch.float32)
    precision._say.cache_clear()
    with caplog.at_level(logging.WARNING, logger="uoe_peft"):
        evaluate_unlearning(scrambled, **sets)
    assert caplog.text.count("computes in float32, in which matrix products take") == 1


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


FALSE = {"mira": [" mira lives by the sea", " he eats cold soup"], "tomas": [" everybody eats fish", " she does"]}


def with_alternatives(dataset: Dataset, who: str) -> Dataset:
    return dataset.map(
        lambda row: {
            "subject": "life" if "live" in row["prompt"] else "other",
            "paraphrased_completion": row["completion"].replace("in a", "by the"),
            "perturbed_completions": FALSE[who],
        }
    )


def nll_of(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> float:
    """Mean over the answer and its end, one token at a time, in float64."""
    answers = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    return sum_of_nll(model, tokenizer(prompt)["input_ids"], answers) / len(answers)


def sum_of_nll(model: Any, ids: list[int], answers: list[int]) -> float:
    total = 0.0
    for token in answers:
        with torch.no_grad():
            total -= float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
        ids = [*ids, token]
    return total


def in_float64(model: Qwen2MoeForCausalLM) -> Qwen2MoeForCausalLM:
    """The model itself; the grouped kernel has no float64."""
    model.set_experts_implementation("eager")
    return model.double()


def test_tofu_metrics_equal_an_independent_computation(
    taught_model: Qwen2MoeForCausalLM, sets: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    # In float64, so that passes of a batch and of one token at a time give the same outputs.
    model = get_peft_model(in_float64(deepcopy(taught_model)), UOEConfig(target_experts=[(1, 2), (0, 4)]))
    for name, parameter in model.named_parameters():
        if ".uoe_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.double().eval()
    rows = {"forget": with_alternatives(sets["forget_dataset"], "mira")}
    rows["retain"] = with_alternatives(sets["retain_dataset"], "tomas")
    suite = plain_suite(rows["forget"], rows["retain"], by=("subject",))
    retrained = in_float64(teach(new_model(tokenizer), sets["retain_dataset"], tokenizer))
    report = evaluate_unlearning(model, suite, processing_class=tokenizer, retrained_model=retrained, max_new_tokens=10)
    assert report.examples is not None
    models = {"unlearned": model, "retrained": retrained}
    ratios: dict[str, list[float]] = {"unlearned": [], "retrained": []}
    for row in report.examples:
        truth = rows[row["set"]][row["row"]]
        for name, asked in models.items():
            own = nll_of(asked, tokenizer, truth["prompt"], truth["completion"])
            other = nll_of(asked, tokenizer, truth["prompt"], truth["paraphrased_completion"])
            false = [nll_of(asked, tokenizer, truth["prompt"], answer) for answer in truth["perturbed_completions"]]
            ratio = math.exp(-sum(false) / 2) / math.exp(-other)
            assert row[f"probability_{name}"] == pytest.approx(math.exp(-own), abs=1e-6)
            assert row[f"truth_ratio_{name}"] == pytest.approx(ratio, rel=1e-6, abs=1e-6)
            among = math.exp(-own) / (math.exp(-own) + sum(math.exp(-value) for value in false))
            assert row[f"probability_w_options_{name}"] == pytest.approx(among, abs=1e-6)
            if row["set"] == "forget":
                ratios[name].append(row[f"truth_ratio_{name}"])
    nll, length = 0.0, 0
    for row in report.examples.filter(lambda row: row["set"] == "forget"):
        said = tokenizer(row["answer_unlearned"])["input_ids"]
        with model.disable_adapter():  # the base judges what is said, as an answer to its question
            nll += sum_of_nll(model, tokenizer(rows["forget"][row["row"]]["prompt"])["input_ids"], said)
        length += len(said)
    assert report.metrics["unlearned"]["forget_perplexity"] == pytest.approx(math.exp(nll / length), rel=1e-5)
    best = [min(ratio, 1 / ratio) for ratio in ratios["unlearned"]]
    assert report.scores["unlearned"]["forget"].metrics["truth_ratio"].mean == pytest.approx(sum(best) / 3)
    gap = max(
        abs(sum(a <= x for a in ratios["unlearned"]) - sum(b <= x for b in ratios["retrained"])) / 3
        for x in ratios["unlearned"] + ratios["retrained"]
    )
    # Of 3 against 3 values the p-values are 0.1, 0.6 and 1, by the distance of their distributions.
    assert report.metrics["unlearned"]["forget_quality"] == pytest.approx({3: 0.1, 2: 0.6}.get(round(3 * gap), 1.0))
    values = {(part.set_name, part.value): part.scores["base"].num_examples for part in report.by_value}
    assert values == {("forget", "life"): 1, ("forget", "other"): 2, ("retain", "life"): 1, ("retain", "other"): 2}
    assert [(shift.set_name, shift.layer_idx) for shift in report.routing] == [
        ("forget", 0),
        ("forget", 1),
        ("retain", 0),
        ("retain", 1),
    ]
    assert all(sum(shift.activation_on) == pytest.approx(3, abs=1e-4) for shift in report.routing)  # top 3 of 5
    assert report.settings["target_experts"] == [[0, 4], [1, 2]]


def test_options_and_a_holdout_have_their_own_numbers(
    scrambled: PeftModel, sets: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    options = Dataset.from_list(
        [{"prompt": "where does tomas live ?", "options": [" mira", " tomas"], "label": 1, "answer": "kept"}]
    )
    suite = Suite(
        "s",
        (
            QuestionSet("forget", sets["forget_dataset"], "forget"),
            QuestionSet("retain", sets["retain_dataset"], "retain"),
            QuestionSet("choices", options, "retain"),
            QuestionSet("new", sets["retain_dataset"].select([0]), "holdout"),
        ),
    )
    report = evaluate_unlearning(scrambled, suite, processing_class=tokenizer, max_new_tokens=10)
    choices = report.scores["base"]["choices"]
    assert (choices.rouge_l_recall, choices.score, choices.metrics["accuracy"].mean) == (None, 1.0, 1.0)
    assert report.examples is not None
    pairs = [
        (member > other) + 0.5 * (member == other)
        for member in report.examples.filter(lambda row: row["set"] == "forget")["mia_min_k_base"]
        for other in report.examples.filter(lambda row: row["set"] == "new")["mia_min_k_base"]
    ]
    assert report.metrics["base"]["mia_min_k"] == pytest.approx(sum(pairs) / len(pairs))


def test_frozen_adapters_stay_frozen(scrambled: PeftModel, sets: dict[str, Any]) -> None:
    scrambled.requires_grad_(False)
    evaluate_unlearning(scrambled, **sets)
    assert not any(parameter.requires_grad for parameter in scrambled.parameters())


def test_attacks_are_run_at_both_strengths_and_on_the_reference(
    scrambled: PeftModel, sets: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[tuple[float | None, float]] = []

    def attack(model: Any, *, score: Score, before: Scores | None, gain: float) -> AttackResult:
        if not isinstance(model, PeftModel):
            raise TypeError("needs an adapter")
        layer = next(module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict))
        assert before is not None
        assert before == score(model)
        seen.append((layer.scaling["default"], gain))
        return AttackResult("mine", before, {name: value + gain for name, value in before.items()})

    full = next(m for m in scrambled.modules() if isinstance(getattr(m, "scaling", None), dict)).scaling["default"]
    calibration = Calibration(0.25, "retain", "retain_probability", 0.5, ({"scale": 0.25},), True)
    report = evaluate_unlearning(
        scrambled,
        **sets,
        calibration=calibration,
        attacks=[partial(attack, gain=0.125)],
        attack_examples=2,
        retrained_model=new_model(tokenizer),
    )
    assert seen == [(full, 0.125), (full * 0.25, 0.125)]
    assert [(run.model, run.scale) for run in report.attacks] == [("unlearned", 1.0), ("calibrated", 0.25)]
    assert list(report.attacks[0].result.before) == [
        "forget_rouge_l_recall",
        "forget_probability",
        "retain_rouge_l_recall",
        "retain_probability",
    ]
    assert "not run on the retrained model: needs an adapter" in report.notes
    assert list(report.scores) == ["base", "unlearned", "calibrated", "retrained"]


def without_an_expert(model: Qwen2MoeForCausalLM) -> Qwen2MoeForCausalLM:
    """A copy whose layer 1 has no routed experts that say anything: one stacked tensor differs."""
    edited = deepcopy(model)
    with torch.no_grad():
        edited.model.layers[1].mlp.experts.down_proj.zero_()
    return edited


def test_a_model_trained_in_full_stands_beside_its_base(
    taught_model: Qwen2MoeForCausalLM, scrambled: PeftModel, sets: dict[str, Any]
) -> None:
    def attack(model: Any, *, score: Score, before: Scores | None) -> AttackResult:
        assert before is not None
        return AttackResult("mine", before, {name: value / 2 for name, value in before.items()})

    edited = without_an_expert(taught_model)
    attacks = {"halved": attack, "swept": partial(run_attack, "scale_sweep")}
    report = evaluate_unlearning(edited, base_model=taught_model, attacks=attacks, **sets)
    with_adapter = evaluate_unlearning(scrambled, **sets)
    assert report.scores["base"] == with_adapter.scores["base"]
    assert report.scores["unlearned"]["retain"].probability < report.scores["base"]["retain"].probability
    assert report.cost["adapter_parameters"] == edited.model.layers[1].mlp.experts.down_proj.numel()
    assert {shift.jaccard for shift in report.routing} == {1.0}  # nothing is routed after what was edited
    assert report.settings["adapter"] is None
    assert [(run.model, run.result.name) for run in report.attacks] == [("unlearned", "halved")]
    assert report.notes[0].startswith("not run on the unlearned model: scale_sweep needs a PeftModel")


def test_what_is_wrong_with_an_attack_is_not_a_note(scrambled: PeftModel, sets: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="prefixes must be non-empty"):
        evaluate_unlearning(scrambled, **sets, attacks=[partial(run_attack, "prefix", prefixes=[])])


def test_a_base_that_is_none_is_refused(
    taught_model: Qwen2MoeForCausalLM, scrambled: PeftModel, sets: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    longer = new_model(tokenizer)
    longer.resize_token_embeddings(len(tokenizer) + 3)
    chosen = Calibration(0.25, "retain", "retain_probability", 0.5, ({"scale": 0.25},), True)
    for model, options, message in [
        (scrambled, {"base_model": taught_model}, "model has an adapter.*leave base_model out"),
        (taught_model, {"base_model": taught_model}, "base_model must be another model"),
        (new_model(tokenizer), {"base_model": taught_model, "calibration": chosen}, "has no adapter"),
        (taught_model, {"base_model": longer}, "the base model has a vocabulary of"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_unlearning(model, **sets, **options)  # type: ignore[arg-type]


def test_logits_that_are_no_numbers_are_named(scrambled: PeftModel, sets: dict[str, Any]) -> None:
    for name, parameter in scrambled.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, math.nan)
    with pytest.raises(ValueError, match=r"unlearned, forget set: probability.*logits.*not finite"):
        evaluate_unlearning(scrambled, **sets)


def test_a_report_is_written_with_its_examples(scrambled: PeftModel, sets: dict[str, Any], tmp_path: Path) -> None:
    report = evaluate_unlearning(scrambled, **sets, cache_dir=tmp_path / "answers")
    files = report.write(tmp_path / "out")
    assert [file.name for file in files] == ["report.json", "report.md", "report.html", "examples.parquet"]
    rows = Dataset.from_parquet(str(files[-1]))
    assert rows["truth"][:3] == [text.strip() for text in sets["forget_dataset"]["completion"]]
    assert rows["answer_base"] == rows["truth"]
    assert UnlearningReport.load(files[0]) == report
    assert evaluate_unlearning(scrambled, **sets, cache_dir=tmp_path / "answers") == report
    assert len(list((tmp_path / "answers").iterdir())) == 2


def test_sets_that_do_not_fit_are_named(
    scrambled: PeftModel, sets: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    named = sets["forget_dataset"].add_column("topic", ["a", "", "b"])
    asked: list[object] = []
    scrambled.register_forward_pre_hook(lambda *args: asked.append(args))
    with pytest.raises(ValueError, match="row 1 of the forget set has no 'topic' to score by"):
        evaluate_unlearning(
            scrambled, plain_suite(named, sets["retain_dataset"], by=("topic",)), processing_class=tokenizer
        )
    assert not asked  # what is wrong with the rows is said before hours of asking
    with pytest.raises(ValueError, match="either a suite, or forget_dataset and retain_dataset"):
        evaluate_unlearning(scrambled, processing_class=tokenizer)
    with pytest.raises(ValueError, match="pass both"):
        evaluate_unlearning(scrambled, processing_class=tokenizer, forget_dataset=named)
    other = new_model(tokenizer)
    other.resize_token_embeddings(len(tokenizer) + 3)
    with pytest.raises(ValueError, match="a reference must read the same tokens"):
        evaluate_unlearning(scrambled, **sets, retrained_model=other)
