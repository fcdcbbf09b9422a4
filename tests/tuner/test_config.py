"""UOEConfig validates once and survives JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftConfig

from uoe_peft.tuner import UOEConfig


def test_pairs_and_mappings_mean_the_same() -> None:
    assert UOEConfig(target_experts={2: [5, 1], 0: [3]}).target_experts == [(0, 3), (2, 1), (2, 5)]
    assert UOEConfig(target_experts=[(2, 5), (0, 3), (2, 1)]).target_experts == [(0, 3), (2, 1), (2, 5)]


def test_round_trip_through_json_keeps_every_field(tmp_path: Path) -> None:
    record = {"score": "gate", "affinity": 0.31, "tokens": 1234, "fingerprint": "ab12"}
    config = UOEConfig(
        target_experts={7: [2, 4]},
        target_projections=["down_proj"],
        delta_type="low_rank",
        r=3,
        uoe_alpha=7,
        use_rslora=True,
        train_router=False,
        router_delta_type="low_rank",
        attribution=record,
        base_model_name_or_path="org/model",
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, UOEConfig)
    loaded.inference_mode = config.inference_mode  # saving sets it on disk, for every method
    assert loaded == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["attribution"] == record


def test_keys_of_newer_versions_are_reported_and_ignored(tmp_path: Path) -> None:
    UOEConfig(target_experts=[(0, 1)]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert UOEConfig.from_pretrained(tmp_path).target_experts == [(0, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_experts": None}, "non-empty"),
        ({"target_experts": []}, "non-empty"),
        ({"target_experts": "best"}, '"auto"'),
        ({"target_experts": [(0, -1)]}, ">= 0"),
        ({"target_experts": [3]}, "pairs"),
        ({"target_experts": [(0, 1, 2)]}, "pairs"),
        ({"target_experts": [(0, 1), (0, 1)]}, "twice"),
        ({"delta_type": "sparse"}, r"delta_type must be one of .*low_rank.*'sparse'"),
        ({"router_delta_type": "none"}, "router_delta_type must be one of"),
        ({"init_weights": "gaussian"}, "zero_expert"),
        ({"init_weights": "zero_expert", "delta_type": "low_rank"}, 'delta_type="full"'),
        ({"target_projections": []}, "target_projections is empty"),
        ({"r": 0}, "r must be an integer >= 1"),
        ({"uoe_alpha": 0}, "uoe_alpha must be > 0"),
        ({"exclude_modules": ["experts"]}, "exclude_modules is not supported"),
        ({"target_parameters": ["gate_up_proj"]}, "target_parameters is not supported"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UOEConfig(**{"target_experts": [(0, 1)], **arguments})
