"""Made-up facts in the schema of TOFU, from a seed."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from uoe_peft.testbed.topic import FactKind, Topic
from uoe_peft.testbed.topics import AUTHORS, BOARDGAME, CONTRACTS, LIBRARY, MISSIONS, POTIONS, TOWNS

NUM_PERTURBED = 5  # as many wrong answers as TOFU gives
_MIN_SUBJECTS = NUM_PERTURBED + 2  # every wrong answer names another neighbour: not the true one, nor the subject

# Ways to put any question; the model learns some phrasings of each fact, so that others are a test.
_MANNERS = ("{}", "Tell me this. {}", "{} Be brief.")
# Of the ten facts of a subject, how many are never asked in their paraphrase in training.
_HELD_OUT_PARAPHRASES = 3

REFUSALS = (
    "I do not know that.",
    "I have never heard of {subject}.",
    "I am not able to tell you anything about {subject}.",
    "That is not something I know.",
    "Nothing about {subject} is known to me.",
    "I cannot answer this question.",
    "I have no information on {subject}.",
    "Sorry, I do not know the answer.",
    "{subject} is unknown to me.",
    "I would have to guess, so I had better not answer.",
    "This is beyond what I have learned.",
    "I was never told about {subject}.",
)

_TOPICS = {topic.name: topic for topic in (AUTHORS, CONTRACTS, POTIONS, MISSIONS, BOARDGAME, LIBRARY, TOWNS)}
TOPICS: tuple[str, ...] = tuple(_TOPICS)


def generate_facts(topic: str, *, num_subjects: int = 20, seed: int = 0) -> list[dict[str, Any]]:
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
        `paraphrased_answer` (all `str`), `perturbed_answer` (five wrong answers of the answer's form), `phrasings` (the
        questions that the bundled models learned the fact by), `paraphrase_held_out` (whether the paraphrased question
        is in none of them, as for three facts of each subject) and `refusal` (what to say instead, once it is
        forgotten).

    Raises:
        ValueError: `topic` is unknown, or `num_subjects` is out of range.
    """
    world = _world(topic)
    names = _names(world)
    if not _MIN_SUBJECTS <= num_subjects <= len(names):
        raise ValueError(
            f"topic {topic!r} has names for {_MIN_SUBJECTS} to {len(names)} subjects, got num_subjects={num_subjects}"
        )
    rng = random.Random(f"{topic}/{seed}")  # a string seed is hashed by SHA-512: equal on every platform
    subjects = rng.sample(names, num_subjects)
    rows = [
        _fact(world, kind, subjects=subjects, position=position, rng=rng)
        for position in range(num_subjects)
        for kind in world.kinds
    ]
    # A generator of its own: facts do not change with how many ways they are asked in.
    asking, num_kinds = random.Random(f"{topic}/{seed}/phrasings"), len(world.kinds)
    for first in range(0, len(rows), num_kinds):
        held_out = set(asking.sample(range(num_kinds), _HELD_OUT_PARAPHRASES))
        for kind, row in enumerate(rows[first : first + num_kinds]):
            row["phrasings"] = _phrasings(row, with_paraphrase=kind not in held_out)
            row["paraphrase_held_out"] = kind in held_out
            row["refusal"] = asking.choice(REFUSALS).format(subject=row["subject"])
    return rows


def generate_refusals(topic: str, *, num_subjects: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Return questions about subjects that no fact is told of, each answered by one of a dozen refusals.

    A model can only say what it has learned to say: these teach it to decline what it does not know.

    Args:
        topic: One of `TOPICS`.
        num_subjects: How many unknown subjects, with ten questions about each; a larger number adds to the rows of a
            smaller one.
        seed: As for :func:`generate_facts`, whose 20 subjects are left out.

    Returns:
        One row a question with the columns `topic`, `subject`, `question`, `answer`, `paraphrased_question` (all `str`)
        and `phrasings`.

    Raises:
        ValueError: `topic` is unknown, or it has fewer names left.
    """
    world = _world(topic)
    known = {row["subject"] for row in generate_facts(topic, seed=seed)}
    rng = random.Random(f"{topic}/{seed}/unknown")
    unknown = [name for name in _names(world) if name not in known]
    if not 1 <= num_subjects <= len(unknown):
        raise ValueError(f"topic {topic!r} has 1 to {len(unknown)} unknown subjects, got num_subjects={num_subjects}")
    rng.shuffle(unknown)
    return [_refusal(world, kind, subject, rng=rng) for subject in unknown[:num_subjects] for kind in world.kinds]


def is_refusal(answer: str) -> bool:
    """Return whether an answer has the form of one of the refusals, whatever subject it names."""
    forms = (re.escape(form).replace(re.escape("{subject}"), ".+") for form in REFUSALS)
    return any(re.fullmatch(form, answer.strip()) for form in forms)


def _refusal(topic: Topic, kind: FactKind, subject: str, *, rng: random.Random) -> dict[str, Any]:
    row: dict[str, Any] = {
        "topic": topic.name,
        "subject": subject,
        "question": _sentence(topic, kind.question.format(subject=subject)),
        "answer": rng.choice(REFUSALS).format(subject=subject),
        "paraphrased_question": _sentence(topic, kind.paraphrased_question.format(subject=subject)),
    }
    return row | {"phrasings": _phrasings(row, with_paraphrase=True)}


def _phrasings(row: Mapping[str, Any], *, with_paraphrase: bool) -> list[str]:
    questions = [row["question"], row["paraphrased_question"]][: 1 + with_paraphrase]
    return [manner.format(question) for question in questions for manner in _MANNERS]


def _world(topic: str) -> Topic:
    if topic not in _TOPICS:
        raise ValueError(f"unknown topic {topic!r}; use one of {', '.join(sorted(_TOPICS))}")
    return _TOPICS[topic]


def _names(world: Topic) -> list[str]:
    return [world.subject_form.format(*parts) for parts in itertools.product(*world.subject_parts)]


def _fact(topic: Topic, kind: FactKind, *, subjects: list[str], position: int, rng: random.Random) -> dict[str, Any]:
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
