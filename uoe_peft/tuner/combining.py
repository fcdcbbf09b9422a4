"""What an adapter is that is made of others: their weighted sum, whole or pruned.

Pruning is PEFT's (`peft.utils.merge_utils`), of whole deltas: TIES (https://arxiv.org/abs/2306.01708) and DARE
(https://arxiv.org/abs/2311.03099) are defined on changes of weights, and factors of different adapters have no common
basis in which their entries could be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

from peft.utils import merge_utils
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from uoe_peft.tuner.arguments import as_int, as_number
from uoe_peft.tuner.config import UOEConfig

Pruning = Literal["ties", "dare_linear", "dare_ties", "magnitude_prune"]
PrunedTo = Literal["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
CombinationType = Literal["linear", "svd", "cat"] | Pruning | PrunedTo
SignMethod = Literal["total", "frequency"]
COMBINATION_TYPES = tuple(name for group in get_args(CombinationType) for name in get_args(group))
# Deltas of one slice, one of each adapter that edits it, and their weights, shape `(n,)`, to the slice's new delta.
Combine = Callable[[list[Tensor], Tensor], Tensor]


def check_combination(
    model: nn.Module, known: Mapping[str, object], adapters: Sequence[str], weights: Sequence[float], name: str
) -> None:
    """Whether adapters can be combined at all.

    Raises:
        ValueError: An unknown adapter, a taken name, unequal lengths, a weight that is not finite, or modules that an
            adapter saves in full: only deltas can be added.
    """
    unknown = sorted(set(adapters) - set(known))
    if unknown or not adapters:
        raise ValueError(f"adapters {unknown or adapters} not found; the model has {sorted(known)}")
    if len(set(adapters)) < len(adapters):
        raise ValueError(f"adapters must name each adapter once, got {adapters}")
    if len(adapters) != len(weights):
        raise ValueError(f"got {len(adapters)} adapters and {len(weights)} weights; pass one weight for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite numbers, got {weights}")
    if name in known:
        raise ValueError(f"the model has an adapter {name!r} already; choose another adapter_name")
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and module._adapters.intersection(adapters):
            raise ValueError(
                f"{path} is saved in full by one of {adapters} (modules_to_save): only deltas can be added"
            )


def combination(combination_type: str, density: float | None, majority_sign_method: SignMethod) -> Combine:
    """How the deltas of one slice become one.

    Raises:
        ValueError: `density` is missing where deltas are pruned, is given where they are not, or is not in (0, 1]; or
            the signs cannot be counted so.
    """
    pruning = combination_type.removesuffix("_svd")
    if pruning not in get_args(Pruning):
        if density is not None:
            raise ValueError(f"combination_type={combination_type!r} prunes nothing and takes no density")
        return merge_utils.task_arithmetic
    if density is None:
        raise ValueError(f"combination_type={combination_type!r} needs density, the share of values to keep")
    density = as_number("density", density, zero=False)
    if density > 1:
        raise ValueError(f"density is the share of values to keep, expected at most 1, got {density}")
    if majority_sign_method not in get_args(SignMethod):
        raise ValueError(f'majority_sign_method must be "total" or "frequency", got {majority_sign_method!r}')
    match pruning:
        case "ties":
            return partial(merge_utils.ties, density=density, majority_sign_method=majority_sign_method)
        case "dare_ties":
            return partial(merge_utils.dare_ties, density=density, majority_sign_method=majority_sign_method)
        case "dare_linear":
            return partial(merge_utils.dare_linear, density=density)
        case _:
            return partial(merge_utils.magnitude_prune, density=density)


def combined_config(configs: list[UOEConfig], combination_type: str, svd_rank: int | None) -> UOEConfig:
    """The config of an adapter that others are combined to.

    Raises:
        ValueError: An unknown combination, a rank below 1 or one that would not be used, or for "cat" an expert that
            two of the adapters edit.
    """
    pairs = [pair for config in configs for pair in config.target_experts]
    rank = sum(config.r for config in configs)
    delta_type = "full" if any(config.delta_type == "full" for config in configs) else "low_rank"
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(f"combination_type must be one of {COMBINATION_TYPES}, got {combination_type!r}")
    if combination_type == "cat" and len(set(pairs)) < len(pairs):
        raise ValueError(f'combination_type="cat" needs adapters of different experts, got {sorted(pairs)}')
    routers = {config.router_delta_type for config in configs if config.train_router}
    if combination_type.endswith("svd"):
        rank, delta_type = max(config.r for config in configs), "low_rank"
        rank = rank if svd_rank is None else as_int("svd_rank", svd_rank, minimum=1)
    elif svd_rank is not None:
        raise ValueError(f"combination_type={combination_type!r} truncates nothing and takes no svd_rank")
    elif combination_type in get_args(Pruning):  # what is left of a low-rank delta has every rank
        delta_type, routers = "full", routers and {"full"}
    projections = [config.target_projections for config in configs]
    return replace(
        configs[0],
        target_experts=sorted(set(pairs)),
        target_projections=None if None in projections else sorted({p for names in projections for p in names or ()}),
        delta_type=delta_type,
        r=rank,
        uoe_alpha=rank,  # scale 1
        use_rslora=False,
        init_weights=True,
        train_router=bool(routers),
        router_delta_type="low_rank" if routers == {"low_rank"} else "full",
        strength=1.0,  # that of the adapters is in the sum
        attribution=None,
        provenance=None,
        target_modules=None,
        modules_to_save=None,
        base_experts=None,
    )
