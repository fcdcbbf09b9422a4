import pytest
import torch

from tests import families
from uoe_peft.training.saving import load_full_checkpoint


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
