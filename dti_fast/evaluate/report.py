"""Results of an evaluation as JSON, Markdown and a sheet of pictures."""

import json
import math
from pathlib import Path

from PIL import Image

from dti_fast.drawing import grid, save_picture
from dti_fast.files import write_text


def write(summary: dict, rows: list[tuple[str, list[Image.Image]]], folder: Path) -> None:
    """Write results.json, results.md and sheet.png.

    Args:
        summary: `concepts` by name and prompt set, `means` by prompt set and score; the rest is passed on.
        rows: labelled rows of the sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finite = {  # JSON has no NaN
        name: {s: {k: None if math.isnan(v) else v for k, v in e.items()} for s, e in of_set.items()}
        for name, of_set in summary["means"].items()
    }
    write_text(json.dumps(summary | {"means": finite}, indent=1) + "\n", folder / "results.json")
    write_text(markdown(summary), folder / "results.md")
    save_picture(grid(rows, largest=256), folder / "sheet.png")


def markdown(summary: dict) -> str:
    """A table of every concept and prompt set; of several concepts also the means with their 95 % intervals."""
    scores = list(next(iter(summary["means"].values())))
    lines = [f"| concept | prompts | {' | '.join(scores)} |", "|---" * (2 + len(scores)) + "|"]
    for name, of_concept in summary["concepts"].items():
        for set_name, values in of_concept.items():
            cells = " | ".join(f"{values[score]:.3f}" for score in scores)
            lines.append(f"| {name} | {set_name} | {cells} |")
    how = "; ".join(f"{name}: {what}" for name, what in summary["protocol"].items()) + "."
    count = len(summary["concepts"])
    if count > 1:
        for set_name, estimates in summary["means"].items():
            cells = [f"{e['mean']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for e in map(estimates.get, scores)]
            lines.append(f"| mean of {count} | {set_name} | {' | '.join(cells)} |")
        how += " In brackets: 95 % bootstrap interval over concepts."
    return "\n".join(lines) + f"\n\n{how}\n"
