"""The command line, `dti_fast.commands`, with bad input as one line and exit code 2."""

import os
import sys
import warnings
from importlib.util import find_spec

from dti_fast.errors import UserError

REQUIRED = {name: name for name in ("cyclopts", "rich", "numpy", "diffusers", "transformers")} | {"PIL": "pillow"}


def main() -> None:
    """Entry point; bad input is one line on stderr and exit code 2, a signal ends with 128 and its number."""
    missing = [package for module, package in REQUIRED.items() if find_spec(module) is None]
    if missing and sys.argv[1:] == ["doctor"]:
        from dti_fast.commands.doctor import doctor

        return doctor()
    if missing:
        _fail(f"{', '.join(missing)} missing: install the training packages with  pip install 'dti-fast[train]'")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from cyclopts import CycloptsError

    from dti_fast.commands import describe, make_app
    from dti_fast.commands.interruption import interrupt, on_signals

    with warnings.catch_warnings():
        warnings.showwarning = _warn
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            with on_signals(interrupt):
                return make_app().meta(exit_on_error=False, print_error=False)
        except UserError as error:
            message = str(error)
        except CycloptsError as error:
            message = describe(error)
        except OSError as error:
            if error.errno is None:  # not the system's word on a file
                raise
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except KeyboardInterrupt as interruption:
            sys.exit(128 + getattr(interruption, "number", 2))
    _fail(message)  # here, where the exception no longer holds the model


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
