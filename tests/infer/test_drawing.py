"""Pictures in answers: allowed next tokens, pictures from codes, guidance, and files next to the answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from tests.harness import run_ranks
from tests.train.runs import QUICKSTART, run, train_quietly
from tests.train.test_draw_run import config_of
from tutti.config import Config, InferConfig
from tutti.infer.drawing import Drawing, DrawingState, GuidedLogits, PictureCollector
from tutti.infer.generate import Request, Token
from tutti.infer.run import InferenceJob, infer

DRAWING = Drawing(
    start=1, pattern=(-1, -1, 2), first=4, number=3, decode=lambda codes: torch.ones(1, 3, 2, 2) * codes[0, 0]
)


def test_codes_come_within_a_picture_and_nowhere_else() -> None:
    state, logits, seen = DrawingState(room=9), torch.zeros(1, 7), []
    for token in (1, 5, 6, 2, 3):
        seen.append(DRAWING.allow(logits, [state]).isfinite()[0].nonzero().flatten().tolist())
        assert token in seen[-1]
        state.add(token, DRAWING)
    text, codes = [0, 1, 2, 3], [4, 5, 6]
    assert seen == [text, codes, codes, [2], text]
    allowed = DRAWING.allow(logits, [DrawingState(room=3)]).isfinite()[0].tolist()
    assert allowed == [True, False, True, True, False, False, False]
    begun = DrawingState.of(Request(0, [3, 1], 5), DRAWING)
    assert begun.place == 0 and DrawingState.of(Request(0, [3, 1], 5), None).place is None


def test_codes_become_pictures_and_leave_the_text() -> None:
    made: list[tuple[int, int]] = []
    pictures = PictureCollector(DRAWING, lambda number, place, picture: made.append((number, place)))
    tokens = [Token(7, token, None) for token in (3, 1, 5, 4, 2, 1, 4, 4, 2)]
    assert [token.id for token in pictures.watch(tokens)] == [3, 1, 2, 1, 2]
    assert made == [(7, 1), (7, 2)]
    assert [picture.getpixel((0, 0)) for picture in pictures.found[7]] == [(255, 255, 255), (128, 128, 128)]


class Echo:
    """Logits that depend on the prompt's first token."""

    joins = True

    def start(self, requests: list[Request]) -> torch.Tensor:
        return torch.tensor([[1.0, 1.0, float(item.ids[0])] for item in requests])


def test_guidance_pushes_codes_away_from_a_hidden_prompt() -> None:
    drawing = replace(DRAWING, first=2, number=1)
    guided = GuidedLogits(Echo(), drawing, guidance=3.0, hide=lambda ids: [1] * len(ids))  # type: ignore[arg-type]
    assert guided.start([Request(0, [5], 4), Request(1, [2], 4)]).tolist() == [[1, 1, 13], [1, 1, 4]]


def trained(folder: Path) -> None:
    torch.set_num_threads(1)
    train_quietly(config_of(folder, **{"train.save_hf_weights": True}))


def answered(folder: Path, guidance: float) -> None:
    torch.set_num_threads(1)
    (folder / "ask.jsonl").write_text('{"prompt": "Draw: dog"}\n{"prompt": "Draw: cat"}\n')
    settings = InferConfig(
        model_path=str(folder / "out" / "hf" / "final"), max_tokens=8, image_guidance=guidance, seed=3
    )
    output = folder / f"answers{guidance}.jsonl"
    infer(Config(infer=settings), InferenceJob(input=str(folder / "ask.jsonl"), output=str(output), draw=True))


def test_pictures_lie_beside_the_answers(tmp_path: Path) -> None:
    run_ranks(1, trained, tmp_path)
    pixels = {}
    for guidance in (1.0, 4.0):
        run_ranks(1, answered, tmp_path, guidance)
        rows = [json.loads(line) for line in (tmp_path / f"answers{guidance}.jsonl").read_text().splitlines()]
        assert [len(row["pictures"]) for row in rows] == [1, 1] and rows[0]["pictures"][0]["type"] == "image"
        picture = Image.open(tmp_path / rows[0]["pictures"][0]["path"])
        assert picture.size == (8, 8)
        pixels[guidance] = picture.tobytes()
    assert pixels[1.0] != pixels[4.0]


def test_pictures_drawn_while_training_are_counted_and_shown(tmp_path: Path) -> None:
    rows = (QUICKSTART / "images.jsonl").read_text().splitlines()[:3]
    (tmp_path / "asked.jsonl").write_text("\n".join(rows))
    changes = {"train.sample_prompts_path": str(tmp_path / "asked.jsonl"), "train.max_steps": 1}
    changes |= {"data.row_template": {"user": "Draw: {caption}", "assistant": "<image>"}, "train.num_train_epochs": 1}
    lines = run(config_of(tmp_path, **changes))
    assert [line["sample_answers"] for line in lines if "sample_answers" in line] == [3, 3]
