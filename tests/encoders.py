"""Tiny text encoders with random weights whose tokenizers differ from CLIP's: Gemma 2, Qwen 3 and T5.

All have more rows than words, as the published ones do.  Gemma's and Qwen's tokenizers have a token for a lone space
and make a word's first space a part of it; Gemma's embedding scales its rows; T5's is held in two places.
"""

import json
import string

import torch
from tiny import WORDS
from tokenizers import pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT = [" ".join(WORDS.split())] * 20 + [f"a photo of a {word} on the {word}" for word in WORDS.split()] * 10


def _pairs(backend) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a trained byte-pair encoding."""
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def gemma():
    backend = GemmaTokenizer()._tokenizer
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training: merges stay within words
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=800, special_tokens=special))
    vocabulary, merges = _pairs(backend)
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, padding_side="right", add_bos_token=True)
    config = Gemma2Config(
        vocab_size=len(tokenizer) + 12, hidden_size=16, head_dim=8, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, num_hidden_layers=2, query_pre_attn_scalar=8, sliding_window=16,
    )  # fmt: skip
    return Gemma2Model(config), tokenizer


def qwen():
    backend = Qwen2Tokenizer()._tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet))
    vocabulary, merges = _pairs(backend)
    words = {word: i for i, word in enumerate([*(w for w in vocabulary if w != "<|endoftext|>"), "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(vocab=words, merges=merges)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 267, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config), tokenizer


def t5():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS.split()]
    pieces += [(c, -8.0) for c in string.ascii_letters + string.digits + ".,:>-_'()"] + [("<extra_id_0>", 0.0)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=1)
    config = T5Config(
        vocab_size=len(tokenizer) + 28, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config), tokenizer


def make(name: str):
    """A frozen text encoder and its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, tokenizer = {"gemma": gemma, "qwen": qwen, "t5": t5}[name]()
    return encoder.requires_grad_(False).eval(), tokenizer
