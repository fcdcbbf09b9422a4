"""Experts that are modules of their own, where an adapter lies on another that is merged."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from tests.families import build, logits
from tests.tuner.conftest import make_config, randomise
from uoe_peft.moe import find_moe_blocks
from uoe_peft.tuner import UOEConfig
from uoe_peft.tuner.targets import _expert_targets


def test_zero_expert_silences_what_lies_under_a_merged_adapter() -> None:
    base = build("listed, router module")
    silenced, ids = copy.deepcopy(base).eval(), torch.arange(3, 21).view(2, 9)
    storage = find_moe_blocks(silenced)[-1].storage
    storage.weight(storage.projections[-1], 1).data.zero_()
    model = get_peft_model(base, make_config(base)).eval()
    randomise(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):  # only after the new adapter was made
        model.add_adapter("silence", make_config(base, init_weights="zero_expert", train_router=False))
    model.set_adapter("silence")
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), logits(silenced, ids), rtol=1e-4, atol=1e-5)


def test_of_an_experts_linear_modules_only_the_last_one_writes_its_output(monkeypatch) -> None:
    """By its place, not by its name: it is the one that would silence the expert."""
    block = find_moe_blocks(build("listed, router module"))[-1]
    for names, last in ((("bb", "cc", "aa"), "aa"), (("cc", "aa", "bb"), "bb"), (("aa", "bb", "cc"), "cc")):
        monkeypatch.setattr(type(block.storage), "projections", names)
        monkeypatch.setattr(type(block.storage), "linear_name", lambda storage, name, index: f"{index}.{name}")
        targets = _expert_targets(UOEConfig(target_experts=[(2, 1), (2, 3)]), block, (1, 3))
        writing = [path.rsplit(".", 2)[-2:] for path, target in targets.items() if target.writes_output]
        assert writing == [["1", last], ["3", last]]
        chosen = UOEConfig(target_experts=[(2, 1)], target_projections=["".join(last)], train_router=False)
        assert [target.writes_output for target in _expert_targets(chosen, block, (1,)).values()] == [True]
