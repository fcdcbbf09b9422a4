"""Whether what models say is language, as the base model judges it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from uoe_peft.data import IGNORE_INDEX
from uoe_peft.evaluation.likelihood import score_answers
from uoe_peft.evaluation.measure import AnyModel, Asked, Asking, Measured
from uoe_peft.evaluation.questions import Choices, Questions, last_answer
from uoe_peft.evaluation.report import ModelName
from uoe_peft.evaluation.report.summary import fluency_metrics
from uoe_peft.evaluation.suites import Suite
from uoe_peft.evaluation.switching import answering
from uoe_peft.moe.passes import find_streamed

Said = tuple[tuple[int, ...], str]
"""The tokens that stand before, and what was said."""


def fluency_of(
    judge: AnyModel,
    results: Mapping[ModelName, Measured],
    suite: Suite,
    sets: Mapping[str, Asked],
    asking: Asking,
) -> dict[ModelName, dict[str, float]]:
    """`forget_perplexity` and `rr2r` by model, of the first forget and the first retain set.

    Where both sets have false answers, what is said is judged as an answer to its question, and is fluent where it is
    as likely as a false answer: a model that knows the truth finds any other answer unlikely, but noise far more so.
    Otherwise texts are judged by themselves, beside the true ones; a model that has learned nothing but answers to
    questions is a poor judge of that.

    Args:
        judge: The base model.
        results: What the models said.
        suite: What was asked.
        sets: Its questions.
        asking: How.

    Returns:
        Nothing where one of the sets got no answers.
    """
    roles = {role: suite.of_role(role)[0].name for role in ("forget", "retain")}
    asked = {role: sets[name] for role, name in roles.items()}
    nothing_said = find_streamed(judge) is not None
    if nothing_said or any(isinstance(own, Choices) or not own.prompts for own in asked.values()):
        return {}
    questions = cast(Mapping[str, Questions], asked)
    in_context = all(own.false_answers for own in questions.values())
    usual = [said for own in questions.values() for said in _language(own, asking, in_context=in_context)]
    answered = {
        name: {role: [row for row in measured.rows[own] if "answer" in row] for role, own in roles.items()}
        for name, measured in results.items()
    }
    said = {
        name: {
            role: _said([row["answer"] for row in rows], questions[role], asking, in_context=in_context)
            for role, rows in own.items()
        }
        for name, own in answered.items()
    }
    everything = [*usual, *(text for own in said.values() for part in own.values() for text in part)]
    distinct = list(dict.fromkeys(everything))  # models agree on much: nothing is read twice
    read = dict(zip(distinct, likelihoods(judge, distinct, asking), strict=True))
    return {
        name: fluency_metrics(
            {role: [read[text] for text in part] for role, part in said[name].items()},
            [read[text] for text in usual],
            rows,
        )
        for name, rows in answered.items()
    }


def likelihoods(judge: AnyModel, said: Sequence[Said], asking: Asking) -> list[tuple[float, int]]:
    """Negative log-likelihood in nats and number of tokens of each text; `(inf, 0)` for one without tokens.

    Args:
        judge: The model that judges.
        said: The texts, and what stands before them; where nothing does, a token that begins texts.
        asking: How.
    """
    tokenizer: Any = asking.tokenizer
    begin = next(
        (t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if t is not None), 0
    )
    ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for _, text in said]
    contexts = [list(context) or [begin] for context, _ in said]
    examples = [
        {"input_ids": [*context, *tokens], "labels": [IGNORE_INDEX] * len(context) + tokens}
        for context, tokens in zip(contexts, ids, strict=True)
        if tokens
    ]
    with answering(judge):
        desc = "fluency of what was said"
        scored = iter(score_answers(judge, examples, batch_size=asking.batch_size, desc=desc))
        found = [next(scored) if tokens else None for tokens in ids]
    return [
        (-float(answer.log_probs.sum()), len(answer.log_probs)) if answer else (float("inf"), 0) for answer in found
    ]


def _language(questions: Questions, asking: Asking, *, in_context: bool) -> list[Said]:
    """Answers that are language: to each question a false one, or the true ones by themselves."""
    if not in_context:
        return _said(questions.references, questions, asking, in_context=False)
    false = [_text(questions.false_answers[place][0], asking) for place in questions.asked]
    return _said(false, questions, asking, in_context=True)


def _said(texts: Sequence[str], questions: Questions, asking: Asking, *, in_context: bool) -> list[Said]:
    """Each text with its question before it, and between them the white space of the set; or by itself."""
    if not in_context:
        return [((), text) for text in texts]
    truths = [_text(questions.examples[place], asking) for place in questions.asked]
    spaces = [truth[: len(truth) - len(truth.lstrip())] for truth in truths]
    return [
        (tuple(prompt), space + text.strip() if text.strip() else "")
        for prompt, space, text in zip(questions.prompts, spaces, texts, strict=True)
    ]


def _text(example: Mapping[str, Any], asking: Asking) -> str:
    """The last answer of an example, with the white space before it."""
    return str(asking.tokenizer.decode(example["input_ids"][last_answer(example["labels"])], skip_special_tokens=True))
