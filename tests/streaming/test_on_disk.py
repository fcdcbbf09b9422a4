"""Experts that are read in blocks: the layers, and what is found with them, are those of the model in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, PreTrainedModel, Qwen3MoeConfig

from tests.streaming.conftest import Open, SaveFamily, open_in_blocks
from tests.streaming.test_families import batches, said
from tests.streaming.test_method import adapter, attributed, moments
from tests.training.conftest import TARGET, make_args, make_sets
from uoe_peft import UOEConfig
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.passes import run_passes
from uoe_peft.streaming import StreamedModel
from uoe_peft.streaming.opening import make_skeleton
from uoe_peft.streaming.reader import PartReader
from uoe_peft.training import UnlearningTrainer, solve_unlearning
from uoe_peft.tuner import UOEModel

# Fused by conversion from single experts, fused on disk; transposed; without a gate; as many as a layer in two has;
# experts beside a parallel attention, beside shared ones, and with a scale in front of them.
FAMILIES = [
    "aria",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gemma4",
    "glm4_moe",
    "granitemoe",
    "jamba",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_next",
    "zaya",
]


@pytest.fixture
def in_blocks(checkpoint: Path) -> Open:
    return partial(open_in_blocks, checkpoint)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Layer and experts of every read of experts."""
    found: list[tuple[int, list[int]]] = []
    whole = PartReader.read_experts

    def noted(self: PartReader, names: list[str], expert_indices: list[int]) -> dict[str, Tensor]:
        found.append((int(names[0].split(".")[2]), list(expert_indices)))
        return whole(self, names, expert_indices)

    monkeypatch.setattr(PartReader, "read_experts", noted)
    return found


@torch.no_grad()
def assert_every_bit(model: Any, resident: Any, inputs: list[dict[str, Tensor]]) -> None:
    expected = [said(resident, batch) for batch in inputs]
    found = [output for output, _ in run_passes(model, [partial(said, model, batch) for batch in inputs])]
    assert all(map(torch.equal, found, expected))
    assert torch.equal(said(model, inputs[0]), expected[0])  # a single call, too


def ids(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(2, 97, (2, 5 + index), generator=generator)} for index in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_is_the_resident_models(family: str, saved_family: SaveFamily) -> None:
    folder, resident = saved_family(family)
    model = open_in_blocks(folder)
    for implementation in ("grouped_mm", "eager"):
        resident.set_experts_implementation(implementation)
        model.set_experts_implementation(implementation)
        assert_every_bit(model, resident, batches(family))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_biases_of_experts_that_are_fused_on_disk(implementation: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = GptOssConfig(**sizes, **heads, num_local_experts=5, layer_types=["sliding_attention", "full_attention"])
    made = GptOssForCausalLM(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(tmp_path)
    model = open_in_blocks(tmp_path)
    resident = GptOssForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    for own in (resident, model):
        own.set_experts_implementation(implementation)
    assert_every_bit(model, resident, [{"input_ids": torch.arange(2, 20).view(2, 9)}])


def test_sums_of_three_experts_in_the_order_of_eager(in_blocks: Open, resident: PreTrainedModel) -> None:
    model = in_blocks()
    for own in (resident, model):
        own.set_experts_implementation("eager")
    assert_every_bit(model, resident, ids())


def test_a_model_larger_than_any_memory_is_made_without_data() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 2**16, "moe_intermediate_size": 2**15, "num_experts": 2**15}
    config = Qwen3MoeConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    skeleton = make_skeleton(config, "float32", trust_remote_code=False)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert skeleton.model.layers[0].mlp.experts.gate_up_proj.numel() == 2**47
    assert torch.equal(skeleton.model.rotary_emb.inv_freq[:1], torch.ones(1))


def test_computed_in_bfloat16(checkpoint: Path, in_blocks: Open) -> None:
    resident = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16")
    assert_every_bit(in_blocks(dtype="bfloat16"), resident, ids())


@pytest.mark.parametrize("experts_a_block", [1, 4, 6])
def test_many_passes_read_each_expert_once(
    experts_a_block: int, in_blocks: Open, resident: PreTrainedModel, reads: list[tuple[int, list[int]]]
) -> None:
    model = in_blocks(experts_a_block=experts_a_block)
    assert_every_bit(model, resident, ids())
    in_a_sweep = [list(range(first, min(6, first + experts_a_block))) for first in range(0, 6, experts_a_block)]
    per_layer = [(layer_idx, block) for layer_idx in range(3) for block in in_a_sweep]
    assert reads[: len(per_layer)] == per_layer


def test_experts_without_tokens_are_not_read(
    in_blocks: Open, resident: PreTrainedModel, reads: list[tuple[int, list[int]]]
) -> None:
    inputs = [{"input_ids": torch.tensor([[5]])}, {"input_ids": torch.tensor([[9]])}]
    used: dict[int, set[int]] = {layer_idx: set() for layer_idx in range(3)}
    for layer_idx, layer in enumerate(resident.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda experts, args, own=used[layer_idx]: own.update(args[1].flatten().tolist())
        )
    assert_every_bit(in_blocks(), resident, inputs[:1])
    assert any(len(own) < 6 for own in used.values())
    assert {layer_idx: {e for idx, block in reads for e in block if idx == layer_idx} for layer_idx in used} == used


def test_outputs_that_do_not_fit_together_take_passes_in_groups(
    in_blocks: Open, resident: PreTrainedModel, reads: list[tuple[int, list[int]]]
) -> None:
    # A token has 32 numbers of 4 bytes; three experts, what they get, and attention wait for it. Batches have 10 to 16.
    model = in_blocks(experts_a_block=6, state_memory=5 * 32 * 4 * 22)
    assert_every_bit(model, resident, ids())
    assert [layer_idx for layer_idx, _ in reads[:9]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_at_most_three_blocks_are_in_memory(in_blocks: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    model = in_blocks(experts_a_block=1)
    for experts in model._on_disk.values():
        own = experts._holding
        monkeypatch.setattr(
            experts, "_holding", lambda read, part, own=own: (held.append(len(part)), own(read, part))[1]
        )
    said(model, ids()[0])
    assert set(held) == {1}
    for layer in model.model.layers:
        assert layer.mlp.experts.gate_up_proj.is_meta
        assert model._residence.num_bytes(0) < 6 * 3 * 32 * 24 * 4


def test_attention_and_shared_experts_run_once_for_each_pass(in_blocks: Open) -> None:
    model, calls = in_blocks(), []
    for layer in model.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.shared_expert.down_proj):
            own = part.forward
            part.forward = lambda hidden, own=own: (calls.append(0), own(hidden))[1]
    with torch.no_grad():
        list(run_passes(model, [partial(said, model, batch) for batch in ids()]))
    assert len(calls) == 2 * 3 * 4


@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")
@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4", "mixtral", "olmoe"])
def test_affinities_moments_and_the_trained_adapter(
    family: str, saved_family: SaveFamily, tokenizer: Any, tmp_path: Path
) -> None:
    folder, resident = saved_family(family)
    streamed, sets = open_in_blocks(folder), make_sets()
    expected, found = (attributed(model, sets, tokenizer) for model in (resident, streamed))
    assert torch.equal(found.affinity, expected.affinity)
    (target,) = expected.top(1)
    measures: list[Callable[[Any], dict[str, Tensor]]] = [
        lambda model: moments(model, sets[1], tokenizer, target),
        lambda model: adapter(model, sets, tokenizer, target, str(tmp_path)),
    ]
    for measure in measures:
        whole, read = measure(resident), measure(streamed)
        assert whole.keys() == read.keys()
        assert all(torch.equal(value, read[name]) for name, value in whole.items())
        assert any(value.any() for value in whole.values())


@pytest.mark.filterwarnings("ignore:fewer tokens of the .* set reach:UserWarning")
def test_solved(in_blocks: Open, resident: PreTrainedModel, tokenizer: Any, sets: tuple[Dataset, Dataset]) -> None:
    options: dict[str, Any] = {"processing_class": tokenizer, "target_experts": [TARGET], "show_progress": False}
    expected, found = (
        {name: p for name, p in solve_unlearning(model, *sets, **options).named_parameters() if "uoe_" in name}
        for model in (resident, in_blocks())
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(value.any() for value in expected.values())


def trainer_of(model: Any, sets: tuple[Dataset, Dataset], tokenizer: Any, folder: Path, **options: Any) -> Any:
    options = {"forget_loss": "rmu", "retain_loss": "embed_diff", **options}
    return UnlearningTrainer(
        model=model,
        args=make_args(output_dir=str(folder), **options),
        train_dataset=sets[0],
        retain_dataset=sets[1],
        processing_class=tokenizer,
        peft_config=UOEConfig(target_experts=[TARGET]),
    )


def test_autograd_keeps_no_weights_but_the_edited_experts(
    in_blocks: Open, tokenizer: Any, sets: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    model = in_blocks(experts_a_block=4)
    trainer = trainer_of(model, sets, tokenizer, tmp_path)
    stacks: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() == 3 and tensor.shape[-2:] in ((48, 32), (32, 24)):
            stacks.append(len(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.train()
    assert set(stacks) <= {1}  # the deltas of the one edited expert
    experts = model._on_disk[TARGET[0]]
    assert set(experts._remembered) == {TARGET[1]}
    tuned: Any = trainer.model
    assert isinstance(tuned.base_model, UOEModel)
    assert model.model.layers[TARGET[0]].mlp.experts.base_layer.gate_up_proj.is_meta


def test_losses_whose_gradients_need_further_layers_are_refused_at_the_start(
    in_blocks: Open, tokenizer: Any, sets: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    trainer = trainer_of(in_blocks(), sets, tokenizer, tmp_path, forget_loss="npo", retain_loss="nll")
    with pytest.raises(ValueError, match=r"layers \[1, 2\], of which \[2\] have .* read in blocks: edit one layer"):
        trainer.train()


def test_gradients_never_go_through_blocks(in_blocks: Open) -> None:
    model = in_blocks()
    model.model.layers[0].self_attn.o_proj.register_forward_hook(
        lambda module, args, output: output.requires_grad_(True)
    )
    with pytest.raises(ValueError, match="gradients are to go through experts that are read in blocks"):
        model(**ids()[0])
    with torch.no_grad():
        model(**ids()[0])


def test_one_expert_is_read_by_its_index(in_blocks: Open, resident: PreTrainedModel) -> None:
    model = in_blocks()
    experts = model.model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        whole = getattr(resident.model.layers[1].mlp.experts, name)
        assert torch.equal(getattr(experts, name)[4], whole[4])
        assert torch.equal(getattr(experts, name)[torch.tensor(2)], whole[2])
        assert torch.equal(getattr(experts, name)[-1], whole[5])
        with pytest.raises(IndexError):
            getattr(experts, name)[6]


def test_a_kernel_whose_order_is_not_known_is_refused(in_blocks: Open) -> None:
    model = in_blocks()
    model.config._experts_implementation_internal = "deepgemm"
    with pytest.raises(UnsupportedModelError, match=r"cannot be run by 'deepgemm'; .*grouped_mm"):
        model(**ids()[0])


def test_a_router_that_draws_lots_gets_what_its_experts_say(in_blocks: Open, resident: PreTrainedModel) -> None:
    """What was computed ahead is of other experts then, and is not taken."""
    model, calls = in_blocks(), []
    experts = model.model.layers[1].mlp.experts

    def other_experts(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(0)
        return (args[0], (args[1] + len(calls)) % 6, args[2])

    experts.register_forward_pre_hook(other_experts)
    (inputs,) = ids(1)
    with torch.no_grad():
        ((found, _),) = run_passes(model, [partial(said, model, inputs)])
    assert len(calls) == 2
    resident.model.layers[1].mlp.experts.register_forward_pre_hook(
        lambda module, args: (args[0], (args[1] + 2) % 6, args[2])
    )
    with torch.no_grad():
        assert torch.equal(found, said(resident, inputs))


@pytest.mark.parametrize("fails_in", ["experts", "attention"])
def test_nothing_is_left_behind_by_a_pass_that_fails(
    fails_in: str, in_blocks: Open, resident: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_blocks()
    layer = model.model.layers[1]
    part = layer.mlp.experts if fails_in == "experts" else layer.self_attn

    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    handle = part.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mine"):
        list(run_passes(model, [partial(said, model, batch) for batch in ids()]))
    handle.remove()
    with monkeypatch.context() as patch:
        patch.setattr(PartReader, "read_experts", fail)
        with pytest.raises(RuntimeError, match="mine"):
            list(run_passes(model, [partial(said, model, batch) for batch in ids()]))
    assert_every_bit(model, resident, ids())


def test_a_run_that_was_stopped_goes_on(
    in_blocks: Open, resident: PreTrainedModel, tmp_path: Path, reads: list[tuple[int, list[int]]]
) -> None:
    model, passes = in_blocks(state_dir=tmp_path / "states"), ids()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    model.model.layers[2].mlp.experts.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        list(run_passes(model, [partial(said, model, batch) for batch in passes]))
    reads.clear()
    model = in_blocks(state_dir=tmp_path / "states")
    with torch.no_grad():
        found = [output for output, _ in run_passes(model, [partial(said, model, batch) for batch in passes])]
        assert all(torch.equal(output, said(resident, batch)) for output, batch in zip(found, passes, strict=True))
    assert {layer_idx for layer_idx, _ in reads} == {2}
    assert list((tmp_path / "states").iterdir()) == []


def test_a_layer_that_does_not_fit_in_blocks_either_is_refused_with_figures(
    checkpoint: Path, saved_family: SaveFamily
) -> None:
    with pytest.raises(ValueError, match=r"takes .* GiB with its routed experts read one at a time\), more than the"):
        StreamedModel.from_pretrained(checkpoint, layer_memory=1000)
    folder, _ = saved_family("dbrx")
    with pytest.raises(ValueError, match=r"its experts cannot be read apart\), more than"):
        StreamedModel.from_pretrained(folder, layer_memory=1000)


def test_chosen_by_what_is_free(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: Any = StreamedModel.from_pretrained(checkpoint)
    assert whole._on_disk == {}
    limit = whole._residence.least_bytes
    for free, is_apart in ((limit, False), (limit - 1, True)):
        monkeypatch.setattr("uoe_peft.streaming.model.available_memory", lambda free=free: free)
        model: Any = StreamedModel.from_pretrained(checkpoint)
        assert bool(model._on_disk) == is_apart
