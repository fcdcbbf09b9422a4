"""All attacks on all models of an evaluation, with equal budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

from tqdm import tqdm

from uoe_peft.errors import NotApplicableError, UnsupportedModelError
from uoe_peft.evaluation.attacks.result import AttackResult, Score, Scores
from uoe_peft.evaluation.calibration import Calibration
from uoe_peft.evaluation.measure import AnyModel
from uoe_peft.evaluation.report import AttackRun, ModelName
from uoe_peft.evaluation.switching import scaled


class Attack(Protocol):
    """What can be passed as an attack: `functools.partial(run_attack, "int4")` is one."""

    def __call__(self, model: Any, *, score: Score, before: Scores | None) -> AttackResult:
        """Attack a model; see `uoe_peft.evaluation.attacks`."""
        ...


Attacks = Sequence[Attack] | Mapping[str, Attack]


def attack_all(
    model: AnyModel,
    retrained_model: AnyModel | None,
    attacks: Attacks,
    score: Score,
    *,
    calibration: Calibration | None,
) -> tuple[list[AttackRun], list[str]]:
    """What the attacks report, and notes on those that do not apply to a model.

    Args:
        model: The unlearned model, attacked at full strength and, where it was calibrated, at the chosen scale.
        retrained_model: The reference, attacked likewise; None: there is none.
        attacks: The attacks; the keys of a mapping are what the report calls them.
        score: Measures forget and retain.
        calibration: What chose the scale; None: nothing did.

    Raises:
        Exception: Whatever an attack raises on the unlearned model, but that the model lacks what it needs.
    """
    named = list(attacks.items()) if isinstance(attacks, Mapping) else [(None, attack) for attack in attacks]
    runs: list[AttackRun] = []
    notes: list[str] = []
    for name, attacked, scale in _states(model, retrained_model, calibration):
        # What runs on the unlearned model has no fault of its own: on another one it can only be out of place.
        out_of_place = (TypeError, ValueError) if name == "retrained" else (NotApplicableError, UnsupportedModelError)
        with scaled(attacked, scale) if scale != 1 else nullcontext():
            before = score(attacked)
            for called, attack in tqdm(named, desc=f"attacks, {name}", unit="attack", leave=False):
                try:
                    result = attack(attacked, score=score, before=before)
                except out_of_place as error:
                    notes.append(f"not run on the {name} model: {error}")
                    continue
                runs.append(AttackRun(name, scale, replace(result, name=called) if called else result))
    return runs, notes


def _states(
    model: AnyModel, retrained_model: AnyModel | None, calibration: Calibration | None
) -> Iterator[tuple[ModelName, AnyModel, float]]:
    yield "unlearned", model, 1.0
    if calibration is not None and calibration.scale is not None and 0 < calibration.scale < 1:
        yield "calibrated", model, calibration.scale
    if retrained_model is not None:
        yield "retrained", retrained_model, 1.0
