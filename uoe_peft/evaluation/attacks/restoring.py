"""Parts of an adapter taken back: its routers, its experts, or a share of everything."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from uoe_peft.evaluation.attacks.copies import AdapterScale, edited_experts
from uoe_peft.evaluation.attacks.result import AttackResult, CausalLM, Score, Scores, baseline, measured
from uoe_peft.tuner import UOELayer, UOERouterLayer


def router_restored(model: CausalLM, *, score: Score, before: Scores | None = None) -> AttackResult:
    """Gives the base's routers back, and leaves the edited experts: how much of the forgetting is routing?

    Args:
        model: A model with a UOE adapter.
        score: Measures forget and retain.
        before: Scores of the model as it is; None: they are measured.

    Returns:
        After: scores with the base's routers, corrected ones included.

    Raises:
        NotApplicableError: The model has no UOE adapter, or one that edits no router.
        ValueError: The adapter is merged or switched off; or a score is not finite.
    """
    return _restored("router_restored", model, score=score, before=before, routers=True)


def expert_restored(model: CausalLM, *, score: Score, before: Scores | None = None) -> AttackResult:
    """Gives the base's experts back, and leaves the edited routers: how much of the forgetting is in the weights?

    Args:
        model: A model with a UOE adapter.
        score: Measures forget and retain.
        before: Scores of the model as it is; None: they are measured.

    Returns:
        After: scores with the base's experts.

    Raises:
        NotApplicableError: The model has no UOE adapter.
        ValueError: The adapter is merged or switched off; or a score is not finite.
    """
    return _restored("expert_restored", model, score=score, before=before, routers=False)


def scale_sweep(
    model: CausalLM,
    *,
    score: Score,
    scales: Sequence[float] = (0.8, 0.6, 0.4, 0.2, 0.0),
    before: Scores | None = None,
) -> AttackResult:
    """Turns the adapter down: from which strength on is it remembered, and what is retain worth there?

    The sweep of UWC, https://arxiv.org/abs/2406.09179. At 0 stands the base.

    Args:
        model: A model with an adapter that is a scaled sum: UOE, or LoRA in its plain form.
        score: Measures forget and retain.
        scales: What the adapter's present scale is multiplied by, one after the other, >= 0.
        before: Scores at the present scale; None: they are measured.

    Returns:
        Curve: by "scale", 1 (the present one) first. After: scores at the last of `scales`.

    Raises:
        NotApplicableError: The model has no adapter, or one that is no scaled sum.
        ValueError: The adapter is merged or switched off; `scales` is empty or negative; or a score is not finite.
    """
    factors = [float(scale) for scale in scales]
    if not factors or not all(0 <= factor < float("inf") for factor in factors):
        raise ValueError(f"scales must be numbers >= 0, at least one, got {scales!r}")
    scale = AdapterScale.of(model, attack="scale_sweep")
    start = baseline(score, model, before)
    curve: list[Scores] = [{"scale": 1.0, **start}]
    for factor in factors:
        with scale.times(factor):
            curve.append({"scale": factor, **measured(score, model)})
    return AttackResult("scale_sweep", before=start, after=curve[-1], curve=curve, settings={"scales": factors})


def _restored(name: str, model: CausalLM, *, score: Score, before: Scores | None, routers: bool) -> AttackResult:
    def restored(layer: nn.Module) -> bool:
        return isinstance(layer, UOELayer) and isinstance(layer, UOERouterLayer) == routers

    pairs = edited_experts(model, attack=name)
    scale = AdapterScale.of(model, attack=name, layers=restored)
    start = baseline(score, model, before)
    with scale.times(0.0):
        after = measured(score, model)
    return AttackResult(name, before=start, after=after, settings={"experts": [list(pair) for pair in pairs]})
