import json
import logging
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback

from uoe_peft import precision
from uoe_peft.attribution import AttributionWarning
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.training import UnlearningConfig, UnlearningTrainer
from uoe_peft.tuner import UOEConfig


def gradients_of(make_trainer, build, **options):
    keep = build.keep_gradients()
    trainer = make_trainer(build.uoe(build.model()), callbacks=[keep], max_steps=1, max_grad_norm=0, **options)
    trainer.train()
    assert keep.gradients
    return keep.gradients


def assert_same_gradients(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)


def adapter_state(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


# ---- Gradients ----


@pytest.mark.parametrize("forget_loss", ["grad_ascent", "npo", "rmu", "idk", "random_label"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(make_trainer, build, forget_loss):
    options = {"forget_loss": forget_loss, "retain_loss": "kl"}
    whole = gradients_of(make_trainer, build, per_device_train_batch_size=4, **options)
    parts = gradients_of(
        make_trainer,
        build,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **options,
    )
    assert_same_gradients(whole, parts, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("retain_loss", ["nll", "embed_diff"])
def test_checkpointing_does_not_change_gradients(make_trainer, build, retain_loss):
    plain, recomputed = (
        gradients_of(
            make_trainer,
            build,
            retain_loss=retain_loss,
            anchor_weight=3.0,
            gradient_checkpointing=checkpointing,
        )
        for checkpointing in (False, True)
    )
    assert_same_gradients(plain, recomputed, atol=0, rtol=0)


def test_the_anchor_reaches_the_router_also_with_checkpointing(make_trainer, build):
    gradients = gradients_of(make_trainer, build, forget_weight=0, retain_loss="none", gradient_checkpointing=True)
    moved = [name for name, gradient in gradients.items() if gradient.any()]
    assert moved and all("gate" in name for name in moved)


def test_only_target_experts_and_their_router_train(make_trainer, uoe_model):
    trainer = make_trainer(uoe_model)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    assert changed and all("layers.1.mlp" in name and "uoe_" in name for name in changed)


def test_reentrant_checkpointing_would_lose_the_anchor(make_trainer, uoe_model):
    with pytest.raises(ValueError, match="no gradient through reentrant"):
        make_trainer(uoe_model, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


# ---- Training as a whole ----


def test_it_forgets_and_retains(make_trainer, build):
    """A full fine-tuning on both sets first; then one expert is trained to forget one of them."""
    model = build.model()
    sets = make_trainer(build.lora(model)).train_dataset  # tokenised
    rows = [sets[i][role] for role in ("forget", "retain") for i in range(8)]
    everything = Dataset.from_list([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows])
    learner = make_trainer(
        build.model(),
        forget=everything,
        retain=everything,
        forget_weight=0,
        max_steps=60,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
    )
    learner.train()
    learned = learner.model
    trainer = make_trainer(
        build.uoe(learned),
        max_steps=30,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
    )
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert first["forget_nll"] < 0.5
    assert last["forget_nll"] > first["forget_nll"] + 2
    assert last["retain_nll"] < last["forget_nll"] / 2
    assert last["loss_anchor"] < first["loss_anchor"]
    assert last["target_activation_rate"] >= first["target_activation_rate"]


def test_resuming_gives_the_same_weights_bit_for_bit(make_trainer, build, tmp_path):
    options = {"max_steps": 5, "per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(build.uoe(build.model()), **options)  # 8 examples: step 2 is in the middle of an epoch
    whole.train()
    resumed = make_trainer(build.uoe(build.model()), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.state.global_step == 5
    expected = adapter_state(whole)
    for name, value in adapter_state(resumed).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_full_training_gives_the_same_weights_bit_for_bit(make_trainer, build, tmp_path, dtype):
    options = {"max_steps": 5, "per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(build.model().to(dtype), learning_rate=1e-2, **options)
    whole.train()
    resumed = make_trainer(build.model().to(dtype), learning_rate=1e-2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    expected = adapter_state(whole)
    assert any("experts" in name for name in expected)
    for name, value in adapter_state(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_the_best_model_of_full_training_has_its_experts(make_trainer, build, sets):
    kept = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            kept[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}

    trainer = make_trainer(
        build.model(),
        eval_dataset=sets[0],
        callbacks=[Keep()],
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=1e-2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",  # the forget loss only rises: the first checkpoint is the best
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, kept[1][name]), name
        assert not torch.equal(parameter, kept[3][name]), name


def test_each_epoch_has_new_pairs(make_trainer, uoe_model):
    trainer = make_trainer(uoe_model, max_steps=4, per_device_train_batch_size=4)
    seen = []
    original = trainer.compute_loss

    def watch(model, inputs, *args, **kwargs):
        seen.append((inputs["forget"]["index"].tolist(), inputs["retain"]["index"].tolist()))
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = watch
    trainer.train()
    epochs = [dict(zip(a[0] + b[0], a[1] + b[1], strict=True)) for a, b in (seen[:2], seen[2:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 2
    assert all(epochs[0][i] != epochs[1][i] for i in range(3, 8))


def test_every_term_is_logged(make_trainer, uoe_model):
    trainer = make_trainer(uoe_model, log_routing=True, logging_steps=2, max_steps=2)
    trainer.train()
    logs = trainer.state.log_history[0]
    names = ["loss_forget", "loss_retain", "loss_anchor", "forget_accuracy", "retain_accuracy", "forget_nll"]
    names += ["target_activation_rate", "forget_selection_overlap", "retain_selection_overlap", "grad_norm"]
    assert all(math.isfinite(logs[name]) for name in names)
    assert 0 < logs["forget_selection_overlap"] <= 1
    assert logs["num_tokens"] > 0


def test_the_shares_that_reach_the_target_come_with_the_passes_that_run_anyway(make_trainer, build, monkeypatch):
    """Against a count on the plain base model; and without a request no pass is added."""
    base, passes = build.model().eval(), []
    trainer = make_trainer(build.uoe(build.model()), max_steps=1, per_device_train_batch_size=8, logging_steps=1)
    trainer.model.register_forward_pre_hook(lambda *args: passes.append(1))
    sets, chosen = trainer.train_dataset.sets, []
    base.model.layers[1].mlp.experts.register_forward_pre_hook(lambda experts, args: chosen.append(args[1] == 2))
    trainer.train_dataset.set_epoch(0)
    expected = {}
    for role in ("forget", "retain"):
        chosen.clear()
        for index in (trainer.train_dataset[i][role]["index"] for i in range(8)):
            base(torch.tensor([sets[role][index]["input_ids"]]))
        expected[role] = torch.cat(chosen).any(dim=-1).float().mean().item()
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["target_activation_rate"] == pytest.approx(expected["forget"], abs=1e-6)
    assert logs["retain_activation_rate"] == pytest.approx(expected["retain"], abs=1e-6)
    assert not any("overlap" in name for name in logs)
    assert len(passes) == 3  # forget, its reference, retain


def test_a_slow_type_is_said_before_training(make_trainer, build, monkeypatch, caplog):
    monkeypatch.setattr("uoe_peft.precision.is_slow", lambda dtype, device: dtype == torch.bfloat16)
    precision._say.cache_clear()
    with caplog.at_level(logging.WARNING, logger="uoe_peft"):
        make_trainer(build.uoe(build.model()))
        assert "computes in" not in caplog.text
        make_trainer(build.uoe(build.model().bfloat16()))
    assert "computes in bfloat16" in caplog.text


def test_auto_is_what_the_first_process_found(make_trainer, build, monkeypatch):
    def first(objects, from_process=0):
        assert objects[0] != [(1, 1)] and from_process == 0
        return [[(1, 1)], objects[1]]

    monkeypatch.setattr("uoe_peft.training.auto.broadcast_object_list", first)
    trainer = make_trainer(
        build.model(), peft_config=UOEConfig(target_experts="auto"), attribution_score="random", seed=1
    )
    assert trainer.model.peft_config["default"].target_experts == [(1, 1)]


def test_a_fresh_adapter_selects_the_base_models_experts(make_trainer, uoe_model):
    trainer = make_trainer(uoe_model, log_routing=True, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["forget_selection_overlap"] == 1
    assert trainer.state.log_history[0]["retain_selection_overlap"] == 1


def test_evaluation_while_training(make_trainer, uoe_model, sets):
    forget, retain = sets
    trainer = make_trainer(
        uoe_model, eval_dataset={"forget": forget, "retain": retain}, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    evaluated = [log for log in trainer.state.log_history if "eval_forget_loss" in log]
    assert len(evaluated) == 2
    assert 0 <= evaluated[0]["eval_mean_token_accuracy"] <= 1
    assert trainer.evaluate(retain)["eval_loss"] > 0  # a raw set, tokenised on the way


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # of TRL, wherever logits are asked for
def test_prediction_takes_a_raw_set(make_trainer, uoe_model, sets):
    trainer = make_trainer(uoe_model)
    predicted = trainer.predict(sets[1])
    assert len(predicted.predictions) == 11
    assert predicted.metrics["test_loss"] == trainer.evaluate(sets[1])["eval_loss"]
    assert trainer.predict(trainer.train_dataset.sets["retain"]).metrics["test_loss"] == predicted.metrics["test_loss"]


def test_raw_sets_are_formatted_on_the_way(make_trainer, uoe_model, sets):
    def formatting_func(row):
        return row["prompt"] + row["completion"]

    retain_text = Dataset.from_list([{"text": formatting_func(row)} for row in sets[1]])
    trainer = make_trainer(
        uoe_model, formatting_func=formatting_func, completion_only_loss=False, prediction_loss_only=True
    )
    expected = make_trainer(uoe_model, completion_only_loss=False).evaluate(retain_text)["eval_loss"]
    assert trainer.evaluate({"forget": sets[0], "retain": sets[1]})["eval_retain_loss"] == expected
    assert trainer.predict(sets[1]).metrics["test_loss"] == expected


def test_it_stops_once_enough_is_forgotten(make_trainer, uoe_model):
    trainer = make_trainer(uoe_model, max_steps=20, stop_when_forget_accuracy=1.0)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_loss_that_is_not_finite_stops_training(make_trainer, build):
    model = build.uoe(build.model())
    trainer = make_trainer(model, max_steps=3)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1: the .* is nan on the rows \["):
        trainer.train()


# ---- Models ----


def test_auto_attributes_on_the_forget_set(make_trainer, build, caplog):
    with pytest.warns(AttributionWarning), caplog.at_level(logging.INFO):  # a random model has no specialist
        trainer = make_trainer(build.model(), peft_config=UOEConfig(target_experts="auto"), num_target_experts=2)
    config = trainer.model.peft_config["default"]
    assert len(config.target_experts) == 2
    assert config.attribution["score"] == "gate"
    assert 'target_experts="auto" is' in caplog.text
    json.dumps(config.to_dict(), default=list)
    trainer.train()


def test_auto_with_an_adapter_is_refused_before_attribution(make_trainer, uoe_model, monkeypatch):
    monkeypatch.setattr("uoe_peft.training.auto.attribute_experts", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(ValueError, match=r"the adapters \['default'\] already; pass it without peft_config"):
        make_trainer(uoe_model, peft_config=UOEConfig(target_experts="auto"))


@pytest.mark.parametrize(("forget_loss", "retain_loss"), [("npo", "nll"), ("rmu", "embed_diff")])
def test_the_reference_of_full_training_is_the_model_before_any(make_trainer, build, forget_loss, retain_loss):
    losses = {"forget_loss": forget_loss, "retain_loss": retain_loss, "rmu_layer": 1}
    trainer = make_trainer(build.model(), learning_rate=1e-2, **losses)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 3, 5)])
    trainer.train()
    before = trainer.compute_loss(trainer.model, batch)
    trainer.train()
    trained = trainer.model.state_dict()
    fresh = make_trainer(build.model(), learning_rate=1e-2, **losses)
    fresh.train()
    fresh.model.load_state_dict(trained)
    assert trainer.compute_loss(trainer.model, batch) != before
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), fresh.compute_loss(fresh.model, batch))


def test_a_model_by_name(make_trainer, build, tmp_path, tokenizer):
    build.model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for target in ([(1, 2)], "auto"):
        config = UOEConfig(target_experts=target)
        options = {"attribution_score": "random", "model_init_kwargs": {"dtype": "float32"}}
        trainer = make_trainer(str(tmp_path / "base"), peft_config=config, **options)
        trainer.train()
        assert isinstance(trainer.model, PeftModel)


def test_the_saved_adapter_is_loaded_by_peft(make_trainer, uoe_model, build, tmp_path):
    trainer = make_trainer(uoe_model)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert not list(Path(tmp_path / "adapter").glob("model*.safetensors"))
    loaded = PeftModel.from_pretrained(build.model(), tmp_path / "adapter")
    ids = torch.arange(2, 12)[None]
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, atol=0, rtol=0)
    trainer.create_model_card()
    assert "uoe-peft" in (tmp_path / "out" / "README.md").read_text()


def test_peft_config_of_another_method(make_trainer, build):
    trainer = make_trainer(build.model(), peft_config=LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer.train()
    assert "loss_anchor" not in trainer.state.log_history[0]


def test_load_balancing_is_off(make_trainer, uoe_model, caplog):
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(uoe_model)
    assert not trainer.aux_loss_enabled
    assert caplog.text.count("router_aux_loss_coef is 0") == 1


@pytest.mark.parametrize("option", [{"anchor_reduction": "mean_gate"}, {"retain_token_weights": "trace"}])
def test_what_cannot_be_split_is_said_once_where_batches_are_split(make_trainer, build, option, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(build.uoe(build.model()), **option)
        make_trainer(build.uoe(build.model()), gradient_accumulation_steps=4)
        make_trainer(
            build.uoe(build.model()), gradient_accumulation_steps=4, anchor_weight=0, retain_weight=0, **option
        )
    assert "parts of a batch" not in caplog.text
    with caplog.at_level(logging.WARNING):
        make_trainer(build.uoe(build.model()), gradient_accumulation_steps=4, **option).train()
    (name, chosen), *_ = option.items()
    assert caplog.text.count(f"{name}={chosen!r} is computed on each of the 4 parts of a batch") == 1


# ---- Data ----


def test_every_type_of_set_trains(make_trainer, build):
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "Ada"}]
    for rows in (
        [{"text": "plain text"}],
        [{"messages": turns}],
        [{"prompt": turns[:1], "completion": turns[1:]}],
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}],
    ):
        trainer = make_trainer(
            build.uoe(build.model()), forget=Dataset.from_list(rows * 4), retain=Dataset.from_list(rows * 3)
        )
        trainer.train()


def test_rows_in_both_sets_are_counted(make_trainer, uoe_model, sets, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(uoe_model, retain=sets[0].select(range(3)))
    assert "3 rows of the retain set are in the forget set" in caplog.text


def test_dpo_prefers_the_sets_own_alternative(make_trainer, uoe_model, tokenizer):
    rows = {"prompt": ["who? "] * 4, "chosen": ["nobody"] * 4, "rejected": ["Ada"] * 4}
    trainer = make_trainer(uoe_model, forget=Dataset.from_dict(rows), forget_loss="dpo")
    row = trainer.train_dataset[0]
    assert "".join(tokenizer.convert_ids_to_tokens(row["forget"]["input_ids"])) == "who? Ada|end|"
    assert "".join(tokenizer.convert_ids_to_tokens(row["alternative"]["input_ids"])) == "who? nobody|end|"
    trainer.train()


# ---- What is refused ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"retain": "none"}, ValueError, "retain_loss='nll' needs a retain set"),
        ({"forget": Dataset.from_dict({"text": []})}, ValueError, "the forget set is empty"),
        ({"retain": Dataset.from_dict({"text": []})}, ValueError, "the retain set is empty"),
        ({"max_length": 5}, ValueError, "all 8 answers lie beyond max_length=5"),
        ({"forget_loss": "ascent"}, ValueError, "forget_loss must be one of"),
        ({"forget": Dataset.from_dict({"question": ["x"]})}, ValueError, r"the columns \['question'\]"),
        ({"forget": IterableDataset.from_generator(lambda: iter(()))}, ValueError, "streaming"),
        ({"forget": Dataset.from_dict({"text": ["x"]}), "forget_loss": "dpo"}, ValueError, "alternative answers need"),
        ({"forget_loss": "rmu", "rmu_layer": 3}, ValueError, "has 3 decoder layers, got layer 3"),
        ({"forget_loss": "rmu", "rmu_layer": -4}, ValueError, "has 3 decoder layers, got layer -4"),
    ],
)
def test_bad_input(make_trainer, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**options)


def test_full_training_cannot_compare_distributions(make_trainer, build):
    with pytest.raises(ValueError, match="retain_loss='kl' compares whole distributions"):
        make_trainer(build.model(), retain_loss="kl")


def test_rmu_needs_a_layer_where_no_adapter_names_one(make_trainer, build):
    with pytest.raises(ValueError, match="set rmu_layer"):
        make_trainer(build.lora(build.model()), forget_loss="rmu")


def test_contrast_needs_a_retain_set(make_trainer, build):
    with pytest.raises(ValueError, match="contrast"):
        make_trainer(
            build.model(),
            peft_config=UOEConfig(target_experts="auto"),
            attribution_score="contrast",
            retain="none",
            retain_loss="none",
        )


def test_a_dense_model_has_no_expert_to_unlearn(make_trainer, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes))
    with pytest.raises(UnsupportedModelError):
        make_trainer(dense, peft_config=UOEConfig(target_experts="auto"))


def test_a_forget_set_is_required(tmp_path, uoe_model, tokenizer):
    args = UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="the forget set, is required"):
        UnlearningTrainer(uoe_model, args, processing_class=tokenizer)
    with pytest.raises(ValueError, match="pass processing_class"):
        rows = Dataset.from_dict({"text": ["x"]})
        UnlearningTrainer(uoe_model, args, train_dataset=rows, retain_dataset=rows)


def test_a_frozen_adapter_is_refused(make_trainer, uoe_model):
    uoe_model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter of the model is trainable.*is_trainable=True"):
        make_trainer(uoe_model)


def test_a_merged_adapter_is_refused(make_trainer, uoe_model):
    uoe_model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged.*unmerge_adapter"):
        make_trainer(uoe_model)


def test_a_formatting_function_is_refused_where_questions_must_stand_apart(make_trainer, uoe_model):
    with pytest.raises(ValueError, match="formatting_func cannot be used with forget_loss='dpo'"):
        make_trainer(
            uoe_model, forget_loss="dpo", completion_only_loss=False, formatting_func=lambda row: row["prompt"]
        )


def test_trace_weights_without_an_edited_expert_are_said_not_to_apply(make_trainer, build, caplog):
    with caplog.at_level(logging.WARNING, logger="uoe_peft"):
        make_trainer(build.lora(build.model()), retain_token_weights="trace")
    assert "retain_token_weights='trace' does not apply" in caplog.text


def test_training_in_full_again_over_other_rows_is_refused_with_what_to_do(make_trainer, build):
    options = {"retain_loss": "embed_diff", "rmu_layer": 1, "forget_loss": "grad_ascent"}
    trainer = make_trainer(build.model(), max_steps=2, **options)
    trainer.train()
    trainer.args.max_steps = 8
    with pytest.raises(ValueError, match="Make a new trainer from the base model"):
        trainer.train()
