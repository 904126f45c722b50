"""Documents that kill the process that touches them, as a Ray worker's set-up hook arranges it.

The product has no switch for this: the hook wraps the engine's and the tokenizer's own functions in the worker.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

import ray

from pipeline import ScoreConfig, score

SEGFAULT, KILL, TOKENIZER = "game game game game bank", "sport sport sport sport bank", "fine fine fine fine bank"


def arm() -> None:
    """Set up a Ray worker: the marked documents are deadly from now on."""
    from tests.conftest import tiny_tokenizer
    from trbert_model.engine import Engine
    from trbert_model.tasks.classification import ClassificationTask

    tokenizer = tiny_tokenizer()
    deadly = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]): text for text in (SEGFAULT, KILL)}
    forward, tokenize = Engine._forward_once, ClassificationTask.tokenize

    def poisoned_forward(self, windows):
        for window in windows:
            text = deadly.get(tuple(int(token) for token in window.input_ids[1:-1]))
            if text == SEGFAULT:
                ctypes.string_at(0)
            elif text == KILL:  # as the kernel does it when memory runs out
                os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, windows)

    def poisoned_tokenize(self, texts):
        if TOKENIZER in texts:
            os.abort()
        return tokenize(self, texts)

    Engine._forward_once, ClassificationTask.tokenize = poisoned_forward, poisoned_tokenize


def main() -> int:
    """Score with armed workers: `python -m tests.integration.poison CONFIG.json`, on RAY_ADDRESS."""
    config = ScoreConfig(**json.loads(Path(sys.argv[1]).read_text()))
    # A worker that cannot import its hook exits, and Ray starts another one, for ever.
    where = {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    hook = {"worker_process_setup_hook": "tests.integration.poison.arm", "env_vars": where}
    ray.init(logging_level="warning", runtime_env=hook)
    return score(config)["exit_code"]


if __name__ == "__main__":
    sys.exit(main())
