"""What is said of a picture while training: templates, or the captions beside the pictures."""

from dti_fast.data.folder import Picture
from dti_fast.data.templates import TEMPLATES
from dti_fast.errors import UserError


def training_prompts(pictures: list[Picture], placeholder: str, learnable_property: str) -> tuple[list[str], bool]:
    """The prompts to draw from, and whether prompt i belongs to picture i (captions) or to any (templates).

    A caption holds the placeholder, or `{}` for it.  Pictures without a caption among others that have one
    get the first template.

    Raises:
        UserError: if a caption lacks the placeholder.  It would not be neutral: where the pictures pull nowhere, the
            normalised step follows the prior alone, back to the initializer.
    """
    templates = [template.format(placeholder) for template in TEMPLATES[learnable_property]]
    captions = [None if p.caption is None else p.caption.replace("{}", placeholder) for p in pictures]
    if not any(captions):
        return templates, False
    lacking = [
        p.path.with_suffix(".txt").name for p, c in zip(pictures, captions, strict=True) if c and placeholder not in c
    ]
    if lacking:
        raise UserError(
            f"no {placeholder!r} in {', '.join(lacking)}: every caption must contain the placeholder (or {{}} for it)"
        )
    return [caption or templates[0] for caption in captions], True
