"""UOEConfig validates once and survives JSON."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftConfig

from uoe_peft.tuner import UOEConfig


def test_pairs_and_mappings_mean_the_same() -> None:
    assert UOEConfig(target_experts={2: [5, 1], 0: [3]}).target_experts == [(0, 3), (2, 1), (2, 5)]
    assert UOEConfig(target_experts=[(2, 5), (0, 3), (2, 1)]).target_experts == [(0, 3), (2, 1), (2, 5)]


def test_a_choice_need_not_be_the_codes_own_string() -> None:
    assert UOEConfig(target_experts="".join("auto")).target_experts == "auto"
    silent = UOEConfig(target_experts=[(0, 1)], init_weights="".join("zero_expert"), delta_type="".join("full"))
    assert (silent.init_weights, silent.delta_type) == ("zero_expert", "full")


def test_defaults_are_those_of_the_method() -> None:
    config = UOEConfig(target_experts=[(0, 1)])
    assert (config.delta_type, config.router_delta_type, config.train_router) == ("full", "full", True)
    assert (config.r, config.uoe_alpha, config.use_rslora) == (16, 32, False)
    assert (config.init_weights, config.strength, config.target_projections) == (True, 1.0, None)


def test_the_least_that_is_allowed_is_taken() -> None:
    config = UOEConfig(target_experts=[(0, 0)], r=1, strength=0)
    assert (config.target_experts, config.r, config.strength) == ([(0, 0)], 1, 0.0)


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
        strength=0.65,
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


def test_numbers_of_numpy_become_pythons_own(tmp_path: Path) -> None:
    config = UOEConfig(
        target_experts=np.array([[2, 5], [0, 3]]),
        r=np.int64(4),
        uoe_alpha=np.float32(8),
        strength=np.float64(0.5),
        train_router=np.bool_(False),
        target_projections=np.array(["down_proj"]),
    )
    assert config.target_experts == [(0, 3), (2, 5)]
    assert (config.r, config.uoe_alpha, config.strength, config.train_router) == (4, 8.0, 0.5, False)
    assert config.target_projections == ["down_proj"]
    assert UOEConfig(target_experts=[(0, 1)], strength=torch.tensor(0.5)).strength == 0.5
    assert UOEConfig(target_experts={np.int32(2): np.arange(2)}).target_experts == [(2, 0), (2, 1)]
    config.save_pretrained(tmp_path)  # JSON holds Python's numbers only
    assert UOEConfig.from_pretrained(tmp_path).target_experts == config.target_experts
    assert UOEConfig(target_experts=json.loads('{"12": [1]}')).target_experts == [(12, 1)]


@pytest.mark.parametrize("loader", [PeftConfig, UOEConfig])
def test_configs_of_version_0_1_0_load(tmp_path: Path, loader: type[PeftConfig]) -> None:
    UOEConfig(target_experts=[(0, 1)]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    assert "corrected_router_layers" not in written
    del written["strength"]
    path.write_text(json.dumps({**written, "corrected_router_layers": None}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = loader.from_pretrained(tmp_path)
    assert isinstance(loaded, UOEConfig) and loaded.target_experts == [(0, 1)] and loaded.strength == 1
    path.write_text(json.dumps({**written, "corrected_router_layers": [4]}))
    with pytest.raises(ValueError, match=r"corrects the routers of layers \[4\]"):
        loader.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_experts": None}, "non-empty"),
        ({"target_experts": []}, "non-empty"),
        ({"target_experts": "best"}, '"auto"'),
        ({"target_experts": "all"}, '"auto"'),
        ({"target_experts": [(0, -1)]}, ">= 0"),
        ({"target_experts": [3]}, "pairs"),
        ({"target_experts": [(0, 1, 2)]}, "pairs"),
        ({"target_experts": [(0, 1), (0, 1)]}, "twice"),
        ({"delta_type": "sparse"}, r"delta_type must be one of .*low_rank.*'sparse'"),
        ({"router_delta_type": "none"}, "router_delta_type must be one of"),
        ({"init_weights": "gaussian"}, "zero_expert"),
        ({"init_weights": "zzz"}, "zero_expert"),
        ({"init_weights": "zero_expert", "delta_type": "low_rank"}, 'delta_type="full"'),
        ({"target_projections": []}, "target_projections must be a non-empty list"),
        ({"r": 0}, "r must be an integer >= 1"),
        ({"target_experts": [(3.9, 6.9)]}, "integers >= 0"),
        ({"target_experts": ["36"]}, "pairs"),
        ({"target_experts": [("3", "6")]}, "integers >= 0"),
        ({"target_experts": [(True, 1)]}, "integers >= 0"),
        ({"target_experts": [(np.bool_(True), 1)]}, "integers >= 0"),
        ({"target_experts": np.array([[0.0, 1.0]])}, "integers >= 0"),
        ({"target_experts": np.array([3, 6])}, "pairs"),
        ({"target_experts": {"x": [1]}}, "integers >= 0"),
        ({"target_experts": {0: 1}}, "pairs"),
        ({"target_projections": "down_proj"}, "target_projections must be a non-empty list"),
        ({"target_projections": 5}, "target_projections must be a non-empty list"),
        ({"target_projections": {"down_proj": 1}}, "target_projections must be a non-empty list"),
        ({"target_projections": ["down_proj", "down_proj"]}, "distinct names"),
        ({"r": True}, "r must be an integer >= 1"),
        ({"r": 4.0}, "r must be an integer >= 1"),
        ({"r": "4"}, "r must be an integer >= 1"),
        ({"uoe_alpha": 0}, "uoe_alpha must be a finite number > 0"),
        ({"uoe_alpha": math.inf}, "uoe_alpha must be a finite number > 0"),
        ({"uoe_alpha": math.nan}, "uoe_alpha must be a finite number > 0"),
        ({"uoe_alpha": "32"}, "uoe_alpha must be a finite number > 0"),
        ({"uoe_alpha": True}, "uoe_alpha must be a finite number > 0"),
        ({"strength": -0.1}, "strength must be a finite number >= 0"),
        ({"strength": math.inf}, "strength must be a finite number >= 0"),
        ({"strength": np.array([1.0, 2.0])}, "strength must be a finite number >= 0"),
        ({"strength": "1"}, "strength must be a finite number >= 0"),
        ({"train_router": "false"}, "train_router must be True or False"),
        ({"use_rslora": 1}, "use_rslora must be True or False"),
        ({"init_weights": 1}, "init_weights must be True or False"),
        ({"delta_type": np.array(["full", "full"])}, "delta_type must be one of"),
        ({"target_modules": ["q_proj"]}, "target_modules is filled in by UOE"),
        ({"corrected_router_layers": [3]}, r"corrects the routers of layers \[3\]"),
        ({"exclude_modules": ["experts"]}, "exclude_modules is not supported"),
        ({"target_parameters": ["gate_up_proj"]}, "target_parameters is not supported"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UOEConfig(**{"target_experts": [(0, 1)], **arguments})
