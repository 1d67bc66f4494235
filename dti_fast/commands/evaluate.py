"""`dti-fast evaluate`: how good learned concepts are."""

from pathlib import Path

from dti_fast.evaluate.concepts import EvaluateConfig
from dti_fast.evaluate.report import markdown
from dti_fast.evaluate.run import evaluate as evaluate_concepts


def evaluate(*concepts: Path, settings: EvaluateConfig | None = None) -> None:
    """Measure learned concepts: how like their pictures, and how true to prompts, are drawings of them?

    Those of real models are scored by DINOv2 and SigLIP, as in the paper; those of the bundled pocket model by
    pocket-bench, which takes none of the settings for them.

    Parameters
    ----------
    concepts
        Embedding files, or output folders of runs. Default: dti-output.
    """
    settings = settings or EvaluateConfig()
    print(markdown(evaluate_concepts(concepts or [Path("dti-output")], settings)))
    print(f"wrote results.md, results.json and sheet.png to {settings.output_dir}")
