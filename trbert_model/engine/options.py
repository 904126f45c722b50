"""Engine options: precision, device, batch size, thresholds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..tasks.base import TaskOptions

if TYPE_CHECKING:
    from ..configuration import TRBertConfig

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineOptions(TaskOptions):
    """Options of an engine, in addition to those of its task.

    Attributes:
        max_tokens_per_batch: maximum number of tokens in a varlen batch. Default: depends on the device.
        device: "cpu", "cuda" or "cuda:N". Default: CUDA if available.
        dtype: "float32", "bfloat16" or "float16"; "auto" is bfloat16 on CUDA and on CPUs that
            compute it fast (`precision.cpu_is_fast_in_bfloat16`), and float32 elsewhere.
        reduce: False runs the dense model.
        thresholds: lowest keep probabilities of kept tokens, one per reduction; then, for models with exits, the
            uncertainty below which a document or word leaves, one per exit, and for models with gates their threshold
            (`operating_thresholds`). Default: the model's own, also of exits and gates that are left out.

    Raises:
        ConfigurationError: an option has an invalid value.
    """

    max_tokens_per_batch: int | None = None
    device: str | None = None
    dtype: str = "auto"
    reduce: bool = True
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.thresholds is not None and not all(0 <= threshold <= 1 for threshold in self.thresholds):
            raise ConfigurationError(f"thresholds {self.thresholds} must be probabilities from 0 to 1")
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigurationError(f"dtype {self.dtype!r} is none of auto, {', '.join(DTYPES)}")
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ConfigurationError(f"max_tokens_per_batch {self.max_tokens_per_batch} must be at least 1")


def check_thresholds(config: "TRBertConfig", thresholds: Sequence[float]) -> None:
    """Check that there is one threshold per reduction, or one for each that the model has.

    Raises:
        ConfigurationError: there are more or fewer.
    """
    whole, reductions = len(operating_thresholds(config)), len(config.reduction_layers)
    if len(thresholds) in (reductions, whole):
        return
    further = f", or {whole} with those of its exits and gates" if whole > reductions else ""
    raise ConfigurationError(
        f"thresholds {tuple(thresholds)} must be one for each of the model's reduction layers "
        f"{config.reduction_layers}{further}"
    )


def operating_thresholds(config: "TRBertConfig") -> tuple[float, ...]:
    """All thresholds of a model: one per reduction, one per exit, and that of its gates."""
    exits, gates = config.exit_options, config.gate_options
    return (
        *config.selector_thresholds,
        *(exits.thresholds if exits else ()),
        *((gates.threshold,) if gates else ()),
    )
