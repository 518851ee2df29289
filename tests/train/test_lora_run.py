"""Runs that train adapters: exact resume, low memory, small checkpoints, and full models after merging."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tests.harness import run_ranks
from tests.train.adapted import export_quietly, lora_config, open_merged, write_bases
from tests.train.runs import records, run, tiny_config
from tests.train.test_run import assert_same_training, train_until
from tutti.checkpoint.dcp import read_index
from tutti.core.tensors import local_part
from tutti.model.lora import ADAPTER_MARK


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def make(bases, tmp_path):
    def config_of(name="run", base="dense", world=1, **train):
        return lora_config(tmp_path / name, bases / base, world, **({"max_steps": 3} | train))

    return config_of


def test_bf16_stays_close_to_fp32(make):
    half = make("half", world=2, data_parallel_mode="fsdp2", compute_dtype="bfloat16")
    assert_same_training(run(half, 2), run(make("full")), rtol_loss=2e-2, rtol_norm=5e-2)


def test_packing_and_accumulation_do_not_change_the_gradient(make):
    common = {"dyn_bsz": False, "data.train_sample": 32, "micro_batch_size": 8}
    assert_same_training(run(make("packed", **common)), run(make("alone", **(common | {"micro_batch_size": 1}))))


@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_bit_equal_and_checkpoints_hold_only_what_trains(make, world):
    changes = {
        "world": world,
        "data_parallel_mode": "fsdp2",
        "save_steps": 2,
        "lora_dropout": 0.1,
        "lora_dora": True,
        "enable_full_determinism": True,
    }
    expected = run(make("whole", **changes), world)
    half = make("half", **changes)
    run_ranks(world, train_until, half, 2)
    assert [line["step"] for line in records(half)] == [1, 2]
    resumed = run(make("half", **changes, load_checkpoint_path="auto"), world)
    for ours, theirs in zip(resumed, expected, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"]), f"step {ours['step']}"
    checkpoint = Path(half.train.output_dir) / "checkpoints" / "global_step_2"
    names = read_index(checkpoint).state_dict_metadata
    assert len(names) == 2 * 7 * 3 * 4, "parameter, two moments and step of A, B and offset of all layers, nothing else"
    assert all(ADAPTER_MARK in name for name in names)
    state = json.loads((checkpoint / "state.json").read_text())["state"]
    assert state["base"]["path"] == half.model.model_path and len(state["base"]["digest"]) == 64


def test_resume_with_another_base_is_refused(make, bases):
    run(make(save_steps=2))
    other = AutoModelForCausalLM.from_pretrained(bases / "dense")
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    other.save_pretrained(bases / "other")
    with pytest.raises(AssertionError, match="adapters of another base model"):
        run(make(base="other", load_checkpoint_path="auto"))


def assert_same_files(first, second):
    names = {file.name for file in first.iterdir()}
    assert names == {file.name for file in second.iterdir()}
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("base", ["dense", "moe"])
def test_adapter_folder_and_merged_folder_are_the_trained_model(make, tmp_path, base):
    config = make(base=base, save_hf_weights=True, save_epochs=1, lora_dora=base == "dense", lora_full_modules=["norm"])
    run(config)
    output = Path(config.train.output_dir)
    adapter = output / "hf" / "final"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        file.name for file in adapter.iterdir()
    }
    run_ranks(1, export_quietly, str(output), str(tmp_path / "merged"), True)
    run_ranks(1, export_quietly, str(output), str(tmp_path / "adapter"), False)
    run_ranks(1, export_quietly, str(adapter), str(tmp_path / "of_folder"), True)
    assert_same_files(tmp_path / "of_folder", tmp_path / "merged")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / weights).read_bytes() == (adapter / weights).read_bytes()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        want = open_merged(adapter).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(config.model.model_path).eval()(ids).logits
    torch.testing.assert_close(merged, want, rtol=0, atol=1e-5)
    assert (merged - plain).abs().max() > 1e-2
    peft = pytest.importorskip("peft")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, merged, rtol=0, atol=1e-5)


def test_full_training_has_nothing_to_merge(tmp_path):
    config = tiny_config(tmp_path, **{"train.max_steps": 1, "train.save_steps": 1})
    run(config)
    with pytest.raises(AssertionError, match=r"--merge: .* nothing to merge"):
        run_ranks(1, export_quietly, config.train.output_dir, str(tmp_path / "merged"), True)


def test_training_goes_on_from_an_adapter(make):
    first = make("first", save_hf_weights=True, lora_rslora=True, lora_targets=["q_proj"])
    run(first)
    adapter = str(Path(first.train.output_dir) / "hf" / "final")
    # The adapter's own settings apply, not train.lora_*.
    second = make("second", **{"model.adapter_path": adapter}, save_hf_weights=True, lr=0.0, lr_min=0.0)
    lines = run(second)
    assert lines[0]["loss"] < records(first)[0]["loss"] - 1e-3
    again = Path(second.train.output_dir) / "hf" / "final"
    weights = "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (Path(adapter) / weights).read_bytes()
    assert json.loads((again / "adapter_config.json").read_text())["use_rslora"]


def test_classifier_trains_its_head_beside_adapters(make, tmp_path):
    rows = [{"text": f"{'good' if i % 2 else 'bad'} thing number {i % 7}", "label": i % 2} for i in range(64)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    lines = run(
        make(
            **{"data.data_type": "classification", "data.train_path": str(path), "data.eval_path": str(path)},
            **{"model.num_labels": 2, "eval_epochs": 1, "max_steps": None, "num_train_epochs": 4},
            dyn_bsz=False,
            lr_decay_style="constant",
        )
    )
    assert [line for line in lines if "eval_accuracy" in line][-1]["eval_accuracy"] == 1.0


def test_head_that_is_frozen_gets_no_gradient(make):
    assert run_ranks(1, needed_gradients, make(max_steps=1))[0] == [(True, False)]


def needed_gradients(config):
    from tests.train.runs import train_quietly
    from tutti.train import loss

    seen = []
    original = loss._LinearCrossEntropy.forward

    def forward(ctx, *args):
        seen.append(tuple(ctx.needs_input_grad[:2]))
        return original(ctx, *args)

    loss._LinearCrossEntropy.forward = staticmethod(forward)
    train_quietly(config)
    return sorted(set(seen))


SPLIT = ({"data_parallel_mode": "fsdp2"}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2})


@pytest.mark.parametrize("train", SPLIT)
def test_frozen_weights_have_no_gradient_no_state_and_no_wider_copy(make, train):
    config = make(world=2, max_steps=1, compute_dtype="bfloat16", **train)
    for frozen, trained, graded, stepped, wide in run_ranks(2, hold, config):
        assert frozen and {dtype for dtype, *_ in frozen.values()} == {torch.bfloat16}
        assert {dtype for dtype, *_ in trained.values()} == {torch.float32}
        assert all(ADAPTER_MARK in name for name in trained)
        assert graded == stepped == set(trained)
        shapes = {shape for _, *both in frozen.values() for shape in both if len(shape) == 2}
        assert not shapes.intersection(wide), "a frozen matrix is held in fp32"


def hold(config):
    """Of a rank's frozen and of its trained parameters, by name, the dtype, and the shapes of the whole and of what is
    held of it; and while a step has its gradients: the names of parameters that have one, and of those that the
    optimizer has a state for, and the shapes of all fp32 matrices."""
    import gc

    from tests.train.runs import train_quietly
    from tutti.train.step import TrainStep

    kept = {}
    original = TrainStep.step

    def step(self, batch, totals):
        norm = self._executor.gradient_norm
        named = dict(self._executor._root.named_parameters())

        def seen(parameters):
            kept["graded"] = {name for name, parameter in named.items() if parameter.grad is not None}
            held = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
            plain = [item.to_local() if isinstance(item, DTensor) else item for item in held]
            kept["wide"] = {tuple(item.shape) for item in plain if item.dtype == torch.float32}
            return norm(parameters)

        self._executor.gradient_norm = seen
        original(self, batch, totals)
        kept["stepped"] = {name for name, parameter in named.items() if self._optimizer.state.get(parameter)}
        kept["named"] = named

    TrainStep.step = step
    train_quietly(config)
    described = {
        name: (parameter.dtype, tuple(parameter.shape), tuple(local_part(parameter).shape))
        for name, parameter in kept["named"].items()
    }
    frozen, trained = (
        {name: facts for name, facts in described.items() if kept["named"][name].requires_grad == kind}
        for kind in (False, True)
    )
    return frozen, trained, kept["graded"], kept["stepped"], kept["wide"]


@pytest.mark.parametrize("train", SPLIT)
def test_unused_adapter_stops_the_run_on_all_ranks(make, train):
    with pytest.raises(AssertionError, match=r"adapters of model\.layers\.0\.mlp\.unused_proj got no gradient"):
        run_ranks(2, train_with_unused_layer, make(world=2, **train))


def train_with_unused_layer(config):
    from tests.train.runs import train_quietly
    from tutti.kinds import language

    original = language.add_adapters

    def add(model, lora, dtype):
        model.model.layers[0].mlp.unused_proj = torch.nn.Linear(8, 8, device="meta")
        original(model, lora, dtype)
        del model.model.layers[0].mlp.unused_proj.weight
        model.model.layers[0].mlp.unused_proj.bias = None

    language.add_adapters = add
    train_quietly(config)
