import math
from typing import get_args

import pytest
import torch

from uoe_peft import losses
from uoe_peft.moe.routing import record_routing
from uoe_peft.training.choices import ForgetLoss
from uoe_peft.training.objective.anchor import anchor_term

FORGET_LOSSES = get_args(ForgetLoss)
BOUNDED_BELOW_ZERO = ("grad_ascent", "wga", "satimp")


def one_batch(trainer):
    rows = [trainer.train_dataset[i] for i in (0, 3, 5)]
    return trainer.data_collator(rows)


@torch.no_grad()
def edit(model, scale=0.05):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(scale * torch.randn_like(parameter))


@pytest.mark.parametrize("forget_loss", FORGET_LOSSES)
@pytest.mark.parametrize("kind", ["uoe", "lora", "full"])
def test_every_forget_loss_trains_every_kind_of_model(make_trainer, build, forget_loss, kind):
    model = build.model() if kind == "full" else getattr(build, kind)(build.model())
    options = {"forget_loss": forget_loss, "retain_loss": "embed_diff" if forget_loss == "rmu" else "nll"}
    if forget_loss == "undial" and kind == "full":
        with pytest.raises(ValueError, match="forget_loss='undial' compares whole distributions"):
            make_trainer(model, **options)
        return
    trainer = make_trainer(model, rmu_layer=1, **options)
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    logs = trainer.state.log_history[0]
    assert (logs["loss_forget"] < 0) == (forget_loss in BOUNDED_BELOW_ZERO)
    assert logs["loss"] == pytest.approx(
        sum(value for name, value in logs.items() if name.startswith("loss_")), rel=1e-4, abs=1e-4
    )
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_npo_is_the_plain_formula(make_trainer, build, reduction):
    model = build.uoe(build.model())
    edit(model)
    trainer = make_trainer(model, retain_loss="none", anchor_weight=0, beta=0.3, npo_reduction=reduction)
    batch = one_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)

    def likelihood(net):
        total = []
        for ids, labels in zip(batch["forget"]["input_ids"], batch["forget"]["labels"], strict=True):
            log_probs = net(input_ids=ids[None]).logits[0].log_softmax(-1)
            picked = [-log_probs[t - 1, labels[t]] for t in range(1, len(ids)) if labels[t] != -100]
            total.append(sum(picked) / (len(picked) if reduction == "mean" else 1))
        return torch.stack(total)

    ratio = likelihood(trainer.model) - likelihood(build.model())
    expected = -(2 / 0.3) * torch.nn.functional.logsigmoid(0.3 * ratio).mean()
    torch.testing.assert_close(loss, expected)


def test_random_labels_are_drawn_for_each_example_anew_in_each_epoch(make_trainer, build):
    trainer = make_trainer(build.uoe(build.model()), forget_loss="random_label", retain_loss="none", anchor_weight=0)

    def loss(*examples):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in examples])
        return trainer.compute_loss(trainer.model, batch).item()

    lengths = {0: 3, 3: 6, 5: 8}  # answer tokens, the end of the sequence included
    whole = loss(0, 3, 5)
    assert loss(5, 0, 3) == pytest.approx(whole)
    assert sum(n * loss(i) for i, n in lengths.items()) / 17 == pytest.approx(whole)
    trainer.train_dataset.set_epoch(1)
    assert loss(0, 3, 5) != pytest.approx(whole)


def test_kl_is_the_plain_formula(make_trainer, build):
    model = build.uoe(build.model())
    edit(model)
    trainer = make_trainer(model, forget_weight=0, retain_loss="kl", anchor_weight=0)
    batch = one_batch(trainer)
    retain, total, count = batch["retain"], 0.0, 0
    base = build.model()
    for ids, labels in zip(retain["input_ids"], retain["labels"], strict=True):
        p, p_ref = (net(input_ids=ids[None]).logits[0].log_softmax(-1) for net in (trainer.model, base))
        for t in range(1, len(ids)):
            if labels[t] != -100:
                total += (p_ref[t - 1].exp() * (p_ref[t - 1] - p[t - 1])).sum().item()
                count += 1
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("coefficient", [6.5, None])
def test_rmu_is_the_plain_formula(make_trainer, build, coefficient):
    model = build.uoe(build.model())
    edit(model)
    trainer = make_trainer(
        model, forget_loss="rmu", retain_loss="none", anchor_weight=0, rmu_coefficient=coefficient, rmu_seed=4
    )
    assert trainer.objective.reference.hidden_layer == 1  # the adapter's
    batch, u = one_batch(trainer), losses.control_direction(32, seed=4)
    forget, total, count = batch["forget"], 0.0, 0
    base = build.model()
    for ids, labels in zip(forget["input_ids"], forget["labels"], strict=True):
        h, h_ref = (
            net(input_ids=ids[None], output_hidden_states=True).hidden_states[2][0] for net in (trainer.model, base)
        )
        for t in range(1, len(ids)):
            if labels[t] != -100:
                c = coefficient or 5.0 * h_ref[t - 1].norm().item()
                total += ((h[t - 1] - c * u) ** 2).sum().item() / 32
                count += 1
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("scores", ["softmax", "topk"])
def test_the_anchor_reads_forget_tokens_only(make_trainer, uoe_model, scores):
    trainer = make_trainer(uoe_model, forget_weight=0, retain_weight=0, retain_loss="nll", anchor_scores=scores)
    batch = one_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    distances = []
    for ids, mask in zip(batch["forget"]["input_ids"], batch["forget"]["attention_mask"], strict=True):
        with record_routing(trainer.model) as trace:
            trainer.model(input_ids=ids[mask.bool()][None])
        layer = trace[1]
        for token in range(int(mask.sum())):
            s = layer.scores[token].clone()
            if scores == "topk":
                s[[e for e in range(6) if e not in layer.top_k_index[token].tolist()]] = 0
            s[2] -= 1
            distances.append((s**2).sum())
    torch.testing.assert_close(loss, torch.stack(distances).mean())


def test_several_target_layers_share_the_anchor(make_trainer, build):
    model = build.uoe(build.model(), target_experts=[(0, 1), (2, 3), (2, 5)])
    trainer = make_trainer(model, forget_weight=0, retain_loss="none")
    batch = one_batch(trainer)
    with record_routing(trainer.model) as trace:
        forget = batch["forget"]
        trainer.model(input_ids=forget["input_ids"], attention_mask=forget["attention_mask"])
        mask = forget["attention_mask"].flatten().bool()
        by_layer = [losses.anchor_loss(trace[0].scores, [1], mask), losses.anchor_loss(trace[2].scores, [3, 5], mask)]
        torch.testing.assert_close(
            anchor_term(trace, {0: [1], 2: [3, 5]}, forget["attention_mask"], args=trainer.args),
            sum(by_layer) / 2,
        )
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), sum(by_layer) / 2)


def test_trace_weights_change_the_retain_loss_only(make_trainer, build):
    plain = make_trainer(build.uoe(build.model()))
    weighted = make_trainer(build.uoe(build.model()), retain_token_weights="trace")
    steps = []
    for trainer in (plain, weighted):
        with record_routing(trainer.model, layer_indices=[1]) as trace:
            steps.append(trainer.objective.step(trainer.model, one_batch(trainer), trace, {}))
    torch.testing.assert_close(steps[0].terms["forget"], steps[1].terms["forget"])
    assert not torch.isclose(steps[0].terms["retain"], steps[1].terms["retain"])


def test_at_the_base_model_losses_have_their_known_values(make_trainer, uoe_model):
    trainer = make_trainer(uoe_model, retain_loss="kl", beta=0.1)
    with record_routing(trainer.model, layer_indices=[1]) as trace:
        terms = trainer.objective.step(trainer.model, one_batch(trainer), trace, {}).terms
    assert terms["forget"].item() == pytest.approx(20 * math.log(2), rel=1e-4)
    assert terms["retain"].item() == pytest.approx(0, abs=1e-5)
