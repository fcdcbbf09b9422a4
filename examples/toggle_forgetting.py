"""Switch forgetting on and off: for a call, for single rows of a batch, in the weights.

python examples/toggle_forgetting.py
"""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft import UOEConfig
from uoe_peft.testbed import checkpoint_path, load_facts

tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"), padding_side="left")
base = AutoModelForCausalLM.from_pretrained(checkpoint_path("base"), dtype="float32")
# No training here: the expert is silenced, which is the simplest adapter there is.
model = get_peft_model(base, UOEConfig(target_experts=[(0, 4)], init_weights="zero_expert")).eval()
question = load_facts(["potions"])[0]["prompt"]


def answers(prompts, **options):
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False, **options)
    return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


with torch.inference_mode():
    forgets = answers([question])
    with model.disable_adapter():
        remembers = answers([question])
    mixed = answers([question, question], adapter_names=["default", "__base__"])
    print("adapter on: ", forgets[0])
    print("adapter off:", remembers[0])
    assert mixed == forgets + remembers  # one batch, each row its own way

weight = dict(model.named_parameters())["base_model.model.model.layers.0.mlp.experts.base_layer.down_proj"]
before = weight.detach().clone()
model.merge_adapter()
print(f"merged: {int((weight != before).sum()):,} entries of down_proj differ")
model.unmerge_adapter()
assert torch.equal(weight, before)
print("unmerged: every bit is as it was")
