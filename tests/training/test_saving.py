from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests import families
from uoe_peft.training.saving import load_adapters, load_full_checkpoint
from uoe_peft.tuner import UOEConfig


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "deepseek_v3", "llama4", "phimoe"])
def test_every_bit_comes_back_whatever_form_experts_are_stored_in(family, dtype, tmp_path):
    model = families.build(family, dtype=dtype)
    families.randomise(model)
    saved, parameters = state(model), dict(model.named_parameters())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1)
    load_full_checkpoint(model, str(tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_parameters_of_several_dtypes_keep_theirs(build, tmp_path):
    model = build.model().bfloat16()
    model.model.layers[1].mlp.gate.float()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.mul_(1 / 3)  # which bfloat16 cannot hold
    saved = state(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()
    load_full_checkpoint(model, str(tmp_path))
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16, torch.float32}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name]), name


def test_a_checkpoint_of_another_model_is_refused(build, tmp_path):
    deep = build.model()
    sizes = deep.config.to_dict() | {"num_hidden_layers": 2, "layer_types": None}
    shallow = type(deep)(type(deep.config)(**sizes))
    for model, name in ((shallow, "shallow"), (deep, "deep")):
        model.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"lacks 16 weights of Qwen2MoeForCausalLM, such as \['model.layers.2"):
        load_full_checkpoint(deep, str(tmp_path / "shallow"))
    with pytest.raises(ValueError, match=r"has, unknown to the model, 16 weights of Qwen2MoeForCausalLM"):
        load_full_checkpoint(shallow, str(tmp_path / "deep"))


def two_adapters(build):
    model = build.uoe(build.model())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    model.add_adapter("second", UOEConfig(target_experts=[(2, 4)]))
    model.base_model.set_adapter(["default", "second"])
    model.set_requires_grad("default", False)
    return model


@pytest.mark.parametrize("trained", ["default", "second"])
def test_resuming_the_second_of_two_adapters_gives_the_same_bits(make_trainer, build, tmp_path, trained):
    def prepare():
        torch.manual_seed(2)
        model = two_adapters(build)
        for name in ("default", "second"):
            model.set_requires_grad(name, name == trained)
        return model

    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    whole = make_trainer(prepare(), **options)
    whole.train()
    resumed = make_trainer(prepare(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.model.active_adapters == ["default", "second"]
    for (name, expected), parameter in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert parameter.requires_grad == expected.requires_grad == (f".{trained}." in name and "uoe_" in name), name
        assert torch.equal(parameter, expected), name


def test_a_checkpoint_without_an_active_adapter_is_refused(build, tmp_path):
    build.uoe(build.model()).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="of the active adapter 'second'"):
        load_adapters(two_adapters(build), tmp_path)


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        (
            {},
            {"target_experts": [(1, 3)]},
            r"with target_experts=\[\(1, 2\)\], the model's has target_experts=\[\(1, 3\)\]",
        ),
        ({"delta_type": "low_rank"}, {"delta_type": "low_rank", "uoe_alpha": 8}, "with uoe_alpha=32, the model's has"),
        (
            {"router_delta_type": "low_rank", "use_rslora": True},
            {"router_delta_type": "low_rank"},
            "use_rslora=True, the",
        ),
        ({"uoe_alpha": 8}, {}, None),  # of full deltas it says nothing
        ({"strength": 0.5}, {}, None),  # that of the checkpoint counts
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(make_trainer, build, tmp_path, saved, own, message):
    """Tensors of other experts, and of other scales, have the same names and shapes."""
    make_trainer(build.uoe(build.model(), **saved), save_strategy="steps", save_steps=1, max_steps=1).train()
    other = make_trainer(build.uoe(build.model(), **own))
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def named(build, *, experts):
    torch.manual_seed(3)
    return get_peft_model(build.model(), UOEConfig(target_experts=experts), adapter_name="request")


def test_an_adapter_of_another_name_resumes_and_loads(make_trainer, build, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    whole = make_trainer(named(build, experts=[(1, 2)]), **options)
    whole.train()
    resumed = make_trainer(named(build, experts=[(1, 2)]), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for (name, expected), parameter in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    assert resumed.model.active_adapters == ["request"]
    with pytest.raises(ValueError, match="'request' with target_experts"):
        other = make_trainer(named(build, experts=[(1, 3)]), **options)
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    whole.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(build.model(), tmp_path / "saved" / "request", adapter_name="renamed").eval()
    ids = torch.arange(2, 12)[None]
    assert torch.equal(loaded(ids).logits, whole.model.eval()(ids).logits)
