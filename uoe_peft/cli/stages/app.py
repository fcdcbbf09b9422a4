"""A page that answers the same question with the adapter on and off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import PeftConfig, PeftModel

from uoe_peft.cli.app_page import page
from uoe_peft.cli.loading import load_model, load_tokenizer
from uoe_peft.cli.parsing import parse
from uoe_peft.tuner import UOEConfig  # noqa: F401  (registers the method with PEFT)


@dataclass(kw_only=True)
class AppArguments:
    """Which adapter, where the page is served."""

    adapter: str = field(metadata={"help": "Folder of the adapter, or its name on the Hub."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Its base model; None: the adapter's own."})
    dtype: str = field(default="auto", metadata={"help": "Of the model: auto, bfloat16, float16 or float32."})
    device_map: str | None = field(default=None, metadata={"help": "Where the model goes, for example auto."})
    max_new_tokens: int = field(default=128, metadata={"help": "Where an answer is cut."})
    port: int = field(default=7860, metadata={"help": "Of the page, on this machine."})


def run(arguments: Sequence[str]) -> None:
    """Serve the page until it is stopped."""
    (options,) = parse("app", arguments, AppArguments)
    name = options.model_name_or_path or PeftConfig.from_pretrained(options.adapter).base_model_name_or_path
    if not name:
        raise ValueError(f"{options.adapter} does not say which base model it is for; pass --model_name_or_path")
    base = load_model(name, dtype=options.dtype, device_map=options.device_map)
    model = PeftModel.from_pretrained(base, options.adapter).eval()
    served = page(model, load_tokenizer(name), max_new_tokens=options.max_new_tokens)
    served.launch(server_name="127.0.0.1", server_port=options.port)
