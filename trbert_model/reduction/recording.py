"""Records which layers compute which tokens."""

import numpy as np
import torch
from torch import Tensor

from ..configuration import TRBertConfig
from .state import Candidates, SelectionPolicy


class LayerRecorder:
    """A policy that decides as another one does, and counts the layers that compute each token.

    Attributes:
        layers: of each sequence in the finished batches, the number of layers that computed each token, int16
            (tokens,).
    """

    def __init__(self, policy: SelectionPolicy, config: TRBertConfig):
        self.policy, self.config = policy, config
        self.layers: list[np.ndarray] = []
        self._batch: Tensor | None = None

    def __call__(self, candidates: Candidates) -> Tensor:
        keep = self.policy(candidates)
        all_layers = self.config.num_hidden_layers
        if candidates.reduction == 0:  # a new batch; the one before it has failed if it was not finished
            self._batch = torch.full_like(candidates.token_indices, all_layers)
        assert self._batch is not None
        # Without selecting the dropped tokens, which would make another device-to-host copy.
        layer = self.config.reduction_layers[candidates.reduction]
        self._batch[candidates.token_indices] = torch.where(keep | candidates.fixed, all_layers, layer)
        return keep

    def finish(self, lengths: list[int]) -> None:
        """Add the batch that was computed to `layers`; lengths: tokens of each of its sequences."""
        if self._batch is None:  # nothing was reduced
            layers = np.full(sum(lengths), self.config.num_hidden_layers)
        else:
            layers = self._batch.cpu().numpy()
        self.layers += np.split(layers.astype(np.int16), np.cumsum(lengths)[:-1])
        self._batch = None
