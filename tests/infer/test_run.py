"""`tutti infer` as a whole: the effect of each argument, the sources of models, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.harness import run_ranks
from tests.infer.models import PROMPTS, infer_config, write_model
from tests.train.runs import QUICKSTART, tiny_config
from tutti.cli import main
from tutti.infer.generate import Generator
from tutti.infer.run import InferenceJob, infer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run that saved a checkpoint, and its export."""
    config = tiny_config(
        tmp_path_factory.mktemp("run"),
        **{"train.max_steps": 2, "train.save_steps": 1, "train.save_hf_weights": True, "train.lr": 0.05},
    )
    run_ranks(1, _train, config)
    return Path(config.train.output_dir)


def _train(config):
    from tests.train.runs import train_quietly

    train_quietly(config)


@pytest.fixture
def say(capsys):
    """Run `tutti infer` on a prompt; what it prints."""

    def run(path: str, prompts=("What is the capital of Sweden?",), **values) -> str:
        arguments = {"model_path": path, "max_tokens": 12} | values
        capsys.readouterr()
        asked = [part for prompt in prompts for part in ("--prompt", prompt)]
        status = main(["infer", *(f"--infer.{name}={value}" for name, value in arguments.items()), *asked, "--debug"])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        return shown.out

    return run


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 7),
        ("do_sample", False),
        ("temperature", 0.2),
        ("top_p", 0.2),
        ("top_k", 1),
        ("repetition_penalty", 2.0),
        ("max_tokens", 3),
        ("chat_template", "none"),
    ],
)
def test_each_argument_changes_the_text(model, say, name, value):
    assert say(model, **{name: value}) != say(model)


def test_a_text_that_ends_an_answer(model, say):
    """Nothing of it is shown, and what comes before it is what comes without it."""
    whole = say(model, do_sample=False).strip("\n")
    stop = whole[len(whole) // 2 :][:3]
    cut = say(model, do_sample=False, stop=json.dumps([stop, "never there"], ensure_ascii=False)).strip("\n")
    assert cut == whole[: whole.index(stop)]
    assert say(model, do_sample=False, stop="never there").strip("\n") == whole


def test_the_same_seed_gives_the_same_text(model, say):
    assert say(model, seed=5) == say(model, seed=5) == say(model, seed=5, batch_tokens=1)


def test_max_tokens_and_context_limit_an_answer(model, say):
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer(say(model, max_tokens=4, do_sample=False)).input_ids) <= 6
    say(model, max_tokens=10_000, do_sample=False)  # as far as the context of 256 reaches


def test_another_tokenizer(model, say, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QUICKSTART / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    other = say(model, do_sample=False, tokenizer_path=str(tmp_path))
    assert other == say(model, do_sample=False, chat_template="none") != say(model, do_sample=False)


def test_several_prompts_are_answered_in_order(model, say):
    shown = say(model, prompts=PROMPTS[:3], do_sample=False, max_tokens=4)
    places = [shown.index(f"> {prompt}\n") for prompt in PROMPTS[:3]]
    assert places == sorted(places) and places[0] == 0
    for prompt in PROMPTS[:3]:
        assert say(model, prompts=[prompt], do_sample=False, max_tokens=4) in shown


def test_a_checkpoint_speaks_as_its_export_does(trained, say):
    final = say(str(trained / "hf" / "final"))
    assert final.strip()
    for path in (trained, trained / "checkpoints" / "global_step_2"):
        assert say(str(path)) == final, path
    assert say(str(trained / "checkpoints" / "global_step_1")) != final


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, model):
    """A short run that trained adapters on `model`."""
    # The compute dtype of training, bf16, does not matter: inference uses the precision of the base.
    changes = {"train.architecture": "lora", "train.lora_rank": 4, "train.save_hf_weights": True, "train.lr": 0.1}
    changes |= {"train.compute_dtype": "bfloat16"}
    config = tiny_config(
        tmp_path_factory.mktemp("lora"),
        **{"train.max_steps": 2, "train.save_steps": 2, "model.model_path": model},
        **changes,
    )
    run_ranks(1, _train, config)
    return Path(config.train.output_dir)


def test_an_adapter_speaks_as_its_merged_model_does(adapted, model, say, tmp_path):
    from tutti.kinds.export import export

    export(str(adapted), str(tmp_path / "merged"), merge_adapters=True)
    merged = say(str(tmp_path / "merged"), do_sample=False)
    assert merged != say(model, do_sample=False)
    for path in (adapted / "hf" / "final", adapted, adapted / "checkpoints" / "global_step_2"):
        assert say(str(path), do_sample=False) == merged, path
    other = write_model(tmp_path / "other", dtype=torch.bfloat16)
    asked = ["--model.model_path", other, "--infer.model_path", str(adapted / "hf" / "final"), "--prompt", "x"]
    assert main(["infer", *asked, "--infer.max_tokens=2"]) == 0, "an adapter on a base that is named"


def test_a_checkpoint_of_a_chat_run_is_asked_as_its_export_is(tmp_path, say):
    """With a tokenizer without a chat template, so chats are written in a plain format."""
    shutil.copytree(QUICKSTART, tmp_path / "tokenizer")
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    changes = {"train.max_steps": 2, "train.save_steps": 2, "train.save_hf_weights": True, "train.lr": 0.05}
    run = tiny_config(tmp_path, **changes, **{"model.tokenizer_path": str(tmp_path / "tokenizer")})
    run_ranks(1, _train, run)
    final = say(f"{run.train.output_dir}/hf/final")
    assert final != say(f"{run.train.output_dir}/hf/final", chat_template="none")
    assert say(f"{run.train.output_dir}/checkpoints/global_step_2") == final


def test_answers_of_two_checkpoints_are_not_mixed(tmp_path, trained, monkeypatch):
    """A newer checkpoint has come since the run that answers was interrupted."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "hf")
    newest = tmp_path / "run" / "checkpoints" / "global_step_2"
    newest.rename(tmp_path / "global_step_2")
    source, output = tmp_path / "in.jsonl", str(tmp_path / "out.jsonl")
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    stream = Generator.stream

    def breaking(self, requests):
        for token in stream(self, requests):
            yield token
            if token.end:
                raise KeyboardInterrupt

    config = infer_config(str(tmp_path / "run"), max_tokens=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Generator, "stream", breaking)
        infer(config, InferenceJob((), str(source), output))
    (tmp_path / "global_step_2").rename(newest)
    with pytest.raises(ValueError, match="is what a run with another model left"):
        infer(config, InferenceJob((), str(source), output))
    shutil.rmtree(newest)
    infer(config, InferenceJob((), str(source), output))
    assert len(Path(output).read_text().splitlines()) == len(PROMPTS)


def test_an_output_folder_without_export_gives_its_newest_whole_checkpoint(trained, say, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "hf")
    final = say(str(trained))
    assert say(str(copy)) == final
    assert say(str(copy / "checkpoints")) == final
    next((copy / "checkpoints" / "global_step_2").glob("*.distcp")).write_bytes(b"damaged")
    assert say(str(copy)) == say(str(trained / "checkpoints" / "global_step_1"))


def test_a_base_model_without_template_goes_on_with_the_text(model, say, tmp_path):
    shutil.copytree(model, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    base = str(tmp_path / "base")
    assert say(base, do_sample=False) == say(model, do_sample=False, chat_template="none")
    assert say(base, do_sample=False, chat_template="chatml") == say(model, do_sample=False)


def _refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(["infer", *argv]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    return line


def test_what_is_no_model_is_refused(capsys, tmp_path, model, trained):
    def refused(path: Path, *argv: str) -> str:
        return _refused(capsys, f"--infer.model_path={path}", "--prompt", "x", *argv)

    assert "infer.model_path: " in refused(tmp_path / "none") and "is not there" in refused(tmp_path / "none")
    assert "is not there" in refused(tmp_path / "none", "--output", "pictures")
    assert "is neither a Hugging Face folder" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    assert "is of VQModel, which writes no text" in refused(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "infer.model_path: " in refused(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").unlink()
    assert "infer.model_path: no weights in" in refused(broken)
    step = tmp_path / "run" / "checkpoints" / "global_step_1"
    shutil.copytree(trained / "checkpoints" / "global_step_1", step)
    shutil.copy(trained / "config.yaml", tmp_path / "run")
    next(step.glob("*.distcp")).write_bytes(b"x")
    assert "is damaged" in refused(step)
    assert "infer.tokenizer_path" in refused(model, f"--infer.tokenizer_path={tmp_path / 'nowhere'}")
    assert "--prompt 1: the prompt has" in _refused(capsys, f"--infer.model_path={model}", "--prompt", "word " * 300)


def test_a_classifier_is_refused(capsys, tmp_path, model):
    shutil.copytree(model, tmp_path / "classifier")
    config = json.loads((tmp_path / "classifier" / "config.json").read_text())
    (tmp_path / "classifier" / "config.json").write_text(
        json.dumps(config | {"architectures": ["Qwen3ForSequenceClassification"]})
    )
    line = _refused(capsys, f"--infer.model_path={tmp_path / 'classifier'}", "--prompt", "x")
    assert "is a classifier, which generates no text" in line


def _infer_on_rank(path, source, output, settings):
    import logging

    logging.disable(logging.INFO)
    infer(infer_config(path, **settings), InferenceJob((), source, output))
    return torch.get_num_threads()


@pytest.mark.parametrize("kind", ["folder", "checkpoint", "transformers' generate"])
def test_ranks_that_share_a_model_give_the_same_text(tmp_path, model, trained, kind):
    path = {"folder": model, "checkpoint": str(trained / "checkpoints" / "global_step_2")}.get(kind)
    if path is None:
        path = str(tmp_path / "model")
        shutil.copytree(model, path)
        (tmp_path / "model" / "generation_config.json").write_text('{"repetition_penalty": 1.3, "eos_token_id": 2}')
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    outputs = []
    for world in (1, 2):
        output = tmp_path / f"out{world}.jsonl"
        run_ranks(world, _infer_on_rank, path, str(source), str(output), {"max_tokens": 8, "batch_tokens": 400})
        outputs.append([json.loads(line)["response"] for line in output.read_text().splitlines()])
    assert outputs[0] == outputs[1]
