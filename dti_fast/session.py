"""A session: one model, loaded once, that learns any number of concepts and draws them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dti_fast.backbones import Backbone
from dti_fast.backbones.load import check_model, load_backbone
from dti_fast.devices import pick_device, pick_precision, precision_name
from dti_fast.drawing import draw
from dti_fast.errors import UserError
from dti_fast.formats import read_embeddings
from dti_fast.frozen.quantise import PRECISIONS
from dti_fast.loss import Consistency
from dti_fast.memory.budget import Budget, free_memory
from dti_fast.memory.estimator import Estimator, precisions
from dti_fast.memory.plan import GIB, MODES
from dti_fast.pipelines import lora_of
from dti_fast.tokens import TokenEmbedding
from dti_fast.trainer.config import Settings, TrainConfig
from dti_fast.trainer.loggers import Logger, Loggers, make_logger
from dti_fast.trainer.result import Result
from dti_fast.trainer.run import Cancel, Job, prepare, run


class Session:
    """Holds a model between runs.

        with dti_fast.Session("sdxl", device="cuda:0", vram=12) as session:
            result = session.learn(config)
            pictures = session.draw(["a photo of {}"], concept=result)

    The model is loaded when it is first needed, and let go at the end of the block.  After `learn` and `draw` it is as
    it was before: stock classes, tokens, attention, pooling, no LoRA; also after an error.

    Args:
        model: a diffusers folder, hub id, .safetensors file, or "pocket".
        device, mixed_precision, base_precision, quantised_cache, prediction_type, variant, vram: as in `TrainConfig`;
            a configuration that is learned here leaves these out, or has the same.

    Raises:
        UserError: for a model or device that is plainly not there.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        mixed_precision: str = "auto",
        base_precision: str | None = None,
        quantised_cache: Path | None = None,
        prediction_type: str | None = None,
        variant: str | None = None,
        vram: float | None = None,
    ):
        check_model(model)
        self.device = pick_device(device)
        self.dtype = pick_precision(mixed_precision, self.device)
        self._settings: dict[str, Any] = {
            "pretrained_model_name_or_path": model, "device": device, "mixed_precision": mixed_precision,
            "base_precision": base_precision, "quantised_cache": quantised_cache, "prediction_type": prediction_type,
            "variant": variant, "vram": vram,
        }  # fmt: skip
        self._loaded: tuple[Backbone, str | None] | None = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception) -> None:
        self._loaded = None

    @property
    def backbone(self) -> Backbone:
        """The model, loaded by now; where --base_precision auto has not been decided by a run, not quantised."""
        base_precision = self._settings["base_precision"]
        return self._load(base_precision if base_precision in PRECISIONS else None, Loggers([]))

    def learn(self, config: TrainConfig, *, loggers: Sequence[Logger] = (), cancel: Cancel | None = None) -> Result:
        """Learn a concept from the pictures that `config` names; writes its files to `config.output_dir`.

        Args:
            loggers: hear what happens, beside log.jsonl.
            cancel: once it is set, the run stops after the present step and leaves a checkpoint.

        Raises:
            UserError: for bad input, before anything is written where that is possible.
        """
        told = Loggers(loggers)
        job = prepare(self._with_own_settings(config))
        try:
            told.phase("planning")
            budget = self._budget(job, told)
            backbone = self._load(budget.base_precision, told)
        finally:
            told.phase("")
        chosen: dict[str, Any] = {
            "mixed_precision": precision_name(self.dtype),
            "base_precision": budget.base_precision,
        }
        if budget.base_precision is None:
            chosen["quantised_cache"] = None  # auto has not needed it
        return run(replace(job, config=replace(job.config, **chosen)), backbone, budget, loggers, cancel)

    def draw(
        self,
        prompts: Sequence[str],
        *,
        concept: Result | str | Path | None = None,
        count: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: int | None = None,
    ) -> list[list[Image.Image]]:
        """`count` pictures for each prompt, in which {} or the concept's own token stands for it.

        Args:
            concept: what `learn` returned, or an embedding file, or the output folder of a run.
            seed: picture i of every prompt starts from noise of seed + i.
            steps, guidance_scale, size: None for the model's own.

        Raises:
            UserError: if the concept is for another kind of model.
        """
        settings = {"steps": steps, "guidance_scale": guidance_scale, "size": size}
        if concept is None:
            return [draw(self.backbone, prompt, count, seed, **settings) for prompt in prompts]
        if isinstance(concept, Result):
            token, vectors, folder = concept.placeholder, concept.vectors, concept.log_path.parent
            pooling = concept.pooling
        else:
            vectors, metadata = read_embeddings(Path(concept))
            token, folder, pooling = metadata["token"], Path(concept), metadata.get("pooling", "eos")
        with self._concept(token, vectors, pooling), lora_of(self.backbone.pipeline, folder):
            named = [prompt.replace("{}", token) for prompt in prompts]
            return [draw(self.backbone, prompt, count, seed, **settings) for prompt in named]

    @contextmanager
    def _concept(self, token: str, vectors: list[Tensor], pooling: str) -> Iterator[None]:
        """The model with a concept, and without it afterwards."""
        backbone = self.backbone
        widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in backbone.text_encoders]
        if widths != [v.shape[1] for v in vectors]:
            raise UserError(
                f"{token} is {[v.shape[1] for v in vectors]} numbers wide, but this model's words are {widths}: it was "
                "learned on another kind of model"
            )
        installed: list[TokenEmbedding] = []
        backbone.set_pooling(pooling)
        try:
            for encoder, tokenizer, rows in zip(backbone.text_encoders, backbone.tokenizers, vectors, strict=True):
                installed.append(TokenEmbedding.install(encoder, tokenizer, token, init=rows, magnitude="class"))
            yield
        finally:
            for embedding in reversed(installed):
                embedding.uninstall()
            backbone.set_pooling("reference")

    def _with_own_settings(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the session's model; UserError if it names another."""
        defaults = {f.name: f.default for f in fields(TrainConfig)}
        for name, own in self._settings.items():
            if getattr(config, name) not in (defaults[name], own):
                raise UserError(
                    f"this session has {name} {own}, not {getattr(config, name)}; leave it out, or make another"
                )
        return replace(config, **self._settings)

    def _budget(self, job: Job, told: Loggers) -> Budget:
        """The plan of a run, for the precision of the model if it is loaded."""
        config = job.config
        allowed = precisions(config.base_precision, self.dtype)
        if self._loaded is not None:
            allowed = precisions(self._loaded[1], self.dtype)
        limit = None
        if config.vram is not None:
            limit = config.vram * GIB
        elif self.device.type == "cuda":
            limit = free_memory(self.device)
        return Budget(
            estimator_of(config, self.dtype), allowed, config.attention, limit, config.vram is not None, told.message
        )

    def _load(self, base_precision: str | None, told: Loggers) -> Backbone:
        if self._loaded is None:
            told.phase("loading the model")
            settings = self._settings
            backbone = load_backbone(
                settings["pretrained_model_name_or_path"], self.dtype, self.device, base_precision=base_precision,
                quantised_cache=settings["quantised_cache"], prediction_type=settings["prediction_type"],
                variant=settings["variant"],
            )  # fmt: skip
            self._loaded = backbone, base_precision
        return self._loaded[0]


def estimator_of(config: Settings, dtype) -> Estimator:
    """What counts the run."""

    def extend(backbone: Backbone, embeddings: list[TokenEmbedding]) -> Consistency | None:
        from dti_fast.trainer.parts.ancillary import Ancillary

        ancillary = Ancillary(config, backbone, embeddings)
        ancillary.begin(config.lora_start_step, 1.0)
        return ancillary.consistency

    return Estimator(
        config.pretrained_model_name_or_path,
        dtype,
        batch=config.train_batch_size,
        resolution=config.resolution,
        attention=config.attention,
        modes=MODES if config.recompute is None else (config.recompute,),
        previews=config.num_validation_images > 0,
        extend=extend if config.lora_rank or config.train_magnitude else None,
    )


def train(config: TrainConfig, *, loggers: Sequence[Logger] | None = None, cancel: Cancel | None = None) -> Result:
    """Learn one concept in a session of its own, as `dti-fast train` does; see `Session.learn`.

    `loggers` are by default the console alone.
    """
    config = config.resolved()
    with Session(
        config.pretrained_model_name_or_path, device=config.device, mixed_precision=config.mixed_precision,
        base_precision=config.base_precision, quantised_cache=config.quantised_cache,
        prediction_type=config.prediction_type, variant=config.variant, vram=config.vram,
    ) as session:  # fmt: skip
        return session.learn(config, loggers=[make_logger("console")] if loggers is None else loggers, cancel=cancel)
