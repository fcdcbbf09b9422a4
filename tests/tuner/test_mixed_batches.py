"""Each sample of a mixed batch has its own adapter, and what the model says of the batch is of that batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from tests.tuner.conftest import make_config, randomise
from uoe_peft.moe import find_moe_blocks
from uoe_peft.tuner.mixed_batches import AppliedGroup, copies_per_sample
from uoe_peft.tuner.router import _select

Logits = Callable[..., Tensor]


@pytest.mark.parametrize("shape", [(6, 5), (6,), (2, 3, 5)])
def test_rows_of_a_routers_output_are_its_samples(shape: tuple[int, ...]) -> None:
    group = AppliedGroup(["default"], [False, True])
    found = _select(group, torch.ones(shape), torch.zeros(shape))
    assert found.shape == shape
    assert found.flatten().tolist() == [0.0] * (found.numel() // 2) + [1.0] * (found.numel() // 2)


@pytest.mark.parametrize("shape", [(3, 4), (3,), (1, 3, 4)])
def test_rows_that_samples_do_not_divide_are_refused(shape: tuple[int, ...]) -> None:
    group = AppliedGroup(["default"], [False, True])
    with pytest.raises(ValueError, match="2 entries, which does not divide 3 tokens"):
        _select(group, torch.ones(shape), torch.zeros(shape))


def test_samples_are_told_by_the_letters_of_their_adapters_names(qwen: PreTrainedModel, logits: Logits) -> None:
    model = get_peft_model(qwen, make_config(qwen)).eval()
    randomise(model)
    names = ["".join("default"), "__base__", "".join("default")]
    mixed, edited = logits(model, adapter_names=names), logits(model)
    torch.testing.assert_close(mixed[[0, 2]], edited[[0, 2]])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], logits(model)[1])


def test_what_has_no_rows_is_the_batchs_own() -> None:
    group, auxiliary = AppliedGroup(["default"], [False, True]), torch.tensor(0.3)
    edited = (torch.ones(2, 5), None, torch.tensor(0.7))
    scores, nothing, loss = _select(group, edited, (torch.zeros(2, 5), None, auxiliary))
    assert scores.sum(dim=1).tolist() == [0.0, 5.0]
    assert nothing is None
    assert loss is auxiliary


def test_a_model_makes_one_answer_of_a_sample_unless_it_is_told() -> None:
    model = torch.nn.Module()
    assert copies_per_sample(model, {}) == 1
    assert copies_per_sample(model, {"num_beams": 1, "num_return_sequences": 2}) == 2
    assert copies_per_sample(model, {"num_beams": 3, "num_return_sequences": 2}) == 3
    config = GenerationConfig(num_return_sequences=5, do_sample=True)
    assert copies_per_sample(model, {"generation_config": config}) == 5
    assert copies_per_sample(model, {"generation_config": config, "num_return_sequences": 2}) == 2
    model.generation_config = config
    assert copies_per_sample(model, {}) == 5


@pytest.fixture
def adapted(base: PreTrainedModel) -> PeftModel:
    model = get_peft_model(base, make_config(base)).eval()
    randomise(model, std=0.5)
    model.add_adapter("other", make_config(base, expert_idx=0))
    randomise(model, adapter_name="other", seed=1, std=0.5)
    return model


@pytest.mark.parametrize("num_names", [1, 2, 11, 33])
@pytest.mark.parametrize("family", ["qwen2_moe"], indirect=True)
def test_names_must_be_one_for_each_sample(adapted: PeftModel, input_ids: Tensor, num_names: int) -> None:
    message = f"adapter_names has {num_names} entries for a batch of 3 samples"
    names = ["default"] * num_names
    with pytest.raises(ValueError, match=message):
        adapted(input_ids=input_ids, adapter_names=names)  # 33 tokens
    with pytest.raises(ValueError, match=message):
        embeds = adapted.get_input_embeddings()(input_ids)
        adapted(inputs_embeds=embeds, adapter_names=names)
    with pytest.raises(ValueError, match="entries for a batch of"):
        adapted.generate(input_ids=input_ids, adapter_names=names, max_new_tokens=1, pad_token_id=0)
    assert not adapted.get_base_model()._forward_pre_hooks  # nothing of a failed batch stays


@pytest.mark.parametrize("family", ["qwen2_moe"], indirect=True)
def test_where_adapters_are_off_every_sample_is_the_bases(adapted: PeftModel, logits: Logits) -> None:
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, adapter_names=["default", "other", "__base__"]), logits(adapted))
        assert find_moe_blocks(adapted)[-1].experts.applied_groups(["default", "other", "__base__"]) == []


@pytest.mark.parametrize("family", ["qwen2_moe"], indirect=True)
def test_several_answers_to_one_prompt_are_of_its_adapter(adapted: PeftModel, input_ids: Tensor) -> None:
    arguments = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 4, "pad_token_id": 0}
    arguments |= {"num_return_sequences": 2, "num_beams": 2, "do_sample": False}
    names = ["default", "__base__", "other"]
    mixed = adapted.generate(input_ids=input_ids, adapter_names=names, **arguments).view(3, 2, -1)
    for row, name in enumerate(names):
        adapted.set_adapter(name if name != "__base__" else "default")
        with adapted.disable_adapter() if name == "__base__" else torch.no_grad():
            assert torch.equal(adapted.generate(input_ids=input_ids, **arguments).view(3, 2, -1)[row], mixed[row])
    sampled = {**arguments, "num_beams": 1, "do_sample": True}
    assert len(adapted.generate(input_ids=input_ids, adapter_names=names, **sampled)) == 6


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "olmoe"], indirect=True)
def test_router_logits_are_those_of_the_batch(adapted: PeftModel, input_ids: Tensor) -> None:
    def run(**kwargs: object) -> tuple[list[Tensor], Tensor]:
        out = adapted(input_ids=input_ids, output_router_logits=True, **kwargs)
        return [logits.view(3, 11, -1) for logits in out.router_logits], out.aux_loss

    with torch.no_grad():
        alone = {}
        for name in ("default", "other"):
            adapted.set_adapter(name)
            alone[name], _ = run()
        with adapted.disable_adapter():
            alone["__base__"], _ = run()
        names = ["default", "__base__", "other"]
        mixed, aux_loss = run(adapter_names=names)
    assert len(mixed) == len(find_moe_blocks(adapted))
    for layer, logits in enumerate(mixed):
        for row, name in enumerate(names):
            torch.testing.assert_close(logits[row], alone[name][layer][row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[-1][0], alone["__base__"][-1][0], atol=1e-3)
    top_k = adapted.config.num_experts_per_tok
    probabilities = torch.cat([logits.flatten(0, 1).softmax(-1) for logits in mixed])
    chosen = torch.nn.functional.one_hot(probabilities.topk(top_k).indices, probabilities.shape[-1]).float()
    share = chosen.mean(dim=0)  # (K, E)
    expected = probabilities.shape[-1] * (share * probabilities.mean(dim=0)).sum()
    torch.testing.assert_close(aux_loss, expected, rtol=1e-4, atol=1e-5)
