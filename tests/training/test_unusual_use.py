"""What people do with a trainer beside what it was written for: it works as they think, or it says that it does not."""

from __future__ import annotations

import json
import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig

from uoe_peft import precision
from uoe_peft.training import UnlearningConfig, UnlearningTrainer


class StepGradients(TrainerCallback):
    """The gradients of every optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def ascent_gradients(model: Any, rows: Any) -> list[Tensor]:
    """Of minus the mean cross-entropy over all answer tokens of the rows, at the slices that `TARGET` names."""
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        losses.append(F.cross_entropy(model(ids).logits[0, :-1], labels[1:], reduction="none")[labels[1:] != -100])
    mlp = model.model.layers[1].mlp
    parameters = [mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight]
    up, down, gate = torch.autograd.grad(-torch.cat(losses).mean(), parameters)
    return [up[2], down[2], gate]


@pytest.mark.parametrize(("batch_size", "accumulation", "sizes"), [(3, 2, [6, 2]), (2, 3, [6, 2]), (1, 5, [5, 3])])
def test_the_last_step_of_an_epoch_divides_by_what_it_has(make_trainer, build, batch_size, accumulation, sizes):
    """8 examples do not fill the last step's micro-batches: it has fewer, and the last of them is short."""
    keep = StepGradients()
    trainer = make_trainer(
        build.uoe(build.model()),
        callbacks=[keep],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        forget_loss="grad_ascent",
        retain_loss="none",
        anchor_weight=0.0,
        learning_rate=0.0,
        max_grad_norm=0.0,
    )
    trainer.train()
    rows, base = list(trainer.train_dataset.forget), build.model().eval()
    assert len(keep.steps) == 2
    for found, part in zip(keep.steps, (rows[: sizes[0]], rows[sizes[0] :]), strict=True):
        expected = ascent_gradients(base, part)
        assert len(found) == len(expected) == 3
        for gradient in found.values():
            flat = gradient.reshape(-1)
            assert any(flat.shape == e.reshape(-1).shape and torch.allclose(flat, e.reshape(-1), atol=1e-6, rtol=1e-4)
                       for e in expected)  # fmt: skip


def test_workers_hand_out_the_same_pairs(make_trainer, build):
    def pairs(**options: Any) -> list[Any]:
        trainer, seen = make_trainer(build.uoe(build.model()), max_steps=4, **options), []
        compute_loss = trainer.compute_loss

        def watch(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            columns = [inputs["forget"][name].tolist() for name in ("index", "seed")]
            seen.append([*columns, inputs["retain"]["index"].tolist()])
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = watch
        trainer.train()
        return seen

    expected = pairs()
    assert expected[:2] != expected[2:]
    assert pairs(dataloader_num_workers=2, dataloader_persistent_workers=True) == expected


@pytest.mark.parametrize("config", [SFTConfig, TrainingArguments])
def test_arguments_of_another_trainer_are_refused(uoe_model, sets, tokenizer, tmp_path, config):
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False)
    with pytest.raises(TypeError, match=rf"args must be an UnlearningConfig.*got {config.__name__}"):
        UnlearningTrainer(uoe_model, args, train_dataset=sets[0], retain_dataset=sets[1], processing_class=tokenizer)


def test_contradicting_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="assistant_only_loss=True and completion_only_loss=False contradict"):
        UnlearningConfig(output_dir=str(tmp_path), assistant_only_loss=True, completion_only_loss=False)


def test_a_set_that_is_to_be_shuffled_is(make_trainer, build):
    plain = make_trainer(train_sampling_strategy="sequential").train_dataset.forget["id"][:]
    options = {"shuffle_dataset": True, "train_sampling_strategy": "sequential"}
    for loss in ("npo", "idk"):
        dataset = make_trainer(forget_loss=loss, **options).train_dataset
        assert dataset.forget["id"][:] != plain and sorted(dataset.forget["id"]) == sorted(plain)
    for forget, alternative in zip(dataset.forget, dataset.extra["alternative"], strict=True):
        prompt = forget["labels"].count(-100)
        assert forget["input_ids"][:prompt] == alternative["input_ids"][:prompt]  # still side by side


def test_sets_of_one_row_and_of_equal_rows_train(make_trainer, build, sets):
    forget, retain = sets[0].select([0]), sets[1].select([3])
    for rows in (forget, concatenate_datasets([forget, sets[0], forget])):
        trainer = make_trainer(build.uoe(build.model()), forget=rows, retain=retain, max_steps=6)
        trainer.train()
        assert trainer.state.log_history[0]["loss_retain"] > 0


def test_splits_are_evaluated_as_a_dict_of_sets(make_trainer, sets):
    trainer = make_trainer(eval_dataset=DatasetDict(forget=sets[0], retain=sets[1]))
    expected = make_trainer(eval_dataset={"forget": sets[0], "retain": sets[1]}).evaluate()
    assert trainer.evaluate()["eval_balance"] == expected["eval_balance"]


def test_noise_on_the_embeddings_is_not_lost_in_a_cache(make_trainer, build):
    trainer = make_trainer(build.uoe(build.model()), max_steps=4, neftune_noise_alpha=50.0, learning_rate=0.0)
    trainer.train()
    plain = make_trainer(build.uoe(build.model()), max_steps=4, learning_rate=0.0)
    plain.train()
    with_noise, without = (t.state.log_history[0]["forget_nll"] for t in (trainer, plain))
    assert with_noise != pytest.approx(without, rel=1e-3)
    with torch.no_grad():  # the noise ends with training
        assert trainer.evaluate(Dataset.from_dict({"text": ["x y"]})) is not None
    assert not trainer.model.get_input_embeddings()._forward_hooks


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(make_trainer, tokenizer):
    tokenizer.pad_token = None
    trainer = make_trainer(tokenizer=tokenizer)
    assert trainer.data_collator.pad_token_id == tokenizer.eos_token_id
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[7]])["forget"]
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["labels"][padding] == -100).all()
    trainer.train()


def test_a_tokenizer_without_padding_and_end_is_refused(make_trainer, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="pad_token"):
        make_trainer(tokenizer=tokenizer)


def test_a_formatting_function_that_was_changed_is_called_again(make_trainer, tokenizer, tmp_path):
    """`datasets` knows a function of a module by its name alone."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"row {i}"}) + "\n" for i in range(3)))
    rows = load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    module = ModuleType("formatting_of_a_user")
    sys.modules[module.__name__] = module
    found = []
    for mark in "<>":
        exec(f"def write(row):\n    return {mark!r} + row['body']", module.__dict__)
        options = {"formatting_func": module.write, "completion_only_loss": False, "retain": rows}
        dataset = make_trainer(forget=rows, **options).train_dataset.forget
        found.append(tokenizer.convert_ids_to_tokens(dataset[0]["input_ids"])[0])
    del sys.modules[module.__name__]
    assert found == ["<", ">"]


@pytest.mark.parametrize("loss", ["npo", "idk"])
def test_a_set_of_which_no_batch_is_left_is_refused(make_trainer, build, loss):
    options = {"dataloader_drop_last": True, "forget_loss": loss}
    with pytest.raises(ValueError, match="the 8 rows of the forget set do not fill one of 9: nothing would be"):
        make_trainer(per_device_train_batch_size=9, **options)
    trainer = make_trainer(per_device_train_batch_size=8, max_steps=1, **options)
    trainer.train()
    assert "loss_forget" in trainer.state.log_history[0]


def test_the_overlap_of_selections_costs_two_passes_of_each_batch_at_the_steps_that_are_logged(make_trainer, build):
    def num_passes(**options: Any) -> int:
        model, passes = build.uoe(build.model()), []
        model.get_base_model().model.register_forward_pre_hook(lambda *args: passes.append(1))
        make_trainer(model, forget_loss="grad_ascent", prefix_cache=False, max_steps=4, **options).train()
        return len(passes)

    without = num_passes(logging_steps=2)
    assert num_passes(logging_steps=2, log_routing=True) - without == 2 * 2 * 2  # twice two sets, at two steps


def test_a_slow_type_that_autocast_computes_in_is_said_once(make_trainer, build, monkeypatch, caplog):
    monkeypatch.setattr("uoe_peft.precision.is_slow", lambda dtype, device: dtype == torch.bfloat16)
    precision._say.cache_clear()
    with caplog.at_level(logging.WARNING, logger="uoe_peft"):
        for _ in range(2):
            make_trainer(build.uoe(build.model()), bf16=True)  # weights in float32
    assert caplog.text.count("computes in bfloat16") == 1


def test_prompts_count_beside_alternatives_where_they_are_asked_for(make_trainer):
    dataset = make_trainer(forget_loss="idk", completion_only_loss=False).train_dataset
    for role in ("forget", "alternative", "retain"):
        assert -100 not in dataset[0][role]["labels"]
