"""Pictures that answers draw by diffusion equal the definition, with and without guidance, on any ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.harness import regroup, run_ranks
from tests.infer.models import open_model
from tests.train.runs import QUICKSTART, train_quietly
from tests.train.test_flow_run import config_of, states_of
from tutti.config import Config, InferConfig
from tutti.core.keyed_random import generator
from tutti.core.pixels import to_image
from tutti.infer.drawing import hiding
from tutti.infer.prompts import prompt_request, to_draw
from tutti.infer.run import InferenceJob, infer
from tutti.model.conditions import Conditions
from tutti.model.diffusion import Guided, sample
from tutti.model.pipeline_folder import read_scheduler

GUIDANCE = (1.0, 3.0)


def answered(folder: Path, ranks: int, guidance: float) -> None:
    torch.set_num_threads(1)
    settings = InferConfig(
        model_path=str(folder / "out" / "hf" / "final"), max_tokens=4, image_guidance=guidance, image_steps=3, seed=3
    )
    output = folder / f"{ranks} {guidance}.jsonl"
    infer(Config(infer=settings), InferenceJob(input=str(folder / "ask.jsonl"), output=str(output), draw=True))


def trained_and_asked(folder: Path) -> None:
    """Train one step, drawing sample prompts before and after, and draw pictures with the export."""
    torch.set_num_threads(1)
    rows = (QUICKSTART / "images.jsonl").read_text().splitlines()[:2]
    (folder / "shown.jsonl").write_text("\n".join(rows))
    changes = {"train.sample_prompts_path": str(folder / "shown.jsonl"), "train.sample_steps": 2}
    changes |= {"data.row_template": {"user": "Draw: {caption}", "assistant": "<image>"}}
    train_quietly(config_of(folder, **changes, **{"train.save_hf_weights": True, "train.max_steps": 1}))
    for guidance in GUIDANCE:
        regroup()
        answered(folder, 1, guidance)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "ask.jsonl").write_text('{"prompt": "Draw: dog"}\n{"prompt": "Draw: a cat of some kind"}\n')
    run_ranks(1, trained_and_asked, folder)
    return folder


@torch.no_grad()
def drawn_by_hand(loaded: Any, prompt: str, number: int, guidance: float) -> Image.Image:
    model, spec = loaded.model, loaded.model.flow
    request = to_draw(loaded.form, prompt_request(loaded.form, prompt, number, 4))
    hidden = [*hiding(loaded.form.tokenizer, model)(request.ids[:-1]), request.ids[-1]]
    text, empty = (model.flow_decoder.text(states_of(model, list(ids))) for ids in (request.ids, hidden))
    noise = torch.randn(spec.latents, generator=generator(3, "sample", number, 1))[None]
    net, scheduler = model.flow_decoder.net, read_scheduler(spec.folder)
    latents = sample(spec.family, net, scheduler, text, empty, noise, Guided(3, guidance))
    conditions = Conditions(spec.folder, torch.device("cpu"), torch.float32, max_length=0, seed=0)
    return to_image(conditions.decode(latents[0]) / 127.5 - 1)


def pictures_in(file: Path) -> list[np.ndarray]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [np.asarray(Image.open(file.parent / row["pictures"][0]["path"]), np.int16) for row in rows]


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_pictures_are_those_of_the_definition(made: Path, guidance: float) -> None:
    _, loaded = open_model(str(made / "out" / "hf" / "final"))
    loaded.model.set_attn_implementation("sdpa")
    found = pictures_in(made / f"1 {guidance}.jsonl")
    prompts = [json.loads(line)["prompt"] for line in (made / "ask.jsonl").read_text().splitlines()]
    for line, (prompt, picture) in enumerate(zip(prompts, found, strict=True), 1):
        want = np.asarray(drawn_by_hand(loaded, prompt, line, guidance), np.int16)
        assert picture.shape == (16, 16, 3) and abs(picture - want).max() <= 1
    assert not np.array_equal(found[0], found[1])


def test_guidance_changes_pictures(made: Path) -> None:
    plain, guided = (pictures_in(made / f"1 {guidance}.jsonl") for guidance in GUIDANCE)
    assert abs(plain[0] - guided[0]).max() > 1


def test_two_ranks_draw_as_one(made: Path) -> None:
    run_ranks(2, answered, made, 2, GUIDANCE[1])
    found = pictures_in(made / f"2 {GUIDANCE[1]}.jsonl")
    for mine, theirs in zip(found, pictures_in(made / f"1 {GUIDANCE[1]}.jsonl"), strict=True):
        assert abs(mine - theirs).max() <= 1


def test_pictures_drawn_while_training_are_counted(made: Path) -> None:
    lines = [json.loads(line) for line in (made / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["sample_answers"] for line in lines if "sample_answers" in line] == [2, 2]
