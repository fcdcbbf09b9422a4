"""Checkpoints and saved models: all that training needs to go on, and what a reader of the folder needs to know.

Fused experts of a model that is trained in full are stored one by one: `save_pretrained` splits them, `from_pretrained`
stacks them. The Trainer of transformers reads the file as it stands instead and leaves out what has no place, which is
every expert. And of several adapters it loads one, and switches the others off.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import SFTTrainer

from uoe_peft.training.model_card import add_loading_section, record_training
from uoe_peft.training.objective.anchor import active_configs, trained_configs
from uoe_peft.tuner import UOEConfig

_ADAPTER_FILE = "adapter_model.safetensors"
_CONFIG_FILE = "adapter_config.json"


class SavingTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with checkpoints that hold every weight that is trained."""

    @property
    def is_sharded(self) -> bool:
        """Whether processes split the weights; asked of the trainer, since a launcher may say so without the arguments.

        With "distributed_config" the model has split them itself.
        """
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled or self._is_sharded_at_load)

    @property
    def _is_sharded_at_load(self) -> bool:
        return bool(getattr(self, "is_distributed_loading_by_transformers", False))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.model, PeftModel):
            check_same_adapters(self.model, Path(resume_from_checkpoint))
        if not self._load_unsharded(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_unsharded(cast(str, self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _load_unsharded(self, folder: str) -> bool:
        """Load what the Trainer itself would load in part; whether that was the case."""
        model = cast(nn.Module, self.model)
        if self.is_sharded:
            return False
        if not isinstance(model, PeftModel):
            load_full_checkpoint(cast(PreTrainedModel, model), folder)
            return True
        if len(model.active_adapters) > 1:
            load_adapters(model, Path(folder))
            return True
        return False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model = cast(nn.Module, self.model)
        record_training(trained_configs(model), self.args)
        if state_dict is None and self._is_sharded_at_load:
            state_dict = adapters_alone(model)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or cast(str, self.args.output_dir))
            add_loading_section(folder / "README.md", active_configs(model))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in TRL; of a UOE adapter also how to load it."""
        super().create_model_card(*args, **kwargs)
        if self.args.should_save:
            folder = Path(cast(str, self.args.output_dir))
            add_loading_section(folder / "README.md", active_configs(cast(nn.Module, self.model)))


def adapters_alone(model: nn.Module) -> dict[str, Tensor] | None:
    """The tensors of a model's UOE adapters; None where adapters have others, too.

    Asked for the whole model, each process of a sharded one would bring all of it together, to leave most of it out.
    """
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    if not configs or any(not isinstance(c, UOEConfig) or c.modules_to_save for c in configs):
        return None
    return {name: parameter.detach() for name, parameter in model.named_parameters() if ".uoe_" in name}


def load_adapters(model: PeftModel, folder: Path) -> None:
    """Give the active adapters of a model what a checkpoint has of them; which are on, and which train, stays.

    Args:
        model: The model that was saved, or one with the same adapters.
        folder: Where `save_pretrained` wrote it: the adapter "default" itself, others in folders of their names.

    Raises:
        FileNotFoundError: An active adapter is not there.
    """
    places = _places(model, folder)
    for name, place in places.items():
        if not (place / _ADAPTER_FILE).is_file():
            raise FileNotFoundError(
                f"{place} has no {_ADAPTER_FILE} of the active adapter {name!r}; resume with the adapters "
                "that were active when the checkpoint was written"
            )
    for name, place in places.items():
        set_peft_model_state_dict(model, load_file(place / _ADAPTER_FILE), adapter_name=name)


def check_same_adapters(model: PeftModel, folder: Path) -> None:
    """Whether a checkpoint's tensors mean in the model what they meant: of other experts or scales they look the same.

    Args:
        model: Where the checkpoint will be loaded.
        folder: Where it is.

    Raises:
        ValueError: An active UOE adapter edited other experts, or had another scale, when the checkpoint was written.
    """
    for name, place in _places(model, folder).items():
        config = model.peft_config[name]
        if not isinstance(config, UOEConfig) or not (place / _CONFIG_FILE).is_file():
            continue
        saved, own = _meaning(UOEConfig.from_pretrained(str(place))), _meaning(config)
        for option in saved.keys() & own.keys():
            if saved[option] != own[option]:
                raise ValueError(
                    f"the checkpoint {folder} is of an adapter {name!r} with {option}={saved[option]}, the model's has "
                    f"{option}={own[option]}; resume with {option}={saved[option]}"
                )


def _meaning(config: UOEConfig) -> dict[str, Any]:
    """What neither names nor shapes of an adapter's tensors tell; its strength becomes the checkpoint's."""
    scaled = "low_rank" in (config.delta_type, config.router_delta_type)
    names = ("target_experts", *(("uoe_alpha", "use_rslora") if scaled else ()))
    return {name: getattr(config, name) for name in names}


def _places(model: PeftModel, folder: Path) -> dict[str, Path]:
    """Where `save_pretrained` writes the active adapters of a model: "default" itself, others by their names."""
    return {name: folder if name == "default" else folder / name for name in model.active_adapters}


def load_full_checkpoint(model: PreTrainedModel, folder: str) -> None:
    """Give a model all weights of a checkpoint, bit for bit; its parameters stay the same objects.

    Args:
        model: The model that was saved, or one of the same class and sizes.
        folder: Where `save_pretrained` wrote it.

    Raises:
        ValueError: The checkpoint lacks weights of the model, or has others.
        OSError: There are no weights in the folder.
    """
    # The widest dtype holds the values of every other: casting back to each parameter's own changes no bit.
    dtype = reduce(torch.promote_types, {p.dtype for p in model.parameters() if p.is_floating_point()})
    load = cast(Any, type(model)).from_pretrained
    saved, found = load(folder, config=model.config, dtype=dtype, output_loading_info=True)
    for what, names in (("lacks", found["missing_keys"]), ("has, unknown to the model,", found["unexpected_keys"])):
        if names:
            raise ValueError(
                f"the checkpoint {folder} {what} {len(names)} weights of {type(model).__name__}, such as "
                f"{sorted(names)[:3]}; resume with the model that wrote it"
            )
    model.load_state_dict(saved.state_dict())
