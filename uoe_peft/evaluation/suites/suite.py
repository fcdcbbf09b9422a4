"""What is asked of a model: named sets of questions, and what each is there for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset, IterableDataset

SetRole = Literal["forget", "retain", "holdout"]

PARAPHRASED = "paraphrased_completion"
PERTURBED = "perturbed_completions"
OPTIONS = "options"
LABEL = "label"
OTHER_PROMPT = "paraphrased_prompt"


@dataclass(frozen=True)
class QuestionSet:
    """Questions and true answers.

    Columns with a meaning, besides those of TRL's dataset types, all optional: `paraphrased_completion`, the true
    answer in other words, and `perturbed_completions`, a list of false ones: both give the truth ratio;
    `paraphrased_prompt`, the question in other words, which an attack asks; `options`, a list of completions to choose
    from, and `label`, the place of the right one: such a set has an accuracy and needs no `completion`, and nothing is
    generated. All other columns are kept with the results.

    Attributes:
        name: What tables call it, such as "real_authors".
        rows: The questions.
        role: "forget": what should be gone; "retain": what should still be known; "holdout": what no model was ever
            taught, of the same kind as the forget set: what membership inference compares with.
        by: Columns for whose values there are scores of their own: a mean over topics can hide one that was lost.
        utility: Whether TOFU's model utility is over this set, too.

    Raises:
        ValueError: The role is unknown, or a column of `by` is missing.
    """

    name: str
    rows: Dataset | IterableDataset
    role: SetRole
    by: tuple[str, ...] = ()
    utility: bool = False

    def __post_init__(self) -> None:
        if self.role not in ("forget", "retain", "holdout"):
            raise ValueError(f'role of set {self.name!r} must be "forget", "retain" or "holdout", got {self.role!r}')
        columns = getattr(self.rows, "column_names", None)  # unknown for some streams, and for what is no data set
        missing = sorted(set(self.by) - set(columns)) if columns else []
        if missing:
            raise ValueError(f"set {self.name!r} has no columns {missing} to score by; it has {sorted(columns or ())}")


@dataclass(frozen=True)
class Suite:
    """The sets of one evaluation.

    Attributes:
        name: What reports call it.
        sets: In the order of tables: at least one of role "forget" and one of role "retain".

    Raises:
        ValueError: A role is missing, or two sets share a name.
    """

    name: str
    sets: tuple[QuestionSet, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.sets]
        if len(set(names)) < len(names):
            raise ValueError(f"the sets of suite {self.name!r} must have different names, got {names}")
        for role in ("forget", "retain"):
            if not self.of_role(role):
                roles = {part.name: part.role for part in self.sets}
                raise ValueError(f"suite {self.name!r} needs a set of role {role!r}, got {roles}")

    def of_role(self, role: str) -> list[QuestionSet]:
        """The sets of a role, in their order."""
        return [part for part in self.sets if part.role == role]


def plain_suite(
    forget_dataset: Dataset | IterableDataset,
    retain_dataset: Dataset | IterableDataset,
    *,
    holdout_dataset: Dataset | IterableDataset | None = None,
    by: Sequence[str] = (),
    name: str = "plain",
) -> Suite:
    """A suite of a user's own sets.

    Args:
        forget_dataset: What should be forgotten, in any of TRL's types; `QuestionSet` says what else columns can hold.
        retain_dataset: What should be kept.
        holdout_dataset: Rows of the forget set's kind that no model was taught.
        by: Columns for whose values there are scores of their own, in each set that has them.
        name: What reports call the suite.

    Raises:
        ValueError: No set has a column of `by`.
    """
    given = {"forget": forget_dataset, "retain": retain_dataset, "holdout": holdout_dataset}
    sets = {role: rows for role, rows in given.items() if rows is not None}
    columns = {role: list(getattr(rows, "column_names", None) or ()) for role, rows in sets.items()}
    nowhere = sorted(column for column in by if not any(column in names for names in columns.values()))
    if nowhere:
        raise ValueError(f"no set has the columns {nowhere} to score by; they have {columns}")
    return Suite(
        name,
        tuple(
            QuestionSet(role, rows, role, by=tuple(c for c in by if c in columns[role]), utility=role == "retain")  # type: ignore[arg-type]
            for role, rows in sets.items()
        ),
    )
