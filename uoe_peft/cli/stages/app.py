"""A page that answers one question with forgetting off and on, and shows the experts that each token was sent to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftConfig, PeftModel

from uoe_peft.cli.app import Answer, ask, build_page, encode_question, launch
from uoe_peft.cli.app.asking import edited_experts
from uoe_peft.cli.app.page import import_gradio
from uoe_peft.cli.loading import compute_dtype, load_model, load_tokenizer
from uoe_peft.cli.parsing import parse
from uoe_peft.precision import say_if_slow
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, as_prompt, checkpoint_path, load_facts
from uoe_peft.tuner import UOEConfig  # noqa: F401  (registers the method with PEFT)

_HOST = "127.0.0.1"  # for others to see the page, forward the port
_PROMPT_OF_TESTBED = as_prompt("{question}")


@dataclass(kw_only=True)
class AppArguments:
    """Which adapter, where the page is served."""

    adapter: str | None = field(
        default=None,
        metadata={"help": "Folder of the adapter, or its name on the Hub; None: that of the demo, which runs first."},
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Its base model; None: the adapter's own."})
    demo_dir: str = field(
        default="demo_output", metadata={"help": "Where the demo left its adapter, or will leave it."}
    )
    samples: list[str] = field(default_factory=list, metadata={"help": "Questions that the page offers."})
    prompt: str | None = field(
        default=None,
        metadata={"help": "The prompt, with {question} in it; None: the tokenizer's chat template, if it has one."},
    )
    dtype: str = field(default="auto", metadata={"help": "Of the model: auto, bfloat16, float16 or float32."})
    device_map: str | None = field(default=None, metadata={"help": "Where the model goes, for example auto."})
    max_new_tokens: int = field(default=128, metadata={"help": "Where an answer is cut."})
    port: int = field(default=7860, metadata={"help": "Of the page, on this machine."})


def run(arguments: Sequence[str]) -> None:
    """Serve the page until it is stopped."""
    (options,) = parse("app", arguments, AppArguments)
    # PEFT 0.21 asks models for transformers' old name of activation checkpointing, each time it wraps one.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    page = page_of(options)
    print(f"the page is at http://{_HOST}:{options.port}; Ctrl-C stops it", flush=True)
    launch(page, server_name=_HOST, server_port=options.port, quiet=True)


def page_of(options: AppArguments) -> object:
    """The page for an adapter, not yet served; without one the demo runs first, if it has not yet.

    Returns:
        A `gradio.Blocks`.

    Raises:
        ImportError: gradio is not installed.
        ValueError: The adapter does not say which base model it is for.
    """
    import_gradio()  # without it neither the demo nor a model need start
    adapter = options.adapter or demo_adapter(options.demo_dir)
    name = options.model_name_or_path or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter} does not say which base model it is for; pass --model_name_or_path")
    bundled = Path(name).resolve() == checkpoint_path("base").resolve()
    dtype = compute_dtype(options.dtype) if bundled else options.dtype
    base = load_model(name, dtype=dtype, device_map=options.device_map)
    say_if_slow(base)
    model, tokenizer = PeftModel.from_pretrained(base, adapter).eval(), load_tokenizer(name)
    template = options.prompt or (_PROMPT_OF_TESTBED if bundled else None)
    encode_question("Is there a place for it?", tokenizer, template=template)  # a wrong --prompt is said at once

    def asking(question: str, forgetting: bool) -> Answer:
        prompt = encode_question(question, tokenizer, template=template)
        return ask(model, tokenizer, prompt, forgetting=forgetting, max_new_tokens=options.max_new_tokens)

    samples = options.samples or (demo_samples() if bundled else [])
    return build_page(asking, about=about(model, name=name, adapter=adapter), samples=samples)


def demo_adapter(folder: str) -> str:
    """The adapter that the demo left in its folder; the demo runs if there is none."""
    adapter = Path(folder) / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        from uoe_peft.cli.stages import demo  # only here: it imports everything that trains

        print(f"no --adapter, and none of the demo in {folder}: the demo runs first", flush=True)
        demo.run(["--output_dir", folder, "--max_examples", "24"])
    return str(adapter)


def demo_samples() -> list[str]:
    """Questions that the bundled model can answer: three about what the demo forgets, one about each other topic."""
    first = [load_facts([topic])[0]["question"] for topic in TOPICS if topic != FORGET_TOPIC]
    return [*load_facts([FORGET_TOPIC])["question"][0:30:12], *first]


def about(model: PeftModel, *, name: str, adapter: str) -> str:
    """What is asked, in Markdown: base, adapter, what it forgets in the words of whoever trained it, its experts."""
    experts = "; ".join(
        f"layer {layer_idx}, expert {', '.join(map(str, sorted(experts)))}"
        for layer_idx, experts in sorted(edited_experts(model).items())
    )
    forgets = (getattr(model.active_peft_config, "provenance", None) or {}).get("forgets")
    forgets = f" It forgets: {forgets}." if forgets else ""
    return (
        f"Base `{Path(name).name}`, adapter `{adapter}`.{forgets} Edited: **{experts}**. Under each token stand the "
        "experts of this layer that it was sent to, the heaviest first; framed tokens reach the edited one."
    )
