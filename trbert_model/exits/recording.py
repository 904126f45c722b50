"""What documents would answer and cost at each exit, recorded in one run in which nothing leaves.

The results with any thresholds of the exits follow from it exactly, because until a sequence leaves it is computed as
if it never did. Words that are halted singly are not: the others then see other states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ConfigurationError
from ..flops import dense_flops, flops_by_exit, flops_by_layer
from ..reduction.trace import PRESENT
from ..tasks.base import DocumentResults, Task

if TYPE_CHECKING:
    from ..configuration import TRBertConfig


@dataclass(frozen=True)
class WindowExits:
    """A window at each exit; E is the number of exits.

    Attributes:
        outputs: E + 1, as from `Task.window_outputs`: of each exit, and of the whole network.
        uncertainty: float32 (E,).
        open: bool (E,), False where the window cannot leave, because it skipped the layer.
        flops: float64 (E + 1,), of the layers up to each exit, and of all layers.
        exit_flops: float64 (E,), of each exit itself.
        kept: int64 (reductions,), tokens kept.
    """

    outputs: list[Any]
    uncertainty: np.ndarray
    open: np.ndarray
    flops: np.ndarray
    exit_flops: np.ndarray
    kept: np.ndarray


@dataclass
class ExitRecording:
    """The windows of documents at each exit, see `Engine.score`.

    Attributes:
        windows: of each document, its windows in order.
    """

    windows: dict[int, list[tuple[Any, WindowExits]]] = field(default_factory=dict)

    def add(self, document: int, window: Any, exits: WindowExits) -> None:
        self.windows.setdefault(document, []).append((window, exits))

    def uncertainties(self) -> np.ndarray:
        """The uncertainties of all windows at the exits where they can leave, float32 (decisions,)."""
        each = [exits.uncertainty[exits.open] for windows in self.windows.values() for _, exits in windows]
        return np.concatenate([np.zeros(0, np.float32), *each])

    def results(
        self, task: Task, config: "TRBertConfig", documents: Sequence[Any], thresholds: Sequence[float]
    ) -> DocumentResults:
        """The results of the recorded documents with these thresholds of the exits."""
        options = config.exit_options
        assert options is not None
        owners = [number for number, windows in self.windows.items() for _ in windows]
        entries = [entry for windows in self.windows.values() for entry in windows]
        exits = [each for _, each in entries]
        limits = np.asarray(thresholds, np.float32)
        asked = limits > 0
        if options.answers_all:
            asked[-1] = True
        leaves = np.array([each.open & (each.uncertainty < limits) for each in exits]).reshape(-1, len(limits))
        chosen = np.where(leaves.any(1), leaves.argmax(1), len(limits))
        depth = config.num_hidden_layers
        layers = np.array([*(layer + 1 for layer in options.layers), depth])[chosen]
        lengths = np.array([len(window.input_ids) for window, _ in entries])
        spent = [
            each.flops[exit] + each.exit_flops[: exit + 1][asked[: exit + 1]].sum() for each, exit in zip(exits, chosen)
        ]
        reached = np.array(config.reduction_layers)[None, :] < layers[:, None]
        kept = np.array([each.kept for each in exits]).reshape(reached.shape) * reached
        rows = np.column_stack([lengths, np.ones_like(lengths), layers * lengths, kept])
        sums, floats = np.zeros((len(documents), rows.shape[1]), np.int64), np.zeros((len(documents), 2))
        np.add.at(sums, owners, rows)
        np.add.at(floats, owners, np.column_stack([spent, dense_flops(config, lengths)]))
        outputs, start = [], 0
        for number, document in enumerate(documents):
            own = self.windows[number]
            choice = chosen[start : start + len(own)]
            outputs.append(
                task.combine(
                    document,
                    [window for window, _ in own],
                    [each.outputs[exit] for (_, each), exit in zip(own, choice)],
                )
            )
            start += len(own)
        return DocumentResults(
            outputs=task.gathered(outputs),
            num_tokens=sums[:, 0],
            num_windows=sums[:, 1],
            kept_tokens=sums[:, 3:],
            exit_layers=sums[:, 2] / np.maximum(sums[:, 0], 1),
            flops=floats[:, 0],
            dense_flops=floats[:, 1],
        )


def window_exits(task: Task, config: "TRBertConfig", output: Any, lengths: list[int]) -> list[WindowExits]:
    """The windows of a batch at each exit, from the output of a pass with `output_exits` in which nothing left.

    Raises:
        ConfigurationError: the model has no exits that whole sequences leave at.
    """
    options, exits = config.exit_options, output.exits
    if options is None or options.halts:
        raise ConfigurationError("only models whose documents leave early can be recorded at their exits")
    outputs = []
    for logits, judged in zip(exits.logits, exits.judged):
        # A word that was dropped before answers from the state that it left with.
        answers = torch.where(judged[:, None], logits.to(output.logits.dtype), output.logits)
        outputs.append(task.window_outputs(SimpleNamespace(logits=answers), lengths))
    outputs.append(task.window_outputs(output, lengths))
    asked, counts = exits.asked.cpu().numpy(), output.trace.counts.cpu().numpy()
    uncertainties = torch.stack(exits.uncertainties, 1).cpu().numpy()
    opened = np.ones(asked.shape, bool) if options.head == "words" else asked > 0
    ends = [*options.layers, config.num_hidden_layers - 1]
    flops = flops_by_layer(config, counts, output.trace.gated).cumsum(1)[:, ends]
    exit_flops = flops_by_exit(config, asked)
    kept = counts[PRESENT][:, config.reduction_layers]
    return [
        WindowExits(list(own), uncertainties[i], opened[i], flops[i], exit_flops[i], kept[i])
        for i, own in enumerate(zip(*outputs))
    ]
