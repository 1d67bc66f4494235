"""What is said of a picture while training: templates, or the captions beside the pictures."""

import warnings

from dti_fast.data.folder import Picture
from dti_fast.data.templates import TEMPLATES
from dti_fast.errors import UserError


def training_prompts(pictures: list[Picture], placeholder: str, learnable_property: str) -> tuple[list[str], bool]:
    """The prompts to draw from, and whether prompt i belongs to picture i (captions) or to any (templates).

    A caption holds the placeholder, or `{}` for it.  One without it teaches nothing, and is named in a warning.
    Pictures without a caption among others that have one get the first template.

    Raises:
        UserError: if no caption has the placeholder.
    """
    templates = [template.format(placeholder) for template in TEMPLATES[learnable_property]]
    captions = [None if p.caption is None else p.caption.replace("{}", placeholder) for p in pictures]
    if not any(captions):
        return templates, False
    told = [(p.path.with_suffix(".txt").name, c) for p, c in zip(pictures, captions, strict=True) if c]
    lacking = [name.encode("utf-8", "backslashreplace").decode() for name, c in told if placeholder not in c]
    if len(lacking) == len(told):
        raise UserError(
            f"no {placeholder!r} in {', '.join(lacking)}: captions must contain the placeholder (or {{}} for it)"
        )
    if lacking:
        warnings.warn(f"no {placeholder!r} in {', '.join(lacking)}: the concept learns nothing there", stacklevel=2)
    return [caption or templates[0] for caption in captions], True
