"""transformers' Trainer for a training stage."""

import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from ..errors import TrainingError
from ..terminal import clock, get_logger

logger = get_logger(__name__)

# A selector whose kept fraction over a logging period is outside this range has stopped choosing.
_COLLAPSED = (0.002, 0.998)


class _Progress(TrainerCallback):
    """Logs how far a stage is, with the trainer's measurements, and one line at its end."""

    def __init__(self, title: str):
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        left, done = state.max_steps - state.global_step, max(state.global_step - self.first, 1)
        eta = clock((time.monotonic() - self.started) * left / done)
        silent = ("epoch", "grad_norm", "learning_rate")
        numbers = [f"{name} {value:.4g}" for name, value in logs.items() if name not in silent]
        logger.info(" · ".join([self.title, f"step {state.global_step} of {state.max_steps}", f"ETA {eta}", *numbers]))

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            seconds = time.monotonic() - self.started
            logger.info("%s · done: %d steps in %s", self.title, state.global_step - self.first, clock(seconds))


class StageTrainer(Trainer):
    """transformers' Trainer for an `Objective`: logs its measurements, and stops if the selectors stop choosing.

    Args:
        title: the stage's name in the log.
        joint_learning_rate: rate of the parameters outside of selectors and exits. Default: that of all.
        args, kwargs: the arguments of Trainer.
    """

    def __init__(self, *args: Any, title: str, joint_learning_rate: float | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Progress(title))
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
                    groups[any(part in name for part in (".selectors.", ".exits."))].append(parameter)
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
