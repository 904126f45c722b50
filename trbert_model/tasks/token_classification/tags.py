"""Tag sets: which words with which tags are an entity, by the conventions of seqeval's default mode, which are CoNLL's.

A tag is a prefix and a type, such as B-PER. B begins an entity. I continues the entity of its type before it, or else
begins one. E ends it, and S is a whole entity. M, L and U of other schemes are I, E and S. Tags without a prefix are as
if with I: adjacent words of the same tag are an entity. O is outside of all.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

OUTSIDE = "O"
_PREFIXED = re.compile(r"([BIESMLU])-(.+)", re.DOTALL)
_CONTINUES, _GOES_ON = frozenset("IEML"), frozenset("BIM")
_NO_TYPE = "_"  # of entities in a set of prefixes alone, as in word segmentation; seqeval's name


@dataclass(frozen=True)
class TagSet:
    """The tags of a model or corpus; names: by index."""

    names: tuple[str, ...]

    @cached_property
    def has_prefixes(self) -> bool:
        """Whether tags have prefixes that say where entities begin: the set is of entities, not of parts of speech."""
        alone = "B" in self.names and set(self.names) <= {*"BIESMLU", OUTSIDE}
        return alone or any(name.startswith(("B-", "I-")) for name in self.names)

    def entities(self, tags: np.ndarray) -> list[tuple[str, int, int]]:
        """Type, first and last word of each entity, in order.

        Args:
            tags: int (words,), the words' tags by index. Words with a negative one are outside.
        """
        found: list[tuple[str, int, int]] = []
        goes_on = False
        for word in np.flatnonzero(self._inside[tags]).tolist():
            prefix, kind = self._parts[tags[word]]
            if goes_on and prefix in _CONTINUES and found[-1][0] == kind and found[-1][2] == word - 1:
                found[-1] = (kind, found[-1][1], word)
            else:
                found.append((kind, word, word))
            goes_on = prefix in _GOES_ON
        return found

    @cached_property
    def _parts(self) -> list[tuple[str, str]]:
        """Each tag's prefix and type."""
        return [self._split(name) for name in self.names]

    @cached_property
    def _inside(self) -> np.ndarray:
        """Whether each tag is of an entity; the last value is for negative indices."""
        return np.array([name != OUTSIDE for name in self.names] + [False])

    def _split(self, name: str) -> tuple[str, str]:
        if not self.has_prefixes:
            return "I", name
        if match := _PREFIXED.fullmatch(name):
            return match[1], match[2]
        return (name, _NO_TYPE) if len(name) == 1 and name in "BIESMLU" else ("I", name)
