"""Names of a head's labels, in model configurations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..configuration import TRBertConfig


def label_names(names: Sequence[str]) -> dict[str, Any]:
    """Configuration fields for labels with these names, in the order of their indices."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def check_label_names(config: "TRBertConfig") -> None:
    """Raise ConfigurationError unless each label has a name."""
    names = config.id2label
    if sorted(names) != list(range(len(names))) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigurationError(f"id2label {names} must give each label from 0 to {len(names) - 1} a name")


def saved_label_names(raw: dict[str, Any], outputs: int) -> dict[str, Any]:
    """Configuration fields for the labels of a checkpoint.

    Args:
        raw: its config.json.
        outputs: number of outputs of its head.

    Raises:
        ConfigurationError: id2label does not name the labels by their numbers, or not as many as there are outputs.
    """
    names = raw.get("id2label")
    if not names:
        return {"num_labels": outputs}
    try:
        named = {int(i): name for i, name in (enumerate(names) if isinstance(names, list) else names.items())}
    except (ValueError, AttributeError) as error:
        raise ConfigurationError(f"id2label {names!r} does not name the labels by their numbers") from error
    if len(named) != outputs:
        raise ConfigurationError(f"id2label {names!r} names {len(named)} labels, but the head has {outputs}")
    named = {i: str(name) if isinstance(name, int | float) else name for i, name in named.items()}
    return {"id2label": named, "label2id": {label: i for i, label in named.items()}}
