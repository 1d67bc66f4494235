"""What is said of a picture while training: templates, or the captions beside the pictures."""

import warnings

from dti_fast.data.folder import Picture
from dti_fast.data.templates import TEMPLATES
from dti_fast.errors import UserError


def training_prompts(pictures: list[Picture], placeholder: str, learnable_property: str) -> tuple[list[str], bool]:
    """The prompts to draw from, and whether prompt i belongs to picture i (captions) or to any (templates).

    A caption holds the placeholder, or `{}` for it.  Pictures without a caption among others that have one
    get the first template.

    Raises:
        UserError: if no caption holds the placeholder.
    """
    templates = [template.format(placeholder) for template in TEMPLATES[learnable_property]]
    captions = [None if p.caption is None else p.caption.replace("{}", placeholder) for p in pictures]
    if not any(captions):
        return templates, False
    lacking = [p.path.name for p, c in zip(pictures, captions, strict=True) if c and placeholder not in c]
    if len(lacking) == sum(map(bool, captions)):
        raise UserError(
            f"no caption contains the placeholder {placeholder!r}, so nothing could be learned; write it (or {{}}) "
            "into the .txt files"
        )
    if lacking:
        warnings.warn(f"the captions of {', '.join(lacking)} lack {placeholder!r} and teach nothing", stacklevel=2)
    return [caption or templates[0] for caption in captions], True
