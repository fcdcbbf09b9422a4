"""Strength chosen at the end of training: against likelihoods that the tests compute by themselves."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from uoe_peft.training.strength.measure import known, known_after_relearning
from uoe_peft.training.strength.scaling import CannotScale, Interpolation
from uoe_peft.training.strength.validation import NoValidationRows


def answers_of(model, rows):
    """Of each row: the probabilities of its answer tokens, and whether they are the most likely ones."""
    said = []
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            probs = model.eval()(input_ids=ids).logits[0].softmax(-1)
            places = [place for place in range(1, len(labels)) if labels[place] != -100]
            said.append(
                [(probs[p - 1, labels[p]].item(), probs[p - 1].argmax().item() == labels[p].item()) for p in places]
            )
    return said


def probability(model, rows):
    means = [
        torch.tensor([p for p, _ in row], dtype=torch.float64).log().mean().exp() for row in answers_of(model, rows)
    ]
    return torch.stack(means).mean().item()


def accuracy(model, rows):
    right = [hit for row in answers_of(model, rows) for _, hit in row]
    return sum(right) / len(right)


class Watch(TrainerCallback):
    """The strength of the adapter when training begins, and when others are told that it has ended."""

    def __init__(self):
        self.began, self.ended = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.began.append(model.peft_config["default"].strength)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.ended.append(model.peft_config["default"].strength)


@pytest.fixture
def trained(trainer_of):
    watch = Watch()
    trainer = trainer_of(calibrate_retain_share=0.9, callbacks=[watch], save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer, watch


def test_it_is_the_greatest_that_keeps_the_share(trained, tmp_path):
    trainer, watch = trained
    model, choice, rows = trainer.model, trainer.strength_choice, trainer._calibration.rows
    strength = model.peft_config["default"].strength
    assert 0 < strength < 1 and strength == choice.scale and choice.meets_goal
    assert watch.began == [1, 1, 1] and watch.ended == [strength]  # callbacks see the model that will be saved
    with model.disable_adapter():
        base = probability(model, rows["retain"])
    assert probability(model, rows["retain"]) == pytest.approx(choice.curve[strength]["retain"], rel=1e-4)
    assert probability(model, rows["forget"]) == pytest.approx(choice.forget_left, rel=1e-4)
    assert probability(model, rows["retain"]) >= 0.9 * base
    above = min(scale for scale in choice.curve if scale > strength)
    assert above - strength <= 1 / 32
    model.base_model.set_strength(above)
    assert probability(model, rows["retain"]) < 0.9 * base
    model.base_model.set_strength(strength)

    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["strength"] == strength
    history = trainer.state.log_history
    logged = {r["calibration_scale"]: r["calibration_retain"] for r in history if "calibration_scale" in r}
    assert logged == {scale: point["retain"] for scale, point in choice.curve.items()}
    assert history[-1]["strength_scale"] == strength

    # Its rows were kept from training, and the states that enter the edited layer were reused.
    seen = {tuple(ids) for ids in trainer.train_dataset.retain["input_ids"]}
    held = {tuple(ids) for ids in rows["retain"]["input_ids"]}
    assert len(held) == 9 and len(seen) == 81 and not held & seen

    # Resumed in the same trainer: the steps run at the strength of the checkpoint, and the end is the same.
    trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    assert watch.began[3:] == [1] and watch.ended == [strength, strength]


def test_the_least_that_forgets_enough(trainer_of):
    trainer = trainer_of(calibrate_forget_limit=0.0025, calibrate_max_rows=5)
    trainer.train()
    choice, rows = trainer.strength_choice, trainer._calibration.rows["forget"]
    assert choice.goal == "forget" and len(rows) == 5
    assert 0 < choice.scale < 1
    assert probability(trainer.model, rows) <= 0.0025
    below = max(scale for scale in choice.curve if scale < choice.scale)
    trainer.model.base_model.set_strength(below)
    assert probability(trainer.model, rows) > 0.0025 and choice.scale - below <= 1 / 32


def test_the_price_is_said(trainer_of, caplog):
    trainer = trainer_of(calibrate_retain_share=0.9)
    with caplog.at_level(logging.WARNING, logger="uoe_peft"):
        trainer.train()
    assert "easier to undo" in caplog.text


def test_other_adapters_keep_their_strength(trainer_of, builders):
    model = builders.uoe(builders.model())
    model.add_adapter("earlier", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_strength(0.5, "earlier")
    model.base_model.set_adapter(["default", "earlier"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("uoe_" in name and "default" in name)
    trainer = trainer_of(model, calibrate_retain_share=0.9)
    trainer.train()
    assert trainer.strength_choice.scale < 1
    assert model.peft_config["earlier"].strength == 0.5
    assert model.peft_config["default"].strength == trainer.strength_choice.scale


def test_a_model_trained_in_full_is_interpolated(trainer_of, builders):
    base = builders.model()
    trainer = trainer_of(copy.deepcopy(base), calibrate="retain", calibrate_retain_share=0.9, learning_rate=0.003)
    after = {}

    class KeepTrained(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            after.update({name: p.detach().clone() for name, p in model.named_parameters()})

    trainer.add_callback(KeepTrained())
    trainer.train()
    scale = trainer.strength_choice.scale
    assert 0 < scale < 1
    for name, before in base.named_parameters():
        expected = before + scale * (after[name] - before)
        torch.testing.assert_close(trainer.model.get_parameter(name), expected, rtol=1e-5, atol=1e-6)


def test_interpolation_keeps_the_bits_of_both_ends():
    model = torch.nn.Linear(5, 3).to(torch.bfloat16)
    base = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    trained = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    line = Interpolation(model, base, trained)
    for scale, expected in ((1.0, trained), (0.25, None), (0.0, base)):
        line.set(scale)
        for name, p in model.named_parameters():
            between = (0.75 * base[name].float() + 0.25 * trained[name].float()).to(torch.bfloat16)
            torch.testing.assert_close(
                p.detach(), between if expected is None else expected[name], rtol=1e-2, atol=1e-2
            )
            assert expected is None or torch.equal(p, expected[name])


def test_what_cannot_be_scaled_is_refused_by_name_or_left_alone(trainer_of, builders):
    for model, message in ((builders.lora(builders.model()), "LORA"),):
        with pytest.raises(CannotScale, match=message):
            trainer_of(model, calibrate="retain")
        assert trainer_of(model)._calibration is None
    assert trainer_of(builders.model())._calibration is None  # interpolation is for those who ask for it
    with pytest.raises(CannotScale, match=r"lm_head.*in full"):
        trainer_of(builders.uoe(builders.model(), modules_to_save=["lm_head"]), calibrate="retain")
    with pytest.raises(NoValidationRows, match="it has 11 rows"):
        trainer_of(retain=_few(), calibrate="retain")


def _few():
    from datasets import Dataset

    return Dataset.from_dict({"prompt": list("abcdefghijk"), "completion": list("lmnopqrstuv")})


def test_the_measures_are_those_of_a_plain_pass(trainer_of):
    trainer = trainer_of()
    rows = [dict(row) for row in trainer._calibration.rows["forget"]]
    for row in rows[:5:2]:  # a random model is never right: these ask for what it says
        says = trainer.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        row["labels"] = [-100 if old == -100 else new for old, new in zip(row["labels"], [0, *says], strict=False)]
    batches = [trainer._calibration._collate(rows[:5]), trainer._calibration._collate(rows[5:])]
    assert 0.1 < accuracy(trainer.model, rows) < 0.5
    for metric, expected in (("accuracy", accuracy), ("probability", probability)):
        assert known(trainer.model, batches, metric) == pytest.approx(expected(trainer.model, rows), rel=1e-4)
    batches[0]["labels"][0] = -100  # a row without an answer does not count
    assert known(trainer.model, batches, "probability") == pytest.approx(probability(trainer.model, rows[1:]), rel=1e-4)
    with pytest.raises(ValueError, match="no row"):
        known(trainer.model, [], "accuracy")


def test_relearning_is_adamw_on_all_weights_of_a_copy(trainer_of, builders):
    model = builders.uoe(builders.model(), init_weights=False)
    trainer = trainer_of(model)
    rows = list(trainer._calibration.rows["forget"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = builders.uoe(builders.model(), init_weights=False)  # a copy would go on calling the original
    plain.load_state_dict(model.state_dict())
    plain = plain.merge_and_unload().requires_grad_(True)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=2e-4, weight_decay=0)
    expected = []
    for step in range(12):
        row = rows[step % 2]
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        plain(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (5, 11):
            expected.append(probability(plain, rows[2:]))
    batches = [trainer._calibration._collate([row]) for row in rows[:2]]
    found = known_after_relearning(model, batches, lambda model: probability(model, rows[2:]))
    assert found == pytest.approx(max(expected), rel=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_strengths_can_be_judged_after_relearning(trainer_of):
    trainer = trainer_of(calibrate_against="relearning", calibrate_retain_share=0.9, max_steps=1)
    trainer.train()
    choice = trainer.strength_choice
    assert all(set(point) == {"forget", "retain", "forget_relearned"} for point in choice.curve.values())
    assert choice.forget_left == choice.curve[choice.scale]["forget_relearned"]
    assert isinstance(trainer.model, PeftModel)


def test_an_adapter_that_was_merged_meanwhile_is_refused_before_training(trainer_of):
    trainer = trainer_of()
    trainer.model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_was_trained_survives_a_measure_that_fails(trainer_of, monkeypatch, caplog):
    monkeypatch.setattr("uoe_peft.training.strength.calibration.known", lambda *args: float("nan"))
    trainer = trainer_of(calibrate="retain")
    trainer.train()
    assert trainer.strength_choice is None and "stays as trained" in caplog.text
    assert trainer.model.peft_config["default"].strength == 1
    assert any(p.any() for n, p in trainer.model.named_parameters() if "uoe_delta" in n)


def test_the_best_checkpoint_is_what_is_made_weaker(trainer_of, sets):
    """Loaded at the end, before the strength is chosen."""
    trainer = trainer_of(
        eval_dataset={"forget": sets[0], "retain": sets[1]},
        load_best_model_at_end=True,
        metric_for_best_model="eval_retain_loss",
        greater_is_better=False,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        calibrate_retain_share=0.9,
    )
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors")
    now = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if "uoe_delta" in n}
    for name, saved in best.items():
        assert torch.equal(next(p for n, p in now.items() if n == name), saved)
    rows = trainer._calibration.rows
    assert len(rows["retain"]) == 11 and len(trainer.train_dataset.retain) == 90
    kept = probability(trainer.model, rows["retain"])
    assert kept == pytest.approx(trainer.strength_choice.curve[trainer.strength_choice.scale]["retain"], rel=1e-4)
