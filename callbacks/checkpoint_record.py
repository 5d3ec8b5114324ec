"""What a ModelCheckpoint knows of the checkpoints that it has made, and which of them it keeps."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .monitor import worst_value

# Fields that also count for a run that goes on in another folder.
_OF_ANY_FOLDER: Iterable[str] = (
    "best_model_path",
    "last_global_step_saved",
    "postponed",
)


@dataclass(frozen=True)
class CheckpointRecord:
    """The checkpoints that a run has made. Each of them holds the record in which it is the newest.

    A record is never changed: each save makes a new one, and if it fails, the one before counts again.

    Attributes:
        kth_value: value of the worst checkpoint in ``best_k_models``, once that is full; before, the worst possible.
        kth_best_model_path: the path of that checkpoint, or "".
        best_model_path: the best checkpoint (without a monitor: the newest), or "".
        best_model_score: its value.
        current_score: value of the checkpoint that was ranked last.
        best_k_models: values of the checkpoints that are kept for their rank, by path, the oldest first.
        last_model_path: the pointer to the newest checkpoint, or "".
        best_pointer: the pointer to the best checkpoint, or "".
        last_checkpoint_saved: the newest checkpoint, or "".
        last_global_step_saved: its optimizer step; 0, as there is nothing to save before the first step.
        postponed: whether a checkpoint was due before its value was known: it is saved after the next validation.
        removable: checkpoints that are removed as soon as nothing needs them.
    """

    kth_value: Tensor
    kth_best_model_path: str = ""
    best_model_path: str = ""
    best_model_score: Tensor | None = None
    current_score: Tensor | None = None
    best_k_models: dict[str, Tensor] = field(default_factory=dict)
    last_model_path: str = ""
    best_pointer: str = ""
    last_checkpoint_saved: str = ""
    last_global_step_saved: int = 0
    postponed: bool = False
    removable: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return {name: copy(value) for name, value in vars(self).items()}

    def restored(self, state: dict[str, Any], same_folder: bool) -> CheckpointRecord:
        """The record with the fields of a saved one.

        Args:
            state: what :meth:`state_dict` returned; another trainer's may have fewer fields.
            same_folder: whether the run goes on in the folder of the saved one; if not, most of it does not hold.
        """
        names = _OF_ANY_FOLDER
        if same_folder:
            names = vars(self)
        return replace(
            self, **{name: copy(state[name]) for name in names if name in state}
        )

    def ranks(self, score: Tensor, mode: str, top_k: int) -> bool:
        """Whether a checkpoint with this score is among the best.

        Args:
            score: a tensor without dimensions; NaN counts as the worst of all.
            mode: ``"min"`` if less is better, ``"max"`` if more is.
            top_k: how many are kept; -1 for all.
        """
        if top_k == -1 or len(self.best_k_models) < top_k:
            return True
        if torch.isnan(score):
            return False
        better = score < self.kth_value if mode == "min" else score > self.kth_value
        return bool(better)

    def with_ranked(
        self,
        path: str,
        score: Tensor,
        mode: str,
        top_k: int,
    ) -> CheckpointRecord:
        """The record with one more of the best checkpoints, instead of the worst if there are ``top_k`` already."""
        if torch.isnan(score):
            score = worst_value(mode)
        scores = dict(self.best_k_models)
        if len(scores) == top_k:
            scores.pop(self.kth_best_model_path, None)
        scores[path] = score

        def value(path: str) -> float:
            return float(scores[path])

        # Of equally good ones the oldest is the best; of equally bad ones the oldest goes first.
        best = min(scores, key=value)
        worst = max(scores, key=value)
        if mode == "max":
            best, worst = worst, best
        record = replace(
            self,
            best_k_models=scores,
            best_model_path=best,
            best_model_score=scores[best],
            current_score=score,
        )
        if top_k not in (-1, len(scores)):
            return record
        return replace(record, kth_best_model_path=worst, kth_value=scores[worst])

    def unneeded(self, resumed_from: str) -> list[str]:
        """The checkpoints that can be removed.

        Args:
            resumed_from: the checkpoint that the running fit was resumed from, or "". Only a later fit may remove it.
        """
        needed = {
            *self.best_k_models,
            self.best_model_path,
            self.last_checkpoint_saved,
            resumed_from,
        }
        return [path for path in self.removable if path not in needed]
