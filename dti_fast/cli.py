"""The command line, `dti_fast.commands`, with bad input as one line and exit code 2."""

import logging
import os
import sys
import warnings
from importlib.util import find_spec

from dti_fast.errors import UserError

REQUIRED = {name: name for name in ("cyclopts", "rich", "numpy", "diffusers", "transformers")} | {"PIL": "pillow"}


def main() -> None:
    """Entry point; bad input is one line on stderr and exit code 2."""
    missing = [package for module, package in REQUIRED.items() if find_spec(module) is None]
    if missing and sys.argv[1:] == ["doctor"]:
        from dti_fast.commands.doctor import doctor

        return doctor()
    if missing:
        _fail(f"{', '.join(missing)} missing: install the training packages with  pip install 'dti-fast[train]'")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers asks huggingface_hub for it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from cyclopts import CycloptsError

    from dti_fast.commands import make_app

    try:
        return make_app().meta(exit_on_error=False, print_error=False)
    except (UserError, CycloptsError) as error:
        message = str(error)
    except OSError as error:
        if error.errno is None:  # not the system's word on a file
            raise
        message = str(error)
    except KeyboardInterrupt:
        sys.exit(130)
    _fail(message)  # here, where the exception no longer holds the model


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
