"""diffusers' textual-inversion script, made short, with Directional Textual Inversion swapped in.

    accelerate launch examples/diffusers_textual_inversion.py \
        --pretrained_model_name_or_path MODEL_FOLDER --train_data_dir FOLDER --output_dir OUTPUT

The names and the order are those of diffusers' examples/textual_inversion/textual_inversion.py.  Lines marked
`# dti-fast` are the change; the comment above each says what they replace there.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from PIL import Image, ImageOps
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from dti_fast import SphericalSGD, TokenEmbedding, optimize_frozen  # dti-fast

TEMPLATES = ("a photo of a {}", "a close-up photo of a {}", "a good photo of the {}", "a picture of one {}")


class TextualInversionDataset(torch.utils.data.Dataset):
    """`repeats` times each picture, `[3, R, R]` in [-1, 1], with the token ids of a random template."""

    def __init__(self, data_root: Path, tokenizer, placeholder: str, size: int, repeats: int = 100):
        self.tokenizer, self.placeholder, self.size, self.repeats = tokenizer, placeholder, size, repeats
        suffixes = (".png", ".jpg", ".jpeg", ".webp")
        self.paths = [path for path in sorted(data_root.iterdir()) if path.suffix.lower() in suffixes]

    def __len__(self) -> int:
        return len(self.paths) * self.repeats

    def __getitem__(self, i: int) -> dict:
        picture = ImageOps.exif_transpose(Image.open(self.paths[i % len(self.paths)])).convert("RGB")
        picture = ImageOps.fit(picture, (self.size, self.size))
        text = random.choice(TEMPLATES).format(self.placeholder)
        ids = self.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids[0]
        return {"pixel_values": VaeImageProcessor().preprocess(picture)[0], "input_ids": ids}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default="text-inversion-model")
    parser.add_argument("--placeholder_token", default="<concept>")
    parser.add_argument("--initializer_token", default="dog")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--max_train_steps", type=int, default=500)
    parser.add_argument("--learning_rate", type=float, default=0.04)
    parser.add_argument("--lr_scheduler", default="constant")
    parser.add_argument("--lr_warmup_steps", type=int, default=0)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision
    )
    set_seed(args.seed)

    model = args.pretrained_model_name_or_path
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    noise_scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    for module in (vae, unet, text_encoder):
        module.requires_grad_(False)

    # Replaces tokenizer.add_tokens, resize_token_embeddings and the copies of the initializer's row.  After freezing.
    concept = TokenEmbedding.install(  # dti-fast
        text_encoder, tokenizer, args.placeholder_token, init=args.initializer_token
    )
    # Replaces enable_gradient_checkpointing; without checkpointing a frozen model saves less all the same.
    for module in (unet, text_encoder):
        optimize_frozen(module, recompute="block" if args.gradient_checkpointing else "none")  # dti-fast

    # Replaces AdamW over the whole vocabulary.
    optimizer = SphericalSGD([concept.directions], lr=args.learning_rate, kappa=1e-4, mu=concept.mu)  # dti-fast

    # Replaces placeholder_token = " ".join(tokenizer.convert_ids_to_tokens(placeholder_token_ids)).
    placeholder = concept.expand(args.placeholder_token)  # dti-fast
    dataset = TextualInversionDataset(args.train_data_dir, tokenizer, placeholder, args.resolution)
    dataloader = torch.utils.data.DataLoader(dataset, batch_size=args.train_batch_size, shuffle=True, drop_last=True)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    text_encoder.train()
    text_encoder, optimizer, dataloader, lr_scheduler = accelerator.prepare(
        text_encoder, optimizer, dataloader, lr_scheduler
    )
    weight_dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    unet.to(accelerator.device, dtype=weight_dtype)
    vae.to(accelerator.device, dtype=weight_dtype)

    global_step = 0
    while global_step < args.max_train_steps:
        for batch in dataloader:
            with accelerator.accumulate(text_encoder):
                with torch.no_grad():
                    latents = vae.encode(batch["pixel_values"].to(weight_dtype)).latent_dist.sample()
                latents = latents * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(
                    noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
                )
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                encoder_hidden_states = text_encoder(batch["input_ids"])[0].to(weight_dtype)
                model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
                if noise_scheduler.config.prediction_type == "epsilon":
                    target = noise
                else:
                    target = noise_scheduler.get_velocity(latents, noise, timesteps)
                loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                # The restoring of all other words' embeddings, which comes here, is gone: nothing moved them.
            if accelerator.sync_gradients:
                global_step += 1
                if global_step % 50 == 0:
                    accelerator.print(f"step {global_step}: loss {loss.item():.4f}")
                if global_step >= args.max_train_steps:
                    break

    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        # Replaces get_input_embeddings().weight[min(placeholder_token_ids) : max(placeholder_token_ids) + 1].
        learned = concept.vectors().detach().cpu()  # dti-fast
        path = args.output_dir / "learned_embeds.safetensors"
        save_file({args.placeholder_token: learned}, path, metadata={"format": "pt"})
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
