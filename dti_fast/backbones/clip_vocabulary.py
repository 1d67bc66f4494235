"""CLIP tokenizer files from a list of byte-pair merges."""

import json
from collections.abc import Sequence
from pathlib import Path

SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")


def byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in vocabulary order.

    Printable Latin-1 bytes stand for themselves and come first; the others are shifted past 255.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def write_clip_vocabulary(folder: Path, merges: Sequence[tuple[str, str]]) -> None:
    """Write `vocab.json` and `merges.txt`: bytes, bytes that end a word, merges, special tokens."""
    characters = byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges), *SPECIAL_TOKENS]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
