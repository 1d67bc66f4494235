"""Which of the method's claims hold on the pocket model?  `python -m benchmarks.evidence --work DIR`.

One resumable command: runs and measurements that are finished, a JSON line each in DIR/units.jsonl, are not repeated.
At the end it writes benchmarks/results/evidence.json, the figures in docs/evidence/ and docs/evidence.md, whose numbers
all come from that file.  Everything is measured by pocket-bench (dti_fast/pocket/bench.py).
"""

import argparse
import itertools
import json
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _evidence_report
from benchmarks._harness import provenance
from benchmarks.pocket_samples import through_autoencoder
from dti_fast.backbones.pocket import Pocket
from dti_fast.blend import blend
from dti_fast.files import write_text
from dti_fast.formats import read_embeddings
from dti_fast.pocket import bench as pocket_bench
from dti_fast.pocket import world
from dti_fast.pocket.bench import CREATURES, HELD_OUT_PLACES, Clauses, PocketBench, Scale
from dti_fast.pocket.recognise import FEATURES, Recognition
from dti_fast.session import Session
from dti_fast.trainer.config import TrainConfig

SEEDS = (0, 1, 2)
STEPS = 400
MEASURED = (100, 200, 400)
ABLATION_STEPS = 100  # DTI is by then where it stays (see the main runs)
ONE_PLACE_STEPS = 200
SMOKE_STEPS = 4
METHODS = {"DTI": {"method": "dti"}, "TI": {"method": "ti"}, "CrossInit": {"method": "crossinit"}}
PATH = tuple(i / 6 for i in range(7))  # along a slerp
KAPPAS = (0.0, 1e-2, 1e-1)  # the default, 1e-4, is among the main runs
RELATIVE_KAPPAS = (0.1, 0.3)  # shares of the gradient's norm
MAGNITUDES = (2, 5, 10, 0.25)  # in mean norms of the vocabulary; 1 is among the main runs
INFLATED = (4, 16, 64)  # times the norm that a word was learned with
SCALES = (0.5, 1, 2, 4, 8, 16, 32, 64)  # norms of a token, in mean norms of the vocabulary
PROBE_PROMPT = "a photo of a {} wearing a crown on the moon"


@dataclass(frozen=True)
class Run:
    """One training run and the steps at which it is measured."""

    label: str
    creature: int
    seed: int
    settings: dict
    steps: int
    measured: tuple[int, ...]
    training_set: str

    @property
    def key(self) -> str:
        words = [self.label, self.training_set, str(self.creature), f"seed{self.seed}", f"{self.steps}steps"]
        return "-".join(words).replace(" ", "_")


def runs(creatures: tuple[int, ...], mean_norm: float, smoke: bool = False) -> Iterator[Run]:
    """All trainings, the most wanted first: a collection that was cut short has whole comparisons."""

    def each(label: str, steps: int, measured: tuple[int, ...], seed: int = 0, training_set="varied", **settings):
        settings = {"lr_scheduler": "constant"} | settings
        for creature in creatures:
            yield Run(label, creature, seed, settings, steps, measured, training_set)

    if smoke:
        for label, method in METHODS.items():
            yield from each(label, SMOKE_STEPS, (SMOKE_STEPS // 2, SMOKE_STEPS), **method)
        return
    for label, method in METHODS.items():
        yield from each(label, STEPS, MEASURED, **method)
    for label, method in METHODS.items():
        yield from each(label, ONE_PLACE_STEPS, (ONE_PLACE_STEPS,), training_set="one-place", **method)
    short = ABLATION_STEPS, (ABLATION_STEPS,)
    for factor in MAGNITUDES:
        yield from each(f"DTI magnitude {factor:g}x", *short, method="dti", magnitude=factor * mean_norm)
    for kappa in KAPPAS:
        yield from each(f"DTI kappa {kappa:g}", *short, method="dti", kappa=kappa)
    yield from each("DTI cosine", STEPS, (STEPS,), method="dti", lr_scheduler="cosine")
    yield from each("DTI AdamW", *short, method="dti", optimizer="adamw")
    for kappa in RELATIVE_KAPPAS:
        yield from each(f"DTI relative kappa {kappa:g}", *short, method="dti", kappa_mode="relative", kappa=kappa)
    yield from each("DTI magnitude class", *short, method="dti", magnitude="class")
    yield from each("DTI 2 vectors", *short, method="dti", num_vectors=2)
    yield from each("TI 2 vectors", *short, method="ti", num_vectors=2)
    yield from each("DTI 2 vectors kappa 0.1", *short, method="dti", num_vectors=2, kappa=0.1)
    yield from each("DTI 2 vectors magnitude 10x", *short, method="dti", num_vectors=2, magnitude=10 * mean_norm)
    yield from each("TI at 0.1", STEPS, (STEPS,), method="ti", learning_rate=0.1)
    for label, method in METHODS.items():
        yield from each(label, STEPS, (STEPS,), SEEDS[1], **method)
    yield from each("TI cosine", STEPS, (STEPS,), method="ti", lr_scheduler="cosine")
    for label, method in METHODS.items():
        yield from each(label, STEPS, (STEPS,), SEEDS[2], **method)


class Evidence:
    """The collected measurements, by key, and what is needed to make more."""

    def __init__(self, work: Path):
        self.work, self.path = work, work / "units.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.units = {unit["key"]: unit for unit in map(json.loads, lines)}
        self._benches: dict[int, PocketBench] = {}
        self.session = Session(Pocket.name, device="cpu")

    @property
    def pipeline(self):
        return self.session.backbone.pipeline

    @cached_property
    def mean_norm(self) -> float:
        """Of the vocabulary's embeddings: what `--magnitude mean` takes."""
        return self.pipeline.text_encoder.get_input_embeddings().weight.detach().norm(dim=-1).mean().item()

    def bench(self, creature: int) -> PocketBench:
        if creature not in self._benches:
            self._benches[creature] = PocketBench(self.pipeline, world.unseen(creature))
        return self._benches[creature]

    def once(self, key: str, measure: Callable[[], dict]) -> dict:
        """The unit `key`, measured now unless it is on file."""
        if key not in self.units:
            unit = {"key": key} | measure()
            with self.path.open("a") as file:
                file.write(json.dumps(unit) + "\n")
            self.units[key] = unit
            print(json.dumps(unit)[:240], flush=True)
        return self.units[key]

    def learned(self, run: Run) -> dict[int, Tensor]:
        """By measured step the learned vectors `[K, D]`; trained now unless that is on file."""
        folder = self.work / "runs" / run.key
        pictures = self.work / "pictures" / f"{run.creature}-{run.training_set}"
        saved = {s: folder if s == run.steps else folder / f"step-{s:06d}" for s in run.measured}
        if not (folder / "learned_embeds.safetensors").exists():
            pocket_bench.write_training_set(pictures, run.creature, run.training_set)
            config = TrainConfig(
                train_data_dir=pictures, output_dir=folder, overwrite=True, seed=run.seed, max_train_steps=run.steps,
                save_steps=min(run.measured), num_validation_images=0, placeholder_token=pocket_bench.WORD,
                initializer_token=Pocket.initializer, **run.settings,
            )  # fmt: skip
            self.session.learn(config)
        return {step: read_embeddings(path)[0][0] for step, path in saved.items()}

    def log(self, run: Run) -> list[dict]:
        lines = (self.work / "runs" / run.key / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def measure(self, run: Run) -> None:
        """Scores at every measured step; of TI also with the norm set back to the vocabulary's mean."""
        wanted = [(run.label, step) for step in run.measured]
        if run.settings.get("method") == "ti":
            wanted += [(f"{run.label}-rescaled", step) for step in run.measured]
        if all(self._key(run, label, step) in self.units for label, step in wanted):
            return
        learned, bench = self.learned(run), self.bench(run.creature)
        curve = {line["step"]: line["magnitude"] for line in self.log(run)}
        for label, step in wanted:
            vectors = learned[step]
            if label.endswith("-rescaled"):
                vectors = F.normalize(vectors, dim=-1) * self.mean_norm

            def unit(vectors=vectors, label=label, step=step) -> dict:
                pictures = bench.pictures(pocket_bench.WORD, vectors)
                return {
                    "label": label, "creature": run.creature, "seed": run.seed, "step": step,
                    "training_set": run.training_set, "norm": vectors.norm(dim=-1).mean().item(),
                    "scores": bench.scores(pictures),
                    "norms": {str(s): _mean(m) for s, m in curve.items() if s <= step} if label == run.label else {},
                }  # fmt: skip

            self.once(self._key(run, label, step), unit)

    def _key(self, run: Run, label: str, step: int) -> str:
        return f"{run.key}:{label}@{step}"

    def baselines(self, creature: int) -> None:
        """The initial word, a description in the model's words, and renderings that went through the autoencoder."""
        who, bench = world.unseen(creature), self.bench(creature)
        for label, word in (("initial word", "creature"), ("description", who.description())):

            def unit(label=label, word=word) -> dict:
                return {"label": label, "creature": creature, "scores": bench.scores(bench.pictures(word))}

            self.once(f"{label}:{creature}", unit)
        self.once(
            f"autoencoded:{creature}",
            lambda: {"label": "autoencoded", "creature": creature, "scores": bench.scores(true_pictures(bench, who))},
        )

    def inflate(self, creature: int, word: Tensor) -> None:
        """Scores of a learned word `[K, D]` whose norm is raised afterwards: what the norm does, and nothing else."""
        for factor in INFLATED:

            def unit(factor=factor) -> dict:
                pictures = self.bench(creature).pictures(pocket_bench.WORD, factor * word)
                label = f"DTI drawn at {factor:g}x"
                return {"label": label, "creature": creature, "scores": self.bench(creature).scores(pictures)}

            self.once(f"inflated:{factor:g}:{creature}", unit)

    def unguide(self, label: str, creature: int, subject: str, word: Tensor | None = None) -> None:
        """Scores without classifier-free guidance, which otherwise brings every clause out."""

        def unit() -> dict:
            bench = self.bench(creature)
            pictures = bench.pictures(subject, word, guidance=1.0)
            return {"label": f"{label} without guidance", "creature": creature, "scores": bench.scores(pictures)}

        self.once(f"unguided:{label}:{creature}", unit)

    def follow(self, label: str, first: int, second: int, vectors: list[Tensor]) -> None:
        """Similarity to both ends on the path between two learned words (`dti_fast.blend`)."""
        clauses = [Clauses(place=place) for place in HELD_OUT_PLACES]

        def unit() -> dict:
            scales = [Scale(world.unseen(c), clauses) for c in (first, second)]
            prompts, drawn, signatures = [c.prompt(pocket_bench.WORD) for c in clauses], [], []
            for t in PATH:
                word = blend([vectors[0]], [vectors[1]], t)[0]
                drawn.append(pocket_bench.draw(self.pipeline, prompts, range(len(prompts)), word))
                seen = Recognition(drawn[-1]).probabilities
                signatures.append(np.concatenate([seen[f].mean(0) for f in FEATURES]))
            moves = [float(np.linalg.norm(b - a)) for a, b in itertools.pairwise(signatures)]
            return {
                "label": label, "ends": [first, second], "path": list(PATH),
                "to_first": [scales[0].similarity(p) for p in drawn],
                "to_second": [scales[1].similarity(p) for p in drawn],
                "fidelity": [pocket_bench.prompt_fidelity(p, clauses) for p in drawn],
                "largest_move": max(moves) / max(sum(moves), 1e-9),
            }  # fmt: skip

        self.once(f"path:{label}:{first}-{second}", unit)


def _mean(values: list[float] | float) -> float:
    return float(np.mean(values))


def true_pictures(bench: PocketBench, creature: world.Creature) -> dict[str, np.ndarray]:
    """Renderings of the benchmark's scenes, through the model's autoencoder."""
    rng, result = random.Random(9), {}
    for name, clauses in pocket_bench.PROMPTS.items():
        scenes = [world.Scene(creature, c.accessory, c.place, c.style or "photo") for c in clauses]
        result[name] = through_autoencoder(bench.pipeline.vae, np.stack([world.render(s, rng) for s in scenes]))
    return result


def text_states(text_encoder, ids: Tensor, vectors: Tensor, token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Residual stream `[B, S, D]` before the first and after the last layer, and the first layer's normalised input.

    Token `token_id` in `ids` `[B, S]` stands for `vectors` `[B, D]`.
    """
    model = getattr(text_encoder, "text_model", text_encoder)
    table, layers = text_encoder.get_input_embeddings(), model.encoder.layers
    seen = {}

    def replace_token(_module, _arguments, rows):
        return torch.where((ids == token_id).unsqueeze(-1), vectors.unsqueeze(1), rows)

    def keep(name):
        def hook(_module, _arguments, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_input(_module, arguments):
        seen["first"] = arguments[0]

    hooks = [
        table.register_forward_hook(replace_token),
        layers[0].layer_norm1.register_forward_pre_hook(keep_input),
        layers[0].layer_norm1.register_forward_hook(keep("normalised")),
        layers[-1].register_forward_hook(keep("last")),
    ]
    try:
        with torch.no_grad():
            text_encoder(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen["first"], seen["last"], seen["normalised"]


def position_effect(text_encoder, vectors: Tensor, mean_norm: float) -> dict:
    """Effect I: what is left of the position after the first LayerNorm, by norm of the token.

    `signal` is the mean over pairs of positions of |LN(m v + p_i) - LN(m v + p_j)|.  `probe` is the accuracy of a
    linear classifier of the position (ridge regression on 2,000 of the vocabulary's own embeddings at all positions)
    for directions that it was not fitted on: 200 further words and `vectors` `[N, D]`.
    """
    model = getattr(text_encoder, "text_model", text_encoder)
    norm = model.encoder.layers[0].layer_norm1
    positions = model.embeddings.position_embedding.weight.detach()
    table = text_encoder.get_input_embeddings().weight.detach()
    shuffled = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    count = len(positions)

    @torch.no_grad()
    def inputs(words: Tensor) -> Tensor:
        return norm(words[:, None] + positions)  # [N, P, D]

    @torch.no_grad()
    def with_bias(features: Tensor) -> Tensor:
        return F.pad(features.flatten(0, 1), (0, 1), value=1.0).double()

    fitted = with_bias(inputs(shuffled[:2000]))
    targets = torch.eye(count, dtype=torch.float64).repeat(2000, 1)
    weights = torch.linalg.solve(fitted.T @ fitted + torch.eye(fitted.shape[1]), fitted.T @ targets)

    def accuracy(words: Tensor) -> float:
        guesses = (with_bias(inputs(words)) @ weights).argmax(1)
        return (guesses == torch.arange(count).repeat(len(words))).double().mean().item()

    rows = {"scale": list(SCALES), "signal": [], "probe_words": [], "probe_learned": []}
    for scale in SCALES:
        words = F.normalize(shuffled[2000:2200], dim=-1) * scale * mean_norm
        learned = F.normalize(vectors, dim=-1) * scale * mean_norm
        features = inputs(learned)
        rows["signal"].append(torch.stack([torch.pdist(f).mean() for f in features]).mean().item())
        rows["probe_words"].append(accuracy(words))
        rows["probe_learned"].append(accuracy(learned))
    return rows


def rotation_effect(text_encoder, tokenizer, vectors: Tensor, mean_norm: float) -> dict:
    """Effect II: by how many degrees the layers turn the residual stream at the token, by its norm.

    Also how much of the rest of the prompt reaches the token: the angle between its final states in two prompts that
    differ in the words before it.
    """
    marker = tokenizer.convert_tokens_to_ids("creature</w>")
    prompts = [PROBE_PROMPT.format("creature"), "a blueprint of a creature wearing a crown on the moon"]
    ids = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    rows = {"scale": list(SCALES), "turn_degrees": [], "context_degrees": []}
    for scale in SCALES:
        turns, contexts = [], []
        for direction in F.normalize(vectors, dim=-1):
            word = (direction * scale * mean_norm).expand(2, -1)
            first, last, _ = text_states(text_encoder, ids, word, marker)
            at = (ids == marker).nonzero()[:, 1]
            before, after = (states[torch.arange(2), at] for states in (first, last))
            turns.append(F.cosine_similarity(before, after).clamp(-1, 1).acos().rad2deg().mean().item())
            contexts.append(F.cosine_similarity(after[:1], after[1:]).clamp(-1, 1).acos().rad2deg().item())
        rows["turn_degrees"].append(_mean(turns))
        rows["context_degrees"].append(_mean(contexts))
    return rows


def collect(evidence: Evidence, creatures: tuple[int, ...], smoke: bool) -> None:
    for creature in creatures:
        evidence.baselines(creature)
    planned = runs(creatures, evidence.mean_norm, smoke)
    for run in itertools.islice(planned, len(METHODS) * len(creatures)):
        evidence.measure(run)
    words = final_words(evidence, creatures, smoke)
    for first, second in zip(creatures, (*creatures[1:], creatures[0]), strict=True):
        for label in ("DTI", "TI", "TI-rescaled"):
            evidence.follow(label, first, second, [words[label][first], words[label][second]])
    for creature in creatures[: 1 if smoke else None]:
        evidence.inflate(creature, words["DTI"][creature])
        evidence.unguide("initial word", creature, "creature")
        for label in words:
            evidence.unguide(label, creature, pocket_bench.WORD, words[label][creature])
    for run in planned:
        evidence.measure(run)


def final_words(evidence: Evidence, creatures: tuple[int, ...], smoke: bool) -> dict[str, dict[int, Tensor]]:
    """By method and creature what was learned at the end from varied pictures with the first seed."""
    words = {label: {} for label in (*METHODS, "TI-rescaled")}
    for run in runs(creatures, evidence.mean_norm, smoke):
        if run.label in METHODS and run.training_set == "varied" and run.seed == SEEDS[0]:
            words[run.label][run.creature] = evidence.learned(run)[run.measured[-1]]
    words["TI-rescaled"] = {c: F.normalize(v, dim=-1) * evidence.mean_norm for c, v in words["TI"].items()}
    return words


def text_effects(evidence: Evidence, words: dict[str, dict[int, Tensor]]) -> dict:
    """Effects I and II on the pocket model's text encoder, for the directions that DTI learned."""
    encoder, tokenizer = evidence.pipeline.text_encoder, evidence.pipeline.tokenizer
    learned = torch.cat(list(words["DTI"].values()))
    return {
        "mean_norm": evidence.mean_norm,
        "position": position_effect(encoder, learned, evidence.mean_norm),
        "rotation": rotation_effect(encoder, tokenizer, learned, evidence.mean_norm),
    }


def draw_strips(
    evidence: Evidence, summary: dict, words: dict[str, dict[int, Tensor]], folder: Path, smoke: bool
) -> None:
    """The same prompts and noise for every method, for the creature in the middle of the field; and a path."""
    gains = summary["differences"]["DTI - TI"]["complex"]["fidelity"]["creatures"]
    middle = int(sorted(gains, key=gains.get)[len(gains) // 2])
    bench, clauses = evidence.bench(middle), pocket_bench.PROMPTS["complex"]
    chosen = [4 * i + (i + shift) % 4 for shift in (0, 3) for i in range(4)]  # every place and every style, twice
    true = true_pictures(bench, world.unseen(middle))["complex"]
    rows = [("true, decoded", true[chosen])]
    rows += [
        (label, bench.pictures(pocket_bench.WORD, words[label][middle])["complex"][chosen])
        for label in ("TI", "TI-rescaled", "CrossInit", "DTI")
    ]
    for run in () if smoke else runs((middle,), evidence.mean_norm):
        if run.label in ("TI 2 vectors", "DTI 2 vectors"):
            pictures = bench.pictures(pocket_bench.WORD, evidence.learned(run)[run.steps])
            rows.append((run.label, pictures["complex"][chosen]))
    headings = [clauses[i].prompt("<concept>") for i in chosen]
    _evidence_report.strip(rows, headings, folder / "strip.png")
    features = {c: world.unseen(c).features() for c in words["DTI"]}
    ends = max(itertools.pairwise(features), key=lambda pair: np.linalg.norm(features[pair[0]] - features[pair[1]]))
    rows = []
    for label in ("DTI", "TI"):
        pair = [words[label][c] for c in ends]
        rows.append((label, along(evidence.pipeline, pair, Clauses(place=HELD_OUT_PLACES[0]))))
    _evidence_report.strip(rows, [f"t = {t:.2f}" for t in PATH], folder / "path.png")


def along(pipeline, pair: list[Tensor], clauses: Clauses) -> np.ndarray:
    """One picture of `clauses` for each word on the path between two, from the same noise."""
    prompt = [clauses.prompt(pocket_bench.WORD)]
    return np.concatenate([pocket_bench.draw(pipeline, prompt, [0], blend([pair[0]], [pair[1]], t)[0]) for t in PATH])


def report(evidence: Evidence, creatures: tuple[int, ...], smoke: bool, results: Path, docs: Path) -> None:
    words = final_words(evidence, creatures, smoke)
    steps = SMOKE_STEPS if smoke else STEPS
    origin = provenance(torch.device("cpu")) | {"pocket_bench": pocket_bench.VERSION}
    origin |= {"ablation_steps": ABLATION_STEPS, "one_place_steps": ONE_PLACE_STEPS}
    summary = _evidence_report.summarise(evidence.units, text_effects(evidence, words), origin, steps)
    figures = docs / "evidence"
    for folder in (results, figures):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(summary, indent=1) + "\n", results / "evidence.json")
    _evidence_report.figures(summary, figures)
    draw_strips(evidence, summary, words, figures, smoke)
    if not smoke:
        _evidence_report.render_page(summary, docs / "evidence.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and finished measurements")
    parser.add_argument("--smoke", action="store_true", help="two creatures, a few steps; writes to DIR alone")
    parser.add_argument("--report", action="store_true", help="only the page, of what has been measured so far")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    root = arguments.work if arguments.smoke else Path(__file__).parent.parent
    creatures = CREATURES[:2] if arguments.smoke else CREATURES
    if arguments.smoke:
        pocket_bench.STEPS = 2  # pictures of noise: it is the machinery that is tried
    evidence = Evidence(arguments.work)
    if not arguments.report:
        collect(evidence, creatures, arguments.smoke)
    report(evidence, creatures, arguments.smoke, root / "benchmarks" / "results", root / "docs")


if __name__ == "__main__":
    main()
