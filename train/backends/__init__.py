"""The seam between the pipeline and what loads a model: `unsloth` (the default) or `peft` (plain transformers)."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantize.errors import UserError

if TYPE_CHECKING:
    from train.config import LoraConfig, ModelConfig


class Backend(Protocol):
    """What the pipeline asks of a backend."""

    name: str

    def load(self, folder: Path, config: ModelConfig, *, dtype: str, max_length: int, full: bool) -> Any:
        """The model, ready for `add_lora`, or for full fine-tuning where `full`."""

    def add_lora(self, model: Any, lora: LoraConfig, *, seed: int, gradient_checkpointing: bool) -> Any:
        """The PEFT model with one LoRA adapter named "default"."""

    def computing(
        self, fake_quantised: Collection[str], *, dtype: str, logits: bool = False
    ) -> AbstractContextManager[None]:
        """Held while the training graph is built and runs, whose weights are in `dtype`.

        The backend leaves out what these fake-quantised layers do not allow, and autocast where `dtype` is float32; it
        gives logits in training where `logits` asks for them.
        """


def pick_backend(name: str) -> Backend:
    """Imports the backend. Unsloth patches transformers and trl, so this comes before anything that imports them.

    Raises:
        UserError: the backend is not installed or does not run here.
    """
    if name == "unsloth":
        try:
            from train.backends.unsloth import UnslothBackend
        except (ImportError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"model.backend=unsloth does not import here ({reason}); install ongrid[unsloth] or set "
                "model.backend=peft"
            ) from error
        return UnslothBackend()
    from train.backends.peft import PeftBackend

    return PeftBackend()


def linear_names(model: Any) -> list[str]:
    """What `all-linear` means: the last parts of the names of the model's linear layers, lm_head left out."""
    from quantize.layers import linear_layers

    return sorted({name.rsplit(".", 1)[-1] for name, _ in linear_layers(model)} - {"lm_head"})


def initialise_adapters(model: Any, seed: int) -> None:
    """Draws LoRA's A on the CPU from one seed, so that every backend and device starts from the same numbers.

    As peft's default: Kaiming-uniform A with a = sqrt(5), that is U(-1/sqrt(I), 1/sqrt(I)); B is zero.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            drawn = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
            parameter.data.copy_(drawn)
        elif ".lora_B." in name:
            parameter.data.zero_()
