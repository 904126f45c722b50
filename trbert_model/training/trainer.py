"""transformers' Trainer for a training stage."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer

from ..errors import TrainingError

# A selector whose kept fraction over a logging period is outside this range has stopped choosing.
_COLLAPSED = (0.002, 0.998)


class StageTrainer(Trainer):
    """transformers' Trainer for an `Objective`: logs its measurements, and stops if the selectors stop choosing."""

    def __init__(self, *args: Any, joint_learning_rate: float | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.joint_learning_rate = joint_learning_rate
        self.measured: defaultdict[str, list[float]] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        loss = output.pop("loss")
        for name, value in output.items():
            self.measured[name].append(float(value))
        return (loss, output) if return_outputs else loss

    def create_optimizer(self, model=None):
        if self.joint_learning_rate is not None and self.optimizer is None:  # type: ignore[has-type]
            groups: list[list[nn.Parameter]] = [[], []]
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups[".selectors." in name].append(parameter)
            rates = (self.joint_learning_rate, self.args.learning_rate)
            self.optimizer = torch.optim.AdamW(
                [{"params": group, "lr": rate} for group, rate in zip(groups, rates) if group],
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=0.0,
                fused=True,
            )
        return super().create_optimizer(model)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        means = {name: float(np.mean(values)) for name, values in self.measured.items()}
        self.measured.clear()
        super().log({**logs, **means}, *args, **kwargs)
        for name, kept in means.items():
            if name.startswith("kept_") and not _COLLAPSED[0] < kept < _COLLAPSED[1] and self.state.global_step > 20:
                what = "everything" if kept > 0.5 else "nothing"
                raise TrainingError(
                    f"step {self.state.global_step}: selector {name.removeprefix('kept_')} keeps {what} "
                    f"({100 * kept:.2f}% of tokens); {'raise' if kept > 0.5 else 'lower'} the length penalty"
                )
