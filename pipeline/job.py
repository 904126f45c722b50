"""A scoring run's options, resolved once: the value that the run and its stages take everything from."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from trbert_model.checkpoints.loading import load_checkpoint
from trbert_model.engine.options import check_thresholds
from trbert_model.errors import TRBertError
from trbert_model.tasks.registry import task_of

from .choice import Expectation, choose
from .commit import identity_differences, identity_key, output_identity, refusal
from .config import ScoreConfig, identity_defaults
from .corpus import Shard, input_root, list_shards
from .encode import EncodeOptions
from .errors import UsageError
from .model import Model, fetch_model
from .placement import Placement, auto_dtype
from .stopping import StopRequest
from .storage import Storage


@dataclass(frozen=True)
class Job:
    """What a scoring run does.

    asked: the options as they were given; config: the same with `dtype` and `thresholds` decided, `speedup` and
    `max_drop` gone. While the cluster is to decide on the dtype, it is taken to be the output's (see `on`).
    input: the corpus's root, which the shards' paths are relative to.
    recorded: the identity that the output has; None if it is new.
    expectation: what the model's calibration table says of the thresholds, if it knows them.
    """

    asked: ScoreConfig
    config: ScoreConfig
    model: Model
    input: Storage
    output: Storage
    shards: Sequence[Shard]
    recorded: dict[str, Any] | None
    expectation: Expectation | None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the output is bound to."""
        return make_identity(self.config, self.model.digest)

    @cached_property
    def identity_key(self) -> str:
        """The identity in 16 characters, for the output's objects to say."""
        return identity_key(self.identity, identity_defaults())

    @property
    def recorded_key(self) -> str | None:
        """The same of what the output has."""
        return identity_key(self.recorded, identity_defaults()) if self.recorded else None

    @property
    def differences(self) -> list[str]:
        """In words, what the output was made with and this job is not."""
        if self.recorded is None:
            return []
        return identity_differences({**identity_defaults(), **self.recorded}, self.identity)

    def require_output(self) -> None:
        """Raises UsageError: the output was made with something else, and is not to be replaced."""
        if (differences := self.differences) and not self.config.overwrite:
            raise refusal(self.output, differences)

    def on(self, dtype: str) -> "Job":
        """The job where dtype "auto" means this one.

        Raises:
            UsageError: the model has no calibration table for the speed asked for in it.
        """
        if self.asked.dtype != "auto" or dtype == self.config.dtype:
            return self
        config, expectation = _decide(self.asked, self.model, [dtype])
        return replace(self, config=config, expectation=expectation)

    def locked(self, fence: Callable[[], None]) -> "Job":
        """The job once nobody else is at work on its output, which `fence` then keeps so.

        Raises:
            UsageError, StorageError: as `make_job`.
        """
        recorded = output_identity(self.output)
        config, expectation = _decide(self.asked, self.model, _dtypes(self.asked, recorded))
        output = self.output.fenced(fence)
        return replace(self, config=config, expectation=expectation, output=output, recorded=recorded)

    def encode_options(self) -> EncodeOptions:
        """What the readers need to know."""
        config, task = self.config, self.model.task
        return EncodeOptions(
            input=self.input,
            task=task,
            text_columns=tuple(getattr(config, name) for name in task.text_options),
            id_column=config.id_column,
            passed_columns=config.passed_columns,
            split_bytes=config.split_bytes,
        )

    def predictor_arguments(self, placement: Placement) -> dict[str, Any]:
        """The arguments of `predict.SplitPredictor` but for the ledger."""
        config = self.config
        return {
            "passed_columns": config.passed_columns,
            "id_column": config.id_column,
            "model": Storage(config.model).uri,
            "digest": self.model.digest,
            "threads": placement.threads,
            **asdict(config.engine_options(placement.device)),
        }


def make_job(config: ScoreConfig, stop: StopRequest | None = None) -> Job:
    """Resolve the options, and refuse whatever can be refused without a cluster.

    Raises:
        UsageError: an option, the input, the model or the output does not fit; names it.
        StorageError: a place cannot be read.
        StoppedError: the run was stopped meanwhile.
    """
    stop = stop or StopRequest()
    output = config.storage(config.output, stop)
    root = config.storage(input_root(config.input), stop)
    inside, around = (f"{place.protocol}:{_real(place)}/" for place in (output, root))
    if inside.startswith(around) or around.startswith(inside):
        raise UsageError(f"output {config.output} and input {config.input} lie inside each other; keep them apart")
    model = _load(config)
    recorded = output_identity(output)
    decided, expectation = _decide(config, model, _dtypes(config, recorded))
    stop.check()
    shards = list_shards(config.storage(config.input, stop))
    return Job(config, decided, model, root, output, shards, recorded, expectation)


def make_identity(config: ScoreConfig, digest: str) -> dict[str, Any]:
    """What an output is bound to by options that are decided and a model's digest."""
    return {"format": 1, "input": Storage(config.input).uri, "model_digest": digest, **config.identity()}


def _real(place: Storage) -> str:
    """A place's root without symbolic links."""
    return os.path.realpath(place.root) if place.is_local else place.root


def _load(config: ScoreConfig) -> Model:
    directory = fetch_model(config.model)
    try:
        loaded, tokenizer, digest = load_checkpoint(directory)
        task = task_of(loaded.config).of(tokenizer, loaded.config, config.engine_options())
        config.check_names(task.result_names)
        if config.thresholds is not None:
            check_thresholds(loaded.config, config.thresholds)
    except TRBertError as error:
        raise UsageError(str(error)) from error
    return Model(config.model, directory, digest, loaded.config.usable_positions, task)


def _dtypes(config: ScoreConfig, recorded: dict[str, Any] | None) -> list[str]:
    """What the dtype may prove to be once there is a cluster, the likeliest first."""
    if config.dtype != "auto":
        return [config.dtype]
    first = [] if recorded is None else [recorded.get("dtype", "float32")]
    if first and not config.overwrite:  # with another one the output is refused
        return first
    if config.gpus_per_actor is not None:
        return [*first, auto_dtype(config.gpus_per_actor)]
    return [*first, *sorted(("bfloat16", "float32"), reverse=not torch.cuda.is_available())]


def _decide(config: ScoreConfig, model: Model, dtypes: Sequence[str]) -> tuple[ScoreConfig, Expectation | None]:
    """The options with the first of these dtypes that the model has the speed asked for in.

    Raises:
        UsageError: it has it in none of them; says it of the first.
    """
    refusals = []
    for dtype in dtypes:
        try:
            return choose(replace(config, dtype=dtype), model)
        except UsageError as error:
            refusals.append(error)
    raise refusals[0]
