import copy
import json
from dataclasses import replace

import pytest
import torch
import yaml
from torch import nn
from transformers import HfArgumentParser
from transformers.training_args import OptimizerNames

from uoe_peft.training import UnlearningConfig
from uoe_peft.training.optim.curvature import gauss_newton_bartlett, hutchinson
from uoe_peft.training.optim.sophia import Sophia, sophia_and_options


def weights(*values, dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def test_two_steps_by_hand():
    weight = weights(1.0, -2.0)
    optimizer = Sophia([weight], lr=0.1, betas=(0.5, 0.75), rho=0.5, weight_decay=0.2)
    optimizer.add_curvature({weight: torch.tensor([8.0, 0.8])})  # h = 2, 0.2
    weight.grad = torch.tensor([0.5, -1.0])  # m = 0.25, -0.5; m / (rho h) = 0.25, -5 -> -1
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.98 - 0.025, -1.96 + 0.1]))
    weight.grad = torch.tensor([-0.5, 0.0])  # m = -0.125, -0.25; ratio -0.125, -2.5 -> -1
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.955 * 0.98 + 0.0125, -1.86 * 0.98 + 0.1]))


def test_the_squared_gradient_is_the_curvature():
    weight = weights(0.0)
    optimizer = Sophia([weight], lr=1.0, betas=(0.0, 0.0), rho=0.25, squared_gradient_scale=16.0)
    weight.grad = torch.tensor([2.0])
    optimizer.step()  # 2 / (0.25 * 16 * 4)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.125]))


def test_no_weight_moves_further_than_the_learning_rate():
    weight = nn.Parameter(torch.zeros(50))
    optimizer = Sophia([weight], lr=0.01)
    optimizer.add_curvature({weight: torch.randn(50) * 1e-3})  # also negative curvature
    weight.grad = torch.randn(50) * 1e3
    optimizer.step()
    assert weight.abs().max() <= 0.01
    assert torch.equal(weight.sign(), -weight.grad.sign())


def test_estimates_are_due_at_every_kth_step():
    weight = weights(1.0)
    optimizer = Sophia([weight], interval=3)
    due = []
    for _ in range(5):
        weight.grad = torch.ones(1)
        due.append(optimizer.curvature_is_due)
        optimizer.step()
    assert due == [True, False, False, True, False]


def test_state_is_float32_and_resumes_to_the_bit():
    def steps(optimizer, weight, number):
        for _ in range(number):
            weight.grad = torch.randn(7, generator=generator).to(weight.dtype)
            optimizer.step()

    options = {"lr": 0.03, "interval": 2, "squared_gradient_scale": 3.0}
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(7).to(torch.bfloat16))
    optimizer = Sophia([weight], **options)
    steps(optimizer, weight, 3)
    assert {value.dtype for value in optimizer.state[weight].values()} == {torch.float32}
    resumed = nn.Parameter(weight.detach().clone())
    other = Sophia([resumed], **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, weight, 3)
    generator.manual_seed(1)
    torch.randn(7, generator=generator), torch.randn(7, generator=generator), torch.randn(7, generator=generator)
    steps(other, resumed, 3)
    assert torch.equal(weight, resumed)
    for name, value in optimizer.state[weight].items():
        assert torch.equal(value, other.state[resumed][name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr and weight_decay must be >= 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"rho": 0.0}, "rho and eps must be > 0"),
        ({"interval": 0}, "interval must be >= 1, got 0"),
        ({"squared_gradient_scale": 0.0}, "squared_gradient_scale must be a number > 0"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sophia([weights(1.0)], **options)


# ---- Estimates ----


def test_hutchinson_of_a_diagonal_hessian_is_exact():
    weight, unused = weights(1.0, 2.0, -1.0), weights(5.0)
    estimates = hutchinson(lambda: (weight**4).sum(), [weight, unused])
    torch.testing.assert_close(estimates[weight], 12 * weight.detach() ** 2)
    assert estimates[unused].tolist() == [0]


def test_hutchinson_is_right_on_average():
    matrix = torch.tensor([[2.0, 1.0], [1.0, -3.0]])
    weight = weights(0.3, 0.7)
    samples = [hutchinson(lambda: weight @ matrix @ weight / 2, [weight])[weight] for _ in range(400)]
    torch.testing.assert_close(torch.stack(samples).mean(0), matrix.diagonal(), atol=0.2, rtol=0)


def test_gauss_newton_of_the_lm_head_is_right_on_average(model):
    """For a bias on the logits the Gauss-Newton diagonal is known: the mean over answer tokens of p (1 - p)."""
    bias = nn.Parameter(torch.zeros(97))
    likely = torch.zeros(97).index_fill(0, torch.tensor([7, 30, 60]), 4.0)
    model.lm_head.register_forward_hook(lambda module, args, output: output + likely + bias)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    labels = torch.tensor([[-100, -100, 7, 8, 9, 10]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    probabilities = model(input_ids=ids).logits[0, 1:5].softmax(-1)
    expected = (probabilities * (1 - probabilities)).mean(0).detach()
    samples = [gauss_newton_bartlett(model, [batch], [bias])[bias] for _ in range(600)]
    torch.testing.assert_close(torch.stack(samples).mean(0), expected, atol=0.03, rtol=0)
    assert expected.max() > 0.1


# ---- Configuration ----


def test_the_name_survives_every_form_of_the_configuration(tmp_path):
    config = UnlearningConfig(output_dir="x", optim="sophia", sophia_rho=0.1)
    assert config.optim == "sophia"
    assert json.loads(config.to_json_string())["optim"] == "sophia"
    assert copy.deepcopy(config).optim == replace(config, seed=3).optim == "sophia"
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "x", "optim": "sophia", "sophia_estimator": "hutchinson"}))
    parser = HfArgumentParser(UnlearningConfig)
    for (parsed,) in (
        parser.parse_yaml_file(str(path)),
        parser.parse_args_into_dataclasses(["--output_dir", "x", "--optim", "sophia", "--sophia_interval", "4"]),
    ):
        assert parsed.optim == "sophia"
        assert sophia_and_options(parsed)[0] is Sophia


def test_other_names_are_transformers_own():
    assert UnlearningConfig(output_dir="x", optim="sgd").optim == OptimizerNames.SGD
    with pytest.raises(ValueError, match="sofia"):
        UnlearningConfig(output_dir="x", optim="sofia")


@pytest.mark.parametrize(
    ("options", "interval", "scale"),
    [
        ({}, 1, 24.0),
        ({"sophia_interval": 5}, 5, 24.0),
        ({"sophia_estimator": "gauss_newton_bartlett"}, 10, None),
    ],
)
def test_defaults_depend_on_the_estimator(options, interval, scale):
    args = {"optim": "sophia", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "use_cpu": True}
    _, chosen = sophia_and_options(UnlearningConfig(output_dir="x", **args, **options))
    assert (chosen["interval"], chosen["squared_gradient_scale"]) == (interval, scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sophia_estimator": "fisher"}, "sophia_estimator must be one of"),
        ({"sophia_interval": 0}, "sophia_interval must be >= 1, got 0"),
        ({"sophia_beta2": 1.0}, r"sophia_beta2 must be in \[0, 1\), got 1.0"),
        ({"sophia_rho": 0.0}, "sophia_rho must be > 0, got 0.0"),
        ({"weight_mask_ratio": 1.5}, r"weight_mask_ratio must be in \(0, 1\], got 1.5"),
        ({"weight_mask_mu": -1.0}, "weight_mask_mu must be > 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UnlearningConfig(output_dir="x", **options)


# ---- Training ----


@pytest.mark.parametrize("estimator", ["squared_gradient", "gauss_newton_bartlett", "hutchinson"])
def test_training_resumes_to_the_bit(make_trainer, build, tmp_path, estimator):
    options = {"optim": "sophia", "sophia_estimator": estimator, "sophia_interval": 2, "max_steps": 5}
    options |= {"save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1, "per_device_train_batch_size": 3}
    whole = make_trainer(build.uoe(build.model()), **options)
    whole.train()
    resumed = make_trainer(build.uoe(build.model()), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    moved = 0
    for (name, first), second in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second), name
        moved += int(first.requires_grad and first.any())
    assert moved == 3  # two projections and the router
    state = whole.optimizer.optimizer.state
    assert len(state) == 3 and all(value["curvature"].any() for value in state.values())


def test_checkpointing_does_not_change_the_estimate(make_trainer, build):
    states = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            build.uoe(build.model()),
            optim="sophia",
            sophia_estimator="hutchinson",
            max_steps=1,
            gradient_checkpointing=checkpointing,
        )
        trainer.train()
        states.append([value["curvature"] for value in trainer.optimizer.optimizer.state.values()])
    for plain, recomputed in zip(*states, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_an_optimizer_of_ones_own_gets_no_estimates(make_trainer, uoe_model):
    trainer = make_trainer(uoe_model, optim="sophia", sophia_estimator="hutchinson")
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(TypeError, match="no optimizer of your own"):
        trainer.train()
