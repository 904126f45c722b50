"""FLOPs of a TR-BERT per sequence, counted as in the paper.

Only the encoder's matrix products count, two FLOPs per multiply-add. Embeddings, heads, normalisation and activations
are left out, for both the dense and the reduced model.
"""

from collections.abc import Sequence

import numpy as np

from .backbones import BACKBONES
from .configuration import TRBertConfig
from .exits.heads import EXIT_HEADS, Gate
from .reduction.selectors import selector_class
from .reduction.trace import ATTENDED, COMPUTED, ENTERING, PRESENT


def first_layers_flops(config: TRBertConfig, layers: int, tokens: np.ndarray) -> np.ndarray:
    """FLOPs of the first `layers` layers on whole sequences, (sequences,) → float64 (sequences,)."""
    layer_flops = BACKBONES[config.backbone].layer_flops
    return sum((layer_flops(config, layer, tokens) for layer in range(layers)), np.zeros(len(tokens)))


def dense_flops(config: TRBertConfig, tokens: np.ndarray) -> np.ndarray:
    """FLOPs of the dense model on sequences with these numbers of tokens, (sequences,) → (sequences,)."""
    return first_layers_flops(config, config.num_hidden_layers, tokens)


def reduced_flops(config: TRBertConfig, tokens: np.ndarray, kept_tokens: np.ndarray) -> np.ndarray:
    """FLOPs of the model with reduction, selectors included, and without exits.

    Args:
        tokens: (sequences,), tokens of each sequence.
        kept_tokens: (sequences, reductions), tokens kept after each reduction.

    Returns:
        float64 (sequences,).
    """
    counts = np.zeros((4, len(tokens), config.num_hidden_layers))
    alive = np.asarray(tokens, dtype=np.float64)
    for layer in range(config.num_hidden_layers):
        counts[ENTERING, :, layer] = alive
        if layer in config.reduction_layers:
            alive = np.asarray(kept_tokens)[:, config.reduction_layers.index(layer)]
        counts[PRESENT:, :, layer] = alive
    return spent_flops(config, counts)


def spent_flops(
    config: TRBertConfig, counts: np.ndarray, asked: np.ndarray | None = None, gated: Sequence[int] = ()
) -> np.ndarray:
    """FLOPs of the model with reduction, exits and gates, and of all that decides about them.

    Args:
        counts: (4, sequences, layers), as in `Trace`.
        asked: (sequences, exits), rows that each exit computed, as in `ExitPass`.
        gated: the layers whose gates were asked.

    Returns:
        float64 (sequences,).
    """
    total = flops_by_layer(config, counts, gated).sum(1)
    return total if asked is None else total + flops_by_exit(config, asked).sum(1)


def flops_by_layer(config: TRBertConfig, counts: np.ndarray, gated: Sequence[int] = ()) -> np.ndarray:
    """FLOPs of each layer, with its selector and gate, float64 (sequences, layers); see `spent_flops`."""
    selector, layer_flops_of = selector_class(config).flops(config), BACKBONES[config.backbone].layer_flops
    flops = np.zeros(counts.shape[1:])
    for layer in range(config.num_hidden_layers):
        if layer in config.reduction_layers:
            flops[:, layer] += selector * counts[ENTERING, :, layer]
        if layer in gated:
            flops[:, layer] += Gate.flops(config, counts[PRESENT, :, layer])
        flops[:, layer] += layer_flops_of(config, layer, counts[COMPUTED, :, layer], counts[ATTENDED, :, layer])
    return flops


def flops_by_exit(config: TRBertConfig, asked: np.ndarray) -> np.ndarray:
    """FLOPs of each exit, float64 (sequences, exits); see `spent_flops`."""
    exits = config.exit_options
    flops = np.zeros(asked.shape)
    if exits is not None:
        for i, rows in enumerate(asked.T):
            flops[:, i] = EXIT_HEADS[exits.head].flops(config, rows)
    return flops
