"""Error handling that all commands share: one readable line for an expected error, and its exit code."""

import logging
import os
import sys
from collections.abc import Callable

from pipeline.errors import AbandonedError, PipelineError
from trbert_model.errors import TRBertError
from trbert_model.terminal import print_in_any_encoding


def run_command(main: Callable[[], int]) -> int:
    """Run a command's main function, and return its exit code. The project's own errors become one line on stderr."""
    print_in_any_encoding()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    try:
        return main()
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, AbandonedError):
            _exit_now(error.exit_code)
        return error.exit_code
    except TRBertError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _exit_now(130)
        raise


def _exit_now(code: int) -> None:
    """Exit without waiting for blocked threads, which Python would do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
