import pytest
import torch
from torch import nn

from uoe_peft.moe.evaluation_mode import evaluation_mode


def make() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    model[2].eval()  # a frozen part, as a user may have left it
    return model


@pytest.mark.parametrize("gradients", [True, False])
def test_no_dropout_inside_and_every_part_as_before_after(gradients):
    model, x = make(), torch.ones(4, 3)
    with evaluation_mode(model, gradients=gradients):
        out = model(x)
        assert torch.equal(out, model[0](x))
        assert out.requires_grad is gradients
    assert [m.training for m in model.modules()] == [True, True, True, False, False]
    assert torch.is_grad_enabled()


def test_an_error_restores_it_too():
    model = make()
    with pytest.raises(RuntimeError, match="inside"), evaluation_mode(model):
        raise RuntimeError("inside")
    assert [m.training for m in model.modules()] == [True, True, True, False, False]
    assert torch.is_grad_enabled()
