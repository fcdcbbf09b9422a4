"""Made-up facts in the schema of TOFU, from a seed."""

from __future__ import annotations

import itertools
import random
from string import Formatter

from uoe_peft.testbed.topic import FactKind, Topic
from uoe_peft.testbed.topics import AUTHORS, BOARDGAME, CONTRACTS, LIBRARY, MISSIONS, POTIONS, TOWNS

NUM_PERTURBED = 5  # as many wrong answers as TOFU gives
_MIN_SUBJECTS = NUM_PERTURBED + 2  # every wrong answer names another neighbour: not the true one, nor the subject

_TOPICS = {topic.name: topic for topic in (AUTHORS, CONTRACTS, POTIONS, MISSIONS, BOARDGAME, LIBRARY, TOWNS)}
TOPICS: tuple[str, ...] = tuple(_TOPICS)


def generate_facts(topic: str, *, num_subjects: int = 20, seed: int = 0) -> list[dict[str, str | list[str]]]:
    """Return the facts of a topic, every one true in its made-up world only.

    The subjects of a topic stand in a ring; some facts of a subject name the next or the previous one
    (the antidote of a potion is another potion), so that facts to forget have neighbours.

    Args:
        topic: One of `TOPICS`.
        num_subjects: How many subjects; ten facts are told about each. At least 7, at most the number of
            names that the topic can form (80 to 140).
        seed: Names and facts are drawn from it. Equal arguments give equal facts on every platform.

    Returns:
        One row a fact with the columns `topic`, `subject`, `question`, `answer`, `paraphrased_question`,
        `paraphrased_answer` (all `str`) and `perturbed_answer` (five wrong answers of the answer's form).

    Raises:
        ValueError: `topic` is unknown, or `num_subjects` is out of range.
    """
    if topic not in _TOPICS:
        raise ValueError(f"unknown topic {topic!r}; use one of {', '.join(sorted(_TOPICS))}")
    world = _TOPICS[topic]
    names = [world.subject_form.format(*parts) for parts in itertools.product(*world.subject_parts)]
    if not _MIN_SUBJECTS <= num_subjects <= len(names):
        raise ValueError(
            f"topic {topic!r} has names for {_MIN_SUBJECTS} to {len(names)} subjects, got num_subjects={num_subjects}"
        )
    rng = random.Random(f"{topic}/{seed}")  # a string seed is hashed by SHA-512: equal on every platform
    subjects = rng.sample(names, num_subjects)
    return [
        _fact(world, kind, subjects=subjects, position=position, rng=rng)
        for position in range(num_subjects)
        for kind in world.kinds
    ]


def _fact(
    topic: Topic, kind: FactKind, *, subjects: list[str], position: int, rng: random.Random
) -> dict[str, str | list[str]]:
    """Return one row: the fact `kind` of the subject at `position` of the ring."""
    subject = subjects[position]
    answer_form, paraphrase_form = rng.sample(kind.answers, 2)
    slots = sorted({name for _, name, _, _ in Formatter().parse(answer_form) if name})
    truth = {
        "next": subjects[(position + 1) % len(subjects)],
        "previous": subjects[position - 1],
    }
    others = [name for name in subjects if name not in (subject, *truth.values())]
    truth |= _draw(topic, [slot for slot in slots if slot not in truth], rng=rng, avoid={})
    # Distinct neighbours make the wrong answers pairwise distinct wherever a neighbour is named.
    wrong_neighbours = rng.sample(others, min(NUM_PERTURBED, len(others)))
    perturbed: list[str] = []
    while len(perturbed) < NUM_PERTURBED:
        neighbour = wrong_neighbours[len(perturbed) % len(wrong_neighbours)]
        wrong = {"next": neighbour, "previous": neighbour}
        wrong |= _draw(topic, [slot for slot in slots if slot not in wrong], rng=rng, avoid=truth)
        candidate = _sentence(topic, answer_form.format(**wrong))
        if candidate not in perturbed:
            perturbed.append(candidate)
    return {
        "topic": topic.name,
        "subject": subject,
        "question": _sentence(topic, kind.question.format(subject=subject)),
        "answer": _sentence(topic, answer_form.format(**truth)),
        "paraphrased_question": _sentence(topic, kind.paraphrased_question.format(subject=subject)),
        "paraphrased_answer": _sentence(topic, paraphrase_form.format(**truth)),
        "perturbed_answer": perturbed,
    }


def _draw(topic: Topic, slots: list[str], *, rng: random.Random, avoid: dict[str, str]) -> dict[str, str]:
    """Return a word for every slot: different within a word list, and never the word of `avoid` there."""
    drawn: dict[str, str] = {}
    for word_list, group in itertools.groupby(slots, key=_word_list):
        names = list(group)
        taken = {avoid[name] for name in names if name in avoid}
        free = [word for word in topic.words[word_list] if word not in taken]
        drawn |= dict(zip(names, rng.sample(free, len(names)), strict=True))
    return drawn


def _word_list(slot: str) -> str:
    return slot.rstrip("0123456789")


def _sentence(topic: Topic, text: str) -> str:
    return text[0].upper() + text[1:] if topic.sentence_case else text
