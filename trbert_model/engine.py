"""Documents in, one result a document out, in order: the one way to run a TR-BERT.

Windows are packed into varlen batches of at most `max_tokens_per_batch` tokens; no padding, no sorting. Memory is
bounded by that budget, not by the documents' lengths or number.
"""

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .configuration import TRBertConfig
from .errors import CheckpointError, ConfigurationError, TRBertError
from .flops import dense_flops, reduced_flops
from .modeling import (
    SelectionPolicy,
    TRBertForQuestionAnswering,
    TRBertForSequenceClassification,
    TRBertPreTrainedModel,
    fuse_for_inference,
)
from .tasks.classification import ClassificationTask
from .tasks.question_answering import Answer, QuestionAnsweringTask
from .tasks.text import check_overflow
from .varlen import VarlenBatch

logger = logging.getLogger(__name__)

# oneDNN keeps what it prepared for each of the last 1,024 matrix shapes, and varlen batches hardly ever repeat one: an
# actor grew by some 500 MiB within minutes. 32 are enough for the layers of a batch. Read when the first one is made.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def computes_bfloat16() -> bool:
    """Whether this machine computes in bfloat16: its GPUs, or instructions of its CPU. A CPU without such takes some 70
    times as long as in fp32 (torch 2.13, matrix products on an AMD EPYC with AVX2 only)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16"))


class OutOfMemoryError(TRBertError, RuntimeError):
    """A single window does not fit the device's memory."""


@dataclass(frozen=True)
class EngineOptions:
    """How a model runs.

    max_tokens_per_batch: tokens in one varlen batch; default by device.
    device: "cpu", "cuda" or "cuda:N"; default: CUDA if there is one.
    dtype: "float32", "bfloat16" or "float16"; "auto" is bfloat16 on CUDA and float32 elsewhere.
    overflow, stride: what becomes of documents longer than the positions, see `ClassificationTask`.
    max_answer_tokens, n_best: see `QuestionAnsweringTask`; classification has no use for them.
    reduce: False runs the dense model.
    thresholds: keep probabilities from which on a token stays, one a reduction; default: the model's own.
    """

    max_tokens_per_batch: int | None = None
    device: str | None = None
    dtype: str = "auto"
    overflow: str = "windows"
    stride: int | None = None
    max_answer_tokens: int = 30
    n_best: int = 1
    reduce: bool = True
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.thresholds is not None and not all(0 <= threshold <= 1 for threshold in self.thresholds):
            raise ConfigurationError(f"thresholds {self.thresholds} must be probabilities from 0 to 1")
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigurationError(f"dtype {self.dtype!r} is none of auto, {', '.join(DTYPES)}")
        check_overflow(self.overflow, self.stride)
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ConfigurationError(f"max_tokens_per_batch {self.max_tokens_per_batch} must be at least 1")


@dataclass
class DocumentResults:
    """What the model found, one row a document.

    outputs: what the task makes of a document's windows: float32 (documents, labels) of logits for classification, a
    list of `Answer`s for question answering;
    num_tokens: int64 (documents,), tokens the model was given over all windows, special and shared ones included;
    num_windows: int64 (documents,); kept_tokens: int64 (documents, reductions), tokens alive after each reduction;
    flops, dense_flops: float64 (documents,), spent, and what the dense model would have spent.
    """

    outputs: Any
    num_tokens: np.ndarray
    num_windows: np.ndarray
    kept_tokens: np.ndarray
    flops: np.ndarray
    dense_flops: np.ndarray

    def __len__(self) -> int:
        return len(self.num_tokens)

    @property
    def logits(self) -> np.ndarray:
        """A classification's outputs."""
        return self.outputs

    @property
    def answers(self) -> list[Answer]:
        """A question answering's outputs."""
        return self.outputs

    @classmethod
    def concatenate(cls, parts: Sequence["DocumentResults"]) -> "DocumentResults":
        """The documents of all parts, in order; at least one part."""

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return np.concatenate(values) if isinstance(values[0], np.ndarray) else [x for each in values for x in each]

        return cls(**{field.name: joined(field.name) for field in dataclasses.fields(cls)})


@dataclass
class EngineStatistics:
    """Since the engine was made: batches computed, seconds in the model, batches halved for want of memory."""

    batches: int = 0
    model_seconds: float = 0.0
    halved_batches: int = 0


@dataclass
class _Open:
    """A document of which windows are still to be computed: they and their outputs so far."""

    document: Any
    windows: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


@dataclass
class _Pending:
    """A batch being packed: its windows, and the document each belongs to."""

    windows: list[Any] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    tokens: int = 0


class Engine:
    """Runs a model over documents.

    Args:
        model: a TRBertForSequenceClassification or TRBertForQuestionAnswering; moved to the device and dtype, set to
            eval mode and fused in place.
        tokenizer: its fast tokenizer.
        options: see `EngineOptions`.
        selection_policy: chooses tokens instead of the thresholds (benchmarks force kept fractions with it).
    """

    def __init__(
        self,
        model: TRBertPreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: EngineOptions = EngineOptions(),
        selection_policy: SelectionPolicy | None = None,
    ):
        self.options = options
        self.config: TRBertConfig = model.config
        if options.thresholds is not None:
            check_thresholds(self.config, options.thresholds)
            self.config.selector_thresholds = list(options.thresholds)
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = options.dtype
        if dtype == "auto":
            dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype = dtype
        self.model = model.to(device=self.device, dtype=DTYPES[dtype]).eval()
        fuse_for_inference(self.model)
        for selector in self.model.bert.encoder.selectors:
            selector.float()
        self.answers = isinstance(model, TRBertForQuestionAnswering)  # questions, where it does not classify
        kind = QUESTION_ANSWERING if self.answers else CLASSIFICATION
        self.task: Any = make_task(kind, tokenizer, self.config, options)
        # On CPU layers run on groups of sequences anyway (modeling.LAYER_TOKENS): more tokens only help the layers
        # after a reduction, which have few left. Of 1,024 to 16,384 the fastest lay around 4,096.
        self.max_tokens_per_batch = options.max_tokens_per_batch or (65536 if self.device.type == "cuda" else 4096)
        self.selection_policy = selection_policy
        self.statistics = EngineStatistics()

    @classmethod
    def from_pretrained(cls, directory: str | Path, options: EngineOptions = EngineOptions()) -> "Engine":
        """Load a model directory as `jobs/train.py` and `jobs/convert.py` write it.

        Raises:
            CheckpointError: not a TR-BERT classification model, weights missing, tokens the embeddings do not have.
        """
        model, tokenizer = load_model(directory)
        return cls(model, tokenizer, options)

    @property
    def labels(self) -> list[str]:
        """Label names by index."""
        return [self.config.id2label[i] for i in range(self.config.num_labels)]

    def score_texts(self, texts: Iterable[str]) -> DocumentResults:
        """Tokenise and score texts."""
        return self.score(self.task.tokenize(list(texts)))

    def score_questions(self, questions: Sequence[str], contexts: Sequence[str]) -> DocumentResults:
        """Tokenise and answer questions, each about its context."""
        return self.score(self.task.encode(questions, contexts))

    def score(self, documents: Iterable[Any]) -> DocumentResults:
        """Score documents of any length, as the task encodes them: token ids without special tokens, int32 (tokens,)
        each, for classification, `EncodedQuestion`s for question answering."""
        outputs: list[Any] = []
        totals: list[np.ndarray] = []  # tokens, windows, FLOPs, dense FLOPs, kept tokens...
        reductions = len(self.config.reduction_layers) if self.options.reduce else 0

        pending, waiting = _Pending(), deque[_Open]()  # the documents that `outputs` does not have yet

        def compute(complete: int) -> None:
            """Compute the batch; the first `complete` documents have no windows beside those computed then."""
            first = len(outputs)
            for document, window, output, sums in self._compute(pending):
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
            totals.append(np.zeros(4 + reductions))
            for window in self.task.windows(document):
                if pending.windows and pending.tokens + len(window.input_ids) > self.max_tokens_per_batch:
                    compute(complete=number)
                    pending = _Pending()
                pending.windows.append(window)
                pending.documents.append(number)
                pending.tokens += len(window.input_ids)
        if pending.windows:
            compute(complete=number + 1)

        sums = np.array(totals).reshape(len(totals), 4 + reductions)
        return DocumentResults(
            outputs=self.task.gathered(outputs, self.config.num_labels),
            num_tokens=sums[:, 0].astype(np.int64),
            num_windows=sums[:, 1].astype(np.int64),
            flops=sums[:, 2],
            dense_flops=sums[:, 3],
            kept_tokens=sums[:, 4:].astype(np.int64),
        )

    def _compute(self, pending: _Pending) -> Iterator[tuple[int, Any, Any, np.ndarray]]:
        """Run one batch: of each window its document, itself, its output, and what it adds to the document's totals."""
        started = time.perf_counter()
        outputs, kept = self._forward(pending.windows)
        self.statistics.model_seconds += time.perf_counter() - started
        lengths = np.array([len(window.input_ids) for window in pending.windows])
        spent = reduced_flops(self.config, lengths, kept) if self.options.reduce else dense_flops(self.config, lengths)
        dense = dense_flops(self.config, lengths)
        for i, (document, window) in enumerate(zip(pending.documents, pending.windows)):
            yield document, window, outputs[i], np.array([lengths[i], 1, spent[i], dense[i], *kept[i]])

    def _forward(self, windows: list[Any]) -> tuple[list[Any], np.ndarray]:
        """Windows → the task's output of each, and kept tokens (windows, reductions), halving while memory runs out."""
        try:
            return self._forward_once(windows)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Out of the except block, so that the failed batch's tensors are no longer held by its traceback.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        tokens = sum(len(window.input_ids) for window in windows)
        if len(windows) == 1:
            raise OutOfMemoryError(f"a single window of {tokens} tokens does not fit {self.device}: {message}")
        self.statistics.halved_batches += 1
        logger.warning("out of memory on %s with %d tokens in a batch; halving it", self.device, tokens)
        half = len(windows) // 2
        first, second = self._forward(windows[:half]), self._forward(windows[half:])
        return first[0] + second[0], np.concatenate([first[1], second[1]])

    @torch.inference_mode()
    def _forward_once(self, windows: list[Any]) -> tuple[list[Any], np.ndarray]:
        self.statistics.batches += 1
        batch = VarlenBatch.from_sequences(
            [window.input_ids for window in windows], self.task.token_types(windows), device=self.device
        )
        output = self.model(
            batch.input_ids,
            token_type_ids=batch.token_type_ids,
            position_ids=batch.position_ids,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            reduce=self.options.reduce,
            selection_policy=self.selection_policy,
        )
        kept = [counts.cpu().numpy() for counts in output.kept_tokens]
        outputs = self.task.window_outputs(output, [len(window.input_ids) for window in windows])
        return outputs, np.stack(kept, 1) if kept else np.zeros((len(windows), 0), int)


CLASSIFICATION, QUESTION_ANSWERING = "classification", "question-answering"
_MODELS = {CLASSIFICATION: TRBertForSequenceClassification, QUESTION_ANSWERING: TRBertForQuestionAnswering}


def task_of(config: TRBertConfig) -> str:
    """CLASSIFICATION or QUESTION_ANSWERING, by the architecture that a saved model names.

    Raises:
        ConfigurationError: it is neither.
    """
    for task, model in _MODELS.items():
        if model.__name__ in (config.architectures or []):
            return task
    known = " nor ".join(model.__name__ for model in _MODELS.values())
    raise ConfigurationError(
        f"its architecture is {config.architectures}, neither {known}; "
        "convert it with jobs/convert.py or train it with jobs/train.py"
    )


def make_task(
    task: str, tokenizer: PreTrainedTokenizerBase, config: TRBertConfig, options: EngineOptions
) -> ClassificationTask | QuestionAnsweringTask:
    """How documents become sequences, for a model with this configuration.

    Raises:
        ConfigurationError: an option that does not fit the model's positions.
    """
    common = (tokenizer, config.max_position_embeddings, options.overflow, options.stride)
    if task == CLASSIFICATION:
        return ClassificationTask(*common)
    return QuestionAnsweringTask(*common, max_answer_tokens=options.max_answer_tokens, n_best=options.n_best)


def check_thresholds(config: TRBertConfig, thresholds: Sequence[float]) -> None:
    """Raises ConfigurationError if they are not one a reduction."""
    if len(thresholds) != len(config.reduction_layers):
        raise ConfigurationError(
            f"thresholds {tuple(thresholds)} must be one for each of the model's reduction layers "
            f"{config.reduction_layers}"
        )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error)  # torch's CPU allocator has no exception of its own


def load_model(directory: str | Path) -> tuple[TRBertPreTrainedModel, PreTrainedTokenizerBase]:
    """A saved TR-BERT model with a task's head and its tokenizer, nothing missing, nothing unpickled.

    Raises:
        CheckpointError: names the directory and what is wrong with it.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: no config.json there; a model is a directory with config.json and weights")
    try:
        config = TRBertConfig.from_pretrained(directory)
        task = task_of(config)
        if task == CLASSIFICATION:
            _check_labels(config)
        _check_index(directory)
        with _without_progress_bars():
            model, loading = _MODELS[task].from_pretrained(
                directory,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
            )
        # Not even when somebody answers "y" to the question that transformers would ask.
        tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=True, trust_remote_code=False)
    except CheckpointError:
        raise
    except TRBertError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{directory}: cannot be loaded: {reason}") from error
    if loading["missing_keys"] or loading["mismatched_keys"]:
        bad = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
        raise CheckpointError(f"{directory}: weights missing or of another shape: {bad[:5]}")
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise CheckpointError(f"{directory}: weights that are not finite: {bad[:5]}")
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if tokens > config.vocab_size:
        raise CheckpointError(
            f"{directory}: its tokenizer has {tokens} tokens, the model's embeddings only {config.vocab_size}"
        )
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise CheckpointError(f"{directory}: its tokenizer names no cls or sep token (tokenizer_config.json)")
    return model, tokenizer


def _check_labels(config: TRBertConfig) -> None:
    """Raises ConfigurationError."""
    names = config.id2label
    if sorted(names) != list(range(len(names))) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigurationError(f"id2label {names} must give each label from 0 to {len(names) - 1} a name")


def _check_index(directory: Path) -> None:
    """Raises ConfigurationError. `use_safetensors` chooses the index, but not the files that it names."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = set(json.loads(index.read_text())["weight_map"].values())
        if pickled := sorted(name for name in files if not name.endswith(".safetensors")):
            raise ConfigurationError(f"{index.name} names {pickled[:5]}; only safetensors are read")


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers' bar for weights that load in a blink would be most of what an actor writes into the log."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
