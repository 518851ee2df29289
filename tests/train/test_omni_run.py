"""Complete runs of a composed model on pictures with captions: layouts, resume, exports, and exchange of parts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.harness import run_ranks
from tests.infer.models import open_model
from tests.infer.test_media import answers, requests_of
from tests.model.composed import TOWERS, WHISPER, write_foundation, write_tower
from tests.train.runs import QUICKSTART, records, run, tiny_config
from tests.train.test_run import assert_same_training
from tutti.config import Config
from tutti.config.load import from_dict
from tutti.infer.generate import CachedLogits
from tutti.model.omni_processor import compose_processor

TEXT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
WEIGHTS = ("model.safetensors", "encoders/image/model.safetensors", "encoders/image/projector.safetensors")


def config_of(folder: Path, *, tower: str = "siglip", world: int = 1, **changes: Any) -> Config:
    """A Qwen3 with a tower beside it, random, on captioned pictures and chats of text alone."""
    rows = (QUICKSTART / "images.jsonl").read_text().splitlines()[:24]
    rows += (QUICKSTART / "chat.jsonl").read_text().splitlines()[:8]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    values = {
        "model.config_path": write_foundation(folder, "qwen3"),
        "model.encoders": {"image": {"config_path": write_tower(folder, tower)}},
        "data.train_path": str(folder / "rows.jsonl"),
        "data.media_root": str(QUICKSTART),
        "data.row_template": {"user": "<image>What is this?", "assistant": "{caption}"},
        "train.lr": 3e-3,
        "train.num_train_epochs": 2,
        "train.max_steps": 2,
    }
    return tiny_config(folder, world=world, **values | changes)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of one process."""
    return run(config_of(tmp_path_factory.mktemp("one")))


LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"data_parallel_mode": "ddp"},
    "fsdp2, remat": {"data_parallel_mode": "fsdp2", "enable_gradient_checkpointing": True},
    "ulysses": {"ulysses_parallel_size": 2},
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one(tmp_path: Path, one: list[dict[str, Any]], layout: str) -> None:
    sizes = {f"train.{name}": value for name, value in LAYOUTS[layout].items()}
    assert_same_training(run(config_of(tmp_path, world=2, **sizes), 2), one)


def test_two_ranks_hear_and_see_videos_as_one_does(tmp_path: Path) -> None:
    """Ranks that share a batch: images and frames are encoded by one of them each, sounds by all."""
    lines = []
    for kind, name in (("audio", "audio.jsonl"), ("image", "images.jsonl"), ("video", "video.jsonl")):
        for line in (QUICKSTART / name).read_text().splitlines()[:4]:
            chat = [{"role": "user", "content": f"<{kind}>What?"}, {"role": "assistant", "content": "Something."}]
            lines.append(json.dumps({"messages": chat, kind: json.loads(line)[kind]}))
    found = []
    for world, sizes in ((1, {}), (2, {"train.ulysses_parallel_size": 2})):
        folder = tmp_path / str(world)
        folder.mkdir()
        encoders = {
            "image": {"config_path": write_tower(folder, "siglip"), "pool": 2},
            "audio": {"config_path": write_tower(folder, "whisper"), "pool": 8},
        }
        config = config_of(folder, world=world, **sizes, **{"model.encoders": encoders, "data.drop_last": False})
        (folder / "rows.jsonl").write_text("\n".join(lines))
        found.append(run(config, world))
    assert_same_training(found[1], found[0])


def trained_and_exported(folder: Path) -> None:
    """A run of two epochs with a checkpoint after each step, and its export."""
    torch.set_num_threads(1)
    from tests.train.runs import train_quietly

    options = {"train.save_steps": 1, "train.save_hf_weights": True}
    train_quietly(config_of(folder, **options))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    run_ranks(1, trained_and_exported, folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file}: {name}": item for file in WEIGHTS for name, item in load_file(folder / file).items()}


def test_training_lowers_the_loss(exported: Path) -> None:
    losses = [line["loss"] for line in records(config_of(exported))]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert '"Qwen3ForCausalLM with SiglipVisionModel"' in (exported / "out" / "run.json").read_text()


def test_the_root_of_an_export_is_the_foundation_s_and_a_part_is_the_tower_s(exported: Path) -> None:
    folder, found = exported / "out" / "hf" / "final", weights_of(exported / "out" / "hf" / "final")
    language = AutoModelForCausalLM.from_pretrained(folder)
    assert type(language).__name__ == "Qwen3ForCausalLM"
    state = language.state_dict()
    assert all(state[name.split(": ")[1]].equal(item) for name, item in found.items() if name.startswith("model."))
    tower = AutoModel.from_pretrained(folder / "encoders" / "image")
    state = tower.state_dict()
    parts = {name.split(": ")[1]: item for name, item in found.items() if name.startswith(WEIGHTS[1])}
    assert type(tower).__name__ == "SiglipVisionModel"
    assert all(item.equal(state[name.removeprefix("vision_model.")]) for name, item in parts.items())
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\n<|image|>What?<|im_end|>\n"


def resumed(folder: Path, start: Path) -> None:
    from tests.train.runs import train_quietly

    options = {"train.save_hf_weights": True}
    step = str(start / "out" / "checkpoints" / "global_step_2")
    train_quietly(config_of(folder, **options, **{"train.load_checkpoint_path": step}))


def test_a_resumed_run_is_bit_equal(tmp_path: Path, exported: Path) -> None:
    run_ranks(1, resumed, tmp_path, exported)
    got, want = (weights_of(folder / "out" / "hf" / "final") for folder in (tmp_path, exported))
    assert got.keys() == want.keys() and all(item.equal(want[name]) for name, item in got.items())


def loaded(model: dict[str, Any], out: Path | None = None) -> Any:
    """The model that `model` describes, with its weights; exported to `out`."""
    from tutti.checkpoint.hf_save import export_hf
    from tutti.checkpoint.omni import load_parts
    from tutti.core.dist import World
    from tutti.kinds import language

    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    data = {"train_path": "x", "data_type": "conversation"}
    config = from_dict({"model": model, "data": data, "train": {"compute_dtype": "float32"}})
    tokenizer, found = language.build(config, world.device)
    load_parts(found, config.model.model_path, world=world, device=world.device)  # type: ignore[arg-type]
    if out is not None:
        export_hf(found, out, tokenizer, world=world)
    return found


def test_what_is_loaded_and_exported_again_is_bit_equal(tmp_path: Path, exported: Path) -> None:
    source = exported / "out" / "hf" / "final"
    loaded({"model_path": str(source)}, tmp_path / "again")
    got, want = weights_of(tmp_path / "again"), weights_of(source)
    assert got.keys() == want.keys() and all(item.equal(want[name]) for name, item in got.items())
    for file in ("config.json", "omni.yaml", "encoders/image/config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / file).read_text() == (source / file).read_text(), file


def test_a_checkpoint_is_exported_complete(tmp_path: Path, exported: Path) -> None:
    from tutti.kinds.export import export

    export(str(exported / "out" / "checkpoints" / "global_step_3"), str(tmp_path / "hf"))
    want = exported / "out" / "hf" / "final"
    files = sorted(str(path.relative_to(want)) for path in want.rglob("*"))
    assert files == sorted(str(path.relative_to(tmp_path / "hf")) for path in (tmp_path / "hf").rglob("*"))
    got = weights_of(tmp_path / "hf")
    assert all(got[name].equal(item) for name, item in weights_of(want).items())


def test_parts_can_be_exchanged(tmp_path: Path, exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = exported / "out" / "hf" / "final"
    want = weights_of(source)
    other = loaded({"model_path": str(source), "encoders": {"image": {"config_path": write_tower(tmp_path, "clip")}}})
    assert type(other.encoders["image"].tower).__name__ == "CLIPVisionModel"
    assert other.foundation.model.norm.weight.equal(want["model.safetensors: model.norm.weight"])
    with caplog.at_level("INFO", logger="tutti"):
        foundation = write_foundation(tmp_path, "llama", hidden_size=48)
        spec = {"image": {"model_path": str(source / "encoders" / "image")}}
        other = loaded({"config_path": foundation, "tokenizer_path": str(QUICKSTART), "encoders": spec})
    assert "joins other widths than these parts have: the projector is new" in caplog.text
    assert "new, drawn from train.seed: encoders.image.projector, foundation" in caplog.text
    name = "encoder.layers.0.mlp.fc1.weight"
    tower = other.encoders["image"].tower.state_dict()
    assert tower[name].equal(next(item for key, item in want.items() if key.endswith(name)))


def answered_by_hand(model: Any, tokenizer: Any, processor: Any, row: dict[str, Any], count: int) -> list[int]:
    """The greedy answer to a row: features replace placeholders, and the full model runs for each token."""
    images = [Image.open(QUICKSTART / name).convert("RGB") for name in row.get("images", ())]
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": "What is this?"}]
    chat = [{"role": "user", "content": parts}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=images)
    values = {"pixel_values": inputs["pixel_values"]} if images else {}
    embedded, made = model.outer.embed(inputs["input_ids"], model.outer.encode(values)), []
    for _ in range(count):
        made.append(int(model.foundation(inputs_embeds=embedded, use_cache=False).logits[0, -1].argmax()))
        embedded = torch.cat([embedded, model.get_input_embeddings()(torch.tensor([made[-1:]]))], 1)
    return made


@torch.no_grad()
def test_inference_answers_about_pictures(exported: Path) -> None:
    """From the export and from the checkpoint, with prompts of images and of text in one batch."""
    source = exported / "out" / "hf" / "final"
    model = loaded({"model_path": str(source)}).eval()
    model.set_attn_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(source)
    processor = compose_processor(from_dict({"model": {"model_path": str(source)}}).model, tokenizer)
    pictures = [json.loads(line)["image"] for line in (QUICKSTART / "images.jsonl").read_text().splitlines()[:3]]
    ask = "What is this?"
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "<image>" * len(names) + ask}], "images": names}
        for names in (pictures[:1], pictures[1:])
    ]
    rows.append({"messages": [{"role": "user", "content": ask}]})
    want = [answered_by_hand(model, tokenizer, processor, row, 6) for row in rows]
    for path in (source, exported / "out" / "checkpoints" / "global_step_3"):
        config, found = open_model(str(path), do_sample=False)
        assert isinstance(found.logits, CachedLogits)
        assert answers(found, config, requests_of(found, rows, QUICKSTART, 6)) == want


def test_stages_load_and_save_what_one_process_does(tmp_path: Path, exported: Path) -> None:
    """A run of two pipeline stages that starts from an export and writes one, of which only the first has towers."""
    source, folders = str(exported / "out" / "hf" / "final"), []
    for world, sizes in ((1, {}), (2, {"train.pipeline_parallel_size": 2, "train.data_parallel_mode": "fsdp2"})):
        folder = tmp_path / str(world)
        folder.mkdir()
        options = {"model.model_path": source, "model.config_path": source, "model.encoders": {}, "train.max_steps": 1}
        run(config_of(folder, world=world, **options, **sizes, **{"train.save_hf_weights": True}), world)
        folders.append(folder / "out" / "hf" / "final")
    want, got = (weights_of(folder) for folder in folders)
    assert got.keys() == want.keys()
    for name, item in want.items():
        torch.testing.assert_close(got[name], item, rtol=1e-3, atol=1e-4, msg=name)


def test_pictures_are_asked_about_while_training(tmp_path: Path) -> None:
    """The rows that are trained on, which data.row_template makes prompts of; their answers are counted."""
    pictures = (QUICKSTART / "images.jsonl").read_text().splitlines()[:3]
    (tmp_path / "asked.jsonl").write_text("\n".join(pictures))
    options = {"train.sample_prompts_path": str(tmp_path / "asked.jsonl"), "train.sample_tokens": 4}
    lines = run(config_of(tmp_path, **options))
    assert [line["sample_accuracy"] for line in lines if "sample_accuracy" in line]


def test_pairs_of_answers_about_pictures(tmp_path: Path) -> None:
    """Preference training, whose reference model has the same parts: the first loss is log 2 a pair."""
    config = config_of(tmp_path, **{"data.data_type": "dpo", "data.row_template": {}})
    lines = []
    for line in (QUICKSTART / "images.jsonl").read_text().splitlines()[:24]:
        row = json.loads(line)
        prompt = [{"role": "user", "content": "<image>What is this?"}]
        pair = {"prompt": prompt, "chosen": row["caption"], "rejected": "no idea"}
        lines.append(json.dumps(pair | {"image": row["image"]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    losses = [line["loss"] for line in run(config)]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5) and losses[-1] < losses[0]


def test_towers_are_taken_out_of_whole_models(tmp_path: Path) -> None:
    """Of a Qwen2-VL, which holds a language model too, and of a Whisper, which holds a decoder; and come back."""
    torch.manual_seed(0)
    sees = AutoModel.from_config(AutoConfig.for_model("qwen2_vl", **TOWERS["qwen2_vl"][1], text_config=TEXT))
    hears = WhisperForConditionalGeneration(WhisperConfig(**WHISPER))
    sees.save_pretrained(tmp_path / "sees")
    hears.save_pretrained(tmp_path / "hears")
    spec = {"image": {"model_path": str(tmp_path / "sees")}, "audio": {"model_path": str(tmp_path / "hears")}}
    foundation = {"config_path": write_foundation(tmp_path, "llama"), "tokenizer_path": str(QUICKSTART)}
    found = loaded(foundation | {"encoders": spec}, tmp_path / "out")
    again = loaded({"model_path": str(tmp_path / "out")})
    for model in (found, again):
        for kind, want in (("image", sees.visual), ("audio", hears.model.encoder)):
            got = model.encoders[kind].tower.state_dict()
            assert got.keys() == want.state_dict().keys()
            assert all(item.equal(got[name]) for name, item in want.state_dict().items())
    assert all(item.equal(again.state_dict()[name]) for name, item in found.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data.data_type": "plaintext"}, "cannot be trained with data.data_type plaintext"),
        ({"data.data_type": "reward"}, "cannot be trained with data.data_type reward"),
    ],
)
def test_what_a_composed_model_cannot_do_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    from tutti.kinds import language

    with pytest.raises(ValueError, match=reason):
        language.build(config_of(tmp_path, **changes), torch.device("cpu"))


def test_a_text_that_spells_the_placeholder_is_a_bad_row(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "<|image|>?"}, {"role": "assistant", "content": "x"}]
    config = config_of(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat}))
    with pytest.raises(AssertionError, match=r"rows\.jsonl, line 1: .*the text has 1 places for images"):
        run_ranks(1, checked, config)


def checked(config: Config) -> None:
    from tutti.train.run import train

    train(config)
