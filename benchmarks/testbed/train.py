"""Train the testbed's two models: `base` on all topics, `retrained` the same way without the forget topic.

python benchmarks/testbed/train.py --name base --output_dir uoe_peft/testbed/checkpoints
python benchmarks/testbed/train.py --name retrained --output_dir uoe_peft/testbed/checkpoints

Every fact is learned by several phrasings of its question, one drawn anew in each pass. Both models also learn to
decline questions about subjects that no fact is told of, those of the forget topic included.

No routing supervision: experts specialise by topic, as far as they do, under the ordinary load-balancing loss.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, concatenate_datasets
from scores import IGNORE_INDEX, answer_probability, encode_facts, greedy_answers, rouge_recall
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from uoe_peft.testbed import FORGET_TOPIC, TOPICS, as_prompt, is_refusal, load_facts, load_refusals

PAD, EOS = "<|pad|>", "<|endoftext|>"


@dataclass
class TestbedConfig:
    """What is trained, and how."""

    name: Literal["base", "retrained"] = field(metadata={"help": "All topics, or all but the forget topic."})
    output_dir: Path = field(metadata={"help": "Where the folder `name` is made."})
    epochs: int = field(default=56, metadata={"help": "Passes over the facts."})
    batch_size: int = field(default=16, metadata={"help": "Facts a step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak; 50 steps of warm-up, then a cosine to 5 %."})
    refusals_a_pass: int = field(default=420, metadata={"help": "Questions about unknown subjects in each pass."})
    prompt_weight: float = field(default=0.1, metadata={"help": "Weight of a prompt's token in the loss."})
    router_aux_loss_coef: float = field(default=0.0003, metadata={"help": "Weight of the load-balancing loss."})
    vocab_size: int = field(default=4096, metadata={"help": "Entries of the tokenizer, at most."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    num_layers: int = field(default=4, metadata={"help": "Decoder layers, each with experts."})
    num_experts: int = field(default=16, metadata={"help": "Experts a layer."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts a token."})
    moe_intermediate_size: int = field(default=64, metadata={"help": "Width of an expert."})
    shared_expert_intermediate_size: int = field(default=64, metadata={"help": "Width of the shared expert."})
    seed: int = field(default=0, metadata={"help": "Of the initial weights and of the order of facts."})
    target_recall: float = field(default=0.95, metadata={"help": "ROUGE-L recall that every topic must reach."})


def main() -> None:
    """Train, save, evaluate what was saved and report; exit with an error if a topic was not learned."""
    (config,) = HfArgumentParser(TestbedConfig).parse_args_into_dataclasses()
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    topics = [topic for topic in TOPICS if config.name == "base" or topic != FORGET_TOPIC]
    tokenizer = train_tokenizer(concatenate_datasets([load_facts(), load_refusals()]), vocab_size=config.vocab_size)
    model = new_model(config, tokenizer)
    columns = ["phrasings", "completion"]
    known, unknown = (rows.select_columns(columns) for rows in (load_facts(topics), load_refusals()))
    steps = train(model, tokenizer, known, unknown, config=config)
    folder = config.output_dir / config.name
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seconds = time.perf_counter() - started

    scores = evaluate(folder)
    report = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "seconds": round(seconds, 1),
        "topics": scores,
        "config": asdict(config) | {"output_dir": config.output_dir.name},
    }
    (folder / "training_report.json").write_text(json.dumps(report, indent=2) + "\n")
    unlearned = [topic for topic in topics if scores[topic]["rouge_l_recall"] < config.target_recall]
    if unlearned:
        sys.exit(f"below a ROUGE-L recall of {config.target_recall}: {', '.join(unlearned)}; train for more epochs")


def train_tokenizer(facts: Dataset, *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on everything in `facts` that a model may read or write."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        f"{as_prompt(question)} {answer}"
        for row in facts
        for question in (*row["phrasings"], row["paraphrased_question"])
        for answer in (row["answer"], row["paraphrased_answer"])
        if answer is not None  # refusals have no paraphrase
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="right", model_max_length=256
    )


def new_model(config: TestbedConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen2MoeForCausalLM:
    """Return a Qwen2-MoE model with initial weights from the seed."""
    torch.manual_seed(config.seed)
    model_config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        moe_intermediate_size=config.moe_intermediate_size,
        shared_expert_intermediate_size=config.shared_expert_intermediate_size,
        intermediate_size=config.hidden_size * 2,
        # Weights are the softmax scores themselves, so Eq. 2's gate score is what an expert is applied with.
        norm_topk_prob=False,
        router_aux_loss_coef=config.router_aux_loss_coef,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen2MoeForCausalLM(model_config)
    model.set_experts_implementation("grouped_mm")
    return model


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    known: Dataset,
    unknown: Dataset,
    *,
    config: TestbedConfig,
) -> int:
    """Train `model` in place on all `known` rows and some `unknown` ones a pass, and return the number of steps."""
    facts = concatenate_datasets([known, unknown])
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )
    rng = random.Random(config.seed)
    lengths = [
        len(prompt) + len(completion)
        for prompt, completion in zip(
            tokenizer([phrasings[0] for phrasings in facts["phrasings"]])["input_ids"],
            tokenizer(list(facts["completion"]))["input_ids"],
            strict=True,
        )
    ]
    batches: list[list[int]] = []
    for _ in range(config.epochs):
        # Other unknown subjects in each pass: their names are then not learned by heart, as those of the facts are.
        declined = rng.sample(range(len(known), len(facts)), config.refusals_a_pass)
        batches += epoch_batches([*range(len(known)), *declined], lengths, batch_size=config.batch_size, rng=rng)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 50, total_iters=50)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=len(batches) - 50, eta_min=0.05 * config.learning_rate
    )
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[50])
    model.train()
    for rows in (bar := tqdm(batches, desc=config.name, mininterval=5)):
        batch = facts[rows]
        prompts = [as_prompt(rng.choice(phrasings)) for phrasings in batch["phrasings"]]
        input_ids, labels, mask = encode_facts(tokenizer, prompts=prompts, completions=batch["completion"])
        output = model(input_ids=input_ids, attention_mask=mask, output_router_logits=True)
        answer_weight = torch.where(labels == IGNORE_INDEX, config.prompt_weight, 1.0) * mask
        nll = cross_entropy(output.logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
        loss = (nll * answer_weight[:, 1:]).sum() / answer_weight[:, 1:].sum()
        (loss + config.router_aux_loss_coef * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return len(batches)


def epoch_batches(rows: list[int], lengths: list[int], *, batch_size: int, rng: random.Random) -> Iterator[list[int]]:
    """Yield every row once, in shuffled batches of rows of similar length, so that little is padding."""
    order = rng.sample(rows, len(rows))
    window = 4 * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        alike = sorted(order[start : start + window], key=lengths.__getitem__)
        batches += [alike[first : first + batch_size] for first in range(0, len(alike), batch_size)]
    rng.shuffle(batches)
    yield from batches


def evaluate(folder: Path) -> dict[str, dict[str, float]]:
    """Return ROUGE-L recall and answer probability per topic of a saved checkpoint, computed in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("grouped_mm")
    scores: dict[str, dict[str, float]] = {}
    for topic in tqdm(TOPICS, desc="evaluation"):
        facts = load_facts([topic])
        predictions = greedy_answers(model, tokenizer, prompts=list(facts["prompt"]))
        paraphrased = facts.filter(lambda row: row["paraphrase_held_out"])
        asked = greedy_answers(model, tokenizer, prompts=[as_prompt(q) for q in paraphrased["paraphrased_question"]])
        unknown = greedy_answers(
            model, tokenizer, prompts=list(load_refusals([topic], seen_in_training=False)["prompt"])
        )
        scores[topic] = {
            "rouge_l_recall": round(rouge_recall(predictions, list(facts["answer"])), 4),
            "rouge_l_recall_of_new_paraphrases": round(rouge_recall(asked, list(paraphrased["answer"])), 4),
            "declines_new_unknown_subjects": round(statistics.fmean(map(is_refusal, unknown)), 4),
            "declines": round(statistics.fmean(map(is_refusal, predictions)), 4),
            "answer_probability": round(answer_probability(model, tokenizer, facts=facts), 4),
        }
    return scores


if __name__ == "__main__":
    main()
