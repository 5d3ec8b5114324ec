"""Write a Hugging Face model as ``from_pretrained`` reads it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from logging import getLogger
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from .base import Callback

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")


class SavePretrained(Callback):
    """Write the folders that ``from_pretrained`` reads: a model's weights and configuration, and its tokenizer.

    The weights are whole under every strategy. Of a PEFT model, the adapters alone are written. By default that is done
    when the training ends.

    Args:
        dirpath: the folder. Default: ``pretrained`` in the run's folder.
        model: the name of the model among the module's submodules, such as ``"model"``. Default: the outermost one that
            has a ``save_pretrained``.
        tokenizer: a tokenizer or processor to write beside it, or several.
        every_checkpoint: write a folder ``epoch=…-step=…`` in ``dirpath`` whenever a checkpoint is saved, too. None is
            removed.
        weight_set: write the weights that a callback keeps by this name, such as ``"ema"``.
        dtype: to convert floating-point weights to.
        push_to_hub: the repository on the Hugging Face Hub to upload the last folder to; by default it is not. A
            failure is said, and ends nothing.
        private: whether a repository that is made for it is private.

    Raises:
        ValueError: when a run begins, if the module has no such model.
    """

    phase = "persist"

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        model: str | None = None,
        tokenizer: Any = (),
        every_checkpoint: bool = False,
        weight_set: str | None = None,
        dtype: torch.dtype | None = None,
        push_to_hub: str | None = None,
        private: bool | None = None,
    ) -> None:
        self.dirpath = dirpath
        self.model = model
        several = isinstance(tokenizer, (list, tuple))
        self.tokenizers: Sequence[Any] = tokenizer if several else [tokenizer]
        self.every_checkpoint = every_checkpoint
        # A callback's `weight_set` would be one that it keeps.
        self.written_weights = weight_set
        self.dtype = dtype
        self.push_to_hub = push_to_hub
        self.private = private
        self._is_due = False

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._find(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]
    ) -> None:
        # Of the same weights, but when the checkpoint is no longer in the making.
        self._is_due = self.every_checkpoint

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int
    ) -> None:
        if self._is_due:
            self._is_due = False
            step = f"epoch={trainer.current_epoch}-step={trainer.global_step}"
            self._save(trainer, os.path.join(self._folder(trainer), step))

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._is_due = False
        folder = self._folder(trainer)
        self._save(trainer, folder)
        if self.push_to_hub is not None and trainer.is_global_zero:
            self._push(self.push_to_hub, folder)

    def _folder(self, trainer: Trainer) -> str:
        return os.fspath(self.dirpath or os.path.join(trainer.log_dir, "pretrained"))

    def _find(self, module: Module) -> tuple[str, Any]:
        """The model's name among the submodules, and the model."""
        for name, part in module.named_modules():
            if self.model in (None, name) and hasattr(part, "save_pretrained"):
                return name, part
        wanted = "submodule" if self.model is None else f"submodule {self.model!r}"
        raise ValueError(
            f"SavePretrained: {type(module).__name__} has no {wanted} with a save_pretrained"
        )

    def _save(self, trainer: Trainer, folder: str) -> None:
        name, model = self._find(trainer.module)
        if trainer.is_global_zero:
            os.makedirs(folder, exist_ok=True)
        file = os.path.join(folder, "weights.partial")
        trainer.export(
            file, self.dtype, self.written_weights
        )  # collective where sharded
        if not trainer.is_global_zero:
            return
        prefix = f"{name}." if name else ""
        state = {
            key.removeprefix(prefix): value
            for key, value in load_file(file).items()
            if key.startswith(prefix)
        }
        os.remove(file)
        model.save_pretrained(folder, state_dict=state)
        for tokenizer in self.tokenizers:
            tokenizer.save_pretrained(folder)
        log.info("Saved %s for from_pretrained in %s", type(model).__name__, folder)

    def _push(self, repository: str, folder: str) -> None:
        try:
            from huggingface_hub import HfApi

            hub = HfApi()
            hub.create_repo(repository, private=self.private, exist_ok=True)
            hub.upload_folder(repo_id=repository, folder_path=folder)
        except Exception as error:
            log.warning(
                "SavePretrained: not uploaded to %s: %s; it is in %s",
                repository,
                error,
                folder,
            )
