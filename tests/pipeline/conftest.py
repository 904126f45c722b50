"""Models for the pipeline's tests."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import tiny_classifier, tiny_tokenizer
from tests.pipeline.stages import texts
from trbert_model.engine import Engine, EngineOptions
from trbert_model.exits.recording import ExitRecording


@pytest.fixture(scope="session")
def leaving_model(tmp_path_factory) -> Path:
    """A saved classifier whose documents leave at different layers."""
    directory = tmp_path_factory.mktemp("leaving")

    def model(**thresholds):
        made = tiny_classifier(exits={"head": "first", "layers": [0, 1, 2]} | thresholds)
        for exit in made.bert.encoder.exits:
            torch.nn.init.normal_(exit.classifier.weight, std=1.0)
        return made

    engine, recording = Engine(model(), tiny_tokenizer(), EngineOptions(device="cpu", dtype="float32")), ExitRecording()
    engine.score(engine.task.encode_rows([(text,) for text in texts(40)])[0], exit_recording=recording)
    windows = [exits.uncertainty for windows in recording.windows.values() for _, exits in windows]
    model(thresholds=np.median(windows, axis=0).tolist()).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
