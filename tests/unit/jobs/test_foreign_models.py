"""Models of others: their tokens, end tokens and defaults are those of transformers, and are carried on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from errors import CheckpointError, DataError
from jobs.chat.chat_template import ChatTemplate
from jobs.checkpoints.generation_defaults import GenerationDefaults
from jobs.checkpoints.loaded_model import LoadedModel, load_model
from jobs.cli.app import app
from jobs.data.carried_files import CarriedFiles
from jobs.data.corpus import PreparedData
from jobs.data.tokenizer import load_tokenizer
from jobs.tools.convert import export_checkpoint, import_checkpoint
from jobs.tools.evaluate import judge
from jobs.tools.generate import continue_tokens, generate
from support.foreign_model import (
    BOS,
    END,
    GENERATION,
    MODEL,
    TURN_END,
    change_json,
    save_foreign_model,
    write_foreign_files,
)

transformers = pytest.importorskip("transformers")
TEXTS = [
    "def the cat",
    "",
    " a  b\n\té 🙂",
    "it ends</s> here<|im_end|>",
    "<s>and begins<|im_end|><|im_end|>x",
]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_foreign_model(tmp_path_factory.mktemp("foreign") / "model")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with the files beside the weights alone."""
    write_foreign_files(tmp_path)
    return tmp_path


def _bounded(file: Path) -> None:
    short = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    wide = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None}
    change_json(
        file, {"truncation": short, "padding": {**wide, "pad_id": 2, "pad_type_id": 0, "pad_token": "</s>"}}
    )


def _closing(file: Path) -> None:
    """A post-processor that also ends each text."""
    processor = json.loads(file.read_text())["post_processor"]
    processor["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    processor["special_tokens"]["</s>"] = {"id": "</s>", "ids": [END], "tokens": ["</s>"]}
    change_json(file, {"post_processor": processor})


@pytest.mark.parametrize(
    ("change", "closes"),
    [(None, 0), (lambda file: change_json(file, {"post_processor": None}), 0), (_bounded, 0), (_closing, 1)],
    ids=["BOS", "no post-processor", "truncation and padding", "BOS and end"],
)
def test_prompts_and_documents_are_tokens_as_transformers_makes_them(
    files: Path, change: Any, closes: int
) -> None:
    if change is not None:
        change(files / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(files)
    ours = load_tokenizer(files, MODEL.vocab_size)
    for text in TEXTS:
        # transformers gives an empty prompt no token where no post-processor adds one.
        assert ours.prompt(text) == (theirs(text, truncation=False)["input_ids"] or [END])
    documents = [theirs(text, split_special_tokens=True)["input_ids"] for text in TEXTS]
    # The packing of documents appends the end, which is not in them twice.
    assert list(ours.documents(TEXTS)) == [ids[: len(ids) - closes] for ids in documents]
    assert all(TURN_END not in ids and END not in ids for ids in ours.documents(TEXTS))


@pytest.mark.parametrize(
    ("config", "generation", "named", "ends"),
    [
        ([END, TURN_END], [END, TURN_END], "</s>", {END, TURN_END}),
        (None, TURN_END, "</s>", {END, TURN_END}),
        (TURN_END, None, "</s>", {END, TURN_END}),
        (None, [9, TURN_END], None, {9, TURN_END}),
        (None, None, None, {END}),
        (-1, None, "<|im_end|>", {TURN_END}),
    ],
)
def test_every_end_token_of_the_files_ends_a_text(
    files: Path, config: Any, generation: Any, named: str | None, ends: set[int]
) -> None:
    change_json(files / "config.json", {"eos_token_id": config})
    change_json(files / "generation_config.json", {"eos_token_id": generation})
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        change_json(files / name, {"eos_token": named})
    ours = load_tokenizer(files, MODEL.vocab_size)
    assert ours.ends == ends
    assert ours.end_of_text in ends
    assert ours.ids["bos_token_id"] == BOS


@pytest.mark.parametrize("newer", [False, True])
def test_a_special_token_is_the_one_that_transformers_reads(files: Path, newer: bool) -> None:
    change_json(files / "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    change_json(files / "config.json", {"eos_token_id": None})
    change_json(files / "generation_config.json", {"eos_token_id": None})
    if newer:
        change_json(files / "tokenizer_config.json", {"added_tokens_decoder": {}})
    theirs = transformers.AutoTokenizer.from_pretrained(files)
    assert theirs.eos_token == ("</s>" if newer else "<|im_end|>")
    assert load_tokenizer(files, MODEL.vocab_size).end_of_text == theirs.eos_token_id
    assert ChatTemplate.from_directory(files).special["eos_token"] == theirs.eos_token


def test_weights_without_a_tokenizer_leave_ids_and_files_to_the_one_that_is_used(files: Path) -> None:
    (files / "tokenizer.json").unlink()
    used = CarriedFiles(files={"tokenizer.json": b"{}"}, config={"eos_token_id": 0})
    rows: Any = None  # which no file depends on
    data = PreparedData(
        tokenizer="{}", end_of_text=0, train=rows, train_documents=0, held_out=rows, carried=used
    )
    carried = data.carrying(files).carried
    assert carried.files == used.files
    assert carried.config["eos_token_id"] == 0
    assert carried.config["use_cache"] is True


def test_an_end_token_that_is_no_number_is_named(files: Path) -> None:
    change_json(files / "generation_config.json", {"eos_token_id": ["</s>"]})
    with pytest.raises(DataError, match=r"generation_config\.json: eos_token_id is \['</s>'\]; write"):
        load_tokenizer(files, MODEL.vocab_size)


def test_ids_without_a_token_are_within_the_vocabulary(files: Path) -> None:
    before = load_tokenizer(files, MODEL.vocab_size)
    model = json.loads((files / "tokenizer.json").read_text())["model"]
    model["vocab"]["<far>"] = 500
    change_json(files / "tokenizer.json", {"model": model})
    assert before.vocabulary < 500
    assert load_tokenizer(files, MODEL.vocab_size).vocabulary == 501


def test_import_and_export_carry_on_what_was_given(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    for path in foreign.iterdir():
        (tmp_path / "given" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "given" / "additional_chat_templates").mkdir()
    (tmp_path / "given" / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    import_checkpoint(tmp_path / "given", tmp_path / "imported", dtype="bf16")
    export_checkpoint(tmp_path / "imported", tmp_path / "exported", dtype="fp32")
    given = CarriedFiles.of_model(tmp_path / "given")
    assert "additional_chat_templates/tools.jinja" in given.files
    for made, dtype in (("imported", "bfloat16"), ("exported", "float32")):
        assert CarriedFiles.of_model(tmp_path / made).files == given.files
        config = transformers.AutoConfig.from_pretrained(tmp_path / made)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS, [END, TURN_END], END)
        assert config.dtype == getattr(torch, dtype)
        assert json.loads((tmp_path / made / "config.json").read_text())["use_cache"] is True
        generation = transformers.GenerationConfig.from_pretrained(tmp_path / made)
        assert {name: getattr(generation, name) for name in GENERATION} == GENERATION


def test_a_checkpoint_without_ids_gets_those_of_its_tokenizer(foreign: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for path in foreign.iterdir():
        (given / path.name).write_bytes(path.read_bytes())
    config = json.loads((given / "config.json").read_text())
    for role in ("bos", "eos", "pad"):
        del config[f"{role}_token_id"]
    (given / "config.json").write_text(json.dumps(config))
    export_checkpoint(given, tmp_path / "hf")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    # Without the keys transformers takes 0 and 1, the ids of DeepSeek-V3.
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (BOS, END, None)


def test_generate_stops_at_every_end_token(foreign: Path) -> None:
    model = load_model(foreign)
    assert model.text.ends == {END, TURN_END}
    prompt = model.text.prompt("the cat")
    assert prompt[0] == BOS
    new, _ = continue_tokens(model, prompt, max_tokens=3, temperature=0.0, seed=0)
    ends = replace(model, text=replace(model.text, ends=frozenset({END, new[2]})))
    stopped = continue_tokens(ends, prompt, max_tokens=9, temperature=0.0, seed=0)
    assert stopped == (new[: new.index(new[2])], "stop")


def _after(model: LoadedModel, prompt: list[int], new: list[int]) -> str:
    """What the whole text has after its prompt."""
    text: str = model.tokenizer.decode([*prompt, *new])
    return text.removeprefix("the cat")


def test_a_continuation_keeps_the_space_before_its_first_word(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(foreign)
    new = theirs("sat on", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("jobs.tools.generate.continue_tokens", lambda *_, **__: (new, "length"))
    whole = theirs.decode([*theirs("the cat")["input_ids"], *new], skip_special_tokens=True)
    result = generate(foreign, "the cat")
    assert result["prompt"] + result["text"] == whole == "the cat sat on"


def test_generate_samples_by_the_defaults_of_the_model(foreign: Path) -> None:
    model = load_model(foreign)
    prompt = model.text.prompt("the cat")
    given = {name: GENERATION[name] for name in ("top_p", "top_k", "repetition_penalty")}
    by_hand, _ = continue_tokens(
        model, prompt, max_tokens=7, temperature=0.6, seed=5, defaults=GenerationDefaults(values=given)
    )
    result = generate(foreign, "the cat", seed=5)
    assert result["text"] == _after(model, prompt, by_hand)
    assert result["tokens"] <= 7
    greedy, _ = continue_tokens(model, prompt, max_tokens=7, temperature=0.0, seed=0)
    off = generate(foreign, "the cat", max_tokens=7, seed=5, generation_config="none")
    assert off["text"] == _after(model, prompt, greedy)
    assert off["text"] != result["text"]


def test_defaults_are_the_values_that_transformers_reads(files: Path) -> None:
    theirs = transformers.GenerationConfig.from_pretrained(files)
    ours = GenerationDefaults.of(files)
    assert ours.values == {name: getattr(theirs, name) for name in ours.values}
    assert set(ours.values) == {"temperature", "top_p", "top_k", "repetition_penalty"}
    assert ours.max_tokens == theirs.max_new_tokens
    told = "temperature 0.6, top_p 0.95, top_k 20, repetition_penalty 1.1, max_new_tokens 7"
    assert (str(ours), str(GenerationDefaults())) == (told, "")
    assert GenerationDefaults.of(files, "none") == GenerationDefaults()


@pytest.mark.parametrize(
    ("values", "temperature"),
    [
        ({"do_sample": True, "temperature": 0.6}, 0.6),
        ({"do_sample": True, "temperature": None}, 1.0),
        ({"do_sample": None, "temperature": 0.6}, 0.6),
        ({"do_sample": False, "temperature": 0.6}, 0.0),
        ({"do_sample": None, "temperature": None, "top_k": -1}, 0.0),
    ],
)
def test_a_command_samples_where_the_file_says_so(
    files: Path, values: dict[str, Any], temperature: float
) -> None:
    change_json(files / "generation_config.json", values)
    defaults = GenerationDefaults.of(files)
    assert defaults.temperature == temperature
    assert defaults.values.get("top_k", 0) >= 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -1}, r"temperature \(-1\) must lie between"),
        ({"temperature": "hot"}, "temperature is 'hot', not a number"),
        ({"top_k": 2.5}, r"top_k is 2\.5, not a whole number"),
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\) is less than 1"),
        ({"repetition_penalty": True}, "repetition_penalty is True, not a number"),
    ],
)
def test_a_default_that_cannot_be_is_named(files: Path, values: dict[str, Any], said: str) -> None:
    change_json(files / "generation_config.json", values)
    with pytest.raises(DataError, match=rf"generation_config\.json: {said}.*--generation-config none"):
        GenerationDefaults.of(files)
    assert GenerationDefaults.of(files, "none") == GenerationDefaults()


def test_with_bos_every_token_of_a_document_is_judged(foreign: Path) -> None:
    model = load_model(foreign)
    texts = ["def the cat</s>", "self"]
    result = judge(model, texts, sequence_length=100, batch_size=1)
    theirs = transformers.AutoTokenizer.from_pretrained(foreign)
    nats = 0.0
    for text in texts:
        ids = [*theirs(text, split_special_tokens=True)["input_ids"], END]
        with torch.no_grad():
            logits = model.transformer(torch.tensor([ids]), experts=model.experts)[0]
        nats += torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item()
    size = sum(len(text.encode()) for text in texts)
    # BOS is the same before every document and costs nothing; no token is left without a prediction.
    assert result["bits_per_byte"] == pytest.approx(nats / torch.tensor(2.0).log().item() / size, rel=1e-5)


def test_import_of_a_run_says_what_takes_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"is a run's directory, which needs no import: .*raymoe export"
    ):
        import_checkpoint(tmp_path / "run", tmp_path / "new")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "NAME", "--prompt", "x"],
        ["eval", "NAME", "--data", "x"],
        ["export", "NAME", "new"],
        ["import", "NAME", "new"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_name_of_the_hub_is_recognised(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "deepseek-ai/DeepSeek-V3.1"
    done = CliRunner().invoke(app, [part.replace("NAME", name) for part in arguments])
    assert done.exit_code == 2
    assert f"hf download {name} --local-dir DIR" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(DataError, match=f"data.tokenizer: .*hf download {name}"):
        load_tokenizer(Path(name), MODEL.vocab_size)
    (tmp_path / "deepseek-ai").mkdir()  # then it is a path
    assert "hf download" not in CliRunner().invoke(app, ["generate", name, "--prompt", "x"]).stderr
