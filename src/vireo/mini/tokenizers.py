"""CLIP and T5 tokenizers whose vocabulary is the words of the mini world, built in code.

The files are the ones that `from_pretrained` reads, a few kilobytes in all. Every word of the world is one token; any
other text falls back to letters, so a prompt of one's own never fails.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from vireo.mini import scenes

CLIP_LENGTH = 77
T5_LENGTH = 226  # CogVideoX's maximum


def words() -> list[str]:
    """All words that texts of the world are made of, in alphabetical order."""
    verbs = "drop cover with the move"
    return sorted({*verbs.split(), *scenes.SHAPES, *scenes.COLOURS, *" ".join(scenes.DIRECTIONS).split()})


def write_clip_tokenizer(folder: Path) -> None:
    """`vocab.json`, `merges.txt` and `tokenizer_config.json` of a CLIPTokenizer that pads to 77.

    A text encoder for it needs `vocab_size`, `bos_token_id` and `eos_token_id` from the tokenizer: CLIPTextModel takes
    its pooled output at the end token, whose default number is beyond this vocabulary.
    """
    merges: list[tuple[str, str]] = []
    for word in sorted(words(), key=len, reverse=True):  # else "ri", of "right", would be joined first in "triangle"
        letters = [*word[:-1], word[-1] + "</w>"]
        while len(letters) > 1:
            pair = (letters[0], letters[1])
            letters[:2] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
    symbols = _byte_symbols()
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(dict.fromkeys(vocabulary))})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": CLIP_LENGTH,
            "do_lower_case": True,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    )


def write_t5_tokenizer(folder: Path, more_words: Sequence[str] = ()) -> None:
    """`tokenizer.json` and `tokenizer_config.json` of a T5Tokenizer: unigram pieces, `</s>` ends every text.

    more_words: that are one token each, beside those of `words`.
    Capital letters are tokens of their own, characters beyond ASCII become `<unk>`.
    """
    special = ["<pad>", "</s>", "<unk>"]  # 0, 1 and 2, as in every T5
    pieces = [(token, 0.0) for token in special] + [("▁", -6.0)]
    pieces += [(f"▁{word}", -3.0) for word in sorted({*words(), *more_words})]
    pieces += [(chr(code), -8.0) for code in range(33, 127)]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
    second_text = {"Sequence": {"id": "B", "type_id": 0}}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": number, "content": token, **plain} for number, token in enumerate(special)],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [text, end],
                "pair": [text, end, second_text, end],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
            },
            "decoder": metaspace,
            "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "T5Tokenizer",
            "model_max_length": T5_LENGTH,
            "extra_ids": 0,
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        },
    )


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + n) for n in range(len(others)))]


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
