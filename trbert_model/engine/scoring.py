"""The engine: runs a model over documents and returns one result per document, in order.

Windows are packed into varlen batches of at most `max_tokens_per_batch` tokens. This limit bounds the memory, whatever
the number and lengths of the documents.
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..backbones.fused import packs_weights
from ..checkpoints.loading import load_model
from ..configuration import TRBertConfig
from ..errors import InputError, TRBertError
from ..exits.policies import NO_EXITS, ExitPolicy, ExitThresholds
from ..exits.recording import ExitRecording, WindowExits, window_exits
from ..explanation import Explanation, Recording
from ..flops import dense_flops, spent_flops
from ..modeling import TRBertPreTrainedModel, fuse_for_inference
from ..reduction.policies import ThresholdPolicy
from ..reduction.state import SelectionPolicy
from ..reduction.trace import PRESENT
from ..tasks.base import DocumentResults
from ..tasks.registry import task_of_model
from ..terminal import get_logger
from ..varlen import VarlenBatch
from . import precision
from .options import EngineOptions, check_thresholds, operating_thresholds

logger = get_logger(__name__)


class OutOfMemoryError(TRBertError, RuntimeError):
    """A single window does not fit into the device's memory."""


@dataclass
class EngineStatistics:
    """Counters of an engine since it was created.

    Attributes:
        batches: batches given to the model.
        model_seconds: time spent in the model.
        halved_batches: batches halved because memory ran out.
    """

    batches: int = 0
    model_seconds: float = 0.0
    halved_batches: int = 0


@dataclass
class _Open:
    """A document that is not complete, with the windows computed so far and their outputs."""

    document: Any
    windows: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


_Policies = tuple[SelectionPolicy, ExitPolicy]
# A window's output, its share of the totals (`_sums`); on request the layers that computed each token, and the exits.
_Computed = tuple[Any, np.ndarray, np.ndarray | None, WindowExits | None]


@dataclass
class _Pending:
    """A batch being packed: its windows, and the index of each window's document."""

    windows: list[Any] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    tokens: int = 0


class Engine:
    """Runs a model over documents.

    Args:
        model: a task's model; moved to the device and dtype, set to eval mode and fused in place.
        tokenizer: its fast tokenizer.
        options: default: `EngineOptions()`.

    Raises:
        ConfigurationError: the model has no task's head, or an option does not fit it.
    """

    def __init__(
        self,
        model: TRBertPreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: EngineOptions | None = None,
    ):
        # By default oneDNN caches what it prepared for the last 1,024 matrix shapes, some 500 MiB. Packed
        # layers have 24 shapes, see `fused`. oneDNN reads the variable at the first matrix product of the process.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        options = self.options = options or EngineOptions()
        self.config: TRBertConfig = model.config
        if options.thresholds is not None:
            check_thresholds(self.config, options.thresholds)
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = options.dtype
        if dtype == "auto":
            fast = self.device.type == "cuda" or precision.cpu_is_fast_in_bfloat16()
            dtype = "bfloat16" if fast else "float32"
        self.dtype = dtype
        self.model = model.to(device=self.device, dtype=getattr(torch, dtype)).eval()
        fuse_for_inference(self.model)
        encoder = self.model.bert.encoder
        for module in (encoder.selectors, encoder.exits, encoder.gates):
            module.float()
        self.task = task_of_model(model).of(tokenizer, self.config, options)
        # On CPUs layers run on segments (`fused.SEGMENT_ROWS`), so larger batches only help layers after a reduction,
        # which have few tokens: their segments are fuller, which counts where products are cheap.
        on_cpu = 16384 if packs_weights(self.device, self.model.dtype) else 4096
        self.max_tokens_per_batch = options.max_tokens_per_batch or (65536 if self.device.type == "cuda" else on_cpu)
        self._policies = self.policies(options.thresholds or ())
        self.statistics = EngineStatistics()

    @classmethod
    def from_pretrained(cls, directory: str | Path, options: EngineOptions | None = None) -> "Engine":
        """Load a model directory written by `jobs/train.py` or `jobs/convert.py`.

        Raises:
            CheckpointError: see `load_checkpoint`.
            ConfigurationError: an option does not fit the model.
        """
        model, tokenizer = load_model(directory)
        return cls(model, tokenizer, options)

    def policies(self, thresholds: Sequence[float]) -> tuple[ThresholdPolicy, ExitThresholds]:
        """The policies of thresholds as in `EngineOptions`: those of the model for what they leave out."""
        reductions, exits = len(self.config.reduction_layers), self.config.exit_options
        every = (*thresholds, *operating_thresholds(self.config)[len(thresholds) :])
        end = reductions + (len(exits.layers) if exits else 0)
        return ThresholdPolicy(every[:reductions]), ExitThresholds(every[reductions:end], *every[end:])

    def score_columns(self, *columns: Sequence[str], policy: SelectionPolicy | None = None) -> DocumentResults:
        """Tokenise and score texts, or questions and their contexts, given as columns.

        Raises:
            InputError: the tokenizer fails on a row.
            TokenizerError: the tokenizer fails on every text.
            OutOfMemoryError: see `score`.
        """
        documents, failures = self.task.encode_rows(list(zip(*columns, strict=True)))
        if failures:
            raise InputError(f"row {min(failures)}: {failures[min(failures)]}")
        return self.score(documents, policy)

    def score(
        self,
        documents: Iterable[Any],
        policy: SelectionPolicy | None = None,
        exit_policy: ExitPolicy | None = None,
        recording: Recording | None = None,
        exit_recording: ExitRecording | None = None,
    ) -> DocumentResults:
        """Score documents of any length.

        Args:
            documents: as from the task's `encode_rows`.
            policy: chooses the tokens to keep, instead of the thresholds.
            exit_policy: decides what leaves early and which layers are skipped. Default: the thresholds, or nothing if
                there is a `policy`.
            recording: receives the layers that computed the tokens of some of the documents.
            exit_recording: receives what all windows answer and cost at each exit. Nothing may leave early.

        Raises:
            OutOfMemoryError: a single window does not fit into the device's memory.
        """
        policies = self._policies if policy is None else (policy, exit_policy or NO_EXITS)
        outputs: list[Any] = []
        totals: list[np.ndarray] = []  # as from `_sums`
        columns = 5 + (len(self.config.reduction_layers) if self.options.reduce else 0)

        pending, waiting = _Pending(), deque[_Open]()  # documents without an entry in `outputs` yet

        def compute(complete: int) -> None:
            """Compute the pending batch; after it, all windows of the first `complete` documents are computed."""
            first = len(outputs)
            for document, window, output, sums in self._compute(pending, policies, recording, exit_recording):
                entry = waiting[document - first]
                entry.windows.append(window)
                entry.outputs.append(output)
                totals[document] += sums
            while len(outputs) < complete:
                entry = waiting.popleft()
                outputs.append(self.task.combine(entry.document, entry.windows, entry.outputs))

        number = -1
        for number, document in enumerate(documents):
            waiting.append(_Open(document))
            totals.append(np.zeros(columns))
            for window in self.task.windows(document):
                if pending.windows and pending.tokens + len(window.input_ids) > self.max_tokens_per_batch:
                    compute(complete=number)
                    pending = _Pending()
                pending.windows.append(window)
                pending.documents.append(number)
                pending.tokens += len(window.input_ids)
        if pending.windows:
            compute(complete=number + 1)

        sums = np.array(totals).reshape(len(totals), columns)
        return DocumentResults(
            outputs=self.task.gathered(outputs),
            num_tokens=sums[:, 0].astype(np.int64),
            num_windows=sums[:, 1].astype(np.int64),
            flops=sums[:, 2],
            dense_flops=sums[:, 3],
            exit_layers=sums[:, 4] / np.maximum(sums[:, 0], 1),
            kept_tokens=sums[:, 5:].astype(np.int64),
        )

    def explanation(
        self,
        texts: tuple[str, ...],
        document: Any,
        windows: list[tuple[Any, np.ndarray]],
        outcome: dict[str, Any],
        lengths: tuple[int, ...] | None = None,
    ) -> Explanation:
        """What a `Recording` says of a document; see `Explanation.of`."""
        layers = tuple(self.config.reduction_layers) if self.options.reduce else ()
        return Explanation.of(
            self.task,
            texts,
            document,
            windows,
            outcome,
            num_layers=self.config.num_hidden_layers,
            reduction_layers=layers,
            lengths=lengths,
        )

    def _compute(
        self,
        pending: _Pending,
        policies: _Policies,
        recording: Recording | None,
        exit_recording: ExitRecording | None,
    ) -> Iterator[tuple[int, Any, Any, np.ndarray]]:
        """Run one batch; yields each window's document index, the window, its output, and its share of the totals."""
        started = time.perf_counter()
        recorded = [recording is not None and document in recording.documents for document in pending.documents]
        computed = self._forward(pending.windows, policies, any(recorded), exit_recording is not None)
        self.statistics.model_seconds += time.perf_counter() - started
        for i, (document, window) in enumerate(zip(pending.documents, pending.windows)):
            output, sums, layers, exits = computed[i]
            if exit_recording is not None and exits is not None:
                exit_recording.add(document, window, exits)
            if recording is not None and layers is not None and recorded[i]:
                recording.windows.setdefault(document, []).append((window, layers))
            yield document, window, output, sums

    def _forward(self, windows: list[Any], policies: _Policies, layers: bool, exits: bool) -> list[_Computed]:
        """Run windows as one batch; halves it if memory runs out.

        Args:
            layers: count the layers that compute each token.
            exits: record each window at each exit.

        Raises:
            OutOfMemoryError: a single window does not fit into the device's memory.
        """
        try:
            return self._forward_once(windows, policies, layers, exits)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Outside the except block, so that the traceback no longer holds the failed batch's tensors.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        tokens = sum(len(window.input_ids) for window in windows)
        if len(windows) == 1:
            raise OutOfMemoryError(f"a single window of {tokens} tokens does not fit {self.device}: {message}")
        self.statistics.halved_batches += 1
        logger.warning("out of memory on %s with %d tokens in a batch; halving it", self.device, tokens)
        half = len(windows) // 2
        first, second = (self._forward(part, policies, layers, exits) for part in (windows[:half], windows[half:]))
        return first + second

    @torch.inference_mode()
    def _forward_once(
        self, windows: list[Any], policies: _Policies, layers: bool, exits: bool = False
    ) -> list[_Computed]:
        self.statistics.batches += 1
        batch = VarlenBatch.from_sequences(
            [window.input_ids for window in windows], self.task.token_types(windows), device=self.device
        )
        extra = {
            name: torch.from_numpy(values).to(self.device) for name, values in self.task.extra_inputs(windows).items()
        }
        output = self.model(
            batch.input_ids,
            token_type_ids=batch.token_type_ids,
            position_ids=batch.position_ids,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            reduce=self.options.reduce,
            selection_policy=policies[0],
            exit_policy=policies[1],
            output_layers=layers,
            output_exits=exits,
            **extra,
        )
        lengths = [len(window.input_ids) for window in windows]
        outputs = self.task.window_outputs(output, lengths)
        computed: Sequence[np.ndarray | None] = [None] * len(windows)
        if layers:
            computed = np.split(output.trace.token_layers.cpu().numpy(), np.cumsum(lengths)[:-1])
        at_exits: Sequence[WindowExits | None] = [None] * len(windows)
        if exits:
            at_exits = window_exits(self.task, self.config, output, lengths)
        return list(zip(outputs, self._sums(output, np.array(lengths)), computed, at_exits))

    def _sums(self, output: Any, lengths: np.ndarray) -> np.ndarray:
        """Of each window: tokens, 1, FLOPs, dense FLOPs, layers that it ran times tokens, and kept tokens."""
        dense = dense_flops(self.config, lengths)
        spent, ran = dense, np.full(len(lengths), self.config.num_hidden_layers)
        kept = np.zeros((len(lengths), 0), int)
        if self.options.reduce:
            counts, asked = output.trace.counts.cpu().numpy(), None
            if output.exits is not None:
                asked, ran = output.exits.asked.cpu().numpy(), output.exits.mean_layers().cpu().numpy()
            spent = spent_flops(self.config, counts, asked, output.trace.gated)
            kept = counts[PRESENT][:, self.config.reduction_layers]
        return np.column_stack([lengths, np.ones_like(lengths), spent, dense, ran * lengths, kept])


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error)  # torch's CPU allocator raises a RuntimeError
