"""The configuration of a model's exits and gates."""

from dataclasses import dataclass

from ..errors import ConfigurationError

# What an exit reads: the first token's state, as DeeBERT; all tokens with attention, as SmartBERT; or each word's first
# token, as SENTEE and TOKEE.
HEADS = ("first", "attention", "words")

NO_SKIPPING = 1.0  # the threshold of gates that are not asked


@dataclass(frozen=True)
class ExitOptions:
    """The exits of a model, `TRBertConfig.exits`.

    An exit is asked after its layer. What it is sure enough of leaves with the exit's answer. Its uncertainty is the
    entropy of its prediction over that of a uniform one, from 0 to 1.

    Attributes:
        head: what the exits read, one of `HEADS`.
        layers: increasing zero-based layers with an exit.
        thresholds: one per exit; less uncertainty than this leaves, so nothing does at 0.
        answers_all: the last exit, which is after the last layer, answers for all that reach it, and the model has no
            other classifier (SmartBERT).
        size, heads: width and attention heads of an exit with attention.
        unit: with `words`: "sequence" if all words leave together (SENTEE), "word" if single words are halted (TOKEE).
        pool: with `words` and "sequence": "max" or "mean" of the words' uncertainties counts.
        window: with "word": number of words, odd, around and including a word, of which the highest uncertainty counts.
        kept: with "word": the state that halted tokens keep: "before_norm", to which every later layer applies its own
            last normalisation, or "after_norm".
        pieces: with "word": "all" tokens of a halted word are halted, or only the "first", which answers.

    Raises:
        ConfigurationError: an option has an invalid value.
    """

    head: str
    layers: tuple[int, ...]
    thresholds: tuple[float, ...] = ()
    answers_all: bool = False
    size: int = 128
    heads: int = 4
    unit: str = "sequence"
    pool: str = "max"
    window: int = 5
    kept: str = "before_norm"
    pieces: str = "all"

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "thresholds", tuple(self.thresholds) or (0.0,) * len(self.layers))
        choices = {
            "head": HEADS,
            "unit": ("sequence", "word"),
            "pool": ("max", "mean"),
            "kept": ("before_norm", "after_norm"),
            "pieces": ("all", "first"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigurationError(f"exits: {name} {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if len(self.thresholds) != len(self.layers):
            raise ConfigurationError(
                f"exits: thresholds {self.thresholds} must be one for each of the layers {self.layers}"
            )
        if self.unit == "word" and self.head != "words":
            raise ConfigurationError(f"exits: only a head that reads words halts single words, not {self.head!r}")
        if self.window < 1 or self.window % 2 == 0:
            raise ConfigurationError(f"exits: window {self.window} must be an odd number of words")

    @property
    def halts(self) -> bool:
        """Whether single words are halted."""
        return self.unit == "word"

    def check(self, depth: int) -> None:
        """Check that the exits fit a model of this many layers.

        Raises:
            ConfigurationError: they do not.
        """
        layers = self.layers
        if any(not 0 <= layer < depth for layer in layers) or any(a >= b for a, b in zip(layers, layers[1:])):
            raise ConfigurationError(f"exits: layers {layers} must be increasing indices from 0 to {depth - 1}")
        if self.answers_all and (not layers or layers[-1] != depth - 1):
            raise ConfigurationError(f"exits: answers_all needs an exit after the last layer, {depth - 1}")


@dataclass(frozen=True)
class GateOptions:
    """The gates of a model, `TRBertConfig.gates`: one before each layer, which sequences can pass over (SmartBERT).

    Attributes:
        threshold: a sequence skips the layer if the gate's probability is at least this; at 1 none does.
        size, heads: width and attention heads of a gate.
    """

    threshold: float = NO_SKIPPING
    size: int = 128
    heads: int = 2
