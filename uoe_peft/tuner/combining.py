"""What an adapter is that holds the weighted sum of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from uoe_peft.tuner.arguments import as_int
from uoe_peft.tuner.config import UOEConfig


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


def combined_config(configs: list[UOEConfig], combination_type: str, svd_rank: int | None) -> UOEConfig:
    """The config of a weighted sum of adapters.

    Raises:
        ValueError: An unknown combination, a rank below 1, or for "cat" an expert that two of the adapters edit.
    """
    pairs = [pair for config in configs for pair in config.target_experts]
    rank = sum(config.r for config in configs)
    delta_type = "full" if any(config.delta_type == "full" for config in configs) else "low_rank"
    match combination_type:
        case "svd":
            rank, delta_type = max(config.r for config in configs), "low_rank"
            rank = rank if svd_rank is None else as_int("svd_rank", svd_rank, minimum=1)
        case "cat":
            if len(set(pairs)) < len(pairs):
                raise ValueError(f'combination_type="cat" needs adapters of different experts, got {sorted(pairs)}')
        case "linear":
            pass
        case _:
            raise ValueError(f'combination_type must be "linear", "svd" or "cat", got {combination_type!r}')
    routers = {config.router_delta_type for config in configs if config.train_router}
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
