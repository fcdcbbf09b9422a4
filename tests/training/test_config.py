from typing import get_args

import pytest
import yaml
from transformers import HfArgumentParser

from uoe_peft.training import UnlearningConfig
from uoe_peft.training.choices import ForgetLoss


def test_defaults_are_the_papers():
    config = UnlearningConfig(output_dir="x")
    assert (config.learning_rate, config.anchor_weight, config.retain_weight) == (1e-4, 1.0, 1.0)
    assert config.router_aux_loss_coef == 0
    assert not config.gradient_checkpointing
    assert not config.log_routing  # it costs passes


@pytest.mark.parametrize(("loss", "beta"), [("npo", 0.1), ("simnpo", 4.5), ("undial", 10), ("wga", 1), ("dpo", 0.1)])
def test_beta_is_the_losses_own(loss, beta):
    assert UnlearningConfig(output_dir="x", forget_loss=loss).forget_beta == beta
    assert UnlearningConfig(output_dir="x", forget_loss=loss, beta=0.7).forget_beta == 0.7


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_checkpointing_work(name):
    config = UnlearningConfig(output_dir="x", **{name: True})
    assert config.gradient_checkpointing
    assert config.activation_checkpointing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget_loss": "forget"}, r"forget_loss must be one of \['grad_ascent', 'npo'.*got 'forget'"),
        (
            {"retain_loss": "l2"},
            r"retain_loss must be one of \['none', 'nll', 'kl', 'embed_diff', 'relative_embed_diff'\], got 'l2'",
        ),
        ({"anchor_scores": "gate"}, r"anchor_scores must be one of \['softmax', 'topk'\]"),
        ({"attribution_score": "best"}, "attribution_score must be one of"),
        ({"anchor_weight": -1}, "anchor_weight must be >= 0, got -1"),
        ({"retain_weight": float("nan")}, "retain_weight must be >= 0"),
        ({"beta": 0}, "beta of 'npo' must be > 0"),
        ({"stop_when_forget_accuracy": 20}, r"in \[0, 1\]"),
        ({"packing": True}, "packing and padding_free"),
        ({"train_sampling_strategy": "group_by_length"}, "no one length to sort pairs by"),
        ({"train_sampling_strategy": "batch_rebalance"}, "must be 'random' or 'sequential', got 'batch_rebalance'"),
        ({"loss_type": "dft"}, "loss_type must stay 'nll'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"retain_token_weights": "trace", "retain_loss": "kl"}, "needs retain_loss='nll'"),
        ({"trace_cap": 0.5}, "trace_cap"),
        ({"num_target_experts": 0}, "num_target_experts"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UnlearningConfig(output_dir="x", **options)


def test_command_line_and_yaml_know_every_option(tmp_path):
    parser = HfArgumentParser(UnlearningConfig)
    (config,) = parser.parse_args_into_dataclasses(
        ["--output_dir", "x", "--forget_loss", "simnpo", "--anchor_weight", "0.5", "--beta", "2"]
    )
    assert (config.forget_loss, config.anchor_weight, config.forget_beta) == ("simnpo", 0.5, 2)
    path = tmp_path / "unlearn.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "x", "forget_loss": "rmu", "rmu_coefficient": 6.5}))
    (config,) = parser.parse_yaml_file(str(path))
    assert (config.forget_loss, config.rmu_coefficient) == ("rmu", 6.5)


def test_every_choice_is_accepted():
    for loss in get_args(ForgetLoss):
        assert UnlearningConfig(output_dir="x", forget_loss=loss).forget_loss == loss
