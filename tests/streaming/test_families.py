"""Streamed from disk, a model of every family says what transformers' own loading of it says, bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import REMOTE_CODE, SUPPORTED, token_ids
from tests.streaming.conftest import SaveFamily
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.passes import run_passes
from uoe_peft.moe.segments import find_layers, output_of
from uoe_peft.streaming import StreamedModel

ENCODER_DECODERS = ("nllb_moe", "switch_transformers")
# Configured as in the tests, this family needs tokens that mark images wherever there is a mask.
_NO_MASK = ("qwen3_omni_moe",)

STREAMED = [family for family in SUPPORTED if family not in (*ENCODER_DECODERS, *REMOTE_CODE)]


def batches(family: str) -> list[dict[str, Tensor]]:
    """Three batches of different lengths, one with padding."""
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    made = [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids[:1, :6], "attention_mask": torch.ones(1, 6, dtype=torch.long)},
        {"input_ids": ids[:, 2:], "attention_mask": torch.ones(2, 7, dtype=torch.long)},
    ]
    return [{"input_ids": batch["input_ids"]} for batch in made] if family in _NO_MASK else made


def said(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or hidden states of a model without a head, at real tokens."""
    output = model(**inputs, use_cache=False)[0]
    mask = inputs.get("attention_mask")
    return output if mask is None else output[mask.bool()]


@pytest.mark.parametrize("family", STREAMED)
def test_every_bit_is_the_resident_models(family: str, saved_family: SaveFamily) -> None:
    assert_every_bit(*saved_family(family), family)


@torch.no_grad()
def assert_every_bit(folder: Path, resident: Any, family: str) -> None:
    streamed = StreamedModel.from_pretrained(folder, show_progress=False)
    inputs = batches(family)
    expected = [said(resident, batch) for batch in inputs]
    found = [output for output, _ in run_passes(streamed, [partial(said, streamed, batch) for batch in inputs])]
    assert all(map(torch.equal, found, expected))
    assert torch.equal(said(streamed, inputs[0]), expected[0])  # a single call, too
    last = list(find_layers(resident).children())[-1]
    hidden = list(find_layers(streamed).children())[-1]
    expected_state, state = output_of(last, resident, inputs[1]), output_of(hidden, streamed, inputs[1])
    pairs = zip(state, expected_state, strict=True) if isinstance(state, tuple) else [(state, expected_state)]
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders_are_refused(family: str, saved_family: SaveFamily) -> None:
    folder, _ = saved_family(family)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder; only decoders can be streamed"):
        StreamedModel.from_pretrained(folder)
