"""FLOPs of a TR-BERT per sequence, counted as in the paper.

Only the encoder's matrix products count, two FLOPs per multiply-add. Embeddings, heads, normalisation and activations
are left out, for both the dense and the reduced model.
"""

import numpy as np

from .backbones import BACKBONES
from .configuration import TRBertConfig
from .reduction.selectors import selector_class


def layer_flops(config: TRBertConfig, tokens: np.ndarray) -> np.ndarray:
    """FLOPs of one layer on sequences with these numbers of tokens, (sequences,) → float64 (sequences,)."""
    return BACKBONES[config.backbone].layer_flops(config, tokens)


def dense_flops(config: TRBertConfig, tokens: np.ndarray) -> np.ndarray:
    """FLOPs of the dense model on sequences with these numbers of tokens, (sequences,) → (sequences,)."""
    return config.num_hidden_layers * layer_flops(config, tokens)


def reduced_flops(config: TRBertConfig, tokens: np.ndarray, kept_tokens: np.ndarray) -> np.ndarray:
    """FLOPs of the model with reduction, selectors included.

    Args:
        tokens: (sequences,), tokens of each sequence.
        kept_tokens: (sequences, reductions), tokens kept after each reduction.

    Returns:
        float64 (sequences,).
    """
    selector = selector_class(config).flops(config)
    alive = np.asarray(tokens, dtype=np.float64)
    kept = np.asarray(kept_tokens, dtype=np.float64)
    total = np.zeros_like(alive)
    for layer in range(config.num_hidden_layers):
        if layer in config.reduction_layers:
            total += selector * alive
            alive = kept[:, config.reduction_layers.index(layer)]
        total += layer_flops(config, alive)
    return total
