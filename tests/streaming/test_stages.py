"""The method's stages on a streamed model: the same calls as on a resident one, and the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.streaming.conftest import Open, layers_read
from tests.training.conftest import TARGET, make_args, with_uoe
from uoe_peft import UOEConfig, attribute_experts, evaluate_unlearning
from uoe_peft.attribution.sampling import sample_batches
from uoe_peft.moe.passes import run_passes
from uoe_peft.moe.routing import record_routing
from uoe_peft.moments import measure_moments
from uoe_peft.streaming import StreamedModel, residence
from uoe_peft.training import UnlearningTrainer, solve_unlearning

Sets = tuple[Dataset, Dataset]

pytestmark = [
    pytest.mark.filterwarnings("ignore::uoe_peft.attribution.UnidentifiedExpertWarning"),
    pytest.mark.filterwarnings("ignore::uoe_peft.attribution.GeneralistExpertWarning"),
]


def trained(model: Any, sets: Sets, tokenizer: Any, folder: Path, **options: Any) -> UnlearningTrainer:
    trainer = UnlearningTrainer(
        model=model,
        args=make_args(output_dir=str(folder), max_steps=3, **options),
        train_dataset=sets[0],
        retain_dataset=sets[1],
        processing_class=tokenizer,
        peft_config=UOEConfig(target_experts=[TARGET]),
    )
    trainer.train()
    return trainer


def deltas(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "uoe_" in name}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(value.any() for value in expected.values())


@pytest.mark.parametrize("score", ["gate", "token_ratio", "contrast"])
def test_affinities(score: Any, opened: Open, resident: PreTrainedModel, tokenizer: Any, sets: Sets) -> None:
    options: dict[str, Any] = {"processing_class": tokenizer, "retain_dataset": sets[1], "batch_size": 3}
    expected, found = (
        attribute_experts(model, sets[0], score=score, show_progress=False, **options) for model in (resident, opened())
    )
    assert torch.equal(found.affinity, expected.affinity)
    assert found.confidence is not None
    assert expected.confidence is not None
    assert torch.equal(found.confidence.low, expected.confidence.low)
    assert found.metadata() == expected.metadata()


@pytest.mark.parametrize("score", ["ablation", "gradient"])
def test_scores_that_need_the_whole_model_often_are_refused(
    score: Any, opened: Open, tokenizer: Any, sets: Sets
) -> None:
    with pytest.raises(ValueError, match=f"score='{score}' needs passes .* use 'gate', 'token_ratio' or 'contrast'"):
        attribute_experts(opened(), sets[0], processing_class=tokenizer, score=score)


@pytest.mark.parametrize("keeps_states", [False, True])
def test_moments_of_several_layers(
    keeps_states: bool, opened: Open, resident: PreTrainedModel, tokenizer: Any, sets: Sets, tmp_path: Path
) -> None:
    batches = sample_batches(sets[1], tokenizer, max_tokens=1000, batch_size=3, max_length=None, seed=0, name="retain")
    experts = [TARGET, (2, 0), (0, 3)]
    streamed = opened(state_dir=tmp_path / "states" if keeps_states else None)
    expected, found = (measure_moments(model, batches, experts, strict=False) for model in (resident, streamed))
    assert not keeps_states or list((tmp_path / "states").iterdir()) == []
    assert found.num_tokens == expected.num_tokens
    assert_same(
        {str(name): own.second for name, own in found.slices.items()},
        {str(name): own.second for name, own in expected.slices.items()},
    )


@pytest.mark.parametrize("retain_loss", ["embed_diff", "relative_embed_diff"])
def test_training_at_the_edited_layer_leaves_the_others_on_disk(
    opened: Open, resident: PreTrainedModel, tokenizer: Any, sets: Sets, tmp_path: Path, retain_loss: str
) -> None:
    options: dict[str, Any] = {"forget_loss": "rmu", "retain_loss": retain_loss}
    streamed = opened()
    found = trained(streamed, sets, tokenizer, tmp_path / "streamed", **options)
    assert_same(deltas(found.model), deltas(trained(resident, sets, tokenizer, tmp_path / "resident", **options).model))
    on_disk = {index for index, layer in enumerate(streamed.model.layers) if layer.input_layernorm.weight.is_meta}
    assert on_disk == {0, 2}
    assert not any("nll" in name for entry in found.state.log_history for name in entry)


@pytest.mark.parametrize("losses", [("npo", "nll"), ("grad_ascent", "kl")])
def test_other_losses_have_the_layers_above_in_memory(
    losses: tuple[str, str],
    opened: Open,
    resident: PreTrainedModel,
    tokenizer: Any,
    sets: Sets,
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = dict(zip(("forget_loss", "retain_loss"), losses, strict=True))
    streamed = opened()
    found = trained(streamed, sets, tokenizer, tmp_path / "streamed", **options)
    assert_same(deltas(found.model), deltas(trained(resident, sets, tokenizer, tmp_path / "resident", **options).model))
    assert [layer.input_layernorm.weight.is_meta for layer in streamed.model.layers] == [True, False, False]


def test_layers_that_do_not_fit_are_said_before_the_first_pass(
    opened: Open, sets: Sets, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed, other, ran = opened(), opened(), []
    for model in (streamed, other):
        model.keep_layers([TARGET[0]])
        model.model.layers[0].register_forward_hook(lambda *_: ran.append(0))
    layer = sum(parameter.numel() * 4 for parameter in streamed.model.layers[2].parameters())
    monkeypatch.setattr(residence, "available_memory", lambda: layer // 2)
    with pytest.raises(ValueError, match=r"layers \[2\] are to stay .* use forget_loss='rmu'"):
        trained(streamed, sets, tokenizer, tmp_path, forget_loss="npo", retain_loss="nll")
    assert ran == []
    trained(other, sets, tokenizer, tmp_path, forget_loss="rmu", retain_loss="embed_diff")
    assert ran


def test_a_trained_adapter_is_an_ordinary_one(
    opened: Open, resident: PreTrainedModel, tokenizer: Any, sets: Sets, tmp_path: Path
) -> None:
    trainer = trained(opened(), sets, tokenizer, tmp_path, forget_loss="rmu", retain_loss="none")
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(resident, str(tmp_path / "adapter"))
    assert_same(deltas(loaded), deltas(trainer.model))
    again = PeftModel.from_pretrained(opened(), str(tmp_path / "adapter"))
    ids = torch.arange(2, 14).view(2, 6)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_solving(opened: Open, resident: PreTrainedModel, tokenizer: Any, sets: Sets) -> None:
    expected, found = (
        solve_unlearning(
            model,
            *sets,
            processing_class=tokenizer,
            target_experts=[TARGET],
            keep_retain=0.1,
            batch_size=3,
            show_progress=False,
        )
        for model in (resident, opened())
    )
    assert_same(deltas(found), deltas(expected))


def randomise(model: nn.Module, *, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "uoe_" in name:
                parameter.copy_(torch.randn_like(parameter))


@torch.no_grad()
def swept(model: Any, inputs: list[Tensor]) -> list[Tensor]:
    passes = [lambda ids=ids: model(input_ids=ids, use_cache=False).logits for ids in inputs]
    return [logits for logits, _ in run_passes(model, passes)]


def test_passes_that_are_run_again_with_another_adapter_begin_at_its_layer(
    opened: Open, resident: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = layers_read(monkeypatch)
    streamed, whole_model = with_uoe(opened(state_memory=40_000)), with_uoe(resident)
    inputs, others = [torch.arange(2, 14).view(2, 6), torch.arange(5, 9).view(1, 4)], [torch.arange(9, 16).view(1, 7)]
    for seed, run, layers in (
        (0, inputs, [0, 2]),  # the edited layer is there to stay
        (1, inputs, [2]),
        (2, others, [0, 2]),
        (3, inputs, [2]),
        (4, others, [2]),
    ):
        reads.clear()
        for model in (streamed, whole_model):
            randomise(model, seed=seed)
        assert all(map(torch.equal, swept(streamed, run), swept(whole_model, run)))
        assert reads == layers
    for model in (streamed, whole_model):
        model.add_adapter("lower", UOEConfig(target_experts=[(0, 1)]))
        model.base_model.set_adapter(["default", "lower"])
        randomise(model, seed=5)
    assert all(map(torch.equal, swept(streamed, inputs), swept(whole_model, inputs)))
    reads.clear()
    base: Any = streamed.unload()
    assert all(map(torch.equal, swept(base, inputs), swept(whole_model.unload(), inputs)))
    assert reads == [2]  # both edited layers are there to stay


def test_a_layer_below_the_edited_one_is_read_again_where_it_is_asked_for(
    opened: Open, resident: PreTrainedModel
) -> None:
    streamed, inputs = with_uoe(opened()), torch.arange(2, 14).view(2, 6)
    with torch.no_grad(), record_routing(streamed) as trace:
        (expected,) = (layer_scores(resident, inputs),)
        for _ in range(2):
            passes = [lambda: streamed(input_ids=inputs, use_cache=False).logits]
            ((_, (found,)),) = run_passes(
                streamed, passes, layer_indices=[0], read=lambda position, layer_idx: trace[layer_idx].scores.clone()
            )
            assert torch.equal(found, expected)


def layer_scores(model: Any, inputs: Tensor) -> Tensor:
    """The router scores of layer 0."""
    with record_routing(model) as trace:
        model(input_ids=inputs, use_cache=False)
        return trace[0].scores.clone()


def test_what_enters_the_edited_layer_is_not_kept_without_room(opened: Open, resident: PreTrainedModel) -> None:
    streamed, whole_model = with_uoe(opened(state_memory=2000)), with_uoe(resident)
    inputs = [torch.arange(2, 14).view(2, 6), torch.arange(5, 9).view(1, 4)]
    for seed in range(2):
        for model in (streamed, whole_model):
            randomise(model, seed=seed)
        assert all(map(torch.equal, swept(streamed, inputs), swept(whole_model, inputs)))


def test_evaluation_by_likelihood(
    opened: Open, resident: PreTrainedModel, tokenizer: Any, sets: Sets, tmp_path: Path
) -> None:
    reports = {}
    for name, model in (("resident", resident), ("streamed", opened())):
        trainer = trained(model, sets, tokenizer, tmp_path / name, forget_loss="rmu", retain_loss="none")
        reports[name] = evaluate_unlearning(
            trainer.model,
            forget_dataset=sets[0],
            retain_dataset=sets[1],
            processing_class=tokenizer,
            batch_size=3,
            max_new_tokens=2,
            cache_dir=tmp_path / f"answers-{name}",
        )
    for model in ("base", "unlearned"):
        for part in ("forget", "retain"):
            expected, found = (reports[name].scores[model][part] for name in ("resident", "streamed"))
            assert found.probability == expected.probability
            assert found.rouge_l_recall is None  # what would be generated
    assert any("no answers were generated" in note for note in reports["streamed"].notes)


def test_a_streamed_model_is_not_saved(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="merge_checkpoint"):
        opened().save_pretrained(tmp_path)


def test_another_dtype_is_chosen_when_it_is_opened(opened: Open) -> None:
    with pytest.raises(ValueError, match=r"computes in torch.float32; open it with dtype=torch.float64"):
        opened().double()
    assert isinstance(opened().to("cpu"), StreamedModel)
