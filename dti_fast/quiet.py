"""Other libraries' remarks and bars, kept from whoever calls this one."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def without_remarks() -> Iterator[None]:
    """Import and use libraries without their remarks on one another; log levels and filters are as before afterwards.

    Errors are raised all the same.
    """
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.ERROR))
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category)
            warnings.filterwarnings("ignore", message="Cannot (en|dis)able progress bars")  # the environment decides
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers asks the hub's client
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Load models `without_remarks`, and without bars but those of downloads; these too are as before afterwards."""
    with without_remarks(), ExitStack() as after:
        import diffusers
        import huggingface_hub
        import transformers

        downloads_shown = not huggingface_hub.utils.are_progress_bars_disabled()
        if not downloads_shown:
            after.callback(huggingface_hub.utils.disable_progress_bars)
        for bars in (diffusers.utils.logging, transformers.utils.logging):
            if bars.is_progress_bar_enabled():
                bars.disable_progress_bar()  # transformers' also hides downloads
                after.callback(bars.enable_progress_bar)
        if downloads_shown:
            huggingface_hub.utils.enable_progress_bars()
        yield
