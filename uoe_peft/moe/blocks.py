"""Find a model's Mixture-of-Experts blocks: layer, experts module, router module, sizes.

Families are told by structure, never by name: an experts module is one whose storage :mod:`uoe_peft.moe.experts`
can read, and its router is the neighbour that holds a matrix with one row for each expert.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from uoe_peft.errors import NoExpertsError, UnsupportedModelError
from uoe_peft.moe.experts import ListedExperts, expert_storage, unwrap
from uoe_peft.moe.storage import ExpertStorage

# Words in the path of a block that text tokens never pass.
_OTHER_MODALITY = re.compile(r"vision|visual|image|video|audio|speech")


@dataclass(frozen=True, eq=False)
class MoEBlock:
    """One Mixture-of-Experts block of a model.

    Attributes:
        layer_idx: Index of the decoder layer, as in `model.layers.20`; not a count of MoE layers.
        experts_name: Path of the experts module in the model.
        router_name: Path of the router module in the model.
        experts: The experts module; where an adapter wraps it, the wrapper, so that hooks see the adapter's effect.
        router: The router module, likewise.
        storage: Access to single experts of the unwrapped experts module.
        gate_name: Name, inside the unwrapped router, of the matrix that maps hidden states to router logits. None
            where the router has nothing to decide: every token uses all experts with weight 1.
        num_experts: Number of routed experts, E.
        hidden_size: Input size of the router's matrix, H.
    """

    layer_idx: int
    experts_name: str
    router_name: str
    experts: nn.Module
    router: nn.Module
    storage: ExpertStorage
    gate_name: str | None
    num_experts: int
    hidden_size: int


def find_moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """The Mixture-of-Experts blocks of a model, ordered by decoder layer.

    Args:
        model: Any model with routed experts, wrapped by PEFT or not. Names are paths inside this very module.

    Returns:
        One block for each decoder layer with routed experts.

    Raises:
        UnsupportedModelError: The model has no routed experts; or none of its experts modules has a router beside it;
            or a decoder layer has several blocks, so that a layer index does not name one; or experts are shared with
            another part of the model.
    """
    stored = list(_experts_modules(model))
    found = [block for block in (_block(model, name, storage) for name, storage in stored) if block is not None]
    if not found:
        # A list of MLPs without a router is most likely none of experts: it says nothing about what is missing.
        stacked = [name for name, storage in stored if not isinstance(storage, ListedExperts)]
        kind = UnsupportedModelError if stacked else NoExpertsError
        raise kind(_nothing_found(model, without_router=stacked))
    blocks = _of_text_decoder(model, found)
    _check_one_per_layer(model, blocks)
    _check_not_shared(model, blocks, others=[block for block in found if block not in blocks])
    return sorted(blocks, key=lambda block: block.layer_idx)


def _experts_modules(model: nn.Module) -> Iterator[tuple[str, ExpertStorage]]:
    wrappers: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(wrappers):
            continue  # what a wrapper wraps is reached through it, and an adapter's own stacks are no experts
        if "base_layer" in module._modules:
            wrappers = (*wrappers, f"{name}.")
        storage = expert_storage(unwrap(module))
        if storage is not None:
            yield name, storage


def _nothing_found(model: nn.Module, *, without_router: list[str]) -> str:
    name = type(model).__name__
    if without_router:
        return (
            f"no router beside {without_router[0]} of {name}: expected a neighbouring module with a matrix that has a "
            "row for each expert"
        )
    return (
        f"{name} has no Mixture-of-Experts block that can be edited; expected a module with stacked expert parameters "
        "(gate_up_proj or up_proj, and down_proj) or a list of expert MLPs, beside a router. Load a model such as "
        "Qwen1.5-MoE, OLMoE or Mixtral; docs/families.md lists all families. A dense model is factorized first: "
        "docs/guides/dense.md"
    )


def _block(model: nn.Module, experts_name: str, storage: ExpertStorage) -> MoEBlock | None:
    """The block of an experts module, or None for experts without a router: shared ones, or a list of other MLPs."""
    found = _router_beside(model, experts_name, storage)
    if found is None:
        return None
    router_name, gate_name, hidden_size = found
    return MoEBlock(
        layer_idx=_layer_idx(experts_name),
        experts_name=experts_name,
        router_name=router_name,
        experts=model.get_submodule(experts_name),
        router=model.get_submodule(router_name),
        storage=storage,
        gate_name=gate_name,
        num_experts=storage.num_experts,
        hidden_size=hidden_size,
    )


def _router_beside(model: nn.Module, experts_name: str, storage: ExpertStorage) -> tuple[str, str | None, int] | None:
    """Path of the router of an experts module, the name of its matrix, and the matrix' input size."""
    parent_name, _, own_name = experts_name.rpartition(".")
    for child_name, child in model.get_submodule(parent_name).named_children():
        if getattr(child, "uses_all_experts", False):
            return f"{parent_name}.{child_name}", None, cast(int, child.hidden_size)
    candidates = []
    for child_name, child in model.get_submodule(parent_name).named_children():
        router = unwrap(child)
        gate = None if child_name == own_name else _gate_matrix(router, storage.num_experts)
        if gate is None:
            continue
        # Any neighbour may by chance have as many rows as there are experts: a router is called one, and it is small.
        called = f"{child_name} {type(router).__name__}".lower()
        rank = next((rank for rank, word in enumerate(("rout", "gat")) if word in called), None)
        if rank is None and isinstance(storage, ListedExperts):
            continue  # a list of MLPs may be anything (vision stages, say): only a router beside it makes them experts
        size = sum(parameter.numel() for parameter in router.parameters())
        path = f"{parent_name}.{child_name}" if parent_name else child_name
        candidates.append((2 if rank is None else rank, size, path, *gate))
    if not candidates:
        return None
    _, _, router_name, gate_name, hidden_size = min(candidates)
    return router_name, gate_name, hidden_size


def _gate_matrix(module: nn.Module, num_experts: int) -> tuple[str, int] | None:
    """Name and input size of the matrix that yields router logits: the last one with a row for each expert.

    Some routers know more classes than experts (a skip expert, identity experts, shared ones), but not twice as many.
    """
    matrices = [(name, p.shape) for name, p in module.named_parameters() if p.dim() == 2]
    fitting = [(name, rows[1]) for name, rows in matrices if num_experts <= rows[0] <= 2 * num_experts]
    return fitting[-1] if fitting else None


def _layer_idx(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise UnsupportedModelError(
            f"cannot tell the decoder layer of {name}: expected a path with a layer index, as in model.layers.3.mlp"
        )
    return numbers[0]


def _of_text_decoder(model: nn.Module, blocks: list[MoEBlock]) -> list[MoEBlock]:
    """The blocks that text tokens of the decoder pass: towers and layers may have others, for images or speech."""
    decoder = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else None
    paths = [f"{name}." if name else "" for name, module in model.named_modules() if module is decoder]
    inside = [block for block in blocks if any(block.experts_name.startswith(path) for path in paths)] or blocks
    return [block for block in inside if not _OTHER_MODALITY.search(block.experts_name)] or inside


def _check_one_per_layer(model: nn.Module, blocks: list[MoEBlock]) -> None:
    counts = Counter(block.layer_idx for block in blocks)
    layer_idx, count = counts.most_common(1)[0]
    if count > 1:
        paths = sorted(block.experts_name for block in blocks if block.layer_idx == layer_idx)
        raise UnsupportedModelError(
            f"layer {layer_idx} of {type(model).__name__} has several Mixture-of-Experts blocks ({', '.join(paths)}); "
            "a layer index must name one: pass the text decoder alone"
        )


def _check_not_shared(model: nn.Module, blocks: list[MoEBlock], *, others: list[MoEBlock]) -> None:
    """Experts in two places would be edited in one by a delta, and in both by a merge."""
    elsewhere = {id(p): block.experts_name for block in others for p in block.storage.module.parameters()}
    for block in blocks:
        name = next((elsewhere[id(p)] for p in block.storage.module.parameters() if id(p) in elsewhere), None)
        if name is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has the same experts in {block.experts_name} and in {name}, so that an edit "
                "cannot be told from a merge: pass the part of the model that holds one of them"
            )
