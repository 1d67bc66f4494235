"""A folder of pictures, checked and decoded."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dti_fast.errors import UserError

SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif",
}  # fmt: skip
_MASK = r"(.+)(?:-masklabel|_mask)"  # OneTrainer's and others' masks, beside the picture they are for
_OUTPUT = r"preview(-\d{6})?\.png"  # of a run, in the folder that holds its log


@dataclass(frozen=True)
class Picture:
    """A picture that could be read, and the caption in the `.txt` file beside it, if there is one."""

    path: Path
    caption: str | None

    @property
    def name(self) -> str:
        """The file's name in printable text."""
        return _printable(self.path.name)


@dataclass(frozen=True)
class Ignored:
    """A file or folder that is not trained on; both in printable text."""

    name: str
    reason: str


def find_pictures(folder: Path) -> list[Picture]:
    """The readable pictures in `folder`, sorted by name; hidden files are ignored, and others as `ignored_files` says.

    Pictures that cannot be read are named in a warning and skipped.

    Raises:
        UserError: if there is no such folder, or no picture in it that can be read.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}; --train_data_dir takes a folder of 3 to 6 pictures")
    if not _is_text(str(folder)):  # config.toml could not say where the pictures are
        raise UserError(f"the name of the folder {str(folder)!r} is not UTF-8 text; rename it")
    files, ignored = _sort(folder)
    if not files:
        found = "; ".join(f"{entry.name}: {entry.reason}" for entry in ignored[:3])
        found = f". It holds {len(ignored)} others ({found}{'; ...' if len(ignored) > 3 else ''})" if ignored else ""
        raise UserError(f"{str(folder)!r} holds no pictures ({', '.join(sorted(SUFFIXES))}){found}")
    captions = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".txt"}
    pictures, broken = [], []
    for path in files:
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # Pillow raises many kinds for a broken file
            broken.append(_printable(path.name))
            warnings.warn(f"skipping {broken[-1]}: it cannot be read as a picture ({error})", stacklevel=2)
            continue
        pictures.append(Picture(path, _read_caption(captions.get(path.stem))))
    if not pictures:
        raise UserError(f"no picture in {str(folder)!r} can be read; broken: {', '.join(broken)}")
    return pictures


def ignored_files(folder: Path, pictures: list[Picture]) -> list[Ignored]:
    """What lies in `folder`, is not hidden, and is neither one of the `pictures` found there nor a caption, and why."""
    files, ignored = _sort(folder)
    used = {picture.path for picture in pictures}
    broken = [Ignored(_printable(path.name), "cannot be read") for path in files if path not in used]
    return sorted([*ignored, *broken], key=lambda entry: entry.name)


def _sort(folder: Path) -> tuple[list[Path], list[Ignored]]:
    """The pictures to train on, by name, and what else there is."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    stems = {path.stem for path in entries if path.suffix.lower() in SUFFIXES}
    of_a_run = {"log.jsonl", "config.toml"} <= {path.name for path in entries}
    pictures, ignored = [], []
    for path in entries:
        suffix, mask = path.suffix.lower(), re.fullmatch(_MASK, path.stem, re.DOTALL)
        if path.is_dir():
            inside = sum(file.suffix.lower() in SUFFIXES for file in path.iterdir())
            reason = f"a folder with {inside} pictures; move them up, or name it" if inside else None
        elif suffix in SUFFIXES:
            reason = "a mask; masks are not used" if mask and mask[1] in stems else None
            reason = "the preview of a run" if of_a_run and re.fullmatch(_OUTPUT, path.name) else reason
            if reason is None:
                pictures.append(path)
        elif suffix == ".txt":
            reason = None if path.stem in stems else "a caption without a picture of its name"
        elif suffix in (".heic", ".heif"):
            reason = "not read by Pillow; save it as JPEG or PNG"
        elif suffix in (".caption", ".jsonl") and not of_a_run:
            reason = "captions are read from a .txt beside each picture"
        else:
            reason = "no picture"
        if reason is not None:
            ignored.append(Ignored(_printable(path.name), reason))
    return pictures, ignored


def _is_text(name: str) -> bool:
    """Whether a name is UTF-8; Python keeps the bytes of one that is not as surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _read_caption(path: Path | None) -> str | None:
    try:
        return None if path is None or not path.is_file() else path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UserError(f"{str(path)!r} is not UTF-8 text; save it as such") from None


def load_pictures(pictures: list[Picture], resolution: int) -> tuple[Tensor, Tensor]:
    """Decode once: turned as EXIF says, shorter side to `resolution`, centre square.

    Transparent parts become white.  Pictures of more than 8 bits keep their tones.

    Returns:
        pixels: float32 `[N, 3, resolution, resolution]` in [-1, 1].
        sizes: int64 `[N, 6]`, SDXL's micro-conditioning: original height and width, top and left of the crop
            (in pixels of the resized picture), target height and width.

    Raises:
        UserError: for a picture of numbers that are none.
    """
    pixels, sizes = [], []
    for picture in pictures:
        with Image.open(picture.path) as opened:
            image = _eight_bits(ImageOps.exif_transpose(opened), picture.path)
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


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """The picture with its tones in 8 bits: Pillow's own conversion would cut them off at 255.

    Integers go up to 65535, or to their maximum if that is more; floats up to 1, or 255 or 65535 if they are larger.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{str(path)!r} holds values that are not finite; save it as an 8-bit picture")
    largest = values.max()
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((white for white in whites if largest <= white), largest)
    return Image.fromarray((np.clip(values / white, 0, 1) * 255).round().astype(np.uint8))
