"""What a PEFT user does with a LoRA adapter works with UOE: on several families, with both kinds of delta."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tuner.conftest import base_state, make_config, randomise
from uoe_peft.moe import find_moe_blocks
from uoe_peft.tuner import UOEConfig, UOEExpertsLayer, UOELayer

Logits = Callable[..., Tensor]


def add_random_adapter(model: PeftModel, name: str, *, seed: int, **kwargs: object) -> None:
    model.add_adapter(name, make_config(model, **kwargs))
    randomise(model, adapter_name=name, seed=seed)


def test_a_fresh_adapter_changes_no_bit(base: PreTrainedModel, config: UOEConfig, logits: Logits) -> None:
    before = logits(base)
    assert torch.equal(logits(get_peft_model(base, config)), before)


def test_only_the_slice_and_its_router_are_trainable(adapted: PeftModel, input_ids: Tensor, config: UOEConfig) -> None:
    adapted.train()
    adapted(input_ids=input_ids).logits.square().mean().backward()
    (layer_idx, _), *_ = config.target_experts
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert ".uoe_" in name and f".layers.{layer_idx}." in name
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_the_delta_changes_the_output_and_disabling_restores_it(
    base: PreTrainedModel, config: UOEConfig, logits: Logits
) -> None:
    before = logits(base)
    model = get_peft_model(base, config)
    randomise(model)
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)


def test_merged_equals_unmerged(adapted: PeftModel, logits: Logits) -> None:
    unmerged = logits(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), unmerged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ten_merges_and_unmerges_restore_every_bit(adapted: PeftModel, dtype: torch.dtype) -> None:
    adapted.to(dtype)
    before = base_state(adapted)
    for _ in range(10):
        adapted.merge_adapter()
        adapted.unmerge_adapter()
    after = base_state(adapted)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_merging_rounds_the_float32_sum_once(qwen: PreTrainedModel) -> None:
    qwen.to(torch.bfloat16)
    model = get_peft_model(qwen, make_config(qwen))
    randomise(model, std=1e-3)
    layer = next(m for m in model.modules() if isinstance(m, UOEExpertsLayer))
    base = layer.base_slice("down_proj", 1).clone()
    delta = layer.get_delta_weight("default", "down_proj", 1)
    assert delta.dtype == torch.float32
    model.merge_adapter()
    assert torch.equal(layer.base_slice("down_proj", 1), (base.float() + delta).bfloat16())


def test_merge_and_unload_gives_a_plain_model(adapted: PeftModel, logits: Logits, base: PreTrainedModel) -> None:
    kinds = [type(m) for m in copy.deepcopy(adapted).unload().modules()]
    unmerged = logits(adapted)
    merged = adapted.merge_and_unload(progressbar=False, safe_merge=True)
    assert [type(m) for m in merged.modules()] == kinds
    assert not any(isinstance(m, UOELayer) for m in merged.modules())
    torch.testing.assert_close(logits(merged), unmerged, rtol=1e-4, atol=1e-5)


def test_unload_gives_the_base_back(base: PreTrainedModel, config: UOEConfig, logits: Logits) -> None:
    before, state = logits(base), base_state(base)
    model = get_peft_model(base, config)
    randomise(model)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), before)
    assert unloaded.state_dict().keys() == state.keys()


def test_save_and_load_give_equal_logits(
    adapted: PeftModel, models: dict[str, PreTrainedModel], family: str, logits: Logits, tmp_path: Path
) -> None:
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".uoe_" in name for name in saved)
    loaded = PeftModel.from_pretrained(copy.deepcopy(models[family]), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_load_as_trainable(
    adapted: PeftModel,
    models: dict[str, PreTrainedModel],
    family: str,
    logits: Logits,
    tmp_path: Path,
    low_cpu_mem_usage: bool,
) -> None:
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        copy.deepcopy(models[family]), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(loaded), logits(adapted))
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable and trainable == {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_state_dict_round_trip(
    adapted: PeftModel, models: dict[str, PreTrainedModel], family: str, logits: Logits
) -> None:
    state = get_peft_model_state_dict(adapted)
    config = copy.deepcopy(adapted.peft_config["default"])
    other = inject_adapter_in_model(config, copy.deepcopy(models[family])).eval()
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(adapted))


def test_copies_and_pickles(adapted: PeftModel, logits: Logits) -> None:
    assert torch.equal(logits(copy.deepcopy(adapted)), logits(adapted))
    restored = pickle.loads(pickle.dumps(adapted.peft_config["default"]))
    assert restored == adapted.peft_config["default"]


def test_two_adapters_on_one_expert_and_on_another(adapted: PeftModel, logits: Logits, delta_type: str) -> None:
    first = logits(adapted)
    add_random_adapter(adapted, "same", seed=1, delta_type=delta_type)
    add_random_adapter(adapted, "other", seed=2, expert_idx=0, delta_type=delta_type)
    assert torch.equal(logits(adapted), first)
    adapted.set_adapter("other")
    assert not torch.allclose(logits(adapted), first)
    adapted.base_model.set_adapter(["default", "same", "other"])
    together = logits(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), together, rtol=1e-4, atol=1e-5)
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), together)
    adapted.delete_adapter("same")
    adapted.delete_adapter("other")
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), first)


def test_merging_a_list_of_adapters_adds_them(adapted: PeftModel, logits: Logits) -> None:
    before = base_state(adapted)
    add_random_adapter(adapted, "second", seed=1)
    adapted.base_model.set_adapter(["default", "second"])
    both = logits(adapted)
    adapted.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        adapted.merge_adapter(["second"])
    torch.testing.assert_close(logits(adapted), both, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="while they are merged"):
        adapted.delete_adapter("default")
    adapted.unmerge_adapter()
    after = base_state(adapted)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("combination_type", ["linear", "svd", "cat"])
def test_weighted_sum_of_adapters(adapted: PeftModel, logits: Logits, delta_type: str, combination_type: str) -> None:
    other = 0 if combination_type == "cat" else 1
    add_random_adapter(adapted, "second", seed=1, expert_idx=other, delta_type=delta_type)
    options = {"svd_rank": 64} if combination_type == "svd" else {}
    adapted.base_model.add_weighted_adapter(
        ["default", "second"], [0.7, -1.3], "mixed", combination_type=combination_type, **options
    )
    for layer in (m for m in adapted.modules() if isinstance(m, UOELayer) and "mixed" in m.target_indices):
        for projection, index in layer.edited_keys(["mixed"]):
            expected = torch.zeros_like(layer.base_slice(projection, index))
            for name, weight in (("default", 0.7), ("second", -1.3)):
                if (projection, index) in layer.edited_keys([name]):
                    expected = expected + weight * layer.get_delta_weight(name, projection, index)
            torch.testing.assert_close(
                layer.get_delta_weight("mixed", projection, index), expected, rtol=1e-4, atol=1e-5
            )
    adapted.set_adapter("mixed")
    assert logits(adapted).isfinite().all()


def test_svd_keeps_the_largest_directions(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    randomise(model)
    model.base_model.add_weighted_adapter(["default"], [1.0], "small", combination_type="svd", svd_rank=2)
    layer = next(m for m in model.modules() if isinstance(m, UOEExpertsLayer))
    delta, small = (layer.get_delta_weight(name, "down_proj", 1).detach() for name in ("default", "small"))
    singular = torch.linalg.svdvals(delta)
    torch.testing.assert_close((delta - small).norm(), singular[2:].norm())
    assert torch.linalg.matrix_rank(small) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["absent"], [1.0], "new"), "absent.*not found"),
        ((["default"], [1.0, 2.0], "new"), "1 adapters and 2 weights"),
        ((["default"], [1.0], "default"), "already"),
        ((["default"], [1.0], "new", "mean"), "combination_type must be"),
        ((["default", "second"], [1.0, 1.0], "new", "cat"), "different experts"),
    ],
)
def test_bad_weighted_sums_are_refused(qwen: PreTrainedModel, arguments: tuple[object, ...], message: str) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    add_random_adapter(model, "second", seed=1)
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"default", "second"}


def test_scale_is_linear_in_the_delta(adapted: PeftModel) -> None:
    for layer in (m for m in adapted.modules() if isinstance(m, UOELayer)):
        (projection, index), *_ = layer.edited_keys(["default"])
        whole = layer.get_delta_weight("default", projection, index)
        layer.set_scale("default", 0.5)
        torch.testing.assert_close(layer.get_delta_weight("default", projection, index), whole * 0.5)
        layer.scale_layer(3.0)
        torch.testing.assert_close(layer.get_delta_weight("default", projection, index), whole * 1.5)
        layer.unscale_layer(3.0)
        layer.unscale_layer()
        assert torch.equal(layer.get_delta_weight("default", projection, index), whole)


def test_scale_zero_is_the_base(adapted: PeftModel, logits: Logits) -> None:
    with adapted.disable_adapter():
        before = logits(adapted)
    for layer in (m for m in adapted.modules() if isinstance(m, UOELayer)):
        layer.set_scale("default", 0.0)
    assert torch.equal(logits(adapted), before)


def test_low_rank_scales(qwen: PreTrainedModel) -> None:
    plain = get_peft_model(copy.deepcopy(qwen), make_config(qwen, delta_type="low_rank", r=4, uoe_alpha=6))
    root = get_peft_model(qwen, make_config(qwen, delta_type="low_rank", r=4, uoe_alpha=6, use_rslora=True))
    scales = [
        {m.scaling["default"] for m in model.modules() if isinstance(m, UOELayer) and "default" in m.uoe_A}
        for model in (plain, root)
    ]
    assert scales == [{1.5}, {3.0}]


def test_mixed_batch_equals_each_adapter_alone(adapted: PeftModel, logits: Logits, input_ids: Tensor) -> None:
    add_random_adapter(adapted, "other", seed=2, expert_idx=0)
    with adapted.disable_adapter():
        base_logits = logits(adapted)
    adapted.set_adapter("other")
    other = logits(adapted)
    adapted.set_adapter("default")
    default = logits(adapted)
    mixed = logits(adapted, adapter_names=["default", "__base__", "other"])
    for row, expected in enumerate((default, base_logits, other)):
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(adapted), default)


def test_mixed_batch_generates(qwen: PreTrainedModel, input_ids: Tensor) -> None:
    model = get_peft_model(qwen, make_config(qwen)).eval()
    randomise(model, std=1.0)
    arguments = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    attention_mask = torch.ones_like(input_ids)
    forgets = model.generate(input_ids=input_ids, attention_mask=attention_mask, **arguments)
    with model.disable_adapter():
        remembers = model.generate(input_ids=input_ids, attention_mask=attention_mask, **arguments)
    names = ["default", "__base__", "default"]
    mixed = model.generate(input_ids=input_ids, attention_mask=attention_mask, adapter_names=names, **arguments)
    assert torch.equal(mixed, torch.stack([forgets[0], remembers[1], forgets[2]]))
    assert not torch.equal(forgets, remembers)


def test_bad_mixed_batches_are_refused(qwen: PreTrainedModel, input_ids: Tensor) -> None:
    model = get_peft_model(qwen, make_config(qwen)).eval()
    with pytest.raises(ValueError, match=r"absent.*not found"):
        model(input_ids=input_ids, adapter_names=["absent"] * 3)
    with pytest.raises(ValueError, match="one name for each sample"):
        model(input_ids=input_ids, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=input_ids, adapter_names=["default"] * 3)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(input_ids=input_ids, adapter_names=["default"] * 3)


def test_status(adapted: PeftModel) -> None:
    adapted.add_adapter("unused", make_config(adapted, expert_idx=0, train_router=False))
    status = get_model_status(adapted)
    assert status.adapter_model_type == "UOEModel"
    assert status.peft_types == {"default": "UOE", "unused": "UOE"}
    assert status.active_adapters == ["default"] and status.enabled is True
    assert status.requires_grad == {"default": True, "unused": False}
    assert {layer.module_type for layer in get_layer_status(adapted)} == {"UOEExpertsLayer", "UOERouterLayer"}
    assert status.trainable_params == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_adapter_dtype(base: PreTrainedModel, delta_type: str) -> None:
    base.to(torch.bfloat16)
    model = get_peft_model(copy.deepcopy(base), make_config(base, delta_type=delta_type))
    assert {p.dtype for n, p in model.named_parameters() if ".uoe_" in n} == {torch.float32}
    model = get_peft_model(base, make_config(base, delta_type=delta_type), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if ".uoe_" in n} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "llama4"], indirect=True)  # gpt_oss has biases
def test_zero_expert_silences_the_expert(base: PreTrainedModel, logits: Logits) -> None:
    silenced = copy.deepcopy(base)
    block = find_moe_blocks(silenced)[-1]
    last = block.storage.projections[-1]
    block.storage.weight(last, 1).data.zero_()
    model = get_peft_model(base, make_config(base, init_weights="zero_expert", train_router=False))
    torch.testing.assert_close(logits(model), logits(silenced), rtol=1e-4, atol=1e-5)


def test_safe_merge_finds_what_is_not_finite(adapted: PeftModel) -> None:
    before = base_state(adapted)
    for name, parameter in adapted.named_parameters():
        if ".experts." in name and ".uoe_" in name:
            parameter.data.view(-1)[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        adapted.merge_adapter(safe_merge=True)
    after = base_state(adapted)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(
    base: PreTrainedModel, config: UOEConfig, input_ids: Tensor, use_reentrant: bool
) -> None:
    model = get_peft_model(base, config).train()
    randomise(model)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=input_ids, use_cache=False).logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_input_require_grads()
    base.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() and plain
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-7)


def test_generate_with_cache_equals_without(adapted: PeftModel, input_ids: Tensor) -> None:
    arguments = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 4, "do_sample": False}
    with_cache = adapted.generate(input_ids=input_ids, use_cache=True, pad_token_id=0, **arguments)
    without = adapted.generate(input_ids=input_ids, use_cache=False, pad_token_id=0, **arguments)
    assert torch.equal(with_cache, without)


def test_auto_class_finds_base_and_adapter(qwen: PreTrainedModel, logits: Logits, tmp_path: Path) -> None:
    qwen.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), make_config(qwen, task_type="CAUSAL_LM")
    )
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["peft_type"] == "UOE" and written["base_model_name_or_path"] == str(tmp_path / "base")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_transformers_own_adapter_methods(qwen: PreTrainedModel, logits: Logits, tmp_path: Path) -> None:
    reference = get_peft_model(copy.deepcopy(qwen), make_config(qwen)).eval()
    randomise(reference)
    reference.save_pretrained(tmp_path)
    before, forgets = logits(qwen), logits(reference)
    qwen.load_adapter(str(tmp_path))
    assert torch.equal(logits(qwen), forgets)
    qwen.disable_adapters()
    assert torch.equal(logits(qwen), before)
    qwen.enable_adapters()
    assert torch.equal(logits(qwen), forgets)
    with pytest.warns(UserWarning, match="multiple adapters"):  # as for every PEFT method
        qwen.add_adapter(make_config(qwen, expert_idx=0), adapter_name="fresh")
    qwen.set_adapter("fresh")
    assert torch.equal(logits(qwen), before)
    qwen.set_adapter("default")
    qwen.delete_adapter("fresh")
    assert torch.equal(logits(qwen), forgets)


def test_compiles_without_graph_breaks(qwen: PreTrainedModel, logits: Logits) -> None:
    model = get_peft_model(qwen, make_config(qwen)).eval()
    randomise(model)
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_experts": [(99, 0)]}, r"layer 99 of Qwen2MoeForCausalLM has no Mixture-of-Experts block.*use one of"),
        ({"expert_idx": 99}, r"layer \d of Qwen2MoeForCausalLM has \d+ experts, got expert_idx=99; use 0 to \d+"),
        ({"target_projections": ["w1"]}, r"no target_projections \['w1'\]; it has"),
        ({"target_experts": "".join("auto")}, "needs a forget set"),
    ],
)
def test_targets_that_do_not_exist_are_refused(
    qwen: PreTrainedModel, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(qwen, make_config(qwen, **arguments))


def test_an_adapter_of_another_model_is_refused(
    models: dict[str, PreTrainedModel], qwen: PreTrainedModel, tmp_path: Path
) -> None:
    get_peft_model(qwen, make_config(qwen)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"made for another model: layer \d of .* has .*num_experts.*the adapter expects"
    ):
        PeftModel.from_pretrained(copy.deepcopy(models["olmoe"]), tmp_path)


def test_a_state_dict_with_missing_or_extra_tensors_names_them(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    state = get_peft_model_state_dict(model)
    down = next(name for name in state if name.endswith("down_proj"))
    with pytest.raises(ValueError, match=r"missing.*down_proj"):
        set_peft_model_state_dict(model, {name: t for name, t in state.items() if name != down})
    with pytest.raises(ValueError, match=r"unexpected.*uoe_delta\.other"):
        set_peft_model_state_dict(model, {**state, down.replace("down_proj", "other"): state[down]})
    with pytest.raises(ValueError, match=r"size mismatch for .*down_proj"):
        set_peft_model_state_dict(model, {**state, down: state[down][:, :-1]})


def test_merging_into_offloaded_or_quantised_weights_raises(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    block = find_moe_blocks(model.get_base_model())[-1]
    stack = block.storage.module.down_proj
    block.storage.module.down_proj = nn.Parameter(stack.detach().to("meta"), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"cannot merge into down_proj of .*Experts: it is offloaded"):
        model.merge_adapter()
    block.storage.module.down_proj = nn.Parameter(stack.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(RuntimeError, match="it is quantised"):
        model.merge_adapter()


def test_only_routed_tokens_change(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen, train_router=False)).eval()
    randomise(model)
    block = find_moe_blocks(model)[-1]
    hidden = torch.randn(40, block.hidden_size)
    index = torch.stack([torch.randperm(block.num_experts)[:2] for _ in range(40)])
    weights = torch.rand(40, 2)
    after = block.experts(hidden, index, weights)
    with model.disable_adapter():
        before = block.experts(hidden, index, weights)
    routed = (index == 1).any(dim=-1)
    assert routed.any() and not routed.all()
    assert torch.equal(after[~routed], before[~routed])
    assert ((after[routed] - before[routed]).abs().amax(dim=-1) > 1e-6).all()


def test_every_parameter_gets_a_gradient_when_no_token_reaches_the_expert(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen, train_router=False))
    block = find_moe_blocks(model)[-1]
    hidden, index = torch.randn(7, block.hidden_size), torch.full((7, 2), 0)
    block.experts(hidden, index, torch.rand(7, 2)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(g is not None and not g.any() for g in gradients)


def test_merging_into_sharded_weights_raises(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    experts = find_moe_blocks(model)[-1].storage.module
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shards = distribute_tensor(experts.down_proj.detach(), mesh, [Shard(0)])
        experts.down_proj = nn.Parameter(shards, requires_grad=False)
        with pytest.raises(RuntimeError, match=r"cannot merge into down_proj of Qwen2MoeExperts: it is sharded"):
            model.merge_adapter()
    finally:
        torch.distributed.destroy_process_group()


def test_push_to_hub_uploads_adapter_and_config(qwen: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, object] = {}

    def upload(self: PeftModel, working_dir: str, repo_id: str, *_: object, **kwargs: object) -> None:
        uploaded.update(repo_id=repo_id, files=sorted(path.name for path in Path(working_dir).iterdir()), **kwargs)

    hub = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(PeftModel, "_upload_modified_files", upload)
    model = get_peft_model(qwen, make_config(qwen))
    model.push_to_hub("org/forget-x", commit_message="first", revision="main")
    assert uploaded["repo_id"] == "org/forget-x" and (uploaded["commit_message"], uploaded["revision"]) == (
        "first",
        "main",
    )
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(uploaded["files"])
