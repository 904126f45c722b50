"""A scoring run's options, resolved once. The run and its stages take all their settings from the resulting `Job`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trbert_model.calibration.table import OperatingPoint
from trbert_model.engine import precision
from trbert_model.engine.options import check_thresholds
from trbert_model.errors import TRBertError
from trbert_model.tasks.registry import task_of

from .choice import Expectation, choose
from .commit import identity_differences, identity_key, output_identity, refusal
from .config import EXIT_LAYER, ScoreConfig, identity_defaults
from .corpus import Location, Shard, find_input, read_corpus
from .encode import EncodeOptions
from .errors import UsageError
from .highlights import SAMPLES
from .manifest import SUCCESS
from .model import ModelSource, fetch_model
from .partitions import Partitions
from .placement import Placement
from .schema import Types
from .stopping import StopRequest
from .storage import Storage

_MOST_SPLIT_BYTES, _LEAST_SPLIT_BYTES = 8 << 20, 32 << 10
_TOKEN_BYTES = 4  # of English text
_SPLIT_FLOPS = 1.5e12  # `stop_grace` at 100 GFLOP/s, which two cores reach in fp32 on a model without reduction


@dataclass(frozen=True)
class Job:
    """A scoring run's resolved options, model, input and output.

    Attributes:
        asked: the options as given.
        config: the options with `dtype` and `thresholds` resolved, and without `speedup` and `max_drop`. As long as
            `dtype` depends on the cluster, it is a guess (see `on`), and `split_bytes` may be None (see `divided`).
        input: the input root, which the shards' paths are relative to.
        partitions: the partition columns among the passed columns.
        recorded: the identity recorded in the output; None if it is new.
        expectation: what the model's calibration table predicts for the thresholds; None if it does not contain them.
        token_flops: FLOPs of the dense model per token in a full window.
        types: the types of the kept columns in the output, once they are settled.
    """

    asked: ScoreConfig
    config: ScoreConfig
    model: ModelSource
    input: Storage
    output: Storage
    shards: Sequence[Shard]
    partitions: Partitions
    recorded: dict[str, Any] | None
    expectation: Expectation | None
    token_flops: float
    types: Types = field(default_factory=dict)

    @property
    def points(self) -> tuple[OperatingPoint, ...]:
        """With `finish_by`, the operating points that splits may be scored at, by rising speed; otherwise none."""
        if self.asked.finish_by is None or self.expectation is None:
            return ()
        return (self.expectation.point, *self.expectation.faster)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The identity of the output: its input, model and the options that affect the results."""
        return make_identity(self.config, self.model.digest, self.points)

    @cached_property
    def identity_key(self) -> str:
        """A 16-character hash of the identity, which is stored in the output's objects."""
        return identity_key(self.identity, identity_defaults())

    @property
    def recorded_key(self) -> str | None:
        """The same hash of the recorded identity; None if the output is new."""
        return identity_key(self.recorded, identity_defaults()) if self.recorded else None

    @property
    def differences(self) -> list[str]:
        """Descriptions of the settings that differ between the recorded identity and this job's."""
        if self.recorded is None:
            return []
        return identity_differences({**identity_defaults(), **self.recorded}, self.identity)

    def require_output(self) -> None:
        """Check that the output is new, has this job's identity, or may be overwritten.

        Raises:
            UsageError: the output was made with another model or other options, and `overwrite` is not set.
        """
        if (differences := self.differences) and not self.config.overwrite:
            raise refusal(self.output, differences)

    @property
    def dtype_is_open(self) -> bool:
        """Whether the dtype depends on the cluster: "auto", for an output that is not begun yet."""
        return self.asked.dtype == "auto" and (self.recorded is None or self.asked.overwrite)

    def on(self, dtype: str) -> "Job":
        """Resolve an open dtype to this one, or to float32 if only its calibration table offers the requested speed.

        Raises:
            UsageError: the model's calibration tables do not offer the requested speed for either.
        """
        config, expectation = _decide(self.asked, self.model, [dtype, "float32"], self.recorded)
        return replace(self, config=config, expectation=expectation)

    def divided(self, device: str) -> "Job":
        """Resolve `split_bytes` for actors on "cuda" or "cpu", unless it is given or recorded.

        A split should be done within the grace of a stopped run. The same machine should divide a shard in the same way
        each time, so this does not depend on measurements.
        """
        if self.config.split_bytes is not None:
            return self
        size = _MOST_SPLIT_BYTES
        while device == "cpu" and size > _LEAST_SPLIT_BYTES and size / _TOKEN_BYTES * self.token_flops > _SPLIT_FLOPS:
            size //= 2
        return replace(self, config=replace(self.config, split_bytes=size))

    def locked(self, fence: Callable[[], None]) -> "Job":
        """The job with the output's identity read again, for use while the run holds the output's lock.

        Args:
            fence: called before each change to the output; raises if another run has taken over the output.

        Raises:
            UsageError, StorageError: as in `make_job`.
        """
        recorded = output_identity(self.output)
        config, expectation = _decide(self.asked, self.model, _dtypes(self.asked, recorded), recorded)
        output = self.output.fenced(fence)
        return replace(self, config=config, expectation=expectation, output=output, recorded=recorded)

    def encode_options(self, shards: int) -> EncodeOptions:
        """The options of the readers of this many shards."""
        config, task = self.config, self.model.task
        if config.split_bytes is None:
            raise ValueError("the job is not divided")
        return EncodeOptions(
            input=self.input,
            task=task,
            text_columns=config.text_columns(task),
            id_column=config.id_column,
            passed_columns=config.passed_columns,
            partitions=self.partitions.typed(self.types),
            split_bytes=config.split_bytes,
            samples=SAMPLES / max(shards, 1) if config.samples else 0,
            types=self.types,
        )

    def predictor_arguments(self, placement: Placement) -> dict[str, Any]:
        """The arguments of `predict.SplitPredictor` except for the ledger."""
        config = self.config
        return {
            "passed_columns": config.passed_columns,
            "id_column": config.id_column,
            "model": Storage(config.model).uri,
            "digest": self.model.digest,
            "threads": placement.threads,
            "points": self.points,
            **asdict(config.engine_options(placement.device)),
        }


def make_job(config: ScoreConfig, stop: StopRequest | None = None, start: Callable[[], None] = lambda: None) -> Job:
    """Resolve the options, and check everything that can be checked without a cluster.

    Args:
        start: called before the model is loaded, which takes seconds, if the output seems to be incomplete.

    Raises:
        UsageError: an option, the input, the model or the output is invalid; the message names it.
        StorageError: the input, the model or the output cannot be read.
        StoppedError: the run was stopped meanwhile.
    """
    stop = stop or StopRequest()
    output = config.storage(config.output, stop)
    location = find_input(config.storage(config.input, stop))
    if _overlap(location, output):
        raise UsageError(f"output {config.output} and input {config.input} lie inside each other; keep them apart")
    directory = fetch_model(config.model)
    recorded = output_identity(output)
    texts = (config.text_column, config.questions, config.context_column)  # whichever the model's task reads
    corpus = read_corpus(location, (*texts, *config.passed_columns))
    stop.check()
    if recorded is None or output.listed(SUCCESS) is None:
        start()
    model, token_flops = _load(config, directory)
    decided, expectation = _decide(config, model, _dtypes(config, recorded), recorded)
    return Job(
        config,
        decided,
        model,
        location.root,
        output,
        corpus.shards,
        corpus.partitions,
        recorded,
        expectation,
        token_flops,
    )


def make_identity(config: ScoreConfig, digest: str, points: Sequence[OperatingPoint] = ()) -> dict[str, Any]:
    """The identity of an output, from options with `dtype` and `thresholds` resolved and a model's digest.

    Args:
        points: with `finish_by`, the operating points that its splits may be scored at.
    """
    identity = {"format": 1, "input": Storage(config.input).uri, "model_digest": digest, **config.identity()}
    if points:
        identity["finish_by_thresholds"] = [list(point.thresholds) for point in points]
    return identity


def _overlap(location: Location, output: Storage) -> bool:
    """Whether the input is in the output, or the output where the input's files are looked for."""
    inside, around = (f"{storage.protocol}:{_real(storage)}/" for storage in (output, location.root))
    if around.startswith(inside):
        return True
    return inside.startswith(around) and location.includes(inside.removeprefix(around))


def _real(storage: Storage) -> str:
    """A storage's root with symbolic links resolved."""
    return os.path.realpath(storage.root) if storage.is_local else storage.root


def _load(config: ScoreConfig, directory: Path) -> tuple[ModelSource, float]:
    """Load a model; returns what is known of it, and its FLOPs per token."""
    from trbert_model.checkpoints.loading import load_checkpoint  # imports torch and transformers, which takes seconds
    from trbert_model.flops import dense_flops

    try:
        loaded, tokenizer, digest = load_checkpoint(directory)
        task = task_of(loaded.config).of(tokenizer, loaded.config, config.engine_options())
        config.check_names((*task.result_names, *([EXIT_LAYER] if loaded.config.exits is not None else [])))
        config.text_columns(task)  # refuses one that it does not read
        if config.thresholds is not None:
            check_thresholds(loaded.config, config.thresholds)
    except TRBertError as error:
        raise UsageError(str(error)) from error
    window = loaded.config.usable_positions
    token_flops = float(dense_flops(loaded.config, np.array([window]))[0] / window)
    layers, reductions = loaded.config.num_hidden_layers, tuple(loaded.config.reduction_layers)
    return ModelSource(config.model, directory, digest, window, task, layers, reductions), token_flops


def _dtypes(config: ScoreConfig, recorded: dict[str, Any] | None) -> list[str]:
    """The dtypes that may be chosen once the cluster is known, the most likely first."""
    if config.dtype != "auto":
        return [config.dtype]
    if recorded is not None and not config.overwrite:  # the output is refused with any other dtype
        return [recorded.get("dtype", "float32")]
    if config.gpus_per_actor:
        return ["bfloat16"]
    return sorted(("bfloat16", "float32"), reverse=not precision.cpu_is_fast_in_bfloat16())


def _decide(
    config: ScoreConfig, model: ModelSource, dtypes: Sequence[str], recorded: dict[str, Any] | None
) -> tuple[ScoreConfig, Expectation | None]:
    """Resolve the options with the first of these dtypes for which the model offers the requested speed.

    Raises:
        UsageError: it offers that for none of them; the message is about the first.
    """
    if config.split_bytes is None and recorded is not None:
        config = replace(config, split_bytes=recorded["split_bytes"])
    refusals = []
    for dtype in dtypes:
        try:
            return choose(replace(config, dtype=dtype), model)
        except UsageError as error:
            refusals.append(error)
    raise refusals[0]
