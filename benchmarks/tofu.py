"""Unlearn five authors of TOFU with one expert of a small model that learned fifty of them.

python benchmarks/tofu.py --data DIR [--output_dir outputs/tofu] [--minutes 8]

DIR holds TOFU's `full.json` (https://arxiv.org/abs/2401.06121; 200 authors of 20 questions each). The last 50 authors
are learned from scratch by a Mixture-of-Experts model of 2.6 M parameters; the last 5 are then to be forgotten. A twin
that never saw these five is the reference. Half of the other authors' questions are used in unlearning, the other half
is what "retain" scores are measured on.

Every choice of expert is unlearned in the same way, a random one included: what it achieves needs no attribution.
"""

from __future__ import annotations

import json
import math
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from peft import PeftModel
from tofu_model import Tofu, load_tofu, new_model, shuffled_batches, train_tokenizer
from tqdm import tqdm
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Qwen2MoeForCausalLM,
    set_seed,
)

from uoe_peft import (
    UnlearningConfig,
    UnlearningReport,
    UnlearningTrainer,
    UOEConfig,
    attribute_experts,
    evaluate_unlearning,
)
from uoe_peft.attribution.scores import Score
from uoe_peft.cli.training_bar import TrainingBar
from uoe_peft.data import collate, tokenize_dataset
from uoe_peft.training.choices import ForgetLoss


@dataclass
class TofuArguments:
    """What is trained, for how long, and how it is unlearned."""

    data: Path = field(metadata={"help": "Folder with TOFU's full.json."})
    output_dir: Path = field(default=Path("outputs/tofu"), metadata={"help": "Where the table goes."})
    minutes: float = field(default=8.0, metadata={"help": "Longest time that training base and twin may take."})
    epochs: int = field(default=20, metadata={"help": "Passes over the data, if time allows."})
    scores: list[str] = field(
        default_factory=lambda: ["gate", "contrast", "ablation", "random"], metadata={"help": "Attributions."}
    )
    forget_loss: ForgetLoss = field(default="npo", metadata={"help": "Loss on the forget set."})
    beta: float | None = field(default=0.05, metadata={"help": "Of the forget loss."})
    retain_weight: float = field(default=4.0, metadata={"help": "Weight of the loss on the retain set."})
    anchor_weight: float = field(default=1.0, metadata={"help": "Weight of the anchor, Eq. 3."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Of the unlearning."})
    num_train_epochs: float = field(default=12.0, metadata={"help": "Of the unlearning, passes over the forget set."})
    seed: int = field(default=0, metadata={"help": "Of everything."})


def main() -> None:
    """Train or load base and twin, unlearn once for each attribution, print a table, write it as JSON."""
    (args,) = HfArgumentParser(TofuArguments).parse_args_into_dataclasses()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a second one gains little on so small a model, and costs much on a busy machine
    set_seed(args.seed)
    tofu = load_tofu(args.data, seed=args.seed)
    tokenizer = train_tokenizer(tofu.everything)
    kept = tofu.everything.select(range(len(tofu.everything) - len(tofu.forget)))
    base = learn(tofu.everything, tokenizer, args=args, name="base")
    retrained = learn(kept, tokenizer, args=args, name="retrained")

    results = {}
    for score in args.scores:
        report, targets, seconds = unlearn(
            deepcopy(base), retrained, tokenizer, tofu=tofu, score=cast(Score, score), args=args
        )
        print(f"\n{score}: layer, expert = {targets}; {seconds:.0f} s of training\n{report.summary()}")
        results[score] = report.to_dict() | {"target_experts": targets, "unlearning_seconds": round(seconds, 1)}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    del settings["data"]
    path = args.output_dir / "tofu.json"
    path.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


def learn(rows: Dataset, tokenizer: PreTrainedTokenizerFast, *, args: TofuArguments, name: str) -> Qwen2MoeForCausalLM:
    """A model trained on `rows` from scratch: for `args.epochs`, or until half of `args.minutes` is over."""
    set_seed(args.seed)
    model = new_model(tokenizer).train()
    examples = list(tokenize_dataset(rows, tokenizer, max_length=None, name=name))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    steps = [batch for _ in range(args.epochs) for batch in shuffled_batches(examples, batch_size=16)]
    started, budget = time.perf_counter(), args.minutes * 60 / 2
    for step, batch in enumerate(bar := tqdm(steps, desc=f"{name} learns", unit="step")):
        # Of the steps or of the time, whichever runs out first: the learning rate then has fallen to its end.
        progress = max(step / len(steps), (time.perf_counter() - started) / budget)
        if progress >= 1:
            print(f"{name}: stopped after {step} of {len(steps)} steps, since {args.minutes} minutes were allowed")
            break
        learning_rate = 2e-3 * min(1, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss = model(**collate(batch, pad_token_id=tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    model.config.output_router_logits = False
    return model.eval()


def unlearn(
    base: Qwen2MoeForCausalLM,
    retrained: Qwen2MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    tofu: Tofu,
    score: Score,
    args: TofuArguments,
) -> tuple[UnlearningReport, list[tuple[int, int]], float]:
    """The report, the target and the seconds that training took."""
    attribution = attribute_experts(
        base,
        tofu.forget,
        processing_class=tokenizer,
        score=score,
        retain_dataset=tofu.retain,
        num_candidates=8,
        batch_size=50,
        seed=args.seed,
    )
    targets = attribution.top(1)
    trainer = UnlearningTrainer(
        model=base,
        args=UnlearningConfig(
            output_dir=str(args.output_dir / "training"),
            forget_loss=args.forget_loss,
            beta=args.beta,
            retain_loss="nll",
            retain_weight=args.retain_weight,
            anchor_weight=args.anchor_weight,
            learning_rate=args.learning_rate,
            num_train_epochs=args.num_train_epochs,
            per_device_train_batch_size=8,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=10,
            log_routing=False,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=tofu.forget,
        retain_dataset=tofu.retain,
        processing_class=tokenizer,
        peft_config=UOEConfig(target_experts=targets),
    )
    started = time.perf_counter()
    trainer.remove_callback(ProgressCallback)  # its bar is kept, its whole logs are not
    trainer.add_callback(TrainingBar)
    trainer.train()
    seconds = time.perf_counter() - started
    report = evaluate_unlearning(
        cast(PeftModel, trainer.model),
        forget_dataset=tofu.forget,
        retain_dataset=tofu.held_out,
        processing_class=tokenizer,
        retrained_model=retrained,
        max_examples=len(tofu.forget),
        batch_size=50,
        seed=args.seed,
    )
    return report, targets, seconds


if __name__ == "__main__":
    main()
