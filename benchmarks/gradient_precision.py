"""How well a quantised base learns: `python -m benchmarks.gradient_precision`.

First the gradient that reaches the embedding, against the same model in float32: its cosine over many draws, on the
pocket model (its own pictures and prompts) and on a shallow SDXL of real widths with random weights.  Then whole runs
on the pocket model: how far the learned direction ends from that of the float32 run, and what it is worth, measured by
the float32 model on draws that are the same for all.
"""

import argparse
import json
import math
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._harness import provenance, update_section
from dti_fast.backbones import Backbone
from dti_fast.backbones.load import load_backbone
from dti_fast.backbones.pocket import Pocket
from dti_fast.data.draws import Dataset, draw
from dti_fast.data.folder import find_pictures, load_pictures
from dti_fast.data.latents import encode_moments
from dti_fast.data.prompts import training_prompts
from dti_fast.frozen import layers
from dti_fast.frozen.engine import RECOMPUTE, optimize_frozen, restore
from dti_fast.frozen.quantise import PRECISIONS, quantise_frozen
from dti_fast.loss import diffusion_loss
from dti_fast.session import train
from dti_fast.tokens import TokenEmbedding
from dti_fast.trainer.config import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How weights are stored, and the dtype of the computation: bf16, as on a GPU.
FORMATS = {"bf16": "bf16", "fp16": "fp16", "int8": "bf16", "nf4": "bf16"}
SLOW = {"fp16"}  # convolutions on a CPU, some fifteen times: on the pocket model's gradients only
QUICK = [name for name in FORMATS if name not in SLOW]
PLACEHOLDER = "<concept>"
EXACT = 0.99  # a median cosine below this makes a format approximate
PAGE = Path("docs/quantisation.md")
HELD_OUT = 10_000_000  # the first of the draws that no run trains on


def pocket() -> tuple[Backbone, Dataset, list[TokenEmbedding]]:
    """The pocket model in float32 and its five pictures."""
    backbone = load_backbone(Pocket.name, torch.float32, torch.device("cpu"))
    pictures = find_pictures(Pocket.concept)
    prompts, per_picture = training_prompts(pictures, PLACEHOLDER, "object")
    pixels, sizes = load_pictures(pictures, backbone.default_resolution())
    embeddings = install(backbone, Pocket.initializer)
    data = Dataset(*encode_moments(backbone, pixels), sizes, backbone.tokenize(prompts), per_picture)
    return backbone, data, embeddings


def shallow_sdxl() -> tuple[Backbone, Dataset, list[TokenEmbedding]]:
    """SDXL with its widths 320 and 640, text 768 and 1280, but two blocks and two text layers; random weights."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from dti_fast.backbones.configs import config_folder
    from dti_fast.backbones.stable_diffusion_xl import StableDiffusionXL

    vae = AutoencoderKL()  # of no use here, but a pipeline has one
    torch.manual_seed(0)
    folder = config_folder("sdxl")
    config = UNet2DConditionModel.load_config(folder / "unet")
    config |= {
        "block_out_channels": (320, 640),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10),
        "transformer_layers_per_block": (1, 2),
    }
    texts = [CLIPTextConfig.from_pretrained(folder / name) for name in ("text_encoder", "text_encoder_2")]
    for text in texts:
        text.num_hidden_layers = 2
    pipeline = StableDiffusionXLPipeline(
        unet=UNet2DConditionModel.from_config(config),
        vae=vae,
        text_encoder=CLIPTextModel(texts[0]),
        text_encoder_2=CLIPTextModelWithProjection(texts[1]),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        scheduler=EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )
    backbone = StableDiffusionXL(pipeline)
    backbone.set_pooling("eos")
    embeddings = install(backbone, "dog")
    mean, std = torch.randn(4, 4, 16, 16), torch.rand(4, 4, 16, 16) * 0.1
    sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]]).expand(4, -1)
    prompts = [f"a {kind} of {PLACEHOLDER} {place}" for kind in ("photo", "painting") for place in ("", "on a beach")]
    return backbone, Dataset(mean, std, sizes, backbone.tokenize(prompts), False), embeddings


def install(backbone: Backbone, initializer: str) -> list[TokenEmbedding]:
    return [
        TokenEmbedding.install(text_encoder, tokenizer, PLACEHOLDER, init=initializer)
        for text_encoder, tokenizer in zip(backbone.text_encoders, backbone.tokenizers, strict=True)
    ]


def convert(models: list[nn.Module], name: str) -> None:
    """Put the models into a format of `FORMATS`; the directions stay float32."""
    for model in models:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[FORMATS[name]])
        if name in PRECISIONS:
            quantise_frozen(model, name)


def gradients(backbone: Backbone, data: Dataset, embeddings: list[TokenEmbedding], count: int) -> list[Tensor]:
    """Of each draw the gradient with respect to all directions, in one float64 vector."""
    path, found = backbone.path(), []
    for number in range(count):
        loss = diffusion_loss(backbone, data, path, draw(data, 1, len(path), 0, number))
        parts = torch.autograd.grad(loss, [embedding.directions for embedding in embeddings])
        found.append(torch.cat([part.flatten().double() for part in parts]))
    return found


def compare_gradients(make, formats: list[str], seeds: int) -> list[dict]:
    rows = []
    exact = gradients(*make(), seeds)
    for name in formats:
        backbone, data, embeddings = make()
        models = [backbone.denoiser, *backbone.text_encoders]
        convert(models, name)
        for recompute in RECOMPUTE:
            for model in models:
                optimize_frozen(model, recompute=recompute)
            ours = gradients(backbone, data, embeddings, seeds)
            cosines = [F.cosine_similarity(a, b, dim=0).item() for a, b in zip(ours, exact, strict=True)]
            rows.append({"base_precision": name, "recompute": recompute})
            rows[-1] |= {"median": statistics.median(cosines), "worst": min(cosines)}
            print(rows[-1], flush=True)
            for model in models:
                restore(model)
    return rows


def learn(folder: Path, steps: int, seed: int, **settings) -> Tensor:
    """Train on the pocket model; the learned vectors `[K, D]`."""
    config = TrainConfig(output_dir=folder, max_train_steps=steps, seed=seed, num_validation_images=0, **settings)
    return train(config).vectors[0]


@torch.no_grad()
def worth(vectors: Tensor, draws: int = 64) -> float:
    """Mean loss of the float32 pocket model with these vectors, over draws that no run has seen."""
    backbone, data, (embedding,) = pocket()
    embedding.directions.copy_(F.normalize(vectors, dim=1))
    path = backbone.path()
    passes = (draw(data, 4, len(path), 0, HELD_OUT + i) for i in range(draws))
    return statistics.mean(diffusion_loss(backbone, data, path, d).item() for d in passes)


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between vectors, the largest of K."""
    return math.degrees(F.cosine_similarity(a.double(), b.double(), dim=1).clamp(-1, 1).acos().max().item())


def compare_runs(steps: int) -> list[dict]:
    runs = {
        "fp32": {},
        "fp32, another seed": {"seed": 43},
        "bf16": {"mixed_precision": "bf16"},
        **{name: {"base_precision": name, "mixed_precision": FORMATS[name]} for name in PRECISIONS},
    }
    rows, exact = [], None
    for name, settings in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            vectors = learn(Path(folder), steps, **{"seed": 42, "mixed_precision": "no", **settings})
        exact = vectors if exact is None else exact
        rows.append({"run": name, "degrees": angle(vectors, exact), "loss": worth(vectors)})
        print(rows[-1], flush=True)
    start = pocket()[2][0].mu
    rows.append({"run": "the initial word", "degrees": angle(start, exact), "loss": worth(start)})
    print(rows[-1], flush=True)
    return rows


def table(result: dict) -> str:
    lines = []
    for name, title in (("pocket", "the pocket model"), ("sdxl", "a shallow SDXL with random weights")):
        part = result[name]
        lines += [
            f"Cosine between the embedding's gradient and the one in float32, {title}, {part['seeds']} draws:\n",
            "| weights in | computes in | recompute | median | worst | |",
            "|---|---|---|---|---|---|",
        ]
        for row in part["rows"]:
            form, label = row["base_precision"], "approximate" if row["median"] < EXACT else ""
            cells = [form, FORMATS[form], row["recompute"], f"{row['median']:.5f}", f"{row['worst']:.5f}", label]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    runs, commits = result["runs"], ", ".join(sorted({part["commit"] for part in result.values()}))
    lines += [
        f"Whole runs on the pocket model, {runs['steps']} steps: the angle to the direction of the float32 run, and",
        "the loss of the float32 model with what was learned, on 256 draws that no run has seen:\n",
        "| run | degrees | loss |",
        "|---|---|---|",
        *(f"| {row['run']} | {row['degrees']:.2f} | {row['loss']:.5f} |" for row in runs["rows"]),
        "",
        f"({runs['device']}, torch {runs['torch']}, commits {commits}; "
        "`python -m benchmarks.gradient_precision --update`)",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--parts", nargs="*", choices=("pocket", "sdxl", "runs"), default=("pocket", "sdxl", "runs"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gradient_precision.json"))
    parser.add_argument("--update", action="store_true", help=f"write the tables of all parts into {PAGE}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    layers.SMALL = 0  # these models are small, and the frozen layers shall be among what is measured
    seeds, steps = arguments.seeds, arguments.steps
    measure = {
        "pocket": lambda: {"seeds": seeds, "rows": compare_gradients(pocket, list(FORMATS), seeds)},
        "sdxl": lambda: {"seeds": seeds, "rows": compare_gradients(shallow_sdxl, QUICK, seeds)},
        "runs": lambda: {"steps": steps, "rows": compare_runs(steps)},
    }
    for part in arguments.parts:
        origin = provenance(torch.device("cpu"))
        found = origin | measure[part]()
        result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result | {part: found}, indent=1) + "\n")
    if arguments.update:
        update_section(PAGE, "Measured", table(json.loads(arguments.out.read_text())))


if __name__ == "__main__":
    main()
