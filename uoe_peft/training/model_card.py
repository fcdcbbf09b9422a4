"""What a model card must say of a UOE adapter: PEFT knows the method only after an import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from uoe_peft.tuner import UOEConfig

PAPER = {
    "title": "UOE: Unlearning One Expert Is Enough for Mixture-of-Experts LLMs",
    "id": "2411.18797",
    "citation": """@inproceedings{zhuang2025seuf,
    title     = {{SEUF: Is Unlearning One Expert Enough for Mixture-of-Experts LLMs?}},
    author    = {Zhuang, Haomin and Zhang, Yihua and Guo, Kehan and Jia, Jinghan and Liu, Gaowen and Liu, Sijia and
                 Zhang, Xiangliang},
    booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics},
    year      = 2025,
    url       = {https://arxiv.org/abs/2411.18797},
}""",
}

_HEADING = "## Loading this adapter"
_LAST_LINES = """model.merge_adapter()  # forgets in the weights; unmerge_adapter() restores every bit
```
"""


def add_loading_section(readme: Path, configs: Sequence[UOEConfig]) -> None:
    """Say in a model card how to load a UOE adapter, and what it edits now; once, whatever stands around it.

    Args:
        readme: The card; nothing happens where there is none.
        configs: Of the model's active UOE adapters; nothing happens where there is none.
    """
    if not configs or not readme.is_file():
        return
    pairs = [pair for config in configs for pair in config.target_experts]
    edited = ", ".join(f"expert {expert_idx} of layer {layer_idx}" for layer_idx, expert_idx in pairs)
    intro = f"This is a UOE adapter: it edits {edited}, and the routers of these layers, so that the model forgets."
    section = f"""
{_HEADING}

{intro}
Importing `uoe_peft` registers the method with PEFT; without it, loading fails with `KeyError: 'UOE'`.

```python
import uoe_peft  # pip install uoe-peft
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("<this folder or repository>")
with model.disable_adapter():  # remembers
    ...
{_LAST_LINES}"""
    card = readme.read_text(encoding="utf-8")
    start = card.find(f"\n{_HEADING}\n")
    end = card.find(_LAST_LINES, start) + len(_LAST_LINES)
    before, after = (card, "") if start < 0 else (card[:start], card[end:])
    readme.write_text(before + section + after, encoding="utf-8")
