"""FLOPs of a TR-BERT per sequence, counted as the paper counts them: the encoder's matrix products, two FLOPs a
multiply-add. Embeddings, heads, normalisation and activations are left out, on both sides of every ratio."""

import numpy as np

from .backbones import BACKBONES
from .configuration import TRBertConfig
from .reduction.selectors import selector_class


def layer_flops(config: TRBertConfig, tokens: np.ndarray) -> np.ndarray:
    """FLOPs of one layer on sequences of `tokens` tokens, (sequences,) → float64 (sequences,)."""
    return BACKBONES[config.backbone].layer_flops(config, tokens)


def dense_flops(config: TRBertConfig, tokens: np.ndarray) -> np.ndarray:
    """FLOPs of the model without reduction on sequences of `tokens` tokens, (sequences,) → (sequences,)."""
    return config.num_hidden_layers * layer_flops(config, tokens)


def reduced_flops(config: TRBertConfig, tokens: np.ndarray, kept_tokens: np.ndarray) -> np.ndarray:
    """FLOPs the model spent, selectors included.

    tokens: (sequences,); kept_tokens: (sequences, reductions), tokens alive after each → float64 (sequences,).
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
