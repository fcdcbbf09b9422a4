"""The pipeline in plain calls, on the small model that ships with the package: python examples/bundled_model.py."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft import (
    UnlearningConfig,
    UnlearningTrainer,
    UOEConfig,
    attribute_experts,
    evaluate_unlearning,
    find_moe_blocks,
)
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts

model = AutoModelForCausalLM.from_pretrained(checkpoint_path("base"), dtype="bfloat16")
tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
forget = load_facts([FORGET_TOPIC])
retain = load_facts([topic for topic in TOPICS if topic != FORGET_TOPIC])

for block in find_moe_blocks(model):
    print(f"layer {block.layer_idx}: {block.num_experts} experts in {block.experts_name}")

attribution = attribute_experts(model, forget, processing_class=tokenizer, retain_dataset=retain)
print(attribution.summary())

trainer = UnlearningTrainer(
    model=model,
    args=UnlearningConfig(
        output_dir="outputs/forget-potions",
        forget_loss="npo",
        beta=0.05,
        retain_weight=4.0,
        learning_rate=5e-3,  # a small model needs more than the default, 1e-4
        num_train_epochs=6,
        per_device_train_batch_size=8,
        dataloader_pin_memory=False,
    ),
    train_dataset=forget,
    retain_dataset=retain,
    processing_class=tokenizer,
    peft_config=UOEConfig(target_experts=attribution.top(1)),
)
trainer.train()
trainer.save_model()

report = evaluate_unlearning(
    trainer.model,
    forget_dataset=forget,
    retain_dataset=retain,
    processing_class=tokenizer,
    max_examples=100,
    max_new_tokens=48,
)
print(report.summary())
