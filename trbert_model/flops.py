"""FLOPs of a TR-BERT per sequence, counted as the paper counts them: the encoder's matrix products, two FLOPs a
multiply-add. Embeddings, heads, normalisation and activations are left out, on both sides of every ratio; so is, where
selectors know the question, the comparison of its words with the passage's (2·H·words a token, under 0.1% of a
MiniLM-L6)."""

import numpy as np

from .configuration import TRBertConfig
from .question_match import NEIGHBOUR_SCALES, REACH, SCALES


def layer_flops(config: TRBertConfig, tokens: np.ndarray) -> np.ndarray:
    """FLOPs of one layer on sequences of `tokens` tokens, (sequences,) → float64 (sequences,).

    Projections 4·H²·n, feed-forward 2·H·I·n, attention 2·H·n² multiply-adds.
    """
    n = np.asarray(tokens, dtype=np.float64)
    hidden, intermediate = config.hidden_size, config.intermediate_size
    return 2 * ((4 * hidden**2 + 2 * hidden * intermediate) * n + 2 * hidden * n**2)


def dense_flops(config: TRBertConfig, tokens: np.ndarray) -> np.ndarray:
    """FLOPs of the model without reduction on sequences of `tokens` tokens, (sequences,) → (sequences,)."""
    return config.num_hidden_layers * layer_flops(config, tokens)


def reduced_flops(config: TRBertConfig, tokens: np.ndarray, kept_tokens: np.ndarray) -> np.ndarray:
    """FLOPs the model spent, selectors included.

    tokens: (sequences,); kept_tokens: (sequences, reductions), tokens alive after each → float64 (sequences,).
    """
    selector = _selector_flops(config)
    alive = np.asarray(tokens, dtype=np.float64)
    kept = np.asarray(kept_tokens, dtype=np.float64)
    total = np.zeros_like(alive)
    for layer in range(config.num_hidden_layers):
        if layer in config.reduction_layers:
            total += selector * alive
            alive = kept[:, config.reduction_layers.index(layer)]
        total += layer_flops(config, alive)
    return total


def _selector_flops(config: TRBertConfig) -> int:
    """FLOPs of one selector on one token."""
    hidden, size = config.hidden_size, config.selector_size
    if not config.question_aware:
        return 2 * (hidden * size + size)
    features = len(SCALES) + len(NEIGHBOUR_SCALES)
    kind = 2 * hidden * size + size + (2 * REACH + 1) * len(NEIGHBOUR_SCALES)
    return 2 * (kind + features + features * size + size)
