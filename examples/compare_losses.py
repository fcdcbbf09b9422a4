"""Forget losses side by side, on equal steps: python examples/compare_losses.py.

A first look, not a verdict: each loss has rates of its own, and only a validation set can choose between them.
"""

import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig
from uoe_peft.testbed import FORGET_TOPIC, checkpoint_path, load_facts

tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
forget, retain = load_facts([FORGET_TOPIC]).select(range(64)), load_facts(["towns"]).select(range(64))

print(f"{'loss':12} {'forget accuracy':>24} {'retain accuracy':>24}")
for loss, rate in (("grad_ascent", 5e-3), ("npo", 1e-2), ("simnpo", 1e-2), ("idk", 1e-2), ("rmu", 1e-2)):
    with tempfile.TemporaryDirectory() as folder:
        trainer = UnlearningTrainer(
            model=AutoModelForCausalLM.from_pretrained(checkpoint_path("base"), dtype="float32"),
            args=UnlearningConfig(
                folder,
                forget_loss=loss,
                learning_rate=rate,
                max_steps=24,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=forget,
            retain_dataset=retain,
            processing_class=tokenizer,
            peft_config=UOEConfig(target_experts=[(3, 12)]),
        )
        trainer.train()
        seen = [entry for entry in trainer.state.log_history if "forget_accuracy" in entry]
        spans = [f"{seen[0][key]:.2f} -> {seen[-1][key]:.2f}" for key in ("forget_accuracy", "retain_accuracy")]
        print(f"{loss:12} {spans[0]:>24} {spans[1]:>24}")
