"""The command line: `dti-fast train | generate | doctor`."""

import logging
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from dti_fast.errors import UserError

REQUIRED = {
    "cyclopts": "cyclopts",
    "rich": "rich",
    "PIL": "pillow",
    "numpy": "numpy",
    "diffusers": "diffusers",
    "transformers": "transformers",
}


def main() -> None:
    """Entry point; bad input is one line on stderr and exit code 2."""
    missing = [package for module, package in REQUIRED.items() if find_spec(module) is None]
    if missing and sys.argv[1:] == ["doctor"]:
        return doctor_command()
    if missing:
        _fail(f"{', '.join(missing)} missing: install the training packages with  pip install 'dti-fast[train]'")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from cyclopts import CycloptsError

    try:
        _app().meta(exit_on_error=False, print_error=False)
    except (UserError, CycloptsError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _app():
    from cyclopts import App, Parameter
    from cyclopts.config import Toml
    from cyclopts.types import ExistingFile

    from dti_fast import __version__
    from dti_fast.trainer.config import TrainConfig

    app = App(
        name="dti-fast",
        version=__version__,
        help_format="plaintext",
        help="Teach a text-to-image model a new concept as a direction.",
        default_parameter=Parameter(negative=""),
    )

    @app.meta.default
    def meta(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[ExistingFile | None, Parameter(help="TOML file with the same keys as the flags.")] = None,
    ):
        if config is not None:
            app.config = Toml(config, use_commands_as_keys=False)
        return app(tokens, exit_on_error=False, print_error=False)

    @app.command
    def train(*, config: Annotated[TrainConfig | None, Parameter(name="*")] = None):
        """Learn a concept from pictures.

        With no arguments: a bundled creature on the bundled pocket model. The learning rate's default,
        0.04 for any batch, is the paper's 0.01 scaled by its batch of 4.
        """
        train_command(config or TrainConfig())

    @app.command
    def generate(
        *,
        prompt: list[str],
        embedding: Path = Path("dti-output"),
        pretrained_model_name_or_path: str | None = None,
        output: Path = Path("generated.png"),
        num_images: int = 4,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        seed: int = 0,
    ):
        """Generate pictures with a learned concept; write its token, such as <concept>, into the prompt.

        Parameters
        ----------
        prompt
            What to draw, with {} or the concept's token; may be given several times.
        embedding
            An embedding file, or the output folder of a run.
        pretrained_model_name_or_path
            Diffusers folder, hub id or .safetensors file. Default: the model the concept was learned on.
        output
            The picture to write: one row for each prompt.
        num_images
            Pictures for each prompt.
        num_inference_steps
            Denoising steps.
        guidance_scale
            Classifier-free guidance. Default: the pipeline's own.
        seed
            Picture i is drawn with seed + i.
        """
        generate_command(
            prompt,
            embedding,
            pretrained_model_name_or_path,
            output,
            num_images,
            num_inference_steps,
            guidance_scale,
            seed,
        )

    @app.command
    def doctor():
        """Print versions, GPUs and which backend serves each op: what a bug report needs."""
        doctor_command()

    return app


def doctor_command() -> None:
    from dti_fast.doctor import report

    print(report())


def train_command(config) -> None:
    from rich.console import Console

    from dti_fast.trainer.loop import train

    result = train(config)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    norms = ", ".join(f"{m:.3f}" for m in result.magnitudes)
    console.print(f"Learned {result.placeholder} (norm {norms}). Files in {config.output_dir}:")
    for path in [*result.embedding_paths, *([result.preview_path] if result.preview_path else []), result.log_path]:
        console.print(f"  {path.name}")
    console.print(
        f'Use it: dti-fast generate --embedding {config.output_dir} --prompt "a photo of a {result.placeholder}"'
    )
    if len(result.embedding_paths) > 1 and config.pooling == "eos":
        console.print(
            "Text features were pooled at the end of the text, as ComfyUI and A1111 do. For the same in diffusers "
            "load it with dti_fast.load_embedding(pipeline, path): a stock SDXL pipeline pools at the placeholder."
        )


def generate_command(prompts, embedding, model, output, num_images, steps, guidance_scale, seed) -> None:
    from dti_fast.backbones.load import POCKET, check_model
    from dti_fast.formats import read_embeddings

    _, metadata = read_embeddings(embedding)
    model = model or metadata.get("base_model") or POCKET
    check_model(model)
    if output.suffix.lower() != ".png" or not output.parent.is_dir():
        raise UserError(f"--output must be a .png file in a folder that exists, got {str(output)!r}")
    if num_images < 1 or steps < 1:
        raise UserError("--num_images and --num_inference_steps must be at least 1")
    import torch

    from dti_fast.backbones.load import load_backbone
    from dti_fast.formats import load_embedding
    from dti_fast.trainer.loop import pick_precision
    from dti_fast.trainer.preview import POCKET_GUIDANCE, generate, grid, save_picture

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_backbone(model, pick_precision("auto", device), device).pipeline
    token = load_embedding(pipeline, embedding, pooling=metadata.get("pooling", "eos"))
    if guidance_scale is None and model == POCKET:
        guidance_scale = POCKET_GUIDANCE
    rows = []
    for prompt in prompts:
        prompt = prompt.replace("{}", token)
        if token not in prompt:
            warnings.warn(f"the prompt {prompt!r} does not contain {token}", stacklevel=2)
        rows.append((prompt, generate(pipeline, prompt, num_images, seed, steps, guidance_scale)))
    picture = (
        rows[0][1][0] if len(rows) == num_images == 1 else grid(rows, cell=max(128, min(512, rows[0][1][0].width)))
    )
    save_picture(picture, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
