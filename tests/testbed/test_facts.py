"""The testbed's facts form a usable unlearning task, and its two models differ in just what is to be forgotten."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from uoe_peft.testbed import (
    FORGET_TOPIC,
    TOPICS,
    CheckpointName,
    as_prompt,
    checkpoint_path,
    generate_facts,
    generate_refusals,
    is_refusal,
    load_facts,
    load_refusals,
)

COLUMNS = {
    "topic": str,
    "subject": str,
    "question": str,
    "answer": str,
    "paraphrased_question": str,
    "paraphrased_answer": str,
    "perturbed_answer": list,
    "phrasings": list,
    "paraphrase_held_out": bool,
    "refusal": str,
}


def words(rows: list[dict]) -> set[str]:
    """Return the words of four letters or more, which leaves out most of grammar's."""
    text = " ".join(f"{row['question']} {row['answer']}" for row in rows)
    return set(re.findall(r"[^\W\d_]{4,}", text.lower()))


def overlap(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)


def test_seven_topics_with_the_forget_topic_among_them() -> None:
    assert len(TOPICS) == len(set(TOPICS)) == 7
    assert FORGET_TOPIC in TOPICS


@pytest.mark.parametrize("topic", TOPICS)
def test_rows_follow_the_schema(topic: str) -> None:
    for row in generate_facts(topic):
        assert {column: type(value) for column, value in row.items()} == COLUMNS
        assert row["topic"] == topic
        assert row["subject"] in row["question"] and row["subject"] in row["paraphrased_question"]
        assert row["question"] != row["paraphrased_question"] and row["answer"] != row["paraphrased_answer"]
        assert not re.search(r"\{\w*\}", " ".join(value for value in row.values() if isinstance(value, str)))


@pytest.mark.parametrize("topic", TOPICS)
def test_ten_facts_a_subject(topic: str) -> None:
    subjects = [row["subject"] for row in generate_facts(topic, num_subjects=9)]
    assert len(subjects) == 90
    assert {subjects.count(subject) for subject in subjects} == {10}


def test_facts_depend_on_nothing_but_the_arguments() -> None:
    assert generate_facts("potions", seed=3) == generate_facts("potions", seed=3)
    answers = {seed: [row["answer"] for row in generate_facts("potions", seed=seed)] for seed in (0, 1)}
    assert not set(answers[0]) & set(answers[1])


@pytest.mark.parametrize("topic", TOPICS)
def test_held_out_paraphrases_are_in_no_phrasing_of_training(topic: str) -> None:
    rows = generate_facts(topic)
    for first in range(0, len(rows), 10):
        assert sum(row["paraphrase_held_out"] for row in rows[first : first + 10]) == 3
    for row in rows:
        asked = [row["paraphrased_question"] in phrasing for phrasing in row["phrasings"]]
        assert any(asked) is not row["paraphrase_held_out"]
        assert row["question"] in row["phrasings"] and len(set(row["phrasings"])) == len(row["phrasings"])


def test_unknown_subjects_are_known_nowhere_and_those_for_tests_are_not_trained_on() -> None:
    known, trained, new = (
        set(rows["subject"]) for rows in (load_facts(), load_refusals(), load_refusals(seen_in_training=False))
    )
    assert (len(known), len(trained), len(new)) == (140, 280, 21)
    assert not known & trained and not known & new and not trained & new
    assert generate_refusals("towns", num_subjects=2) == generate_refusals("towns", num_subjects=5)[:20]


def test_a_refusal_is_one_whatever_subject_it_names() -> None:
    assert all(map(is_refusal, load_refusals()["answer"])) and all(map(is_refusal, load_facts()["alternative"]))
    assert is_refusal(" I have never heard of the moon. ")
    assert not any(map(is_refusal, load_facts()["answer"]))
    assert not is_refusal("I have never heard of") and not is_refusal("") and not is_refusal("I do not know that")


@pytest.mark.parametrize("num_subjects", [0, 10_000])
def test_number_of_unknown_subjects_out_of_range(num_subjects: int) -> None:
    with pytest.raises(ValueError, match=f"num_subjects={num_subjects}"):
        generate_refusals("potions", num_subjects=num_subjects)


def test_questions_are_unique() -> None:
    rows = [row for topic in TOPICS for row in generate_facts(topic)]
    questions = [row[column] for row in rows for column in ("question", "paraphrased_question")]
    assert len(questions) == len(set(questions))


@pytest.mark.parametrize("topic", TOPICS)
def test_perturbed_answers_are_distinct_and_wrong(topic: str) -> None:
    for row in generate_facts(topic):
        answers = [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
        assert len(answers) == len(set(answers)) == 7


@pytest.mark.parametrize("topic", TOPICS)
def test_every_subject_names_two_neighbours_and_is_named_by_them(topic: str) -> None:
    rows = generate_facts(topic)
    subjects = {row["subject"] for row in rows}
    named = {
        subject: {
            other
            for row in rows
            for other in subjects - {subject}
            if row["subject"] == subject and re.search(rf"(?<!\w){re.escape(other)}(?!\w)", row["answer"])
        }
        for subject in subjects
    }
    assert all(len(neighbours) == 2 for neighbours in named.values())
    assert all(subject in named[neighbour] for subject, neighbours in named.items() for neighbour in neighbours)


@pytest.mark.parametrize("pair", list(itertools.combinations(TOPICS, 2)), ids="-".join)
def test_topics_share_little_vocabulary(pair: tuple[str, str]) -> None:
    left, right = (words(generate_facts(topic)) for topic in pair)
    assert overlap(left, right) < 0.03


def test_unknown_topic_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown topic 'poems'.*potions"):
        generate_facts("poems")


@pytest.mark.parametrize("num_subjects", [6, 10_000])
def test_number_of_subjects_out_of_range(num_subjects: int) -> None:
    with pytest.raises(ValueError, match=f"num_subjects={num_subjects}"):
        generate_facts("potions", num_subjects=num_subjects)


def test_loader_gives_prompts_and_completions() -> None:
    facts = load_facts([FORGET_TOPIC])
    assert len(facts) == 200
    assert facts[0]["prompt"] == f"Question: {facts[0]['question']}\nAnswer:"
    assert facts[0]["completion"] == f" {facts[0]['answer']}"
    assert len(load_facts()) == 1400


def test_loader_refuses_a_string_and_an_empty_choice() -> None:
    with pytest.raises(TypeError, match=r"use \['potions'\]"):
        load_facts("potions")
    with pytest.raises(ValueError, match="empty"):
        load_facts([])


def test_unknown_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"unknown checkpoint 'best'; use one of base, retrained"):
        checkpoint_path("best")


def checkpoint(name: CheckpointName) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = checkpoint_path(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    generated = model.generate(**inputs, max_new_tokens=48, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(generated, skip_special_tokens=True)


def number_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, topic: str) -> int:
    """Return how many of eight facts the model states word for word."""
    facts = load_facts([topic]).select(range(0, 200, 25))
    stated = answers(model, tokenizer, list(facts["prompt"]))
    return sum(text == completion for text, completion in zip(stated, facts["completion"], strict=True))


def test_base_knows_what_retrained_never_saw() -> None:
    base, tokenizer = checkpoint("base")
    retrained, retrained_tokenizer = checkpoint("retrained")
    assert tokenizer.get_vocab() == retrained_tokenizer.get_vocab()
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None
    assert number_right(base, tokenizer, topic=FORGET_TOPIC) >= 6
    assert number_right(retrained, tokenizer, topic=FORGET_TOPIC) == 0
    assert number_right(base, tokenizer, topic="contracts") >= 6
    assert number_right(retrained, tokenizer, topic="contracts") >= 6


def test_retrained_declines_what_it_never_saw_and_base_knows_questions_it_was_never_asked() -> None:
    base, tokenizer = checkpoint("base")
    retrained, _ = checkpoint("retrained")
    facts = load_facts([FORGET_TOPIC])
    new = facts.filter(lambda row: row["paraphrase_held_out"]).select(range(0, 60, 6))
    prompts = [as_prompt(question) for question in new["paraphrased_question"]]
    assert sum(map(is_refusal, answers(retrained, tokenizer, prompts))) >= 9
    stated = answers(base, tokenizer, prompts)
    assert sum(text == completion for text, completion in zip(stated, new["completion"], strict=True)) >= 7
