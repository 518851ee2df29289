"""Samples: the model answers prompts during training on any layout, without any effect on training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.train.runs import QUICKSTART, records, run, tiny_config, write_model_config
from tutti.config import Config

ASKED = ["What is the capital of Sweden?", "Describe the element iron."]


def sampling_config(folder: Path, *, world: int = 1, **changes: Any) -> Config:
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.jsonl"
    chat = [{"role": "user", "content": ASKED[1]}, {"role": "assistant", "content": "left out"}]
    prompts.write_text(json.dumps({"prompt": ASKED[0]}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    common = {
        "data.eval_path": str(QUICKSTART / "chat_eval.jsonl"),
        "train.eval_steps": 2,
        "train.sample_tokens": 6,
        "train.sample_prompts_path": str(prompts),
        "train.lr": 3e-3,
    }
    return tiny_config(folder, world=world, **(common | changes))


def texts(config: Config) -> list[dict[str, Any]]:
    return json.loads((Path(config.train.output_dir or "") / "run.json").read_text())["texts"]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = sampling_config(
        tmp_path_factory.mktemp("sampled"), **{"train.max_steps": 5, "train.save_hf_weights": True}
    )
    run(config)
    return config


def test_prompts_are_answered_before_training_at_each_evaluation_and_at_the_end(sampled: Config) -> None:
    assert [(text["step"], text["prompt"]) for text in texts(sampled)] == [
        (step, prompt) for step in (0, 2, 4, 5) for prompt in ASKED
    ]


def test_the_answers_are_those_of_the_exported_model(sampled: Config) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(sampled.train.output_dir or "") / "hf/final"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    final = [text for text in texts(sampled) if text["step"] == 5]
    assert any(text["text"] for text in final)
    for text in final:
        chat = [{"role": "user", "content": text["prompt"]}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        assert text["text"] == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("The capital of Peru is Lima.", ["Lima"], True),
        ("It is  the CITY\nof Lima", ["the city of lima"], True),
        ("Cafe\u0301", ["caf\u00e9"], True),
        ("It ends in .pe.", [".pe"], True),
        ("Nigeria", ["Niger"], False),
        ("Lima2", ["Lima"], False),
        ("Quito", ["Lima", "Quito"], True),
        ("", ["Lima"], False),
        ("a+b", ["a.b"], False),
    ],
)
def test_an_answer_is_right_if_it_holds_an_expected_text(answer: str, expected: list[str], right: bool) -> None:
    from tutti.train.samples import is_right

    assert is_right(answer, expected) is right


def test_expected_answers_are_counted(tmp_path: Path, sampled: Config) -> None:
    final = {text["prompt"]: text["text"] for text in texts(sampled) if text["step"] == 5}
    assert all(text.strip() for text in final.values())
    prompts = tmp_path / "expected.jsonl"
    rows = [
        {"prompt": ASKED[0], "answer": ["never said", final[ASKED[0]]]},
        {"prompt": ASKED[1], "answer": "never said"},
        {"prompt": ASKED[1]},
        *[{"prompt": ASKED[0], "answer": final[ASKED[0]]}] * 9,
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = sampling_config(tmp_path, **{"train.max_steps": 5, "train.sample_prompts_path": str(prompts)})
    counted = {line["step"]: line for line in run(config) if "sample_accuracy" in line}
    assert list(counted) == [0, 2, 4, 5]
    assert counted[5] == {"step": 5, "sample_accuracy": 10 / 11, "sample_answers": 11}
    # Prompts from the evaluation file are counted separately.
    others = tmp_path / "others.jsonl"
    others.write_text(json.dumps(rows[1]))
    both = {"train.sample_prompts_path": f"{prompts}, {others}", "data.eval_path": str(others),
            "data.row_template": {"user": "{prompt}", "assistant": "{answer}"}}  # fmt: skip
    apart = sampling_config(tmp_path / "apart", **{"train.max_steps": 1} | both)
    (line, *_) = [line for line in run(apart) if "unseen_accuracy" in line]
    assert (line["sample_answers"], line["unseen_answers"], line["unseen_accuracy"]) == (11, 1, 0)
    told = [(text["prompt"], text["right"]) for text in texts(config) if text["step"] == 5]
    assert told == [(ASKED[0], True), (ASKED[1], False), (ASKED[1], None), *[(ASKED[0], True)] * 6]


LAYOUTS = {
    "ddp": {"train.data_parallel_mode": "ddp"},
    "zero3": {"train.data_parallel_mode": "fsdp2", "train.enable_gradient_checkpointing": True},
    "zero2": {"train.data_parallel_mode": "fsdp2", "train.enable_full_shard": False},
    "tensor": {"train.data_parallel_mode": "fsdp2", "train.tensor_parallel_size": 2},
    "ulysses": {"train.data_parallel_mode": "fsdp2", "train.ulysses_parallel_size": 2},
    "context, sample by sample": {"train.context_parallel_size": 2, "train.enable_batch_invariant_mode": True},
    "pipeline": {"train.pipeline_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_answers(tmp_path: Path, sampled: Config, layout: dict[str, Any]) -> None:
    config = sampling_config(tmp_path, world=2, **layout, **{"train.max_steps": 5})
    ways = run_ranks(2, train_and_tell, config)
    assert texts(config) == texts(sampled)
    by_cache = layout in (LAYOUTS["ddp"], LAYOUTS["zero3"], LAYOUTS["zero2"])
    assert ways == [["CachedLogits" if by_cache else "RecomputedLogits"]] * 2


def train_and_tell(config: Config) -> list[str]:
    """The ways in which logits were computed for samples."""
    from tests.train.runs import train_quietly
    from tutti.train import samples

    found = set()

    class Watched(samples.Generator):
        def stream(self, requests: Any) -> Any:
            found.add(type(self.logits).__name__)
            return super().stream(requests)

    samples.Generator = Watched  # type: ignore[misc]
    train_quietly(config)
    return sorted(found)


def test_divided_experts_answer_as_whole_ones_do(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "model_type": "qwen3_moe"}
    experts |= {"architectures": ["Qwen3MoeForCausalLM"], "output_router_logits": True}
    model = write_model_config(tmp_path / "moe", **experts)
    layout = {"train.data_parallel_mode": "fsdp2", "train.expert_parallel_size": 2}
    configs = [
        sampling_config(tmp_path / str(world), world=world, **changes, **{"model.config_path": model})
        for world, changes in ((1, {}), (2, layout))
    ]
    for world, config in enumerate(configs, start=1):
        assert run_ranks(world, train_and_tell, config) == [["CachedLogits"]] * world
    assert texts(configs[0]) == texts(configs[1]) != []


@pytest.mark.parametrize("layout", ["zero3", "zero2"])
def test_training_is_bit_equal_with_and_without_samples(tmp_path: Path, layout: str) -> None:
    changes = LAYOUTS[layout] | {"train.save_steps": 2, "train.enable_full_determinism": True}
    without = {"train.sample_prompts_path": None, "train.eval_steps": 0}
    asked = sampling_config(tmp_path / "asked", world=2, **changes)
    silent = sampling_config(tmp_path / "silent", world=2, **(changes | without))
    lines = [[line for line in run(config, 2) if "loss" in line] for config in (asked, silent)]
    assert texts(asked) and not texts(silent)
    for ours, theirs in zip(*lines, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"]), f"step {ours['step']}"
    states = [run_ranks(1, random_state, str(config.train.output_dir)) for config in (asked, silent)]
    assert states[0] == states[1]


def random_state(folder: str) -> str:
    """The digests of what the checkpoint of step 4 holds of random generators and weights."""
    files = sorted((Path(folder) / "checkpoints/global_step_4").rglob("*.distcp"))
    assert files
    import hashlib

    return " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)


def test_compiled_blocks_answer_rows_of_one_length(tmp_path: Path) -> None:
    config = sampling_config(tmp_path, **{"train.max_steps": 2, "train.enable_compile": True})
    widths = run_ranks(1, widths_of_rows, config)[0]
    assert len(widths) == 2 * 6 and len(set(widths)) == 1  # before training and at the end


def widths_of_rows(config: Config) -> list[int]:
    """The lengths of the rows that the prompts are answered in, with compilation asked for and left out."""
    from tests.train.runs import train_quietly
    from tutti.train.objective import Objective, logits

    forward, widths = Objective.forward, []

    def watched(self: Any, batch: Any, *, compute: Any = None) -> Any:
        if compute is logits:
            widths.append(len(batch.input_ids))
        return forward(self, batch, compute=compute)

    Objective.forward = watched  # type: ignore[method-assign]
    torch.compile = lambda function, **options: function  # type: ignore[assignment]
    train_quietly(config)
    return widths


def test_a_text_model_goes_on_with_texts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("It is a truth\n\nShe was\n")
    config = tiny_config(
        tmp_path,
        **{
            "data.data_type": "plaintext",
            "data.train_path": str(QUICKSTART / "prose.txt"),
            "train.max_steps": 1,
            "train.sample_prompts_path": str(prompts),
            "train.sample_prompts": ["The"],
            "train.sample_tokens": 3,
        },
    )
    run(config)
    assert [(text["step"], text["prompt"]) for text in texts(config)] == [
        (step, prompt) for step in (0, 1) for prompt in ("The", "It is a truth", "She was")
    ]


def test_classifiers_are_not_asked(tmp_path: Path) -> None:
    changes = {"data.data_type": "classification", "model.num_labels": 4, "train.max_steps": 1}
    config = sampling_config(
        tmp_path, **changes, **{"data.train_path": str(QUICKSTART / "topics.jsonl")}, **{"data.eval_path": None}
    )
    run(config)
    assert texts(config) == []


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("none.jsonl", None, "none.jsonl can't be read: .*No such file"),
        ("a.jsonl", "What?", r"a.jsonl:1: not valid JSON: .*; a row is such as"),
        ("a.txt", "\udcff", r"a.txt:1: not UTF-8 text"),
        ("a.jsonl", '{"question": "What?"}', r"a.jsonl:1: has neither prompt nor messages; its columns are question"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', r"a.jsonl:1: .* no message to answer"),
        ("a.jsonl", '{"prompt": "What?", "answer": 7}', r'a.jsonl:1: "answer" must be a text or a list of texts'),
        ("a.jsonl", '{"prompt": "What?", "answer": []}', r"a.jsonl:1: .*, not \[\]"),
        ("a.jsonl", '{"prompt": "What?", "answer": ["", "x"]}', r"a.jsonl:1: .* none of them empty"),
        ("a.txt", "word " * 100, r"a.txt:1: the prompt has \d+ tokens"),
    ],
)
def test_prompts_that_cannot_be_used_stop_the_run_first(
    tmp_path: Path, name: str, text: str | None, reason: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, errors="surrogateescape")
    model = write_model_config(tmp_path / "short", max_position_embeddings=64)
    config = tiny_config(tmp_path, **{"model.config_path": model, "train.sample_prompts_path": str(tmp_path / name)})
    with pytest.raises(AssertionError, match=reason):
        run(config)
    assert not (Path(config.train.output_dir or "") / "metrics.jsonl").exists()


def test_only_newlines_end_a_prompt(tmp_path: Path) -> None:
    from tutti.train.samples import prompt_rows

    (tmp_path / "a.txt").write_text("\ufeffone\u2028two\x0cthree\r\n\nfour", encoding="utf-8", newline="")
    (tmp_path / "a.jsonl").write_text('\n{"prompt": "one\u2028two"}\n', encoding="utf-8")
    for name, expected in [("a.txt", [(1, "one\u2028two\x0cthree"), (3, "four")]), ("a.jsonl", [(2, "one\u2028two")])]:
        config = tiny_config(tmp_path, **{"train.sample_prompts_path": str(tmp_path / name)})
        found = [(int(place.rpartition(":")[2]), row["prompt"]) for place, row, *_ in prompt_rows(config)]
        assert found == expected


def test_nothing_is_drawn(tmp_path: Path) -> None:
    assert run_ranks(
        1, generators_untouched, sampling_config(tmp_path, **{"train.max_steps": 1, "train.eval_steps": 0})
    )[0]


def generators_untouched(config: Config) -> bool:
    from tests.train.runs import train_quietly
    from tutti.train.samples import Samples

    show, equal = Samples.show, []

    def watched(self: Any, *args: Any) -> None:
        before = torch.get_rng_state()
        show(self, *args)
        equal.append(torch.equal(before, torch.get_rng_state()))

    Samples.show = watched  # type: ignore[method-assign]
    train_quietly(config)
    return equal == [True, True]


def test_records_hold_no_samples(sampled: Config) -> None:
    assert not any("prompt" in line for line in records(sampled))
