"""Directional Textual Inversion in a plain PyTorch loop, for Stable Diffusion 1.x and 2.x.

    python examples/plain_pytorch.py --model MODEL_FOLDER --pictures FOLDER --output dog.safetensors

Five lines, marked `# dti-fast`, are all that the method takes; the rest is what any such loop has.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from safetensors.torch import save_file

from dti_fast import SphericalSGD, TokenEmbedding  # dti-fast

TEMPLATES = ("a photo of a {}", "a close-up photo of a {}", "a good photo of the {}", "a picture of one {}")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="diffusers folder or hub id")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of 3 to 6 pictures")
    parser.add_argument("--output", type=Path, default="learned_embeds.safetensors")
    parser.add_argument("--placeholder", default="<concept>")
    parser.add_argument("--initializer", default="dog", help="a word or two for what the pictures show")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of autocast")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = PRECISIONS[options.precision]
    torch.manual_seed(0)

    pipeline = StableDiffusionPipeline.from_pretrained(options.model, safety_checker=None).to(device)
    tokenizer, text_encoder, vae, unet = pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet
    for module in (text_encoder, vae, unet):
        module.requires_grad_(False).eval()
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)

    size = (options.resolution, options.resolution)
    suffixes = (".png", ".jpg", ".jpeg", ".webp")
    files = [path for path in sorted(options.pictures.iterdir()) if path.suffix.lower() in suffixes]
    pictures = [ImageOps.fit(ImageOps.exif_transpose(Image.open(path)).convert("RGB"), size) for path in files]
    with torch.no_grad():
        pixels = VaeImageProcessor().preprocess(pictures).to(device)
        latents = torch.cat([vae.encode(p).latent_dist.mean for p in pixels.split(1)]) * vae.config.scaling_factor

    concept = TokenEmbedding.install(text_encoder, tokenizer, options.placeholder, init=options.initializer)  # dti-fast
    optimizer = SphericalSGD([concept.directions], lr=0.04, kappa=1e-4, mu=concept.mu)  # dti-fast
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    prompts = [concept.expand(t.format(options.placeholder)) for t in TEMPLATES]  # dti-fast
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)

    for step in range(1, options.steps + 1):
        x = latents[torch.randint(len(latents), (options.batch,), device=device)]
        t = torch.randint(schedule.config.num_train_timesteps, (options.batch,), device=device)
        noise = torch.randn_like(x)
        target = noise if schedule.config.prediction_type == "epsilon" else schedule.get_velocity(x, noise, t)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            text = text_encoder(ids[torch.randint(len(ids), (options.batch,), device=device)])[0]
            prediction = unet(schedule.add_noise(x, noise, t), t, text).sample
        loss = F.mse_loss(prediction.float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step % 50 == 0 or step == options.steps:
            print(f"step {step}: loss {loss.item():.4f}")

    learned = concept.vectors().detach().cpu()  # dti-fast
    save_file({options.placeholder: learned}, options.output, metadata={"format": "pt"})
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
