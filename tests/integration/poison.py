"""Documents that kill the process that touches them, as a Ray worker's set-up hook arranges it.

The product has no switch for this: the hook wraps the engine's and the tokenizer's own functions in the worker.
"""

import ctypes
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
from pathlib import Path

import ray

SEGFAULT, TOKENIZER, HANGS = "game game game game bank", "fine fine fine fine bank", "good good good good bank"


class _Armoury(importlib.abc.MetaPathFinder):
    """Wraps functions of the project's modules when a process imports them: few of Ray's workers ever do, and the
    imports take seconds."""

    def find_spec(self, name, path=None, target=None):
        arm_module = _ARMED.get(name)
        spec = arm_module and importlib.machinery.PathFinder.find_spec(name, path)
        if not spec:
            return None
        load = spec.loader.exec_module

        def load_and_arm(module):
            load(module)
            arm_module(module)

        spec.loader.exec_module = load_and_arm
        return spec


def _arm_engine(module) -> None:
    forward = module.Engine._forward_once
    deadly, hangs = json.loads(os.environ["DEADLY"])

    def poisoned(self, windows, policies, *recorded):
        for window in windows:
            ids = window.input_ids[1:-1].tolist()
            if ids == deadly:
                ctypes.string_at(0)
            if ids == hangs:
                os.kill(os.getpid(), signal.SIGSTOP)  # no thread of it can help itself any more
        return forward(self, windows, policies, *recorded)

    module.Engine._forward_once = poisoned


def _arm_task(module) -> None:
    tokenize = module.ClassificationTask.tokenize

    def poisoned(self, texts):
        if TOKENIZER in texts:
            os.abort()
        return tokenize(self, texts)

    module.ClassificationTask.tokenize = poisoned


_ARMED = {"trbert_model.engine.scoring": _arm_engine, "trbert_model.tasks.classification.task": _arm_task}


def arm() -> None:
    """Set up a Ray worker: the marked documents are deadly from now on."""
    sys.meta_path.insert(0, _Armoury())


def main() -> int:
    """Score with armed workers: `python -m tests.integration.poison CONFIG.json`, on RAY_ADDRESS."""
    from pipeline import ScoreConfig, score
    from tests.conftest import tiny_tokenizer

    config = ScoreConfig(**json.loads(Path(sys.argv[1]).read_text()))
    deadly = tiny_tokenizer()([SEGFAULT, HANGS], add_special_tokens=False)["input_ids"]
    # A worker that cannot import its hook exits, and Ray starts another one, for ever.
    variables = {"PYTHONPATH": str(Path(__file__).parent.parent.parent), "DEADLY": json.dumps(deadly)}
    hook = {"worker_process_setup_hook": "tests.integration.poison.arm", "env_vars": variables}
    ray.init(logging_level="warning", runtime_env=hook)
    return score(config)["exit_code"]


if __name__ == "__main__":
    sys.exit(main())
