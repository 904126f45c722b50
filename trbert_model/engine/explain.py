"""Which layers computed the tokens of a document."""

from pathlib import Path

from ..checkpoints.loading import LoadedModel
from ..errors import ConfigurationError, InputError
from ..explanation import Explanation, Recording
from .options import EngineOptions
from .scoring import Engine


def explain(
    model: str | Path | Engine | LoadedModel,
    text: str,
    context: str | None = None,
    *,
    options: EngineOptions | None = None,
) -> Explanation:
    """Score one document, and record how many layers computed each of its tokens.

    Args:
        model: a model directory, an engine, or a model from `load_checkpoint`, which is fused in place.
        text: the text to classify, or the question.
        context: the text that the question is about.
        options: of the engine, unless `model` is one.

    Returns:
        The document with its result. It shows itself in notebooks; see also its `to_html` and `to_text`.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigurationError: an option does not fit the model.
        InputError: the text cannot be scored, or there is a context for a model that reads no questions, or none for
            one that does.
    """
    if isinstance(model, Engine):
        if options is not None:
            raise ConfigurationError("options are those of the engine: give them to the Engine")
        engine = model
    elif isinstance(model, LoadedModel):
        engine = Engine(model.model, model.tokenizer, options)
    else:
        engine = Engine.from_pretrained(model, options)
    task = engine.task
    texts = (text,) if context is None else (text, context)
    names = task.text_names()
    if len(texts) != len(names):
        raise InputError(f"the model's task is {task.name}: it needs {' and '.join(names)}, nothing else")
    for name, value in zip(names, texts):
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"the {name} must be a text that is not empty, not {type(value).__name__} {value!r:.40}")
    documents, failures = task.encode_rows([texts])
    if failures:
        raise InputError(f"the tokenizer fails on the text: {failures[0]}")
    if problem := task.problem(documents[0]):
        raise InputError(problem[1])
    recording = Recording({0})
    results = engine.score(documents, recording=recording)
    outcome = task.outcome(task.result_columns(results.outputs, documents), 0)
    return engine.explanation(texts, documents[0], recording.windows[0], outcome)
