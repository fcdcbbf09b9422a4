"""Which expert serves a topic, how sure that is, and a picture of it: python examples/attribute_expert.py."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft import attribute_experts, find_moe_blocks
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts

model = AutoModelForCausalLM.from_pretrained(checkpoint_path("base"), dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
forget = load_facts([FORGET_TOPIC])
retain = load_facts([topic for topic in TOPICS if topic != FORGET_TOPIC]).shuffle(seed=0).select(range(200))

for block in find_moe_blocks(model):
    print(f"layer {block.layer_idx}: {block.num_experts} experts in {block.experts_name}")

output = Path("outputs/examples")
output.mkdir(parents=True, exist_ok=True)
for score in ("gate", "contrast"):
    attribution = attribute_experts(
        model, forget, processing_class=tokenizer, retain_dataset=retain, score=score, max_tokens=4_000
    )
    print(attribution.summary(num_experts=3))
    attribution.save(output / f"{score}.json")
    attribution.plot(output / f"{score}.png")
