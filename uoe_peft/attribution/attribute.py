"""Which expert carries a forget set: the one call that does it all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from uoe_peft.attribution.ablation import measure_loss_rise
from uoe_peft.attribution.affinities import affinity_of
from uoe_peft.attribution.attribution import ExpertAttribution
from uoe_peft.attribution.confidence import Confidence, assess
from uoe_peft.attribution.expert_use import ExpertUse, Resamples, common_num_experts, measure_expert_use
from uoe_peft.attribution.gradient import gradient_affinity
from uoe_peft.attribution.sampling import SampleBatches, sample_batches
from uoe_peft.attribution.scores import Gate, Score, check_tells_apart, contrast, paired_contrast, random_affinity
from uoe_peft.attribution.summary import warn_if_doubtful
from uoe_peft.data.shares import Share
from uoe_peft.data.tokenization import ProcessingClass
from uoe_peft.moe.passes import find_streamed
from uoe_peft.moe.routing import select_blocks


def attribute_experts(
    model: nn.Module,
    forget_dataset: Dataset | IterableDataset,
    *,
    processing_class: ProcessingClass,
    score: Score = "gate",
    gate: Gate = "softmax",
    retain_dataset: Dataset | IterableDataset | None = None,
    max_tokens: int = 100_000,
    batch_size: int = 8,
    max_length: int | None = 512,
    seed: int = 0,
    layer_indices: Sequence[int] | None = None,
    include_prompt: bool = True,
    num_candidates: int = 16,
    kappa: float = 1.0,
    mu: float = 1.0,
    num_resamples: int = 200,
    show_progress: bool = True,
) -> ExpertAttribution:
    """Affinity of every expert to a forget set, at the cost of one forward pass over a sample of it.

    By default Eq. 2 of https://arxiv.org/abs/2411.18797, `1/Z Σ_j 1/L_j Σ_t g_j[t, i]`: the gate score of expert i,
    mean over the tokens of a sequence, then mean over sequences. The pass ends at the last layer asked for, and never
    computes the LM head. An adapter on the model takes part as it is.

    In a group of processes (`torch.distributed`) every one of them must call it, with the same sets and options: where
    each has the whole model they share the batches out, and all get the same result.

    Args:
        model: A model with routed experts, wrapped by PEFT or not.
        forget_dataset: What is to be forgotten, text in the types that `tokenize_dataset` names; may stream.
        processing_class: Tokenizer, or a processor that holds one.
        score: "gate": Eq. 2. "token_ratio": share of the selections (https://arxiv.org/abs/2407.01906). "contrast":
            "gate" on the forget set minus "gate" on the retain set. "ablation": rise of the forget loss minus `kappa`
            times the rise of the retain loss without the expert, over the `num_candidates` best by "gate".
            "gradient": WAGLE (https://arxiv.org/abs/2410.17509) summed over the expert's weights. "random": a control,
            which reads no data.
        gate: "softmax": router scores that sum to 1 over all experts, the paper's. "applied": the weights that the
            layer applies to its experts, before any factor that the block puts on all of them. Of a factorized dense
            model, where these are all 1, "softmax" is a group's share of what the layer computes for the token.
        retain_dataset: What is to be kept; `contrast` needs it, the others report how busy the experts are on it.
        max_tokens: Size of the sample of each set in tokens; the paper used 100,000.
        batch_size: Sequences in a batch.
        max_length: Longest sequence in tokens; None for no limit.
        seed: Of the sample, of the bootstrap and of "random".
        layer_indices: Decoder layers to look at; None for all with routed experts.
        include_prompt: Whether prompt tokens count in routing scores. Padding never does.
        num_candidates: Experts that "ablation" silences, at least 2; each costs a whole pass.
        kappa: Weight of the retain loss in "ablation".
        mu: Curvature of the retain loss in "gradient", > 0.
        num_resamples: Bootstrap resamples for the intervals.
        show_progress: Whether to show progress bars with tokens per second.

    Returns:
        The attribution; `attribution.top(1)` is the best expert.

    Warns:
        UnidentifiedExpertWarning: The best expert is not ahead of the second by more than chance.
        GeneralistExpertWarning: The best expert is about as busy on the retain set.

    Raises:
        UnsupportedModelError: The model has no routed experts, or its routing cannot be understood.
        TypeError: A set is not a `Dataset` or `IterableDataset`.
        ValueError: An unknown score or gate; a number out of range; "contrast" without a retain set; "token_ratio" or
            "applied" where every token uses all experts; a set that is
            empty or has no usable columns or answers; NaN or infinite router scores; `layer_indices` names a layer
            without routed experts; "ablation" or "gradient" of a streamed model; processes were given different sets
            or options.
        RuntimeError: Another process has failed.
    """
    _check_choices(score=score, gate=gate, num_candidates=num_candidates, num_resamples=num_resamples)
    if score == "contrast" and retain_dataset is None:
        raise ValueError("score='contrast' needs retain_dataset; pass one, or use score='gate'")
    if score in ("ablation", "gradient") and find_streamed(model) is not None:
        raise ValueError(
            f"score={score!r} needs passes through the whole model for each candidate or backwards, which a streamed "
            "model would read from disk again and again; use 'gate', 'token_ratio' or 'contrast'"
        )
    blocks = select_blocks(model, layer_indices)
    check_tells_apart(blocks, score=score, gate=gate)
    layers, num_experts = tuple(block.layer_idx for block in blocks), common_num_experts(blocks)
    settings = _Settings(layers, max_tokens, batch_size, max_length, include_prompt, num_resamples, seed, show_progress)
    forget = retain = None
    if score != "random":
        # Or one process would wait for passes that another does not make.
        Share.of(model).check_same((score, gate, num_candidates, layers, retain_dataset is None), name="forget")
    if score != "random":
        forget = _measure(model, forget_dataset, processing_class, settings, name="forget")
    if score != "random" and retain_dataset is not None:
        retain = _measure(model, retain_dataset, processing_class, settings, name="retain")
    confidence = None
    if forget is None:
        affinity = random_affinity(len(layers), num_experts, seed=seed)
    elif score == "ablation":
        affinity, confidence = _ablation(
            model, forget, retain, settings, gate=gate, num_candidates=num_candidates, kappa=kappa
        )
    elif score == "gradient":
        retain_batches = None if retain is None else retain.batches
        affinity = gradient_affinity(
            model, forget.batches, retain_batches, mu=mu, layer_indices=layers, show_progress=show_progress
        )
    else:
        affinity, confidence = _routing(forget, retain, score=score, gate=gate)
    attribution = ExpertAttribution(
        affinity=affinity,
        layer_indices=layers,
        score=score,
        gate=gate,
        **_model_identity(model),
        seed=seed,
        forget=None if forget is None else forget.use,
        retain=None if retain is None else retain.use,
        confidence=confidence,
        options=_options(settings, score, num_candidates=num_candidates, kappa=kappa, mu=mu),
    )
    warn_if_doubtful(attribution)
    return attribution


@dataclass(frozen=True)
class _Settings:
    """What all passes have in common."""

    layer_indices: tuple[int, ...]
    max_tokens: int
    batch_size: int
    max_length: int | None
    include_prompt: bool
    num_resamples: int
    seed: int
    show_progress: bool


@dataclass(frozen=True, eq=False)
class _MeasuredSet:
    """A set's sample and what one pass over it has measured."""

    batches: SampleBatches
    use: ExpertUse
    resamples: Resamples


def _measure(
    model: nn.Module,
    dataset: Dataset | IterableDataset,
    processing_class: ProcessingClass,
    settings: _Settings,
    *,
    name: str,
) -> _MeasuredSet:
    with Share.of(model).failing_together():
        batches = sample_batches(
            dataset,
            processing_class,
            max_tokens=settings.max_tokens,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            seed=settings.seed,
            name=name,
        )
    use, resamples = measure_expert_use(
        model,
        batches,
        layer_indices=settings.layer_indices,
        include_prompt=settings.include_prompt,
        num_resamples=settings.num_resamples,
        seed=_seed_of(settings, name),
        name=name,
        show_progress=settings.show_progress,
    )
    return _MeasuredSet(batches, use, resamples)


def _routing(
    forget: _MeasuredSet, retain: _MeasuredSet | None, *, score: Score, gate: Gate
) -> tuple[Tensor, Confidence | None]:
    """Affinity and confidence of a score that routing decisions alone give."""
    affinity = affinity_of(score, gate, forget.use, None if retain is None else retain.use)
    statistic = "token_ratio" if score == "token_ratio" else gate
    bootstrap, halves = forget.resamples.of(statistic)
    if score == "contrast" and retain is not None:
        retain_bootstrap, retain_halves = retain.resamples.of(statistic)
        bootstrap = paired_contrast(bootstrap, retain_bootstrap)
        halves = paired_contrast(halves, retain_halves)
    if bootstrap is None:
        return affinity, None
    return affinity, assess(affinity, bootstrap, halves, top_k=forget.use.top_k)


def _ablation(
    model: nn.Module,
    forget: _MeasuredSet,
    retain: _MeasuredSet | None,
    settings: _Settings,
    *,
    gate: Gate,
    num_candidates: int,
    kappa: float,
) -> tuple[Tensor, Confidence | None]:
    """Affinity and confidence of the experts that the gate ranks highest, NaN for the others."""
    table = forget.use.table(gate)
    places = table.flatten().argsort(descending=True, stable=True)[:num_candidates]
    rows, columns = places // table.shape[1], places % table.shape[1]
    candidates = [(settings.layer_indices[row], column) for row, column in zip(rows, columns.tolist(), strict=True)]

    def rise(measured: _MeasuredSet, name: str) -> tuple[Tensor, Tensor | None]:
        mean = measure_loss_rise(
            model,
            measured.batches,
            candidates,
            num_resamples=settings.num_resamples,
            seed=_seed_of(settings, name),
            name=name,
            show_progress=settings.show_progress,
        )
        return mean.mean(), mean.resampled_means()

    values, bootstrap = rise(forget, "forget")  # (N,), (R, N)
    if retain is not None:
        retain_values, retain_bootstrap = rise(retain, "retain")
        values = contrast(values, kappa * retain_values)
        scaled = None if retain_bootstrap is None else kappa * retain_bootstrap
        bootstrap = paired_contrast(bootstrap, scaled)
    affinity = torch.full_like(table, torch.nan)
    affinity[rows, columns] = values
    if bootstrap is None:
        return affinity, None
    spread = torch.full((len(bootstrap), *table.shape), torch.nan)
    spread[:, rows, columns] = bootstrap
    return affinity, assess(affinity, spread, None, top_k=forget.use.top_k)


def _check_choices(*, score: str, gate: str, num_candidates: int, num_resamples: int) -> None:
    for option, value, choices in (("score", score, get_args(Score)), ("gate", gate, get_args(Gate))):
        if value not in choices:
            raise ValueError(f"{option} must be one of {choices}, got {value!r}")
    for option, number, least in (("num_candidates", num_candidates, 2), ("num_resamples", num_resamples, 1)):
        if number < least:
            raise ValueError(f"{option} must be at least {least}, got {number}")


def _seed_of(settings: _Settings, name: str) -> int:
    """The two sets need independent resamples: with equal ones their errors would cancel in a contrast."""
    return settings.seed + (name == "retain")


def _model_identity(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {
        "model_name": getattr(config, "_name_or_path", ""),
        "model_revision": getattr(config, "_commit_hash", None),
    }


def _options(settings: _Settings, score: Score, *, num_candidates: int, kappa: float, mu: float) -> dict[str, Any]:
    """For the record: what shaped the result beside the attribution's own fields."""
    options = asdict(settings)
    for name in ("layer_indices", "seed", "show_progress"):
        del options[name]
    match score:
        case "ablation":
            return {**options, "num_candidates": num_candidates, "kappa": kappa}
        case "gradient":
            return {**options, "mu": mu}
        case _:
            return options
