"""Files of other frameworks become valid configurations, and each of their keys is accounted for."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.migrate.files import (
    AXOLOTL,
    FILES,
    LLAMA_FACTORY,
    TRAINER,
    VEOMNI_FLAT,
    VEOMNI_NESTED,
    loaded,
    migrated,
    row,
)
from tutti.cli import main
from tutti.config import ARGUMENTS, ConfigError, get
from tutti.config.load import load
from tutti.migrate import FRAMEWORKS
from tutti.migrate.rules import Source
from tutti.migrate.show import account


def leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
    """The dotted keys of all values that are not mappings."""
    found: set[str] = set()
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}"}
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_accounted_for_once(tmp_path: Path, name: str) -> None:
    migration = migrated(tmp_path, FILES[name])
    assert migration.framework == name.partition(",")[0]
    keys = [row.key for kind in ("mapped", "changed", "none") for row in migration.of(kind)]
    assert len(keys) == len(set(keys))
    read = tomllib.loads if name == "torchtitan" else yaml.safe_load
    for leaf in leaves(read(FILES[name])):
        assert any(leaf == key or leaf.startswith(f"{key}.") for key in keys), f"{leaf} was dropped"
    text = account(migration, "theirs.yaml")
    for kind in ("changed", "none"):
        for found in migration.of(kind):
            assert found.note, f"{found.key} says nothing"
            assert f"  {found.key}:" in text
            assert found.note.split(":")[0][:60] in text, f"what {found.key} means is not shown"


@pytest.mark.parametrize("name", FILES)
def test_the_result_loads_with_just_these_settings(tmp_path: Path, name: str) -> None:
    migration = migrated(tmp_path, FILES[name])
    config = loaded(tmp_path, migration)
    settings = {name: value for name, (value, _) in migration.settings().items()}
    assert config.explicit == set(settings)
    for setting, value in settings.items():
        shown = get(config, setting)
        assert (list(shown) if isinstance(shown, tuple) else shown) == value, setting


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda framework: framework.name)
def test_rules_set_arguments_that_exist(framework: Any) -> None:
    source = Source({}, 2, Path())
    for key, rule in framework.rules.items():
        for value in (True, False, 1, 0.5, "x", "full", ["q_proj"], "z3", "epoch"):
            try:
                result = rule(value, source)
            except (ValueError, TypeError, AttributeError):
                continue  # a value of another type than the key has
            assert set(result.ours) <= set(ARGUMENTS), f"{key}: {set(result.ours) - set(ARGUMENTS)}"
            assert result.kind == "mapped" or result.note, f"{key}: {value} changes or is lost without a word"


def test_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    info = '{"letters": {"file_name": "letters.jsonl", "formatting": "sharegpt", "columns": {"messages": "turns"}}}'
    (tmp_path / "sets/dataset_info.json").write_text(info)
    migration = migrated(tmp_path, LLAMA_FACTORY, ranks=4)
    config = loaded(tmp_path, migration)
    assert config.data.train_path == "sets/letters.jsonl,sets/recipes.json"
    assert "columns" in row(migration, "dataset").note and config.data.text_keys == "turns"
    assert (config.train.micro_batch_size, config.train.global_batch_size) == (2, 64)
    assert (config.train.data_parallel_mode, config.train.enable_full_shard) == ("fsdp2", True)
    assert (config.train.lr, config.train.num_train_epochs, config.train.dyn_bsz) == (1e-4, 2, True)
    assert (config.train.save_steps, config.train.save_epochs, config.train.eval_steps) == (500, 0, 500)
    assert (config.train.lora_rank, config.train.lora_alpha) == (16, 32.0)
    assert (config.train.lora_targets, config.train.lora_base_dtype) == (("q_proj", "v_proj"), "nf4")
    lost = {row.key for row in migration.of("none")}
    assert lost >= {
        "trust_remote_code",
        "max_samples",
        "val_size",
        "warmup_steps",
        "neftune_noise_alpha",
    }
    assert "lr_scheduler_type" in lost and row(migration, "optim").kind == "changed"
    assert row(migration, "dataloader_drop_last").ours == {"data.drop_last": False}


def test_axolotl(tmp_path: Path) -> None:
    migration = migrated(tmp_path, AXOLOTL)
    config = loaded(tmp_path, migration)
    assert config.data.train_path == "owner/alpaca@v1:cleaned/train,letters.jsonl"
    note = row(migration, "datasets").note
    assert "shards" in note and "field_messages" not in note and config.data.text_keys == "turns"
    asked = "base_model: x\ndatasets: [{path: a.jsonl, type: chat_template, roles_to_train: [%s]}]\n"
    assert row(migrated(tmp_path, asked % "assistant"), "datasets").kind == "mapped"
    assert "roles_to_train" in row(migrated(tmp_path, asked % "user"), "datasets").note
    assert (config.data.data_type, config.data.max_seq_len, config.train.pad_to_length) == ("conversation", 4096, True)
    assert (config.train.architecture, config.train.lora_rank, config.train.lora_base_dtype) == ("lora", 32, "nf4")
    assert config.train.lora_full_modules == ("embed_tokens", "lm_head")
    assert (config.train.use_wandb, config.train.wandb_project) == (True, "songs")
    assert not config.train.enable_reentrant and config.train.enable_gradient_checkpointing
    assert row(migration, "evals_per_epoch").kind == "changed" and row(migration, "wandb_entity").kind == "mapped"
    assert {row.key for row in migration.of("none")} == {"val_set_size", "special_tokens"}
    in_full = migrated(tmp_path, AXOLOTL.replace("adapter: qlora", "adapter:"))
    assert "load_in_4bit" in {row.key for row in in_full.of("none")}


def test_veomni_is_nearly_ours(tmp_path: Path) -> None:
    migration = migrated(tmp_path, VEOMNI_FLAT)
    config = loaded(tmp_path, migration)
    tree = yaml.safe_load(VEOMNI_FLAT)
    for name in ("lr", "lr_warmup_ratio", "global_batch_size", "wandb_project", "max_steps", "dyn_bsz"):
        assert getattr(config.train, name) == tree["train"][name]
    assert [row.key for row in migration.of("changed")] == ["data.chat_template"]
    assert not migration.of("none") and not migration.defaults


def test_veomni_nested(tmp_path: Path) -> None:
    migration = migrated(tmp_path, VEOMNI_NESTED)
    config = loaded(tmp_path, migration)
    assert (config.train.lr, config.train.max_grad_norm, config.train.output_dir) == (1e-5, 0.5, "out")
    assert (config.train.dyn_bsz, config.train.init_device, config.train.eval_epochs) == (True, "meta", 1)
    assert (config.train.lora_alpha, config.train.lora_targets) == (32.0, ("q_proj", "v_proj"))
    assert "seed" in row(migration, "model.lora_config").note
    lost = {row.key for row in migration.of("none")}
    assert lost == {"train.optimizer.muon_lr"} and config.train.optimizer == "muon"
    assert config.data.video_fps == 2.0


def test_veomni_composed(tmp_path: Path) -> None:
    """VeOmni's omni models: frozen parts, learning rates of towers, and encoders."""
    text = (
        "model: {model_path: ./llm, encoders: {image: {model_path: ./vit, add_projector: true}}}\n"
        "data: {train_path: x.jsonl, data_type: conversation, mm_configs: {image_max_pixels: 602112, max_frames: 16, "
        "use_audio_in_video: true}}\n"
        "train: {freeze_encoder_all: true, freeze_foundation: true, freeze_vit: false, vit_lr: 1.0e-6, output_dir: o}\n"
    )
    migration = migrated(tmp_path, text)
    config = loaded(tmp_path, migration)
    assert config.model.encoders == {"image": {"model_path": "./vit", "add_projector": True}}
    assert config.train.freeze == ("towers", "projectors", "language_model")
    assert config.train.part_lr == {"towers": 1e-6}
    assert (config.data.image_max_pixels, config.data.video_max_frames) == (602112, 16)
    assert "use_audio_in_video" in row(migration, "data.mm_configs").note
    assert not migration.of("none")


def test_veomni_decoders(tmp_path: Path) -> None:
    """A decoder is used unchanged; features always have the language model's width."""
    text = (
        "model: {model_path: ./llm, input_encoder: encoder, output_encoder: decoder, encode_target: true,\n"
        "  encoders: {image: {model_path: ./vit, add_projector: false, output_size: 64}},\n"
        "  decoders: {image: {config_path: ./vq, model_path: ./vq, add_projector: true, output_size: 64}}}\n"
        "data: {train_path: x.jsonl, data_type: conversation}\n"
        "train: {freeze_decoder: true, output_dir: o}\n"
    )
    migration = migrated(tmp_path, text)
    model = loaded(tmp_path, migration).model
    assert model.encoders == {"image": {"model_path": "./vit", "add_projector": False}}
    assert model.decoders == {"image": {"model_path": "./vq"}}
    assert (model.input_encoder, model.output_encoder, model.encode_target) == ("encoder", "decoder", True)
    changed = row(migration, "model.decoders")
    assert changed.kind == "changed" and "without add_projector, config_path" in changed.note
    assert not migration.of("none")
    random = migrated(tmp_path, text.replace("model_path: ./vq, ", ""))
    assert row(random, "model.decoders").kind == "none" and "name a trained one" in row(random, "model.decoders").note


@pytest.mark.parametrize("known_by", ["name", "field", "folder"])
def test_veomni_decoders_by_diffusion(tmp_path: Path, known_by: str) -> None:
    """They are distinguished from image tokenizers by their names, their fields, or the config in their folder."""
    path = "./ultra-edit-512" if known_by == "name" else "./drawer"
    field = ", patch_size1: 14" if known_by == "field" else ""
    if known_by == "folder":
        (tmp_path / "drawer").mkdir()
        (tmp_path / "drawer/config.json").write_text('{"model_type": "ultra_edit"}')
    text = (
        "model: {model_path: ./llm, input_encoder: encoder, output_encoder: encoder, encode_target: true,\n"
        f"  decoders: {{image: {{model_path: {path}, output_size: 64{field}}}}}}}\n"
        "data: {train_path: x.jsonl, data_type: conversation}\n"
        "train: {freeze_decoder: true, freeze_foundation: true, output_dir: o}\n"
    )
    migration = migrated(tmp_path, text)
    config = loaded(tmp_path, migration)
    assert config.model.decoders == {"image": {"model_path": path}}
    assert config.model.output_encoder == "decoder" and config.model.encode_target
    assert set(config.train.freeze) == {"language_model", "decoders.image.net.*"}
    assert "transformer/, vae/ and scheduler/" in row(migration, "model.decoders").note
    assert "led by queries" in row(migration, "model.output_encoder").note
    unet = row(migrated(tmp_path, text.replace(path, "./instruct-pix2pix")), "model.decoders")
    assert known_by != "name" or (unet.kind == "none" and "a UNet is no decoder here" in unet.note)


def test_what_this_version_refuses_is_given_up_with_its_reason(tmp_path: Path) -> None:
    migration = migrated(tmp_path, VEOMNI_FLAT.replace("lr: 5.0e-6", "lr: fast"))
    assert row(migration, "train.lr").kind == "none"
    assert "expects a number" in row(migration, "train.lr").note
    loaded(tmp_path, migration)


def test_a_max_of_steps_and_warmup_in_steps(tmp_path: Path) -> None:
    text = "base_model: ./m\nlearning_rate: 1e-4\nmax_steps: 200\nwarmup_steps: 20\nnum_epochs: 3\noutput_dir: o\n"
    migration = migrated(tmp_path, text + "datasets: [{path: x.jsonl, type: completion, field: body}]\n")
    config = loaded(tmp_path, migration)
    assert (config.train.max_steps, config.train.num_train_epochs, config.train.lr_warmup_ratio) == (200, 1, 0.1)
    assert (config.data.data_type, config.data.text_keys) == ("plaintext", "body,text")
    assert config.train.compute_dtype == "float32"


def test_newer_settings_of_llama_factory_and_axolotl(tmp_path: Path) -> None:
    factory = "model_name_or_path: x\noutput_dir: o\ndataset: a\nstage: "
    config = loaded(tmp_path, migrated(tmp_path, f"{factory}pt\nreport_to: [mlflow]\nuse_audio_in_video: true\n"))
    assert (config.data.data_type, config.train.dyn_bsz) == ("plaintext", True), "pretraining is packed by default"
    assert (config.train.trackers, config.data.audio_in_video) == (("mlflow",), True)
    assert loaded(tmp_path, migrated(tmp_path, f"{factory}rm\n")).data.data_type == "reward"
    neat = f"{factory}sft\nneat_packing: true\npacking: false\n"
    assert loaded(tmp_path, migrated(tmp_path, neat)).train.dyn_bsz
    axolotl = "base_model: x\ndatasets: [{path: a.jsonl}]\nuse_mlflow: true\nuse_comet: true\nreward_model: true\n"
    config = loaded(tmp_path, migrated(tmp_path, axolotl))
    assert (config.train.trackers, config.data.data_type) == (("mlflow", "comet"), "reward")


def test_a_file_of_another_framework_is_told_when_it_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("a.yaml", AXOLOTL), ("b.yaml", VEOMNI_NESTED), ("c.json", TRAINER)):
        (tmp_path / name).write_text(text)
        assert main(["train", str(tmp_path / name)]) == 2
        assert f"`tutti migrate {tmp_path / name} -o run.yaml` makes one of ours of it" in capsys.readouterr().err
    (tmp_path / "ours.yaml").write_text("train: {lrr: 1}\n")
    assert main(["check", str(tmp_path / "ours.yaml")]) == 2
    assert "tutti migrate" not in capsys.readouterr().err


def test_unknown_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of the frameworks .* Axolotl"):
        migrated(tmp_path, "image: python:3.12\nservices: [a]\n")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text(LLAMA_FACTORY)
    assert main(["migrate", str(theirs), "-o", str(ours), "--nproc", "2"]) == 0
    out = capsys.readouterr().out
    assert "is of LLaMA-Factory: 41 keys, of which" in out and f"next: tutti check {ours}" in out
    assert load([str(ours)]).train.global_batch_size == 32
    assert main(["migrate", str(theirs), "-o", str(ours)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["migrate", str(theirs)]) == 0
    streams = capsys.readouterr()
    assert yaml.safe_load(streams.out)["train"]["lr"] == 1e-4 and "no counterpart" in streams.err
    assert main(["migrate", str(tmp_path / "none.yaml")]) == 2


def test_what_is_still_to_be_set_is_said(tmp_path: Path) -> None:
    text = account(migrated(tmp_path, "model: {model_path: ./m}\ntrain: {lr: 1e-4}\n"), "theirs.yaml")
    assert "still to be set\n  data.train_path:" in text and "train.output_dir" in text


def test_settings_of_models_that_take_media(tmp_path: Path) -> None:
    factory = "model_name_or_path: x\noutput_dir: out\nstage: sft\ndataset: a.jsonl\nimage_max_pixels: 262144\n"
    config = loaded(
        tmp_path, migrated(tmp_path, f"{factory}finetuning_type: full\nfreeze_multi_modal_projector: false\n")
    )
    assert (config.data.image_max_pixels, config.data.video_max_frames) == (262144, 128)
    assert config.train.freeze == ("towers",)
    adapted = migrated(tmp_path, f"{factory}finetuning_type: lora\nfreeze_vision_tower: true\nmedia_dir: pictures\n")
    config = loaded(tmp_path, adapted)
    assert (config.train.freeze, config.data.media_root) == ((), "pictures")
    assert "train.lora_targets names" in row(adapted, "freeze_vision_tower").note
    open_tower = migrated(tmp_path, f"{factory}finetuning_type: lora\nfreeze_vision_tower: false\n")
    assert row(open_tower, "freeze_vision_tower").kind == "changed"

    axolotl = (
        "base_model: x\noutput_dir: out\nprocessor_type: AutoProcessor\nimage_size: 512\nfreeze_mm_modules: true\n"
    )
    axolotl += "micro_batch_size: 1\nsequence_len: 2048\ndatasets:\n  - {path: a.jsonl, type: chat_template}\n"
    migration = migrated(tmp_path, axolotl)
    config = loaded(tmp_path, migration)
    assert (config.data.image_max_pixels, config.train.freeze) == (512 * 512, ("towers", "projectors"))
    assert row(migration, "processor_type").kind == "mapped"


def test_veomni_diffusion(tmp_path: Path) -> None:
    text = (
        "model: {model_path: ./wan/transformer, condition_model_path: ./wan}\n"
        "data: {train_path: x.jsonl, data_type: diffusion}\n"
        "train: {training_task: offline_training, micro_batch_size: 1, output_dir: o}\n"
    )
    migration = migrated(tmp_path, text)
    config = loaded(tmp_path, migration)
    assert config.data.data_type == "diffusion" and config.model.condition_model_path == "./wan"
    assert "pickles are not read" in row(migration, "train.training_task").note and config.train.cache_latents
    online = migrated(tmp_path, text.replace("offline", "online"))
    assert not loaded(tmp_path, online).train.cache_latents
