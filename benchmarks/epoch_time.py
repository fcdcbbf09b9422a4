"""Whether the prefix cache pays from the first epoch: training with it, building included, against training without.

One model with random weights, `UnlearningTrainer` on forget and retain rows of unequal lengths (half to one and a half
times `--length`; the second half of each row is its answer). Trainings with and without the cache take turns; ratios
are medians over rounds. "1 epoch" is the whole `train()` of one epoch, "3 epochs" likewise, and "a later epoch" is an
epoch after the first, as a callback sees it begin and end.

Gradient ascent by default, for which the cache has least to give: "npo" also asks the base model, which the cache
makes cheaper.

    python benchmarks/epoch_time.py --output outputs/epoch_time.json
    python benchmarks/epoch_time.py --scale small --rows 16 --rounds 1       # a few seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from clock import median_ratio, seconds
from datasets import Dataset, disable_progress_bars
from peft import PeftModel, get_peft_model
from random_models import Setting, add_arguments, base_model, busiest_expert, random_batch, setting_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig
from uoe_peft.training.choices import ForgetLoss

Arm = tuple[int, bool]
"""Number of epochs, and whether there is a cache."""
Times = dict[Arm, list[float]]


class EpochTimes(TrainerCallback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it. Each step waits for the device anyway, to log its losses."""
        self.seconds.append(time.perf_counter() - self._began)


def main() -> None:
    """Run the benchmark and print a table."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    setting = setting_of(arguments)
    base = base_model(setting)
    sets = {role: random_rows(setting, arguments.rows, seed=seed) for seed, role in enumerate(("forget", "retain"))}
    wholes: Times = {arm: [] for arm in product(arguments.epochs, (False, True))}
    laters: Times = {arm: [] for arm in wholes}
    # Not timed: first calls allocate.
    few = {role: rows.select(range(min(len(rows), 2 * setting.batch_size))) for role, rows in sets.items()}
    train(base, setting, few, (1, True), arguments.forget_loss)
    for _, arm in product(range(arguments.rounds), wholes):
        whole, later = train(base, setting, sets, arm, arguments.forget_loss)
        wholes[arm].append(whole)
        laters[arm] += later
    rows = _rows(wholes, laters)
    print(f"{arguments.rows} forget and as many retain rows, {arguments.forget_loss}, {setting}\n")
    print("| | without, s | with the cache, s | ratio |\n|---|---|---|---|")
    for row in rows:
        print("| {what} | {without:.2f} | {cached:.2f} | {ratio:.3f} |".format(**row))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        options = {name: getattr(arguments, name) for name in ("rows", "rounds", "forget_loss", "threads")}
        arguments.output.write_text(json.dumps({"setting": vars(setting), **options, "times": rows}, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rows", type=int, default=96, help="Forget rows, and as many retain rows.")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forget_loss", choices=get_args(ForgetLoss), default="grad_ascent")
    parser.add_argument("--output", type=Path)
    return parser


def random_rows(setting: Setting, number: int, *, seed: int) -> Dataset:
    """Rows of random tokens and unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(setting.length // 2, 3 * setting.length // 2 + 1, (number,), generator=generator).tolist()
    ids = [torch.randint(3, setting.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    masks = [[0] * (length // 2) + [1] * (length - length // 2) for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "completion_mask": masks})


def train(
    base: PreTrainedModel, setting: Setting, sets: dict[str, Dataset], arm: Arm, forget_loss: ForgetLoss
) -> tuple[float, list[float]]:
    """Seconds of `train()` with a fresh adapter on shared frozen weights, and of each epoch after the first."""
    times = EpochTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = UnlearningTrainer(
            _with_adapter(base, setting),
            _training_arguments(setting, arm, forget_loss, folder),
            train_dataset=sets["forget"],
            retain_dataset=sets["retain"],
            processing_class=_tokenizer(),
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)
        return seconds(trainer.train, setting.device), times.seconds[1:]


def _with_adapter(base: PreTrainedModel, setting: Setting) -> PeftModel:
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    expert_idx = busiest_expert(base, random_batch(setting)["input_ids"], setting.target_layer)
    return get_peft_model(model, UOEConfig(target_experts=[(setting.target_layer, expert_idx)]))


def _training_arguments(setting: Setting, arm: Arm, forget_loss: ForgetLoss, folder: str) -> UnlearningConfig:
    num_epochs, cached = arm
    return UnlearningConfig(
        output_dir=folder,
        num_train_epochs=num_epochs,
        per_device_train_batch_size=setting.batch_size,
        prefix_cache=cached,
        forget_loss=forget_loss,
        use_cpu=not setting.device.startswith("cuda"),
        bf16=False,  # the model has the dtype that is asked for
        log_routing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Rows are token ids already; what is asked of it is the id of padding."""
    words = Tokenizer(WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[PAD]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")


def _rows(wholes: Times, laters: Times) -> list[dict[str, Any]]:
    rows = []
    for num_epochs in sorted({num_epochs for num_epochs, _ in wholes}):
        what = "1 epoch" if num_epochs == 1 else f"{num_epochs} epochs"
        rows.append(_row(what, wholes[num_epochs, False], wholes[num_epochs, True]))
        if num_epochs > 1:
            rows.append(_row(f"a later epoch, of {num_epochs}", laters[num_epochs, False], laters[num_epochs, True]))
    return rows


def _row(what: str, without: list[float], cached: list[float]) -> dict[str, Any]:
    medians = {"without": statistics.median(without), "cached": statistics.median(cached)}
    runs = {"runs_without": without, "runs_cached": cached}
    return {"what": what, **medians, "ratio": median_ratio(cached, without), **runs}


if __name__ == "__main__":
    main()
