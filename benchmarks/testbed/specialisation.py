"""How far the experts of a testbed model specialise by topic.

python benchmarks/testbed/specialisation.py --model uoe_peft/testbed/checkpoints/base --output specialisation.json

The affinity of an expert for a topic is Eq. 2 of https://arxiv.org/abs/2411.18797: softmax scores masked to the
top k, the mean over a sequence's tokens first, then over sequences; padding never counts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from scores import encode_facts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from uoe_peft.testbed import TOPICS, load_facts


def main() -> None:
    """Print one table row a topic and write the same, with all affinities, as JSON."""
    parser = argparse.ArgumentParser(description="How far the experts of a testbed model specialise by topic.")
    parser.add_argument("--model", required=True, help="Folder of the checkpoint.")
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.set_experts_implementation("grouped_mm")
    affinity = torch.stack([topic_affinity(model, tokenizer, facts=load_facts([topic])) for topic in TOPICS])
    rows = [
        specialist(affinity, topic_idx=topic_idx, by=by)
        for by in ("gate", "contrast")
        for topic_idx in range(len(TOPICS))
    ]
    print(markdown_table(rows))
    if args.output:
        args.output.write_text(json.dumps({"specialists": rows, "affinity": affinity.tolist()}, indent=1) + "\n")


@torch.inference_mode()
def topic_affinity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, facts: Dataset, batch_size: int = 50
) -> Tensor:
    """Return the mean gate score of every expert on a topic, Eq. 2.

    Args:
        model: A model that returns router logits, each layer's of shape `(B * S, E)`.
        tokenizer: Its tokenizer.
        facts: Rows with `prompt` and `completion`.
        batch_size: Facts a forward pass.

    Returns:
        Shape `(num_moe_layers, E)`, in [0, 1].
    """
    total = torch.zeros(())
    for batch in facts.iter(batch_size=batch_size):
        input_ids, _, mask = encode_facts(tokenizer, prompts=batch["prompt"], completions=batch["completion"])
        output = model(input_ids=input_ids, attention_mask=mask, output_router_logits=True)
        scores = torch.stack(output.router_logits).float().softmax(-1)  # (layers, B * S, E)
        chosen = scores.topk(model.config.num_experts_per_tok, dim=-1)
        gate = torch.zeros_like(scores).scatter(-1, chosen.indices, chosen.values)
        gate = gate.unflatten(1, mask.shape) * mask[None, :, :, None]  # (layers, B, S, E)
        sequence_mean = gate.sum(2) / mask.sum(1)[None, :, None]  # (layers, B, E)
        total = total + sequence_mean.sum(1)
    return total / len(facts)


def specialist(affinity: Tensor, *, topic_idx: int, by: str) -> dict[str, str | int | float]:
    """Return a topic's expert, its affinity for the topic and its mean affinity for the other topics.

    Args:
        affinity: Shape `(num_topics, num_moe_layers, E)`.
        topic_idx: Which topic.
        by: `"gate"`: the highest affinity (Eq. 2). `"contrast"`: the highest excess over the other topics.

    Returns:
        `topic`, `by`, `layer`, `expert`, `affinity`, `elsewhere` and `lift`, the ratio of these two.
    """
    here = affinity[topic_idx]
    elsewhere = torch.cat([affinity[:topic_idx], affinity[topic_idx + 1 :]]).mean(0)
    score = here if by == "gate" else here - elsewhere
    layer, expert = divmod(int(score.argmax()), score.shape[1])
    own, other = here[layer, expert].item(), elsewhere[layer, expert].item()
    return {
        "topic": TOPICS[topic_idx],
        "by": by,
        "layer": layer,
        "expert": expert,
        "affinity": round(own, 4),
        "elsewhere": round(other, 4),
        "lift": round(own / max(other, 1e-4), 1),
    }


def markdown_table(rows: list[dict[str, str | int | float]]) -> str:
    """Return `rows`, which have equal keys, as a markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
