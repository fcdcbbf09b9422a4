"""Routers above the edited layer are corrected by least squares, and retain tokens are routed more as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.families import VOCAB
from tests.families import build as build_family
from uoe_peft import RouterCorrection, UnlearningTrainer, correct_routers
from uoe_peft.data import collate, tokenize_dataset
from uoe_peft.moe import find_moe_blocks, unwrap
from uoe_peft.training.objective.anchor import find_targets
from uoe_peft.training.router_correction import router_delta, routing_kept
from uoe_peft.tuner import UOEConfig, UOELayer, add_router_correction

FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4", "gemma4", "olmoe", "listed, linear router")


@pytest.fixture
def retain() -> Dataset:
    """More tokens than a hidden state has numbers, so that least squares cannot fit all of them."""
    return Dataset.from_dict({"text": [f"in {i} there are {i * i} and {7 * i} " + "x" * (i % 5) for i in range(30)]})


@pytest.fixture
def correct(tokenizer: Any, retain: Dataset) -> Callable[..., RouterCorrection]:
    def run(model: nn.Module, **options: Any) -> RouterCorrection:
        return correct_routers(model, retain, processing_class=tokenizer, **{"min_cosine": 0.0, **options})

    return run


def low_adapter(model: PreTrainedModel, *, std: float = 0.3, **options: Any) -> PeftModel:
    """A random adapter on an expert of the first MoE layer and on its router."""
    targets = [(find_moe_blocks(model)[0].layer_idx, 1)]
    adapted = get_peft_model(model, UOEConfig(**{"target_experts": targets, "r": 3, **options})).eval()
    perturb(adapted, std=std)
    return adapted


@torch.no_grad()
def perturb(model: PeftModel, *, std: float, adapter_name: str = "default") -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".uoe_" in name and f".{adapter_name}." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCAB - 5, (2, 13), generator=torch.Generator().manual_seed(4))
    return model(input_ids=ids).logits


def corrections(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if ".uoe_delta." in name}


def batches_of(retain: Dataset, tokenizer: Any, *, size: int, padding_side: str = "right") -> list[dict[str, Tensor]]:
    rows = list(tokenize_dataset(retain, tokenizer, max_length=None, name="retain"))
    return [collate(rows[i : i + size], pad_token_id=0, padding_side=padding_side) for i in range(0, len(rows), size)]


def plain_router_inputs(model: nn.Module, batches: list[dict[str, Tensor]], layer_idx: int) -> Tensor:
    """Of a model whose router multiplies what it is given. Shape `(N, H)`, float64."""
    seen: list[Tensor] = []
    router = unwrap(find_moe_blocks(model)[layer_idx].router)
    handle = router.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            seen[-1] = seen[-1][batch["attention_mask"].flatten().bool()]
    handle.remove()
    return torch.cat(seen).double()


def test_the_delta_is_the_papers(build: Any, tokenizer: Any, retain: Dataset) -> None:
    """`Theta X X~^T (X~ X~^T)^-1 - Theta`, by an independent solver; a ridge pulls the delta to 0."""
    model = low_adapter(build.model())
    batches = batches_of(retain, tokenizer, size=7)
    with model.disable_adapter():
        original = plain_router_inputs(model, batches, 2)
    edited = plain_router_inputs(model, batches, 2)
    assert len(edited) > edited.shape[1]
    block = find_moe_blocks(model)[2]
    theta = block.router.weight.detach().double()
    paper = torch.linalg.lstsq(edited, original @ theta.T).solution.T - theta
    found = router_delta(model, block, batches, ridge=1e-12)
    torch.testing.assert_close(found, paper, rtol=1e-6, atol=1e-8)

    ridge = 0.1
    root = (ridge * edited.square().mean(dim=1).sum()).sqrt() * torch.eye(32, dtype=torch.float64)
    wanted = torch.cat([(original - edited) @ theta.T, torch.zeros(32, len(theta), dtype=torch.float64)])
    expected = torch.linalg.lstsq(torch.cat([edited, root]), wanted).solution.T
    torch.testing.assert_close(router_delta(model, block, batches, ridge=ridge), expected, rtol=1e-6, atol=1e-8)
    assert expected.norm() < paper.norm()


def test_padding_and_batch_size_do_not_count(build: Any, tokenizer: Any, retain: Dataset) -> None:
    model = low_adapter(build.model())
    block = find_moe_blocks(model)[1]
    alone = router_delta(model, block, batches_of(retain, tokenizer, size=1), ridge=1e-3)
    for side in ("right", "left"):
        together = router_delta(model, block, batches_of(retain, tokenizer, size=30, padding_side=side), ridge=1e-3)
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_where_the_adapter_changes_nothing_nothing_is_corrected(build: Any, correct: Any) -> None:
    model = get_peft_model(build.model(), UOEConfig(target_experts=[(0, 1)])).eval()
    before = logits(model)
    correction = correct(model, min_cosine=0.999)
    assert correction.accepted_layers == [1, 2]
    assert all(layer.before == layer.after for layer in correction.layers)
    assert correction.layers[0].before.jaccard == 1
    assert all(not delta.any() for delta in corrections(model).values()) and len(corrections(model)) == 2
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_retain_tokens_are_routed_more_as_before(family: str, correct: Any, tmp_path: Path) -> None:
    base = build_family(family)
    states = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = low_adapter(copy.deepcopy(base))
    forgets = logits(model)
    correction = correct(model)
    above = [block.layer_idx for block in find_moe_blocks(base)[1:]]
    assert above and correction.accepted_layers == above
    for layer in correction.layers:
        assert layer.before.cosine < layer.after.cosine <= 1 + 1e-6
    assert not torch.equal(logits(model), forgets)

    corrected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), corrected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), corrected, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    assert torch.equal(logits(model), corrected)
    # Biases and whatever else the model has are as they were.
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in states.items())


def test_each_layer_is_fitted_to_what_the_corrections_below_leave(
    build: Any, correct: Any, tokenizer: Any, retain: Dataset
) -> None:
    model = low_adapter(build.model())
    correct(model)
    last = find_moe_blocks(model)[2]
    delta = last.router.get_delta_weight("default", "weight", 0).clone()
    only_last = low_adapter(build.model())
    batches = batches_of(retain, tokenizer, size=8)
    fresh = router_delta(only_last, find_moe_blocks(only_last)[2], batches, ridge=1e-3)
    assert (fresh.float() - delta).norm() > 0.05 * delta.norm()


def test_what_misses_the_cosine_leaves_no_trace(build: Any, correct: Any) -> None:
    model = low_adapter(build.model())
    before, names = logits(model), model.state_dict().keys()
    first = correct(model).layers[0].after.cosine
    correction = correct(model, min_cosine=1.0)
    assert correction.accepted_layers == [] and first < 1
    assert correction.summary().count("left as it was: cosine below 1.0") == 2
    assert torch.equal(logits(model), before)
    assert model.state_dict().keys() == names
    assert model.peft_config["default"].corrected_router_layers is None


def test_correcting_again_begins_anew(build: Any, correct: Any) -> None:
    model = low_adapter(build.model())
    first = correct(model)
    once = {name: delta.clone() for name, delta in corrections(model).items()}
    assert correct(model) == first
    again = corrections(model)
    assert again.keys() == once.keys() and all(torch.equal(again[name], delta) for name, delta in once.items())


def test_the_report_is_of_held_out_tokens(build: Any, correct: Any, tokenizer: Any, retain: Dataset) -> None:
    # A matrix of 32 columns fits the eleven tokens of the shorter rows, and no others.
    model = low_adapter(build.model())
    few = Dataset.from_dict({"text": ["abcdefgh", "ijklmn", "opq"]})
    correction = correct_routers(model, few, processing_class=tokenizer, ridge=1e-9, min_cosine=1.0)
    fitted = batches_of(few.select([1, 2]), tokenizer, size=2)
    add_router_correction(
        model.base_model, "default", 1, router_delta(model, find_moe_blocks(model)[1], fitted, ridge=1e-9)
    )
    seen = routing_kept(model, fitted, [1])[1]
    assert seen.cosine > 0.999 > correction.layers[0].after.cosine


def test_measured_routing_is_that_of_the_base(build: Any, tokenizer: Any, retain: Dataset) -> None:
    """Against scores and selections that are computed by hand, for both layers in one pass."""
    model = low_adapter(build.model())
    batches = batches_of(retain, tokenizer, size=7)
    kept = routing_kept(model, batches, [1, 2])
    for layer_idx in (1, 2):
        router = find_moe_blocks(model)[layer_idx].router.weight.detach().double()
        edited = (plain_router_inputs(model, batches, layer_idx) @ router.T).softmax(-1)
        with model.disable_adapter():
            original = (plain_router_inputs(model, batches, layer_idx) @ router.T).softmax(-1)
        cosine = torch.cosine_similarity(edited, original).mean().item()
        pairs = zip(edited.topk(3).indices.tolist(), original.topk(3).indices.tolist(), strict=True)
        jaccard = [len({*now} & {*then}) / len({*now} | {*then}) for now, then in pairs]
        assert kept[layer_idx].cosine == pytest.approx(cosine, abs=1e-5)
        assert kept[layer_idx].jaccard == pytest.approx(sum(jaccard) / len(jaccard), abs=1e-5)


def test_low_rank_adapters_and_bfloat16_models(build: Any, correct: Any, tmp_path: Path) -> None:
    model = low_adapter(build.model().bfloat16(), delta_type="low_rank", router_delta_type="low_rank")
    correction = correct(model)
    assert all(layer.before.cosine < layer.after.cosine for layer in correction.layers)
    assert all(torch.linalg.matrix_rank(delta[0].float()) > 3 for delta in corrections(model).values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build.model().bfloat16(), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_only_the_active_adapter_is_corrected(build: Any, correct: Any) -> None:
    model = low_adapter(build.model())
    model.add_adapter("other", UOEConfig(target_experts=[(1, 2)]))
    perturb(model, std=0.3, adapter_name="other")
    other_before = (model.set_adapter("other"), logits(model))[1]
    model.set_adapter("default")
    assert correct(model).accepted_layers == [1, 2]
    model.set_adapter("other")
    assert torch.equal(logits(model), other_before)
    assert correct(model).accepted_layers == [2]
    assert [model.peft_config[name].corrected_router_layers for name in ("default", "other")] == [[1, 2], [2]]


def test_training_on_leaves_corrections_alone(
    build: Any, correct: Any, make_trainer: Callable[..., UnlearningTrainer]
) -> None:
    model = low_adapter(build.model(), std=0.05)
    correct(model)
    before = {name: delta.clone() for name, delta in corrections(model).items()}
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(model, max_steps=3)
    assert find_targets(model) == trainer.objective.targets == {0: [1]}
    trainer.train()
    assert all(not torch.equal(dict(model.named_parameters())[name], value) for name, value in trained.items())
    assert all(torch.equal(corrections(model)[name], delta) for name, delta in before.items())


def test_modes_are_as_before(build: Any, correct: Any) -> None:
    model = low_adapter(build.model()).train()
    correct(model)
    assert model.training and model.active_adapters == ["default"]
    assert not any(layer.disable_adapters for layer in model.modules() if isinstance(layer, UOELayer))


def test_what_cannot_be_corrected_is_refused(build: Any, correct: Any, retain: Dataset, tokenizer: Any) -> None:
    model = low_adapter(build.model())
    with pytest.raises(ValueError, match="needs a PeftModel with one active UOE adapter, got a Qwen2MoeForCausalLM"):
        correct(build.model())
    with pytest.raises(ValueError, match="got a LoraModel"):
        correct(build.lora(build.model()))
    with pytest.raises(ValueError, match="expected a layer with routed experts above its lowest target layer"):
        correct(low_adapter(build.model(), target_experts=[(2, 1)]))
    for options in ({"ridge": 0.0}, {"min_cosine": 1.5}):
        with pytest.raises(ValueError, match=r"ridge must be > 0 and min_cosine in \[0, 1\]"):
            correct(model, **options)
    with pytest.raises(ValueError, match="the retain set has one row"):
        correct_routers(model, retain.select([0]), processing_class=tokenizer)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged or disabled"):
        correct(model)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="merged or disabled"):
        correct(model)
    model.base_model.enable_adapter_layers()
    next(p for n, p in model.named_parameters() if "uoe_delta.default.down_proj" in n).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        correct(model)


def test_after_an_error_the_adapter_has_the_corrections_that_it_had(
    build: Any, correct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = low_adapter(build.model())
    correct(model)
    before, config = {n: d.clone() for n, d in corrections(model).items()}, model.peft_config["default"]
    layers = config.corrected_router_layers
    calls = []

    def fail_at_the_second(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return router_delta(*args, **kwargs)

    monkeypatch.setattr("uoe_peft.training.router_correction.router_delta", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        correct(model)
    after = corrections(model)
    assert len(before) == 2 and after.keys() == before.keys()
    assert all(torch.equal(after[name], delta) for name, delta in before.items())
    assert config.corrected_router_layers == layers


def test_a_correction_that_makes_routing_worse_is_not_kept(
    build: Any, correct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = low_adapter(build.model())
    noise = torch.randn(6, 32, dtype=torch.float64)
    monkeypatch.setattr("uoe_peft.training.router_correction.router_delta", lambda *args, **kwargs: noise)
    correction = correct(model)
    assert all(layer.after.cosine < layer.before.cosine for layer in correction.layers)
    assert correction.accepted_layers == [] and corrections(model) == {}
