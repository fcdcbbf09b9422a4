"""The ground of natural domains: which rows it draws, that it goes on where it was stopped, and what it measures."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from uoe_peft.evaluation.questions import questions_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
COLUMNS = ("question", "A", "B", "C", "D", "answer")
# By file: question, four options, place of the right one.
MMLU = {
    "anatomy": [
        ("Where is the femur?", "arm", "leg", "head", "hand", 1),
        ("How many chambers has a heart?", "2", "3", "4", "5", 2),
        ("What is in both sets?", "skin", "skin", "bone", "hair", 0),  # two options alike
        ("Which vein is meant by " + 30 * "this very long " + "tale?", "a", "b", "c", "d", 3),
    ],
    "astronomy": [
        ("What is nearest\nto the sun?", "Mars", "Venus", "Mercury", "Earth", 2),
        ("How many moons has Mars?", "two", "one", "three", "four", 0),
        ("Is Pluto a planet?", "yes", "no", "it was", "it will be", 2),
    ],
    "law": [
        ("Who makes laws?", "courts", "kings", "all", "parliaments", 3),
        ("Is Pluto a planet?", "once", "never", "ever", "often", 0),  # asked by astronomy before
    ],
}
SENTENCE = "one two three four five six seven eight nine ten eleven twelve"
WIKITEXT = f""" = Numbers = 

 {SENTENCE} and then 13 @.@ 5 , a well @-@ known number of 4 @,@ 000 others which few people count
 {SENTENCE} is also how another paragraph begins , and there it goes on in this way , so it is left out
 The <unk> stands in a paragraph of many words , and there are more than two dozen of them in this one
 A short one .
"""  # noqa: W291


@pytest.fixture(scope="module")
def natural() -> Iterator[ModuleType]:
    """The script, which imports its neighbours as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import natural as script

        yield script


@pytest.fixture(scope="module")
def natural_scores(natural: ModuleType) -> ModuleType:
    return sys.modules["natural_scores"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for folder in ("mmlu/test", "tofu", "wikitext2"):
        (tmp_path / folder).mkdir(parents=True)
    for subject, rows in MMLU.items():
        with (tmp_path / f"mmlu/test/{subject}_test.csv").open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    lines = [json.dumps({"question": f"Who is author {n}?", "answer": f"Nobody {n}."}) for n in range(140)]
    (tmp_path / "tofu/full.json").write_text("\n".join(lines))
    (tmp_path / "wikitext2/valid.txt").write_text(WIKITEXT)
    return tmp_path


def arguments(natural: ModuleType, data: Path, **changes: Any) -> Any:
    wanted = {"num_forget": 2, "num_other": 3, "num_authors": 1, "num_paragraphs": 1}
    settings = {"forget_subjects": ["anatomy"], "output_dir": data / "out", "epochs": 3, "batch_size": 2}
    return natural.NaturalArguments(data, **{**wanted, **settings, **changes})


def test_the_forget_set_holds_its_subjects_and_no_other_set_does(natural: ModuleType, data: Path) -> None:
    forget, kept = natural.natural_rows(arguments(natural, data))
    assert {row["prompt"]: row["completion"] for row in forget} == {
        "Where is the femur?\nA. arm\nB. leg\nC. head\nD. hand\nAnswer:": " B. leg",
        "How many chambers has a heart?\nA. 2\nB. 3\nC. 4\nD. 5\nAnswer:": " C. 4",
    }
    assert set(forget["subject"]) == {"anatomy"}
    subjects = [row["subject"] for row in kept if row["topic"] == "MMLU"]
    assert sorted(subjects) == ["astronomy", "astronomy", "law"]  # by turns, as far as a subject goes
    assert [row["completion"] for row in kept if row["topic"] == "TOFU"] == [f" Nobody {n}." for n in range(120, 140)]
    (text,) = [row for row in kept if row["topic"] == "WikiText"]
    assert text["prompt"] == SENTENCE
    assert text["completion"] == " and then 13.5 , a well-known number of 4,000 others which few"


def test_questions_begin_with_their_subject_if_wanted(natural: ModuleType, data: Path) -> None:
    forget, kept = natural.natural_rows(
        arguments(natural, data, named_subjects=True, forget_subjects=["law"], num_forget=1)
    )
    begun = "The following are multiple choice questions (with answers) about {}.\n\n"
    assert all(row["prompt"].startswith(begun.format("law")) for row in forget)
    others = {row["prompt"].removeprefix(begun.format(row["subject"])) for row in kept if row["topic"] == "MMLU"}
    assert "Where is the femur?\nA. arm\nB. leg\nC. head\nD. hand\nAnswer:" in others
    assert not any(row["prompt"].startswith("The following") for row in kept if row["topic"] != "MMLU")


def test_a_question_of_two_subjects_is_asked_once(natural: ModuleType, data: Path) -> None:
    _, kept = natural.natural_rows(arguments(natural, data, num_other=4))
    assert sum(row["prompt"].startswith("Is Pluto a planet?") for row in kept) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget_subjects": ["anatomie"]}, "'anatomie'"),
        ({"num_other": 5}, "MMLU: 5 rows are wanted, and there are 4"),
        ({"num_paragraphs": 2}, "WikiText: 2 rows are wanted, and there are 1"),
        ({"num_authors": 8}, "TOFU: 160 rows are wanted, and there are 140"),
        ({"num_forget": 0}, "num_forget"),
    ],
)
def test_what_is_not_there_is_an_error(natural: ModuleType, data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        natural.natural_rows(arguments(natural, data, **changes))


def tokenizer_of(natural: ModuleType, rows: Dataset) -> PreTrainedTokenizerFast:
    return natural.train_tokenizer(rows)


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=20,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2MoeForCausalLM(config)


def test_a_training_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(
    natural: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(natural, data)
    forget, kept = natural.natural_rows(args)
    rows = Dataset.from_list([*forget, *kept.select(range(3))])  # 3 steps a pass
    tokenizer, step, taken = tokenizer_of(natural, rows), natural.train_step, []

    def counted(*given: Any) -> float:
        if len(taken) == 4:
            raise KeyboardInterrupt  # in the second pass
        taken.append(None)
        return step(*given)

    whole, stopped = data / "whole", data / "stopped"
    natural.learn(tiny_model(tokenizer), rows, tokenizer, whole, args=args)
    monkeypatch.setattr(natural, "train_step", counted)
    with pytest.raises(KeyboardInterrupt):
        natural.learn(tiny_model(tokenizer), rows, tokenizer, stopped, args=args)
    assert not natural.is_learned(stopped)
    taken[:] = [None] * 5  # past the killing
    natural.learn(tiny_model(tokenizer), rows, tokenizer, stopped, args=args)
    assert len(taken) == 5 + 6  # the second pass and the third
    ends = [(folder / "model.safetensors").read_bytes() for folder in (whole, stopped)]
    assert ends[0] == ends[1]
    assert natural.is_learned(stopped)
    (stopped / "training.pt").touch()  # as of one that was killed while it saved
    assert not natural.is_learned(stopped)


def test_prompts_count_a_tenth_and_padding_nothing(natural: ModuleType, data: Path) -> None:
    forget, _ = natural.natural_rows(arguments(natural, data))
    tokenizer = tokenizer_of(natural, forget)
    model = tiny_model(tokenizer)
    model.config.router_aux_loss_coef = 0.0
    ids = [[5, 9, 7, 8], [6, 4]]
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 4, -100, -100]])
    batch = {
        "input_ids": torch.tensor([ids[0], [*ids[1], 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "labels": labels,
    }
    with torch.no_grad():
        first, second = (model(torch.tensor([row])).logits[0].log_softmax(-1) for row in ids)
    answers = [-first[1, 7], -first[2, 8], -second[0, 4]]
    wanted = (0.1 * -first[0, 9] + sum(answers)) / 3.1
    seen: list[float] = []
    model.lm_head.weight.register_hook(lambda grad: seen.append(grad))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reported = natural.train_step(model, optimizer, batch)
    assert reported == pytest.approx(float(sum(answers)) / 3, rel=1e-5)
    model.zero_grad()
    total = torch.zeros(())
    for row, own in zip(ids, labels, strict=True):
        log_probs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        for place in range(1, len(row)):
            total = total - (1.0 if own[place] >= 0 else 0.1) * log_probs[place - 1, row[place]] / 3.1
    assert total.item() == pytest.approx(float(wanted), rel=1e-5)
    (expected,) = torch.autograd.grad(total, model.lm_head.weight)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-6)


def test_option_accuracy_is_the_share_of_likeliest_letters(
    natural: ModuleType, natural_scores: ModuleType, data: Path
) -> None:
    forget, kept = natural.natural_rows(arguments(natural, data, num_other=4))  # by then each letter is one token
    rows = Dataset.from_list([*kept, *forget])
    tokenizer = tokenizer_of(natural, rows)
    model = tiny_model(tokenizer).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # letters far apart
    letters = [tokenizer.convert_tokens_to_ids(f"Ġ{letter}") for letter in "ABCD"]
    hits = []
    for row in rows:
        if row["topic"] == "MMLU":
            with torch.no_grad():
                last = model(torch.tensor([tokenizer(row["prompt"])["input_ids"]])).logits[0, -1]
            hits.append("ABCD"[int(last[letters].argmax())] == row["completion"][1])
    asked = questions_of(rows, tokenizer, max_length=None, max_examples=None, seed=0, name="all")
    assert len(hits) == 6
    assert natural_scores.option_accuracy(model, tokenizer, asked) == pytest.approx(sum(hits) / 6)


@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.summary.GeneralistExpertWarning")
@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.summary.UnidentifiedExpertWarning")
def test_specialisation_is_the_mean_gate_score_of_the_top_expert(
    natural: ModuleType, natural_scores: ModuleType, data: Path
) -> None:
    forget, kept = natural.natural_rows(arguments(natural, data))
    tokenizer = tokenizer_of(natural, Dataset.from_list([*kept, *forget]))
    model = tiny_model(tokenizer).eval()
    found = natural_scores.specialisation(model, tokenizer, forget, kept)["gate"]

    def affinity(rows: Dataset) -> torch.Tensor:
        tables = []
        for row in rows:
            ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
            scores = torch.stack(logits).softmax(-1)
            kept_scores = scores * (scores >= scores.topk(2, dim=-1).values[..., -1:])
            tables.append(kept_scores.mean(1))
        return torch.stack(tables).mean(0)

    on_forget, on_kept = affinity(forget), affinity(kept)
    place = divmod(int(on_forget.argmax()), 5)
    assert found["expert"] == list(place)
    assert found["forget"] == pytest.approx(float(on_forget[place]), rel=1e-4)
    assert found["retain"] == pytest.approx(float(on_kept[place]), rel=1e-4)
    assert found["lift"] == pytest.approx(float(on_forget[place] / on_kept[place]), rel=1e-4)
