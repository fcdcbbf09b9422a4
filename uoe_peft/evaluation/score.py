"""A suite as a score: a few means of whatever model it is given. Attacks and calibration ask it many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any, cast

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from uoe_peft.data.tokenization import text_tokenizer
from uoe_peft.evaluation.measure import AnyModel, Asked, Asking, Row, measure
from uoe_peft.evaluation.questions import choices_of, questions_of, sample
from uoe_peft.evaluation.suites.suite import OPTIONS, QuestionSet, Suite

Transform = Callable[[str], str]


class SuiteScore:
    """Means of the first forget set and the first retain set of a suite, as attacks ask for them.

    Args:
        suite: The sets.
        processing_class: The models' tokenizer, or a processor that holds one.
        max_examples: Draw so many rows of each set; None for all.
        batch_size: Rows a forward pass.
        max_length: Longest sequence in tokens; None for no limit.
        max_new_tokens: Where a generated answer is cut.
        seed: Of the draw.

    Raises:
        ValueError: A set is empty or has no usable columns or answers.
    """

    def __init__(
        self,
        suite: Suite,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        *,
        max_examples: int | None = None,
        batch_size: int = 16,
        max_length: int | None = 1024,
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        self._max_length = max_length
        self._asking = Asking(text_tokenizer(processing_class), batch_size, max_new_tokens)
        self._rows = {
            role: sample(_without_alternatives(suite.of_role(role)[0]), max_examples=max_examples, seed=seed, name=role)
            for role in ("forget", "retain")
        }
        self._plain = {role: self._asked(rows, role) for role, rows in self._rows.items()}

    def __call__(
        self, model: nn.Module, *, prompts: Transform | None = None, column: str | None = None
    ) -> dict[str, float]:
        """Ask a model.

        Args:
            model: A causal language model of transformers, wrapped by PEFT or not.
            prompts: Applied to every question before it is tokenised; of a conversation, to its last user turn.
            column: Where questions are read from in place of `prompt`, in sets that have it.

        Returns:
            `forget_rouge_l_recall`, `forget_probability` and the same of the retain set; `..._accuracy` in place of
            ROUGE-L for sets of options, nothing in its place for plain text.

        Raises:
            ValueError: No set has the column, a question is no text, or the logits are not finite.
        """
        asked = self._plain
        if prompts is not None or column is not None:
            if column is not None and not any(column in rows.column_names for rows in self._rows.values()):
                have = {role: rows.column_names for role, rows in self._rows.items()}
                raise ValueError(f"no set has the column {column!r} to read questions from; they have {have}")
            asked = {
                role: self._asked(_reworded(rows, prompts, column, role), role) for role, rows in self._rows.items()
            }
        measured = measure(cast(AnyModel, model), asked, self._asking, called="score", num_experts={})
        return {
            f"{role}_{metric}": value for role, rows in measured.rows.items() for metric, value in _means(rows).items()
        }

    def _asked(self, rows: Dataset, role: str) -> Asked:
        if OPTIONS in rows.column_names:
            return choices_of(rows, self._asking.tokenizer, max_length=self._max_length, name=role)
        return questions_of(
            rows, self._asking.tokenizer, max_length=self._max_length, max_examples=None, seed=0, name=role
        )


def _without_alternatives(part: QuestionSet) -> Any:
    """The rows without false answers, whose likelihoods no score needs."""
    columns = getattr(part.rows, "column_names", None) or []
    unneeded = [name for name in ("paraphrased_completion", "perturbed_completions") if name in columns]
    return part.rows.remove_columns(unneeded) if unneeded else part.rows


def _means(rows: list[Row]) -> dict[str, float]:
    names = [name for name in ("rouge_l_recall", "accuracy", "probability") if any(name in row for row in rows)]
    return {name: fmean(row[name] for row in rows if name in row) for name in names}


def _reworded(rows: Dataset, prompts: Transform | None, column: str | None, role: str) -> Dataset:
    source = column if column in rows.column_names else "prompt"
    if source not in rows.column_names:
        raise ValueError(f"the {role} set has no 'prompt' to reword; it has {rows.column_names}")
    return Dataset.from_list([{**row, "prompt": _apply(prompts, row[source], role)} for row in rows])


def _apply(prompts: Transform | None, question: Any, role: str) -> Any:
    if prompts is None:
        return question
    match question:
        case str():
            return prompts(question)
        case list() if any(turn.get("role") == "user" for turn in question):
            last = max(place for place, turn in enumerate(question) if turn.get("role") == "user")
            turn: Mapping[str, Any] = question[last]
            return [*question[:last], {**turn, "content": prompts(turn["content"])}, *question[last + 1 :]]
        case _:
            raise ValueError(f"a question of the {role} set is neither text nor a conversation with a user's turn")
