"""`longspan lm-eval`: lm-evaluation-harness with the model `longspan` registered, its own arguments unchanged."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from longspan.foundation.errors import LongspanError, Stopped
from longspan.foundation.extras import require


def run_harness(arguments: Sequence[str]) -> None:
    """Run lm-evaluation-harness as its own command line would.

    Args:
        arguments: as for `lm-eval`.

    Raises:
        MissingExtra: the harness is not installed.
        LongspanError: the harness failed; its traceback was printed.
        Stopped: Ctrl-C.
        SystemExit: as the harness ends.
    """
    # The published harness finds no plug-ins by itself: the model is there once this module is imported.
    require("lm-eval", "longspan.engines.lm_eval")
    harness = require("lm-eval", "lm_eval.__main__")
    sys.argv = ["lm-eval", *arguments]
    try:
        harness.cli_evaluate()
    except LongspanError:
        raise
    except KeyboardInterrupt:
        raise Stopped("lm-eval was stopped; with --use_cache FILE the same command goes on from its answers") from None
    except Exception as error:
        traceback.print_exc()
        raise LongspanError(f"lm-eval failed with {type(error).__name__}: {error}") from error
