"""A tiny model with what other tokenizers have: byte fallback, BOS by the post-processor, two end tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.config.presets import preset
from model.causal_lm import CausalLM
from model.checkpoints.pretrained import RandomSource, save_pretrained

MODEL = preset("tiny").model
UNKNOWN, BOS, END, TURN_END = range(4)
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
GENERATION: dict[str, Any] = {
    "bos_token_id": BOS,
    "eos_token_id": [END, TURN_END],
    "pad_token_id": END,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "repetition_penalty": 1.1,
    "max_new_tokens": 7,
}
_WORDS = ("def", "self", "return", "the", "cat", "sat")


def save_foreign_model(directory: Path, *, seed: int = 0) -> Path:
    """Write a random model with such a tokenizer, two end tokens and defaults of generation."""
    model = CausalLM(MODEL).eval()
    model.load(RandomSource(MODEL, seed))
    save_pretrained(model, directory)
    write_foreign_files(directory)
    return directory


def write_foreign_files(directory: Path) -> None:
    """Write the files beside the weights; config.json gets ids, and a key that only others know."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(_tokenizer(), ensure_ascii=False))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    change_json(directory / "tokenizer_config.json", described)
    change_json(directory / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})
    change_json(directory / "generation_config.json", GENERATION)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    ids = {"bos_token_id": BOS, "eos_token_id": [END, TURN_END], "pad_token_id": END}
    change_json(directory / "config.json", {**ids, "attention_dropout": 0.0, "use_cache": True})


def change_json(file: Path, values: dict[str, Any]) -> None:
    """Set keys of a JSON file, which is made if it is not there."""
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**old, **values}, indent=1))


def _tokenizer() -> dict[str, Any]:
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    merges: list[list[str]] = []
    for word in _WORDS:
        for start in ("▁", ""):
            made = start or word[0]
            for letter in word if start else word[1:]:
                if made + letter not in names:
                    merges.append([made, letter])
                    names.append(made + letter)
                made += letter
    beginning = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for id, name in enumerate(SPECIAL)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": beginning,
            "pair": [*beginning, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: id for id, name in enumerate(names)},
            "merges": merges,
        },
    }
