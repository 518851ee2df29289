"""Exports are ready for serving: plain transformers loads them, and generation ends with the turn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.runs import QUICKSTART, run, tiny_config, write_model_config

ENDOFTEXT, IM_END = 0, 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a base model, whose texts end with <|endoftext|>, that learnt one answer in ChatML."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_bytes((QUICKSTART / "tokenizer.json").read_bytes())
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(described))
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day."}]}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 40)
    config = tiny_config(
        folder,
        **{
            "model.config_path": write_model_config(folder / "model", eos_token_id=ENDOFTEXT),
            "model.tokenizer_path": str(tokenizer),
            "data.train_path": str(folder / "rows.jsonl"),
            "data.chat_template": "chatml",
            "train.dyn_bsz": False,
            "train.micro_batch_size": 1,
            "train.global_batch_size": 1,
            "train.max_steps": 40,
            "train.save_hf_weights": True,
        },
    )
    run(config)
    return Path(config.train.output_dir or "") / "hf" / "final"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_generation_ends_with_the_turn(exported: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    chat = [{"role": "user", "content": "Hi"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=30)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(ids) == "Good day.<|im_end|>"


def test_a_server_finds_what_it_needs(exported: Path) -> None:
    config, generation = read(exported / "config.json"), read(exported / "generation_config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["model_type"] == "qwen3"
    assert config["dtype"] == "float32"
    assert generation["eos_token_id"] == [ENDOFTEXT, IM_END]
    assert "<|im_start|>" in (exported / "chat_template.jinja").read_text()
    assert read(exported / "tokenizer_config.json")["eos_token"] == "<|endoftext|>"


def test_every_file_is_that_of_transformers(exported: Path, tmp_path: Path) -> None:
    """Loading the export with transformers and saving it again gives the same files with the same contents."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path)
    assert sorted(file.name for file in exported.iterdir()) == sorted(file.name for file in tmp_path.iterdir())
    for theirs in tmp_path.iterdir():
        ours = exported / theirs.name
        if theirs.suffix == ".json":
            assert read(ours) == read(theirs), theirs.name
        elif theirs.suffix == ".safetensors":
            left, right = load_file(ours), load_file(theirs)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)
        else:
            assert ours.read_bytes() == theirs.read_bytes(), theirs.name


def test_texts_end_as_the_tokenizer_says(tmp_path: Path) -> None:
    changes = {
        "data.data_type": "plaintext",
        "data.train_path": str(QUICKSTART / "prose.txt"),
        "train.max_steps": 1,
        "train.save_hf_weights": True,
    }
    config = tiny_config(tmp_path, **changes)
    run(config)
    assert read(Path(config.train.output_dir or "") / "hf/final/generation_config.json")["eos_token_id"] == IM_END
