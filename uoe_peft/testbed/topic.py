"""What a topic of made-up facts is made of: subjects, word lists and ways to ask and to answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FactKind:
    """One thing that can be asked about every subject of a topic.

    Placeholders in braces name a word list of the topic; a trailing digit draws a further, different
    word from the same list (`{herb}`, `{herb2}`). Three names are reserved: `{subject}`, and `{next}`
    and `{previous}`, its neighbours in the ring of the topic's subjects.

    Args:
        question: Asks for the fact. Contains `{subject}`.
        paraphrased_question: Asks for the same fact in other words. Contains `{subject}`.
        answers: Two or more ways to state the fact; all use the same placeholders. A fact is stated in
            one of them, its paraphrase in another. They do not repeat the subject, so that a model which
            never saw the topic gains nothing by copying the question.
    """

    question: str
    paraphrased_question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Topic:
    """A closed world of subjects with its own vocabulary and its own form of text.

    Args:
        name: Identifier of the topic.
        subject_form: How the parts of a name are joined, for example `"{0}{1}"`.
        subject_parts: The lists from which the parts are drawn, one a position.
        words: Word lists, by the name that placeholders use.
        kinds: The facts told about every subject.
        sentence_case: Whether answers start with a capital letter; moves and code keep theirs.
    """

    name: str
    subject_form: str
    subject_parts: tuple[tuple[str, ...], ...]
    words: dict[str, tuple[str, ...]]
    kinds: tuple[FactKind, ...]
    sentence_case: bool = True


def phrases(text: str) -> tuple[str, ...]:
    """Return the comma-separated phrases of `text`, so that word lists stay readable as prose.

    Args:
        text: Phrases separated by commas; white space around them, line breaks included, is dropped.

    Returns:
        The phrases in their order.

    Raises:
        ValueError: A phrase is empty or occurs twice.
    """
    found = tuple(" ".join(phrase.split()) for phrase in text.split(","))
    repeated = sorted({phrase for phrase in found if found.count(phrase) > 1})
    if repeated or "" in found:
        raise ValueError(f"a word list needs distinct, non-empty phrases, got repeated: {repeated or ['']}")
    return found
