"""TrainConfig, what is asked of a run, from which the command line is made; Settings, what the run then has."""

import json
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from dti_fast.backbones.load import check_model
from dti_fast.backbones.pocket import Pocket
from dti_fast.errors import UserError
from dti_fast.formats import check_token
from dti_fast.frozen.quantise import PRECISIONS, check_bitsandbytes
from dti_fast.limits import check_limits

_essentials = Group("Essentials", sort_key=0)
_training = Group("Training", sort_key=1)
_machine = Group("Model, memory and speed", sort_key=2)
_output = Group("Previews and checkpoints", sort_key=3)
_ancillary = Group("LoRA and magnitudes", sort_key=4)
_ablations = Group("Ablations and the methods to compare with", sort_key=5)

# Settings that may differ between a checkpoint and the run that resumes it.
_FREE_ON_RESUME = {
    "output_dir", "save_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "logging_steps", "validation_prompt", "validation_steps", "num_validation_images", "train_data_dir",
    "pretrained_model_name_or_path", "quantised_cache", "gradient_checkpointing", "recompute", "attention",
    "cuda_graph", "vram", "device", "overwrite", "variant",
}  # fmt: skip

# Settings that depend on the method, with its defaults: the paper's for the methods it compares with.  A method does
# nothing with a setting that it does not list.
_ADAMW = {"learning_rate": 0.02, "lr_scheduler": "constant", "adam_weight_decay": 1e-2}
METHODS = {
    "dti": {
        "learning_rate": 0.04, "lr_scheduler": "cosine", "magnitude": "mean",
        "optimizer": "rsgd", "kappa_mode": "absolute", "kappa": 1e-4, "beta": 0.0,
        "momentum": 0.0, "per_sample_normalisation": False,
    },
    "ti": _ADAMW,
    "ti-rescaled": {**_ADAMW, "magnitude": "mean"},
    "crossinit": {**_ADAMW, "reg_lambda": 1e-5},
}  # fmt: skip


@Parameter(name="*")
@dataclass(kw_only=True, frozen=True)
class TrainConfig:
    """What is asked of a training run; flags, config-file keys and these fields have the same names.

    `resolved` makes the `Settings` of a run of it.
    """

    pretrained_model_name_or_path: Annotated[str | None, Parameter(group=_essentials)] = None
    """Diffusers folder, hub id or .safetensors file. Default: the bundled pocket model, or SDXL if
    --train_data_dir is given."""
    train_data_dir: Annotated[Path | None, Parameter(group=_essentials)] = None
    """Folder of 3 to 6 pictures; a .txt beside a picture is its caption. Default: a bundled creature."""
    placeholder_token: Annotated[str | None, Parameter(group=_essentials)] = None
    """The new word, bracketed and lower case. Default: `<concept>`."""
    initializer_token: Annotated[str | None, Parameter(group=_essentials)] = None
    """A word or phrase for what the pictures show; its direction is the start and the prior's mean. Needed with
    pictures of your own."""
    resolution: Annotated[int | None, Parameter(group=_essentials)] = None
    """Side of the square training pictures in pixels. Default: the model's own."""
    max_train_steps: Annotated[int, Parameter(group=_essentials)] = 400
    """Optimizer steps."""
    output_dir: Annotated[Path, Parameter(group=_essentials)] = Path("dti-output")
    """Where embeddings, preview, log, configuration and checkpoints go."""
    vram: Annotated[float | None, Parameter(group=_essentials)] = None
    """GiB of GPU memory to keep within, by --recompute and by taking a batch in several passes, which changes nothing
    but rounding. See dti-fast plan. Default: what the GPU has free."""
    resume_from_checkpoint: Annotated[str | None, Parameter(group=_essentials)] = None
    """A checkpoint file, or "latest" for the newest in the output folder."""

    learnable_property: Annotated[Literal["object", "style"], Parameter(group=_training)] = "object"
    """Which prompt templates to train with when there are no captions."""
    num_vectors: Annotated[int | None, Parameter(group=_training)] = None
    """Learned vectors. Default: one for each token of the initializer."""
    train_batch_size: Annotated[int, Parameter(group=_training)] = 4
    """Pictures in a forward pass."""
    gradient_accumulation_steps: Annotated[int, Parameter(group=_training)] = 1
    """Forward passes in an optimizer step."""
    learning_rate: Annotated[float | None, Parameter(group=_training)] = None
    """For dti every step turns each vector by arctan of this. The default is 0.04, the paper's 0.01 times its batch
    of 4; for the paper's run, --lr_scheduler constant and a batch of 4. For the other methods, AdamW's: 0.02."""
    lr_scheduler: Annotated[Literal["constant", "cosine"] | None, Parameter(group=_training)] = None
    """Learning-rate schedule. The paper's is constant; for dti the default is cosine. On the pocket model the two
    come out alike (docs/evidence.md)."""
    lr_warmup_steps: Annotated[int, Parameter(group=_training)] = 0
    """Steps of linear warm-up."""
    seed: Annotated[int, Parameter(group=_training)] = 42
    """Seed of every random draw."""
    deterministic: Annotated[bool, Parameter(group=_training)] = False
    """On a GPU, repeat bit for bit (slower). A CPU always does, at a fixed number of threads."""

    device: Annotated[str, Parameter(group=_machine)] = "auto"
    """auto, cpu, cuda, cuda:N, mps or xpu; auto is the first GPU there is."""
    mixed_precision: Annotated[Literal["auto", "no", "fp16", "bf16"], Parameter(group=_machine)] = "auto"
    """Precision of the frozen model; auto is bf16 on a GPU, fp16 where bf16 is slow, fp32 on a CPU."""
    base_precision: Annotated[Literal["auto", "int8", "nf4"] | None, Parameter(group=_machine)] = None
    """How the frozen model's weights are stored. Default: as they compute (--mixed_precision). int8 halves and nf4
    quarters its matrices; nf4 is approximate (docs/quantisation.md). Both need bitsandbytes. auto takes one of them if
    nothing else fits --vram."""
    quantised_cache: Annotated[Path | None, Parameter(group=_machine)] = None
    """Folder that keeps the model as --base_precision int8 or nf4 stored it: the next start is faster."""
    recompute: Annotated[Literal["none", "geglu", "block"] | None, Parameter(group=_machine)] = None
    """What the backward pass computes again to save memory: nothing; the widest layers (a tenth more time, a little
    over half of the memory); or every block (over a third more work, a tenth of the memory). Default: what --vram
    asks for, block by block; nothing without it."""
    gradient_checkpointing: Annotated[bool, Parameter(group=_machine, show=False)] = False
    """diffusers' name for --recompute block."""
    attention: Annotated[Literal["auto", "sdpa", "xformers", "math"], Parameter(group=_machine)] = "auto"
    """Attention of the frozen model; auto is PyTorch's scaled_dot_product_attention."""
    cuda_graph: Annotated[Literal["off", "on"], Parameter(group=_machine)] = "off"
    """Capture the step as a CUDA graph, so that a GPU waits less between kernels. Off by default until a GPU has shown
    that the results are the same."""
    variant: Annotated[str | None, Parameter(group=_machine)] = None
    """Which weights of a diffusers folder to load, such as fp16. Default: the plain ones, or what there is."""
    prediction_type: Annotated[Literal["epsilon", "v_prediction"] | None, Parameter(group=_machine)] = None
    """What the model was trained to predict, where its files do not say. Default: what they say; for a single file,
    v_prediction if it is an SD 2.x and epsilon otherwise."""

    overwrite: Annotated[bool, Parameter(group=_output)] = False
    """Replace the run that the output folder holds."""
    validation_prompt: Annotated[list[str] | None, Parameter(group=_output, consume_multiple=False)] = None
    """Preview prompt with {} for the concept; may be given several times."""
    num_validation_images: Annotated[int, Parameter(group=_output)] = 4
    """Preview pictures for each prompt; 0 makes no preview."""
    validation_steps: Annotated[int | None, Parameter(group=_output)] = None
    """Steps between previews. Default: only one at the end."""
    logging_steps: Annotated[int, Parameter(group=_output)] = 10
    """Steps between lines of log.jsonl. Only these, checkpoints and previews make the run wait for the device."""
    save_steps: Annotated[int | None, Parameter(group=_output)] = None
    """Steps between embeddings written to folders such as step-000100. Default: only the one at the end."""
    checkpointing_steps: Annotated[int, Parameter(group=_output)] = 100
    """Steps between checkpoints."""
    checkpoints_total_limit: Annotated[int, Parameter(group=_output)] = 3
    """Checkpoints to keep."""

    lora_rank: Annotated[int, Parameter(group=_ancillary)] = 0
    """Also learn LoRA layers of this rank in the UNet's attention; 0 is none. Needs bitsandbytes and peft."""
    lora_alpha: Annotated[float | None, Parameter(group=_ancillary)] = None
    """The LoRA's output is multiplied by alpha / rank. Default: the rank."""
    lora_learning_rate: Annotated[float, Parameter(group=_ancillary)] = 5e-5
    """Learning rate of the LoRA under AdamW with 8-bit states; follows --lr_scheduler."""
    lora_start_step: Annotated[int, Parameter(group=_ancillary)] = 1
    """The first step at which the LoRA learns; before it, it is inert and frozen."""
    dco_beta: Annotated[float, Parameter(group=_ancillary)] = 0.0
    """Train with Direct Consistency Optimization, which holds the LoRA near the base model; the paper's value is
    1000, 0 is off. Costs one more forward pass."""
    train_magnitude: Annotated[bool, Parameter(group=_ancillary)] = False
    """Also learn the norm of each vector, with a prior around the vocabulary's. Needs bitsandbytes."""
    magnitude_learning_rate: Annotated[float, Parameter(group=_ancillary)] = 1e-3
    """Learning rate of the logarithms of the norms; follows --lr_scheduler."""
    magnitude_prior: Annotated[float, Parameter(group=_ancillary)] = 1e-4
    """Weight of the prior on the norms; more keeps them closer to those of words."""

    method: Annotated[Literal["dti", "ti", "ti-rescaled", "crossinit"], Parameter(group=_ablations)] = "dti"
    """dti learns a direction. The others are what the paper compares it with: Textual Inversion, the same with its norm
    set to --magnitude afterwards, and Cross Initialization (docs/methods.md)."""
    magnitude: Annotated[float | Literal["mean", "min", "max", "class"] | None, Parameter(group=_ablations)] = None
    """Norm of the learned embedding: of the vocabulary's norms the mean, min or max; the initializer's own
    (class); or a number. Default: mean. For dti and ti-rescaled."""
    optimizer: Annotated[Literal["rsgd", "adamw"] | None, Parameter(group=_ablations)] = None
    """For dti: Riemannian SGD, the default, or Adam with projection to the sphere."""
    kappa: Annotated[float | None, Parameter(group=_ablations)] = None
    """For dti: concentration of the von Mises-Fisher prior around the initializer; more keeps closer to it.
    Default: 1e-4, or 0.1 if relative."""
    kappa_mode: Annotated[Literal["absolute", "relative"] | None, Parameter(group=_ablations)] = None
    """For dti: relative multiplies kappa by the norm of each vector's gradient, so that it does not depend on the
    scale of the loss. Default: absolute."""
    beta: Annotated[float | None, Parameter(group=_ablations)] = None
    """For dti with rsgd: decay of the running mean of squared gradient norms; the default, 0, normalises by the
    present norm alone."""
    momentum: Annotated[float | None, Parameter(group=_ablations)] = None
    """For dti with rsgd: decay of the running mean of gradients, carried along the sphere, by which a step goes. The
    default, 0, goes by the present gradient alone."""
    per_sample_normalisation: Annotated[bool | None, Parameter(group=_ablations)] = None
    """For dti with rsgd: bring each picture's gradient to length one before they are added, so that no noise level
    outweighs another. Not the paper's; with momentum a run needs fewer pictures (docs/methods.md)."""
    adam_weight_decay: Annotated[float | None, Parameter(group=_ablations)] = None
    """Weight decay of the learned vectors, for the methods other than dti. Default: 0.01."""
    reg_lambda: Annotated[float | None, Parameter(group=_ablations)] = None
    """For crossinit: weight of the mean squared distance to the start. Default: 1e-5."""
    pooling: Annotated[Literal["eos", "reference"], Parameter(group=_ablations)] = "eos"
    """Where SDXL's pooled text features are taken: at the end of the text, or as the official code does."""
    scale_lr: Annotated[bool, Parameter(group=_ablations)] = False
    """Multiply the learning rate by batch size and accumulation steps, as diffusers does."""

    def resolved(self) -> "Settings":
        """These settings with every default filled in.

        Raises:
            UserError: for a setting out of range, settings that contradict each other, or a model that plainly does not
                exist.
        """
        values = {f.name: getattr(self, f.name) for f in fields(TrainConfig)}
        check_limits(values)
        if self.pretrained_model_name_or_path is None:
            values["pretrained_model_name_or_path"] = Pocket.name if self.train_data_dir is None else "sdxl"
        model = values["pretrained_model_name_or_path"]
        if self.train_data_dir is None:
            if model != Pocket.name:
                raise UserError("--train_data_dir is missing: give a folder of 3 to 6 pictures of the concept")
            values["train_data_dir"] = Pocket.concept
        if self.placeholder_token is None:
            values["placeholder_token"] = "<concept>"
        check_token(values["placeholder_token"], "--placeholder_token")
        values["initializer_token"] = self._initializer(model, values["placeholder_token"])
        values |= self._method_settings()
        self._check_ancillary()
        if self.lora_rank and self.lora_alpha is None:
            values["lora_alpha"] = float(self.lora_rank)
        if self.gradient_checkpointing:
            if self.recompute not in (None, "block"):
                raise UserError(
                    f"--gradient_checkpointing is --recompute block; it contradicts --recompute {self.recompute}"
                )
            values["recompute"] = "block"
        if self.base_precision == "auto" or self.base_precision in PRECISIONS:
            check_bitsandbytes(self.base_precision)
        elif self.quantised_cache is not None:
            raise UserError("--quantised_cache is for --base_precision int8 or nf4")
        check_model(model)
        # Absolute, so that the configuration written beside the output works from any folder.
        values["train_data_dir"] = Path(values["train_data_dir"]).absolute()
        if self.quantised_cache is not None:
            values["quantised_cache"] = self.quantised_cache.absolute()
        if Path(model).exists() and model != Pocket.name:
            values["pretrained_model_name_or_path"] = str(Path(model).absolute())
        if self.output_dir.resolve() == values["train_data_dir"].resolve():
            raise UserError("--output_dir is the folder of the pictures: the next run would learn this one's preview")
        return Settings(**values)

    def _initializer(self, model: str, placeholder: str) -> str:
        initializer = self.initializer_token
        if initializer is None and model == Pocket.name:
            return Pocket.initializer
        if initializer is None or not initializer.strip() or initializer == placeholder:
            wrong = (
                "missing"
                if initializer is None
                else "the same as --placeholder_token"
                if initializer.strip()
                else "empty"
            )
            raise UserError(
                f"--initializer_token is {wrong}: name what the pictures show, such as --initializer_token dog"
            )
        return initializer

    def _method_settings(self) -> dict:
        """The settings of `METHODS`, with the defaults of this method; None for those that it does not use."""
        defaults, choice = dict(METHODS[self.method]), f"--method {self.method}"
        if self.method == "dti" and self.optimizer == "adamw":
            for name in ("beta", "momentum", "per_sample_normalisation"):
                del defaults[name]
            choice += " --optimizer adamw"
        if self.kappa_mode == "relative":
            defaults["kappa"] = 0.1
        names = {name for settings in METHODS.values() for name in settings}
        for name in sorted(names - set(defaults)):
            if getattr(self, name) is not None:
                raise UserError(f"--{name} does nothing with {choice}; leave it out")
        return {name: v if getattr(self, name) is None else getattr(self, name) for name, v in defaults.items()}

    def _check_ancillary(self) -> None:
        """Raise a UserError for settings of LoRA or magnitudes that are off, or that need a missing package."""
        switches = {"lora_rank": ("lora_alpha", "lora_learning_rate", "lora_start_step", "dco_beta"),
                    "train_magnitude": ("magnitude_learning_rate", "magnitude_prior")}  # fmt: skip
        defaults = {f.name: f.default for f in fields(self)}
        for switch, dependents in switches.items():
            for name in dependents:
                if not getattr(self, switch) and getattr(self, name) != defaults[name]:
                    raise UserError(f"--{name} does nothing without --{switch}")
        if self.cuda_graph == "on" and (self.lora_rank or self.train_magnitude):
            switch = "--lora_rank" if self.lora_rank else "--train_magnitude"
            raise UserError(
                f"{switch} waits for the device once in a step, which a CUDA graph cannot: drop --cuda_graph"
            )
        if self.train_magnitude and self.method != "dti":
            raise UserError(f"--train_magnitude does nothing with --method {self.method}, whose norms are free")
        if self.lora_start_step > self.max_train_steps:
            raise UserError(
                f"--lora_start_step {self.lora_start_step} is past --max_train_steps {self.max_train_steps}"
            )
        for package in ("bitsandbytes", "peft"):
            switch = "--lora_rank" if self.lora_rank else "--train_magnitude"
            wanted = self.lora_rank or (self.train_magnitude and package == "bitsandbytes")
            if wanted and find_spec(package) is None:
                raise UserError(f"{switch} needs the package {package}: pip install {package}")


@dataclass(kw_only=True, frozen=True)
class Settings(TrainConfig):
    """The settings of a run, with every default filled in: what `TrainConfig.resolved` makes.

    None is left where the run does without: the settings in `METHODS` that the method does not use, `lora_alpha`
    without a LoRA; `resolution`, `prediction_type` and `num_vectors` if the model and the initializer decide;
    `recompute`, `vram` and `base_precision` if nothing is to be saved; and what is not asked for (`quantised_cache`,
    `save_steps`, `validation_prompt`, `validation_steps`, `resume_from_checkpoint`).
    """

    pretrained_model_name_or_path: str = field()
    train_data_dir: Path = field()
    placeholder_token: str = field()
    initializer_token: str = field()
    learning_rate: float = field()
    lr_scheduler: Literal["constant", "cosine"] = field()

    @property
    def effective_learning_rate(self) -> float:
        return self.learning_rate * (self.samples_per_step if self.scale_lr else 1)

    @property
    def samples_per_step(self) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps

    def trajectory(self) -> dict:
        """The settings that decide the result: a checkpoint is continued only under the same.

        At a constant learning rate the number of steps is none of them.
        """
        free = _FREE_ON_RESUME | ({"max_train_steps"} if self.lr_scheduler == "constant" else set())
        # Checkpoints from before these settings existed have none of them.
        later = {"momentum": self.momentum or None, "per_sample_normalisation": self.per_sample_normalisation or None}
        return {k: v for k, v in (asdict(self) | later).items() if k not in free}

    def to_dict(self) -> dict:
        """Names and values as config files have them, for a run from the start; those that are None are left out."""
        kept = {
            name: value for name, value in asdict(self).items() if name not in ("resume_from_checkpoint", "overwrite")
        }
        return {name: str(v) if isinstance(v, Path) else v for name, v in kept.items() if v is not None}

    def to_toml(self) -> str:
        """`to_dict` as `--config` reads it."""
        return "".join(f"{name} = {json.dumps(v, ensure_ascii=False)}\n" for name, v in self.to_dict().items())
