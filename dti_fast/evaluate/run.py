"""An evaluation from start to end: `dti-fast evaluate`."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from dti_fast.backbones.load import load_backbone
from dti_fast.backbones.pocket import Pocket
from dti_fast.errors import UserError
from dti_fast.evaluate import protocol, report
from dti_fast.evaluate.concepts import Concept, EvaluateConfig, read_concepts
from dti_fast.evaluate.statistics import bootstrap
from dti_fast.limits import check_limits
from dti_fast.pocket import bench
from dti_fast.progress import track
from dti_fast.trainer.output import check_output


def check_pocket_settings(config: EvaluateConfig) -> None:
    """Raise a UserError for a setting that pocket-bench, which is frozen, does not use."""
    for field in fields(config):
        used = field.name in ("pretrained_model_name_or_path", "train_data_dir", "output_dir")
        if not used and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name} does nothing for concepts of the pocket model; leave it out")


def evaluate(paths: Sequence[Path], config: EvaluateConfig) -> dict:
    """Draw and score concepts; writes results.json, results.md, sheet.png and, for real models, all pictures.

    Concepts of the pocket model are measured by pocket-bench, all others by the paper's protocol.

    Returns:
        What results.json holds: for each concept and prompt set the mean scores, and over concepts their means with
        95 % bootstrap intervals.

    Raises:
        UserError: for bad input, before anything is drawn where that is possible.
    """
    check_limits(vars(config))
    if not config.seeds:
        raise UserError("--seeds is empty; give one seed or several")
    concepts = read_concepts(paths, config)
    pocket = {concept.model == Pocket.name for concept in concepts}
    if len(pocket) > 1:
        raise UserError("concepts of the pocket model and of real models are measured differently; evaluate them apart")
    check_output(config.output_dir)
    if pocket == {True}:
        check_pocket_settings(config)
        results, rows = _measure_on_pocket(concepts)
        summary = {"protocol": bench.SCORES, "version": bench.VERSION}
    else:
        results, rows = protocol.measure(concepts, config)
        summary = {
            "protocol": {
                "subject": f"cosine to the pictures{' under their masks' if config.mask_dir else ''}, {config.dino}",
                "text": f"probability of the prompt, {config.siglip}",
            },
            "seeds": list(config.seeds),
        }
    sets = dict.fromkeys(name for of_concept in results.values() for name in of_concept)
    summary["concepts"] = results
    summary["means"] = {
        name: {
            score: bootstrap([r[name][score] for r in results.values() if name in r])._asdict()
            for score in summary["protocol"]
        }
        for name in sets
    }
    report.write(summary, rows, config.output_dir)
    return summary


def _measure_on_pocket(concepts: Sequence[Concept]) -> tuple[dict, list]:
    """As `protocol.measure`, by pocket-bench."""
    pipeline = load_backbone(Pocket.name, torch.float32, torch.device("cpu")).pipeline
    results, rows = {}, []
    for concept in track(concepts, "measuring"):
        results[concept.name], drawn = bench.measure(pipeline, concept.pictures, concept.folder, concept.vectors[0])
        rows += [(f"{concept.name}, {name}", pictures) for name, pictures in drawn.items()]
    return results, rows
