"""The paper's protocol: a concept drawn for sets of prompts, compared with its pictures and with the texts.

Subject: cosine of DINOv2's class token with every training picture.  Text: SigLIP's probability of the picture with the
prompt, in which a class word stands for the concept.  Source: arXiv 2512.13672, section 4; the prompts are our own.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dti_fast.backbones.load import load_backbone
from dti_fast.data.folder import find_pictures
from dti_fast.devices import pick_device, pick_precision
from dti_fast.drawing import save_picture
from dti_fast.errors import UserError
from dti_fast.evaluate.concepts import Concept, EvaluateConfig
from dti_fast.evaluate.scorers import SubjectScorer, TextScorer, masked, open_picture
from dti_fast.files import hash_tensors, read_tensors
from dti_fast.pipelines import find_lora, load_vectors, lora_of
from dti_fast.progress import phase, track

PROMPT_FOLDER = Path(__file__).parent / "prompts"


def read_prompts(name: str, subject: str) -> list[str]:
    """The prompts of a set, or of a text file, each with a {}.

    Raises:
        UserError: if there is no such set or file, or a line has no {}.
    """
    file = PROMPT_FOLDER / f"{name}.txt" if name == "style" else PROMPT_FOLDER / f"{name}_{subject}.txt"
    if name not in ("simple", "complex", "style"):
        file = Path(name)
        if not file.is_file():
            raise UserError(f"there is no prompt set {name!r}; take simple, complex, style or a text file")
    prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = [prompt for prompt in prompts if "{}" not in prompt]
    if wrong or not prompts:
        raise UserError(f"every line of {str(file)!r} must hold a {{}} for the concept: {wrong[:1] or 'it is empty'}")
    return prompts


def references(concept: Concept) -> list[Image.Image]:
    """The concept's pictures, each times its mask if there is one."""
    pictures = []
    for picture in find_pictures(concept.pictures):
        image = open_picture(picture.path)
        mask = concept.masks and concept.masks / f"{picture.path.stem}.png"
        pictures.append(masked(image, mask) if mask and mask.is_file() else image)
    return pictures


def draw_missing(backbone, concept: Concept, token: str, sets: dict[str, list[str]], config: EvaluateConfig) -> dict:
    """Draw a concept for every prompt and seed, as far as that is not on disk; by set the tasks with their paths."""
    settings = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    settings = {key: value for key, value in settings.items() if value is not None}
    folder = config.output_dir / "pictures" / concept.name
    folder.mkdir(parents=True, exist_ok=True)
    lora = find_lora(concept.folder)
    learned = [*concept.vectors, *(read_tensors(lora)[0].values() if lora else ())]
    origin = f"{hash_tensors(learned)} {concept.model} {concept.prediction_type} {sorted(settings.items())}"
    tasks = {}
    for set_name, prompts in sets.items():
        for i, prompt in enumerate(prompts):
            for seed in config.seeds:
                identity = hashlib.sha256(f"{origin} {prompt}".encode()).hexdigest()[:8]
                path = folder / f"{Path(set_name).stem}-{i:03d}-{seed}-{identity}.png"
                tasks.setdefault(set_name, []).append((prompt, seed, path))
    missing = [task for of_set in tasks.values() for task in of_set if not task[2].exists()]
    batches = [missing[i : i + config.batch_size] for i in range(0, len(missing), config.batch_size)]
    for batch in track(batches, f"drawing {concept.name}"):
        prompts = [prompt.replace("{}", token) for prompt, _, _ in batch]
        drawn = backbone.draw(
            prompts,
            [seed for _, seed, _ in batch],
            steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )
        for (_, _, path), picture in zip(batch, drawn, strict=True):
            save_picture(picture, path)
    return tasks


def measure(concepts: Sequence[Concept], config: EvaluateConfig) -> tuple[dict, list]:
    """Draw and score concepts; their mean scores by name and prompt set, and labelled rows of pictures.

    Raises:
        UserError: for bad input, before anything is drawn where that is possible.
    """
    sets = {}
    for concept in concepts:
        chosen = config.prompts or (["style"] if concept.is_style else ["simple", "complex"])
        sets[concept.name] = {name: read_prompts(name, config.subject) for name in chosen}
    shown = {concept.name: references(concept) for concept in concepts}
    with phase("loading the evaluators"):
        subject, text = SubjectScorer(config.dino), TextScorer(config.siglip)
    device = pick_device(config.device)
    tasks = {}
    for model, kind in dict.fromkeys((concept.model, concept.prediction_type) for concept in concepts):
        with phase(f"loading {model}"):
            backbone = load_backbone(model, pick_precision("auto", device), device, prediction_type=kind)
        pipeline = backbone.pipeline
        for i, concept in enumerate(c for c in concepts if (c.model, c.prediction_type) == (model, kind)):
            token, pooling = f"<evaluated-{i}>", concept.metadata.get("pooling", "eos")
            load_vectors(pipeline, concept.vectors, token, pooling=pooling, source=concept.name)
            with lora_of(pipeline, concept.folder):
                tasks[concept.name] = draw_missing(backbone, concept, token, sets[concept.name], config)
        del backbone, pipeline  # before the evaluators come

    for scorer in (subject, text):
        scorer.model.to(device)
    results, rows = {}, []
    for concept in track(concepts, "scoring"):
        features = subject.features(shown[concept.name])
        results[concept.name] = {}
        for set_name, of_set in tasks[concept.name].items():
            pictures = [open_picture(path) for _, _, path in of_set]
            texts = [f"{prompt.replace('{}', concept.class_word)}." for prompt, _, _ in of_set]
            results[concept.name][set_name] = {
                "subject": subject.score(pictures, features).double().mean().item(),
                "text": text.score(pictures, texts).double().mean().item(),
            }
            first = [p for p, (_, seed, _) in zip(pictures, of_set, strict=True) if seed == config.seeds[0]]
            rows.append((f"{concept.name}, {set_name}", first[:: max(1, len(first) // 8)][:8]))
    return results, rows
