"""`dti-fast blend`: what lies between two concepts."""

import warnings
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter

from dti_fast import sphere
from dti_fast.blend import blend as blend_vectors
from dti_fast.blend import check_blendable
from dti_fast.drawing import DrawSettings, check_picture_path, grid, save_picture
from dti_fast.errors import UserError
from dti_fast.formats import check_token, read_embeddings, write_single_file
from dti_fast.limits import check_limits
from dti_fast.pipelines import load_vectors


def blend(
    a: Path,
    b: Path,
    *,
    prompt: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None,
    steps: int = 7,
    save: float | None = None,
    token: str = "<blend>",
    output: Path = Path("blend.png"),
    settings: DrawSettings | None = None,
) -> None:
    """Draw what lies between two learned concepts, along the great circle between their directions.

    Parameters
    ----------
    a
        An embedding file, or the output folder of a run.
    b
        Another, for the same kind of model and with as many vectors.
    prompt
        What to draw, with {} for the concept; may be given several times.
    steps
        Pictures from a to b, both included; all pictures of a row share their noise.
    save
        Write the blend at this share of the way, from 0 (a) to 1 (b), as a file beside the picture.
    token
        The word for the saved blend.
    output
        The picture to write: one row for each prompt and seed.
    """
    settings, prompts = settings or DrawSettings(), prompt or []
    if not prompts and save is None:
        raise UserError("nothing to do: give --prompt for a picture, --save for a file, or both")
    check_limits({"steps": steps, "save": save})
    check_token(token, "--token")
    check_picture_path(output)
    settings.check()
    (first, first_metadata), (second, second_metadata) = read_embeddings(a), read_embeddings(b)
    check_blendable(first, second)
    if save is not None:
        saved = blend_vectors(first, second, save)
    models = [m.get("base_model_fingerprint") for m in (first_metadata, second_metadata)]
    if None not in models and models[0] != models[1]:
        warnings.warn(
            "the concepts were learned on different models; what lies between them may mean nothing", stacklevel=2
        )
    paths = []
    if prompts:
        backbone = settings.load([first_metadata, second_metadata])
        names = [f"<blend-{i}-of-{steps}>" for i in range(1, steps + 1)]
        for name, t in zip(names, torch.linspace(0, 1, steps, dtype=torch.float64).tolist(), strict=True):
            pooling = first_metadata.get("pooling", "eos")
            load_vectors(backbone.pipeline, blend_vectors(first, second, t), name, pooling=pooling)
        rows = []
        for text in prompts:
            if "{}" not in text:
                warnings.warn(f"the prompt {text!r} has no {{}} for the concept", stacklevel=2)
            named = [text.replace("{}", name) for name in names]
            columns = settings.draw(backbone, named, settings.num_images or 1)
            for i, row in enumerate(zip(*columns, strict=True)):
                rows.append((f"{text}, seed {settings.seed + i}: {_name(a)} to {_name(b)}", list(row)))
        save_picture(grid(rows), output)
        paths.append(output)
    if save is not None:
        paths.append(output.with_name(f"{output.stem}-{save:g}.safetensors"))
        metadata = {"method": "blend", "token": token, "blend": f"{_name(a)} to {_name(b)}, {save:g}"}
        kept = ("base_model", "base_model_fingerprint", "pooling", "prediction_type")
        metadata |= {key: first_metadata[key] for key in kept if key in first_metadata}
        write_single_file(paths[-1], saved, metadata)
    angle = mean_angle(first, second)
    print(f"{angle:.1f}° lie between the two; wrote {', '.join(map(str, paths))}")


def mean_angle(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Degrees between two concepts, the mean over text encoders and vectors."""
    angles = [
        sphere.distance(*(torch.nn.functional.normalize(tensor.double(), dim=-1) for tensor in pair)).rad2deg().mean()
        for pair in zip(first, second, strict=True)
    ]
    return torch.stack(angles).mean().item()


def _name(path: Path) -> str:
    return path.stem or path.resolve().name
