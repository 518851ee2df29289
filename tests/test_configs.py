"""Every recipe in configs/ is a valid configuration and names existing files."""

import base64
import io
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.harness import regroup, run_ranks
from tests.train.runs import train_quietly
from tutti.config.load import load

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(recipe: Path) -> None:
    config = load([str(recipe)])
    assert config.train.output_dir == f"runs/{recipe.stem}"
    for path in (config.model.config_path, config.model.tokenizer_path, config.data.train_path, config.data.eval_path):
        # runs/ contains the results of an earlier recipe.
        assert path is None or path.startswith("runs/") or (ROOT / path).exists(), path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_starts_with_its_launch_line(recipe: Path) -> None:
    lines = recipe.read_text().splitlines()
    comment = lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]
    assert any(f"tutti train configs/{recipe.name}" in line for line in comment)


@pytest.mark.parametrize("name", ["spoken", "animations"])
def test_what_is_seen_and_heard_is_learned_from_and_asked_about(name: str, tmp_path: Path) -> None:
    """Two steps of a recipe with media: trained and unseen media are disjoint, and all are asked about."""
    config = load([
        str(ROOT / "configs" / f"{name}.yaml"), f"train.output_dir={tmp_path}", "train.max_steps=2",
        "train.num_train_epochs=1", "train.eval_epochs=1", "train.save_hf_weights=off", "data.num_workers=0",
        "train.sample_tokens=1",
    ])  # fmt: skip
    rows, unseen = (
        [json.loads(line) for line in (ROOT / str(path)).read_text().splitlines()]
        for path in (config.data.train_path, config.data.eval_path)
    )
    (medium,) = {"image", "audio", "video"} & rows[0].keys()
    assert not {row[medium] for row in rows} & {row[medium] for row in unseen}
    run_ranks(1, train_quietly, config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    answers = [(line["sample_answers"], line["unseen_answers"]) for line in lines if "sample_answers" in line]
    assert answers == [(len(rows), len(unseen))] * 2
    assert all(line["eval_loss"] > 0 for line in lines if "eval_loss" in line)


def two_steps_of_both(folder: Path) -> None:
    few = ["train.max_steps=2", "train.num_train_epochs=1", "train.eval_epochs=1", "data.num_workers=0"]
    train_quietly(load([str(ROOT / "configs/vq.yaml"), f"train.output_dir={folder / 'vq'}", *few]))
    regroup()
    few += [f"model.decoders.image.model_path={folder / 'vq/hf/final'}", "train.sample_prompts_path=none"]
    train_quietly(load([str(ROOT / "configs/draw.yaml"), f"train.output_dir={folder / 'draw'}", *few]))


def test_a_tokenizer_of_pictures_is_trained_and_drawn_by(tmp_path: Path) -> None:
    """Two steps of both recipes; the second uses the result of the first."""
    run_ranks(1, two_steps_of_both, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "draw" / "metrics.jsonl").read_text().splitlines()]
    assert [line["targets/code"] % 64 for line in lines if "loss" in line] == [0, 0]
    assert (tmp_path / "draw" / "hf" / "final" / "decoders" / "image" / "config.json").is_file()


def test_a_diffusion_decoder_is_led_and_draws_into_the_report(tmp_path: Path) -> None:
    """Two steps of the recipe with two pictures for training and two others."""
    folder = ROOT / "data/quickstart"
    for name in ("images", "images_eval"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()[:2]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({**row, "draw": True}) for row in rows))
    known, unseen = (str(tmp_path / f"{name}.jsonl") for name in ("images", "images_eval"))
    config = load([
        str(ROOT / "configs/draw_flow.yaml"), f"train.output_dir={tmp_path / 'out'}", "train.max_steps=2",
        "train.num_train_epochs=1", "train.eval_epochs=1", "data.num_workers=0", "train.micro_batch_size=1",
        f"data.train_path={known}", f"data.eval_path={unseen}", f"train.sample_prompts_path={known}, {unseen}",
        f"data.media_root={folder}", "train.sample_steps=2",
    ])  # fmt: skip
    run_ranks(1, train_quietly, config)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["targets/flow"] for line in lines if "loss" in line] == [1, 1]
    answers = [(line["sample_answers"], line["unseen_answers"]) for line in lines if "sample_answers" in line]
    assert answers == [(2, 2)] * 2
    shown = json.loads((tmp_path / "out/run.json").read_text())["pictures"].values()
    drawn = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in shown]
    assert len(drawn) == 8 and all(picture.size == (24, 24) and picture.getextrema() for picture in drawn)
    parts = {path.name for path in (tmp_path / "out/hf/final/decoders/image").iterdir()}
    assert parts == {"transformer", "scheduler", "queries.safetensors"}


def test_model_configs_fit_the_quickstart_tokenizer() -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/quickstart")
    for folder in sorted((ROOT / "configs/models").iterdir()):
        config = AutoConfig.from_pretrained(folder)
        assert config.vocab_size == len(tokenizer)
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id


def test_mixture_names_every_source() -> None:
    mixture = yaml.safe_load((ROOT / "configs/sources/mixture.yaml").read_text())
    assert len(mixture["sources"]) == len(mixture["names"])
    assert all((ROOT / source).exists() for source in mixture["sources"])
    assert all(len(point["weights"]) == len(mixture["sources"]) for point in mixture["schedule"])


def test_the_quickstart_asks_each_fact_in_a_wording_that_it_is_not_trained_in() -> None:
    folder = ROOT / "data/quickstart"
    trained, asked = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("facts.jsonl", "facts_eval.jsonl")
    )
    wordings = Counter(row["output"] for row in trained)
    assert set(wordings.values()) == {6}
    assert wordings.keys() == {row["output"] for row in asked} and len(wordings) == len(asked)
    assert not {row["instruction"] for row in trained} & {row["instruction"] for row in asked}
    assert all(row["answer"] == row["output"] for row in asked)
    # The texts give this number.
    for text in ((ROOT / name).read_text() for name in ("README.md", "docs/tutorial.md", "configs/quickstart.yaml")):
        assert f"{len(asked)} facts" in text
