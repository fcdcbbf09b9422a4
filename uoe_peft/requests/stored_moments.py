"""What an adapter's request looked like, kept beside the adapter: second moments of its forget set, no text.

Where a request's text is gone, they still say which directions its tokens take: to combine adapters by regression, and
to keep a later request's delta out of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from uoe_peft.moments import Moments, SliceMoments, SliceName
from uoe_peft.tuner import UOEConfig, write_card
from uoe_peft.tuner.card import FORGET_MOMENTS_FILE


def save_forget_moments(folder: str | Path, moments: Moments) -> Path:
    """Write the moments of a request's forget set beside its adapter; a model card in the folder tells their size.

    Args:
        folder: The adapter's, which holds `adapter_config.json`.
        moments: `measure_moments` over the forget set, on the model without the adapter.

    Returns:
        The file.

    Raises:
        FileNotFoundError: The folder holds no adapter.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no adapter_config.json; pass the folder of one adapter, which PEFT calls by the adapter's "
            'name unless that is "default"'
        )
    moments.save(folder / FORGET_MOMENTS_FILE)
    if (folder / "README.md").is_file():
        write_card(folder, {"default": UOEConfig.from_pretrained(str(folder))})
    return folder / FORGET_MOMENTS_FILE


def load_forget_moments(moments: Moments | str | Path) -> Moments:
    """The moments that lie in an adapter's folder.

    Args:
        moments: The folder; moments are given back as they are.

    Raises:
        FileNotFoundError: The adapter was saved without moments.
        ValueError: The file is of another kind, or damaged.
    """
    if isinstance(moments, Moments):
        return moments
    path = Path(moments) / FORGET_MOMENTS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{moments} has no {FORGET_MOMENTS_FILE}: the adapter was saved without its forget set's moments. They can "
            "be had from the text alone: save_forget_moments(folder, measure_moments(...))"
        )
    return Moments.load(path)


def with_requests(retain: Moments, requests: Mapping[str, Moments]) -> Moments:
    """Moments over the tokens of a retain set and of requests together, of the retain set's slices.

    Args:
        retain: Moments of the retain set.
        requests: By name, moments of requests, of these slices at least.

    Raises:
        ValueError: A request lacks a slice, or has it in another width.
    """
    slices = {}
    for name, own in retain.slices.items():
        others = [_of_slice(request, moments, name, own.dimension) for request, moments in requests.items()]
        slices[name] = _together([own, *others])
    return Moments(slices, retain.num_tokens + sum(moments.num_tokens for moments in requests.values()))


def _of_slice(request: str, moments: Moments, name: SliceName, width: int) -> SliceMoments:
    if name not in moments.slices:
        known = _experts(moments.slices)
        raise ValueError(
            f"the moments of {request!r} lack {name}, which is trained; they are of the experts {known}. Edit one of "
            "these, or measure_moments of this one, too, while there is the text"
        )
    if moments.slices[name].dimension != width:
        raise ValueError(
            f"the moments of {request!r} have width {moments.slices[name].dimension} in {name}, the model's {width}: "
            "they are of another model"
        )
    return moments.slices[name]


def _experts(names: Iterable[SliceName]) -> list[tuple[int, int]]:
    return sorted({(name.layer_idx, name.expert_idx) for name in names if name.expert_idx is not None})


def _together(parts: Sequence[SliceMoments]) -> SliceMoments:
    """Moments over the tokens of all parts."""
    total = sum(part.num_tokens for part in parts)
    mean = torch.stack([part.mean.double() * (part.num_tokens / total) for part in parts]).sum(dim=0)
    second = torch.stack([part.second.double() * (part.num_tokens / total) for part in parts]).sum(dim=0)
    return SliceMoments(mean.float(), second.float(), total)
