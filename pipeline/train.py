"""Data-parallel training on several workers with Ray Train, with the same recipe."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from trbert_model.errors import TRBertError
from trbert_model.training import TrainingConfig, train

from .errors import PipelineError, UsageError
from .labelled import corpora_read_as_input
from .ray_internals import environment, worker_errors
from .ray_start import local_token


def train_distributed(config: TrainingConfig, num_workers: int) -> dict[str, Any]:
    """Run `trbert_model.training.train` on several workers, with one GPU each if there are enough, otherwise on CPUs.

    Backbone, corpora and output must be accessible to all workers.

    Returns:
        The measurements, as in the output's training.json.

    Raises:
        UsageError: `batch_size` is not a multiple of `num_workers`, or the cluster is too small.
        PipelineError: a worker failed; gives the reason.
    """
    if config.batch_size % num_workers:
        raise UsageError(f"batch_size {config.batch_size} must be a multiple of num_workers {num_workers}")
    started = not ray.is_initialized()
    if started:
        with environment({} if os.environ.get("RAY_ADDRESS") else local_token()):
            ray.init(include_dashboard=False)
    try:
        available = ray.cluster_resources()
        use_gpu = available.get("GPU", 0) >= num_workers
        if not use_gpu and available.get("CPU", 0) < num_workers:
            raise UsageError(f"num_workers {num_workers}: the cluster has {available.get('CPU', 0):g} CPUs")
        output = Path(config.output).absolute()
        trainer = TorchTrainer(
            _worker,
            train_loop_config=dataclasses.asdict(config) | {"output": str(output)},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
            run_config=ray.train.RunConfig(name="ray", storage_path=str(output / "stages")),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise PipelineError(f"training on {num_workers} workers failed: {_reason(error)}") from error
        return json.loads((output / "training.json").read_text())  # without a checkpoint Ray Train keeps no metrics
    finally:
        if started:
            ray.shutdown()


def _worker(options: dict[str, Any]) -> None:
    tuples = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    with corpora_read_as_input():
        train(TrainingConfig(**options | tuples))


def _reason(error: BaseException) -> str:
    """The project's own error inside the one of Ray Train, otherwise the last line of the latter."""
    for raised in worker_errors(error):
        if isinstance(raised, TRBertError | PipelineError):
            return f"{type(raised).__name__}: {raised}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1]
