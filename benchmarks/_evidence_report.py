"""From the measurements of benchmarks/evidence.py to evidence.json, figures and the page."""

import statistics
from collections import defaultdict
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dti_fast.evaluate.statistics import bootstrap
from dti_fast.files import write_text
from dti_fast.pocket.bench import PROMPTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"DTI": "#1f77b4", "TI": "#d62728", "TI-rescaled": "#ff9896", "CrossInit": "#2ca02c"}
DIFFERENCES = (
    ("DTI", "TI"), ("DTI", "TI-rescaled"), ("DTI", "CrossInit"), ("TI-rescaled", "TI"),
    ("DTI cosine", "DTI"), ("TI cosine", "TI"),
)  # fmt: skip
TWO = "2 vectors"
METRICS = ("similarity", "fidelity", "features")


def estimate(by_creature: dict[int, list[float]]) -> dict:
    """Mean over creatures of the means over seeds, its interval, and the creatures' own means."""
    means = {str(creature): statistics.mean(values) for creature, values in by_creature.items()}
    return bootstrap(list(means.values()))._asdict() | {"creatures": means}


def _scores(units: list[dict]) -> dict:
    result = {}
    for prompts in PROMPTS:
        result[prompts] = {}
        for metric in METRICS:
            values = defaultdict(list)
            for unit in units:
                values[unit["creature"]].append(unit["scores"][prompts][metric])
            result[prompts][metric] = estimate(values)
    if "norm" in units[0]:
        result["norm"] = statistics.mean(unit["norm"] for unit in units)
    result["creatures"] = len({unit["creature"] for unit in units})
    result["seeds"] = len({unit.get("seed", 0) for unit in units})
    return result


def _difference(one: list[dict], other: list[dict], prompts: str, metric: str) -> dict:
    """`one` minus `other`, creature by creature, over the seeds that both have."""
    scores = [{(u["creature"], u.get("seed")): u["scores"][prompts][metric] for u in group} for group in (one, other)]
    differences = defaultdict(list)
    for key in sorted(scores[0].keys() & scores[1].keys()):
        differences[key[0]].append(scores[0][key] - scores[1][key])
    return estimate(differences)


def _changed_from(label: str) -> str:
    """The label of the runs that `label` differs from in one setting."""
    return "DTI 2 vectors" if TWO in label and label != "DTI 2 vectors" else "DTI"


def summarise(units: dict[str, dict], effects: dict, origin: dict, steps: int) -> dict:
    """Everything the page says, from the units of `benchmarks.evidence`."""
    groups, baselines, paths = defaultdict(list), defaultdict(list), defaultdict(list)
    for unit in units.values():
        if "path" in unit:
            paths[unit["label"]].append(unit)
        elif "step" in unit:
            groups[unit["label"], unit["training_set"], unit["step"]].append(unit)
        else:
            baselines[unit["label"]].append(unit)
    summary = {"origin": origin, "steps": steps, "effects": effects}
    summary["baselines"] = {label: _scores(group) for label, group in baselines.items()}
    summary["runs"] = [
        {"label": label, "training_set": training_set, "step": step} | _scores(group)
        for (label, training_set, step), group in groups.items()
    ]
    summary["norms"] = {}
    for label in ("DTI", "TI", "CrossInit"):
        curves = [u["norms"] for u in groups.get((label, "varied", steps), ())]
        if curves:
            at = sorted({int(s) for curve in curves for s in curve})
            summary["norms"][label] = {str(s): statistics.mean(c[str(s)] for c in curves if str(s) in c) for s in at}
    finals = {label: group for (label, places, step), group in groups.items() if places == "varied" and step == steps}
    summary["differences"] = {
        f"{one} - {other}": {
            prompts: {metric: _difference(finals[one], finals[other], prompts, metric) for metric in METRICS}
            for prompts in PROMPTS
        }
        for one, other in DIFFERENCES
        if one in finals and other in finals
    }
    ablation = origin["ablation_steps"]
    short = {name: group for (name, places, step), group in groups.items() if (places, step) == ("varied", ablation)}
    summary["ablation_differences"] = {
        name: {
            prompts: {metric: _difference(group, short[_changed_from(name)], prompts, metric) for metric in METRICS}
            for prompts in PROMPTS
        }
        for name, group in short.items()
        if name not in COLOURS
    }
    bare = {label.removesuffix(" without guidance"): group for label, group in baselines.items() if "without" in label}
    summary["differences_without_guidance"] = {
        f"{one} - {other}": {
            prompts: {metric: _difference(bare[one], bare[other], prompts, metric) for metric in METRICS}
            for prompts in PROMPTS
        }
        for one, other in (*DIFFERENCES, ("DTI", "initial word"), ("TI", "initial word"))
        if one in bare and other in bare
    }
    summary["gap_closed"] = {}
    for run in summary["runs"]:
        if run["step"] == steps and run["training_set"] == "varied" and baselines:
            start = summary["baselines"]["initial word"]
            summary["gap_closed"][run["label"]] = {
                prompts: statistics.median(
                    (own - start[prompts]["similarity"]["creatures"][c])
                    / (1 - start[prompts]["similarity"]["creatures"][c])
                    for c, own in run[prompts]["similarity"]["creatures"].items()
                )
                for prompts in PROMPTS
            }
    summary["seed_spread"] = {
        label: {
            prompts: {
                metric: statistics.mean(
                    statistics.stdev(values)
                    for c in {u["creature"] for u in group}
                    if len(values := [u["scores"][prompts][metric] for u in group if u["creature"] == c]) > 1
                )
                for metric in METRICS
            }
            for prompts in PROMPTS
        }
        for (label, training_set, step), group in groups.items()
        if step == steps and training_set == "varied" and len({u["seed"] for u in group}) > 1
    }
    summary["paths"] = {
        label: {
            "t": group[0]["path"],
            **{name: np.mean([u[name] for u in group], 0).tolist() for name in ("to_first", "to_second", "fidelity")},
            "largest_move": bootstrap([u["largest_move"] for u in group])._asdict(),
            "pairs": len(group),
        }
        for label, group in paths.items()
    }
    return summary


def strip(rows: list[tuple[str, np.ndarray]], columns: list[str], path: Path, scale: int = 3) -> None:
    """Rows of pictures `[N, 32, 32, 3]` with a label each, under wrapped column headings."""
    side, left, font = 32 * scale, 118, ImageFont.load_default(11)
    headings = []
    for heading in columns:
        lines = [""]
        for word in heading.split():
            if font.getlength(f"{lines[-1]} {word}") > side:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        headings.append(lines)
    top = 6 + 14 * max(map(len, headings))
    sheet = Image.new("RGB", (left + len(columns) * (side + 4), top + len(rows) * (side + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, lines in enumerate(headings):
        pen.text((left + i * (side + 4), top - 3 - 14 * len(lines)), "\n".join(lines), fill="black", font=font)
    for j, (label, pictures) in enumerate(rows):
        y = top + j * (side + 4)
        pen.text((4, y + side // 2 - 6), label, fill="black", font=ImageFont.load_default(13))
        for i, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + i * (side + 4), y))
    sheet.quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _bars(estimates: list[dict]) -> np.ndarray:
    return np.array([[e["mean"] - e["low"], e["high"] - e["mean"]] for e in estimates]).T


def plot_methods(summary: dict, path: Path) -> None:
    """Similarity over steps, and similarity against fidelity without guidance."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for axis, prompts in zip(axes, PROMPTS, strict=False):
        for label, colour in COLOURS.items():
            runs = [r for r in summary["runs"] if r["label"] == label and r["training_set"] == "varied"]
            runs.sort(key=lambda r: r["step"])
            values = [r[prompts]["similarity"] for r in runs]
            steps = [r["step"] for r in runs]
            axis.errorbar(
                steps, [v["mean"] for v in values], _bars(values), fmt="o-", color=colour, label=label, capsize=2
            )
        for label, style in (("description", "--"), ("initial word", ":")):
            level = summary["baselines"][label][prompts]["similarity"]["mean"]
            axis.axhline(level, color="black", linewidth=0.8, linestyle=style, label=label)
        axis.set(title=f"{prompts} prompts", xlabel="step", ylabel="subject similarity", ylim=(-0.05, 1))
    axes[0].legend(fontsize=8)
    for label, colour in (*COLOURS.items(), ("initial word", "black")):
        scores = summary["baselines"][f"{label} without guidance"]["complex"]
        x, y = scores["fidelity"], scores["similarity"]
        axes[2].errorbar(x["mean"], y["mean"], _bars([y]), _bars([x]), fmt="o", color=colour, label=label)
    axes[2].set(
        title="complex prompts, without guidance", xlabel="prompt fidelity", ylabel="subject similarity",
        xlim=(0.5, 1.01), ylim=(-0.05, 1),
    )  # fmt: skip
    _save(figure, path)


def plot_norms(summary: dict, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    for label, curve in summary["norms"].items():
        axis.plot([int(s) for s in curve], list(curve.values()), color=COLOURS[label], label=label)
    axis.axhline(summary["effects"]["mean_norm"], color="black", linestyle=":", label="mean of the vocabulary")
    axis.set(yscale="log", xlabel="step", ylabel="norm of the embedding")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def plot_ablations(runs: list[tuple[str, dict]], title: str, path: Path) -> None:
    """Similarity and fidelity of named settings on both prompt sets."""
    figure, axes = plt.subplots(2, 1, figsize=(10, 6), sharex=True)
    for axis, metric in zip(axes, ("similarity", "fidelity"), strict=True):
        for offset, (prompts, colour) in enumerate(zip(PROMPTS, ("#1f77b4", "#ff7f0e"), strict=True)):
            values = [run[prompts][metric] for _, run in runs]
            x = np.arange(len(runs)) + 0.12 * (2 * offset - 1)
            axis.errorbar(x, [v["mean"] for v in values], _bars(values), fmt="o", color=colour, label=prompts)
        axis.set(ylabel=metric, ylim=(0, 1.05))
        axis.grid(axis="y", alpha=0.3)
    axes[1].set_xticks(range(len(runs)), [label for label, _ in runs], rotation=30, ha="right", fontsize=8)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def plot_effects(summary: dict, path: Path) -> None:
    position, rotation = summary["effects"]["position"], summary["effects"]["rotation"]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    scale = np.array(position["scale"])
    axes[0].loglog(scale, position["signal"], "o-", label="measured")
    reference = position["signal"][-1] * scale[-1] / scale
    axes[0].loglog(scale, reference, ":", color="grey", label="proportional to 1/m")
    axes[0].set_ylabel("|LN(mv + p_i) - LN(mv + p_j)|")
    axes[1].semilogx(scale, position["probe_words"], "o-", label="other words")
    axes[1].semilogx(scale, position["probe_learned"], "o-", label="learned directions")
    axes[1].set_ylabel("accuracy of the position probe")
    axes[2].semilogx(scale, rotation["turn_degrees"], "o-", label="turned by the layers")
    axes[2].semilogx(scale, rotation["context_degrees"], "o-", label="between two prompts")
    axes[2].set_ylabel("degrees at the token")
    for axis in axes:
        axis.set_xlabel("norm of the token / mean norm")
        axis.legend(fontsize=8)
    _save(figure, path)


def plot_paths(summary: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, len(summary["paths"]), figsize=(4 * len(summary["paths"]), 3.4), sharey=True)
    for axis, (label, p) in zip(np.atleast_1d(axes), summary["paths"].items(), strict=True):
        axis.plot(p["t"], p["to_first"], "o-", label="similarity to the first")
        axis.plot(p["t"], p["to_second"], "o-", label="similarity to the second")
        axis.plot(p["t"], p["fidelity"], ":", color="grey", label="prompt fidelity")
        axis.set_title(label)
        axis.set_xlabel("t")
    np.atleast_1d(axes)[0].legend(fontsize=7)
    _save(figure, path)


def ablations(summary: dict, two_vectors: bool = False) -> list[tuple[str, dict]]:
    """The runs of DTI that differ in one setting, DTI itself first; or the methods with two vectors."""
    steps = summary["origin"]["ablation_steps"]
    runs = [(r["label"], r) for r in summary["runs"] if r["training_set"] == "varied" and r["step"] == steps]
    if two_vectors:
        return [(label, r) for label, r in runs if TWO in label]
    return [(label, r) for label, r in runs if label.startswith("DTI") and label.count(TWO) == 0]


def figures(summary: dict, folder: Path) -> None:
    plot_methods(summary, folder / "methods.png")
    plot_norms(summary, folder / "norms.png")
    plot_effects(summary, folder / "effects.png")
    plot_paths(summary, folder / "paths.png")
    if len(ablations(summary)) > 1:
        title = f"left, DTI with one setting changed; right, two vectors; {summary['origin']['ablation_steps']} steps"
        plot_ablations(ablations(summary) + ablations(summary, True), title, folder / "ablations.png")


def render_page(summary: dict, path: Path) -> None:
    """Fill benchmarks/_evidence.md.j2; every number on the page comes from `summary`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    table = {(r["label"], r["training_set"], r["step"]): r for r in summary["runs"]}

    def interval(e: dict) -> str:
        return f"{e['mean']:.2f} [{e['low']:.2f}, {e['high']:.2f}]"

    def signed(e: dict) -> str:
        return f"{e['mean']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}]"

    environment.filters |= {"interval": interval, "signed": signed, "percent": lambda x: f"{x:.0%}".replace("%", " %")}
    environment.filters |= {
        "one": lambda x: f"{x:.1f}",
        "plus": lambda x: f"{x:+.3f}",
        "two": lambda x: f"{x:.2f}",
        "three": lambda x: f"{x:.3f}",
    }
    page = environment.get_template("_evidence.md.j2").render(
        s=summary,
        run=lambda label, step, training_set="varied": table[label, training_set, step],
        ablations=ablations(summary)[1:],
        two_vectors=ablations(summary, True),
    )
    write_text(page, path)
