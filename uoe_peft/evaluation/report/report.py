"""What an evaluation found, as a value that can be printed and stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from uoe_peft.evaluation.attacks.result import AttackResult
from uoe_peft.evaluation.calibration import Calibration
from uoe_peft.evaluation.evidence import LayerShift
from uoe_peft.evaluation.metrics import Interval

ModelName = Literal["base", "unlearned", "calibrated", "retrained"]
SetName = Literal["forget", "retain"]
"""Sets that every suite has a role for; a suite can have any number of sets with names of their own."""

MODELS: tuple[ModelName, ...] = ("base", "unlearned", "calibrated", "retrained")


@dataclass(frozen=True)
class AnswerScores:
    """How well one model answers one set.

    Attributes:
        rouge_l_recall: Mean ROUGE-L recall of greedy answers, in [0, 1]; None where there are no prompts to answer.
        probability: Mean over examples of `exp(-CE)` on the answer's tokens, in [0, 1]; of a set of options, the mean
            probability of the right one among them.
        num_examples: Examples that the means are over.
        metrics: Every mean over examples by the name of its metric, those above included, with its 95 % bootstrap
            interval.
    """

    rouge_l_recall: float | None
    probability: float
    num_examples: int
    metrics: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The one number of a picture: ROUGE-L recall; of a set of options their accuracy; else the probability."""
        if self.rouge_l_recall is not None:
            return self.rouge_l_recall
        return self.metrics["accuracy"].mean if "accuracy" in self.metrics else self.probability


@dataclass(frozen=True)
class ValueScores:
    """Scores of the rows of one set that share a value of a column, by model."""

    set_name: str
    column: str
    value: str
    scores: Mapping[ModelName, AnswerScores]


@dataclass(frozen=True)
class AttackRun:
    """An attack on one of the models.

    Attributes:
        model: Which.
        scale: Of its adapter's deltas: 1, or what calibration chose.
        result: What the attack reports.
    """

    model: ModelName
    scale: float
    result: AttackResult


@dataclass(frozen=True)
class Verdict:
    """Whether a model passes.

    Attributes:
        forgotten: Every forget set is down to `forget_limit`.
        kept: Every retain set is at or above `keep` of the base model's score.
        forget_limit: By forget set.
        retain_floor: By retain set.
    """

    forgotten: bool
    kept: bool
    forget_limit: Mapping[str, float]
    retain_floor: Mapping[str, float]


@dataclass(frozen=True)
class UnlearningReport:
    """Answers of the base model, of the unlearned one and, if there is one, of a model that never saw the forget set.

    Attributes:
        scores: By model, then by set.
        notes: What a reader of the numbers must know, such as why a metric is missing.
        by_value: Scores for each value of the columns that were asked for.
        metrics: By model: what is no mean over a set's examples, under open-unlearning's names.
        routing: How far routing differs between adapter off and on, by set and layer.
        attacks: What attacks brought back.
        calibration: The search for the adapter's scale, with its curve; None where there was none.
        roles: What each set is there for: "forget", "retain" or "holdout".
        settings: Of the evaluation, with versions, as plain JSON.
        cost: Size of the adapter, time and memory. Not compared by `==`, nor is what follows.
        examples: Every question with the truth, all models' answers and metrics; None in a report that was loaded.
    """

    scores: Mapping[ModelName, Mapping[str, AnswerScores]]
    notes: tuple[str, ...] = field(default=())
    by_value: tuple[ValueScores, ...] = ()
    metrics: Mapping[ModelName, Mapping[str, float]] = field(default_factory=dict)
    routing: tuple[LayerShift, ...] = ()
    attacks: tuple[AttackRun, ...] = ()
    calibration: Calibration | None = None
    roles: Mapping[str, str] = field(default_factory=lambda: {"forget": "forget", "retain": "retain"})
    settings: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict, compare=False)
    examples: Dataset | None = field(default=None, compare=False, repr=False)

    def sets_of(self, role: str) -> list[str]:
        """The names of the sets of a role, in their order."""
        return [name for name, own in self.roles.items() if own == role]

    def verdict(self, model: ModelName, *, forget_limit: float | None = None, keep: float = 0.95) -> Verdict:
        """Whether a model has forgotten what it should, and kept what it should: by `AnswerScores.score`.

        Args:
            model: Which.
            forget_limit: Greatest score on a forget set that counts as forgotten; None: the retrained model's + 0.05.
            keep: Share of the base model's score that counts as kept.

        Raises:
            ValueError: There are no scores of the model, or neither a limit nor a retrained model.
        """
        if model not in self.scores:
            raise ValueError(f"the report has no scores of {model!r}; it has {sorted(self.scores)}")
        if forget_limit is None and "retrained" not in self.scores:
            raise ValueError("without a retrained model nothing says what forgotten means; pass forget_limit")
        limits = {
            name: self.scores["retrained"][name].score + 0.05 if forget_limit is None else forget_limit
            for name in self.sets_of("forget")
        }
        floors = {name: keep * self.scores["base"][name].score for name in self.sets_of("retain")}
        own = self.scores[model]
        return Verdict(
            forgotten=all(own[name].score <= limit for name, limit in limits.items()),
            kept=all(own[name].score >= floor for name, floor in floors.items()),
            forget_limit=limits,
            retain_floor=floors,
        )

    def to_dict(self) -> dict[str, Any]:
        """All but the examples as plain JSON: the scores of each model under its name, and the other parts."""
        content: dict[str, Any] = {
            model: {name: asdict(scores) for name, scores in sets.items()} for model, sets in self.scores.items()
        }
        return content | {
            "metrics": {model: dict(values) for model, values in self.metrics.items()},
            "by_value": [asdict(part) for part in self.by_value],
            "routing": [asdict(shift) for shift in self.routing],
            "attacks": [
                {"model": run.model, "scale": run.scale, "result": run.result.to_dict()} for run in self.attacks
            ],
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "roles": dict(self.roles),
            "settings": dict(self.settings),
            "cost": dict(self.cost),
            "notes": list(self.notes),
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write `to_dict()` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> UnlearningReport:
        """The report that `save` wrote to `path`, without its examples.

        Raises:
            ValueError: The file is no report.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = {"base", "notes"} - set(content if isinstance(content, dict) else ())
        if missing:
            raise ValueError(f"{path} is no report of an evaluation: it lacks {sorted(missing)}")
        return cls(
            scores={model: _sets(content[model]) for model in MODELS if model in content},
            notes=tuple(content["notes"]),
            by_value=tuple(_value(part) for part in content.get("by_value", ())),
            metrics=content.get("metrics", {}),
            routing=tuple(_shift(shift) for shift in content.get("routing", ())),
            attacks=tuple(_attack(run) for run in content.get("attacks", ())),
            calibration=_calibration(content.get("calibration")),
            roles=content.get("roles", {"forget": "forget", "retain": "retain"}),
            settings=content.get("settings", {}),
            cost=content.get("cost", {}),
        )

    def summary(self) -> str:
        """A table in plain text, one row a model, followed by the notes."""
        names = list(next(iter(self.scores.values())))
        lines = [
            f"{'':10}" + "".join(f"  {name:^24}" for name in names),
            f"{'':10}" + "".join(f"  {'ROUGE-L':>11} {'probability':>12}" for _ in names),
        ]
        for model, sets in self.scores.items():
            lines.append(f"{model:10}" + "".join(f"  {_cells(sets[name])}" for name in names))
        return "\n".join(line.rstrip() for line in [*lines, *(f"note: {note}" for note in self.notes)])

    def markdown(self) -> str:
        """The report as Markdown tables."""
        from uoe_peft.evaluation.report.markdown import render

        return render(self)

    def html(self, *, title: str = "Unlearning report") -> str:
        """The report as one page with its pictures, which needs no network."""
        from uoe_peft.evaluation.report.page import render

        return render(self, title=title)

    def write(self, folder: str | PathLike[str], *, title: str = "Unlearning report") -> list[Path]:
        """Write `report.json`, `report.md`, `report.html` and, where there are examples, `examples.parquet`.

        Args:
            folder: Where; it is made.
            title: Of the page.

        Returns:
            The files.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.save(target / "report.json")
        (target / "report.md").write_text(self.markdown(), encoding="utf-8")
        (target / "report.html").write_text(self.html(title=title), encoding="utf-8")
        files = [target / name for name in ("report.json", "report.md", "report.html")]
        if self.examples is not None:
            self.examples.to_parquet(str(target / "examples.parquet"))
            files.append(target / "examples.parquet")
        return files


def _sets(content: Mapping[str, Any]) -> dict[str, AnswerScores]:
    def scores(values: Mapping[str, Any]) -> AnswerScores:
        metrics = {name: Interval(**interval) for name, interval in values.get("metrics", {}).items()}
        return AnswerScores(**{**values, "metrics": metrics})

    return {name: scores(values) for name, values in content.items()}


def _value(content: Mapping[str, Any]) -> ValueScores:
    return ValueScores(**{**content, "scores": _sets(content["scores"])})


def _attack(content: Mapping[str, Any]) -> AttackRun:
    result = AttackResult(**{**content["result"], "curve": tuple(content["result"]["curve"])})
    return AttackRun(**{**content, "result": result})


def _shift(content: Mapping[str, Any]) -> LayerShift:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    return LayerShift(**values)


def _calibration(content: Mapping[str, Any] | None) -> Calibration | None:
    if content is None:
        return None
    return Calibration(**{**content, "curve": tuple(content["curve"])})


def _cells(scores: AnswerScores) -> str:
    recall = "-" if scores.rouge_l_recall is None else f"{scores.rouge_l_recall:.3f}"
    return f"{recall:>11} {scores.probability:>12.3f}"
