"""A folder of pictures, checked and decoded."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dti_fast.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True)
class Picture:
    """A picture that could be read, and the caption in the `.txt` file beside it, if there is one."""

    path: Path
    caption: str | None


def find_pictures(folder: Path) -> list[Picture]:
    """The readable pictures in `folder`, sorted by name; hidden files are ignored.

    Pictures that cannot be read are named in a warning and skipped.

    Raises:
        UserError: if there is no such folder, or no picture in it that can be read.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}; --train_data_dir takes a folder of 3 to 6 pictures")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise UserError(f"{str(folder)!r} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    pictures, broken = [], []
    for path in files:
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # Pillow raises many kinds for a broken file
            broken.append(path.name)
            warnings.warn(f"skipping {path.name}: it cannot be read as a picture ({error})", stacklevel=2)
            continue
        pictures.append(Picture(path, _read_caption(path.with_suffix(".txt"))))
    if not pictures:
        raise UserError(f"no picture in {str(folder)!r} can be read; broken: {', '.join(broken)}")
    return pictures


def _read_caption(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig").strip() if path.is_file() else None
    except UnicodeDecodeError:
        raise UserError(f"{str(path)!r} is not UTF-8 text; save it as such") from None


def load_pictures(pictures: list[Picture], resolution: int) -> tuple[Tensor, Tensor]:
    """Decode once: turned as EXIF says, shorter side to `resolution`, centre square.

    Transparent parts become white.

    Returns:
        pixels: float32 `[N, 3, resolution, resolution]` in [-1, 1].
        sizes: int64 `[N, 6]`, SDXL's micro-conditioning: original height and width, top and left of the crop
            (in pixels of the resized picture), target height and width.
    """
    pixels, sizes = [], []
    for picture in pictures:
        with Image.open(picture.path) as opened:
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
        width, height = image.size
        scale = resolution / min(width, height)
        resized = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
        if resized != image.size:
            image = image.resize(resized, Image.Resampling.BICUBIC)
        left, top = (resized[0] - resolution) // 2, (resized[1] - resolution) // 2
        image = image.crop((left, top, left + resolution, top + resolution))
        pixels.append(torch.from_numpy(np.asarray(image) / np.float32(127.5) - 1).permute(2, 0, 1))
        sizes.append((height, width, top, left, resolution, resolution))
    return torch.stack(pixels), torch.tensor(sizes)
