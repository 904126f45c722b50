"""The selection policy of multiple choice, which judges tokens shared by several rows together."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import Candidates, SelectionPolicy


class GroupPolicy:
    """Keeps each token shared by the rows of a group in all rows or in none, and keeps all other tokens.

    Args:
        policy: judges the shared tokens by the mean of their keep logits over the group's rows.
        shared: int64 (groups,), number of tokens at the start of a group's rows that are the same in all of them.
        choices: number of rows in a group.
    """

    def __init__(self, policy: SelectionPolicy, shared: Tensor, choices: int):
        self.policy, self.shared, self.choices = policy, shared, choices
        self.first_slots = F.pad(shared.cumsum(0), (1, 0))  # one slot per shared token of a group

    def __call__(self, candidates: Candidates) -> Tensor:
        row, positions, logits = candidates.sequence, candidates.positions, candidates.logits
        shared = positions < self.shared[row // self.choices]
        slot = (self.first_slots[row // self.choices] + positions)[shared]
        means = logits.new_zeros(int(self.first_slots[-1])).index_add_(0, slot, logits[shared]) / self.choices
        judged = dataclasses.replace(candidates, logits=logits.masked_scatter(shared, means[slot]))
        keep = self.policy(judged) | candidates.fixed
        # A random policy may decide differently in each row, so the group's first row decides.
        first_row = (row % self.choices == 0)[shared]
        goes_on = torch.zeros(len(means), dtype=torch.bool, device=logits.device)
        goes_on[slot[first_row]] = keep[shared][first_row]
        return keep.masked_scatter(shared, goes_on[slot]) | ~shared
