"""Reading rules: files, overrides, precedence, types, and every problem at once with the nearest valid name."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutti.config import ARGUMENTS, Config, ConfigError, get
from tutti.config.coerce import coerce
from tutti.config.layout import resolve_sizes
from tutti.config.load import from_dict, load, to_yaml
from tutti.config.synonyms import SYNONYMS

NEEDED = ["--data.train_path", "rows.jsonl", "--train.output_dir=runs/x", "model.model_path=qwen"]


def problems(*argv: str, verb: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(list(argv), verb)
    return caught.value.problems


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("tokens", [["--train.lr", "1e-4"], ["--train.lr=1e-4"], ["train.lr=1e-4"]])
def test_an_override_in_every_form_without_a_file(tokens: list[str]) -> None:
    assert load([*NEEDED, *tokens]).train.lr == 1e-4


def test_overrides_beat_the_file_and_later_ones_earlier_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {lr: 1.0, seed: 1, gc_steps: 7}")
    config = load(["train.seed=3", path, "--train.lr", "2.0", "train.lr=3.0"], None)
    assert (config.train.lr, config.train.seed, config.train.gc_steps) == (3.0, 3, 7)
    assert config.explicit == {"train.lr", "train.seed", "train.gc_steps"}


@pytest.mark.parametrize(
    ("text", "value"), [("5e-5", 5e-5), ("1e-7", 1e-7), ("1E3", 1000.0), ("+.5e-1", 0.05), ("1.e-3", 1e-3), ("2", 2.0)]
)
def test_numbers_are_floats_from_yaml_and_from_the_command_line(tmp_path: Path, text: str, value: float) -> None:
    for argv in ([write(tmp_path, f"train:\n  lr: {text}\n")], ["--train.lr", text]):
        lr = load(argv, None).train.lr
        assert isinstance(lr, float)
        assert lr == value


def test_what_looks_like_a_number_or_a_date_stays_a_string_where_one_is_wanted(tmp_path: Path) -> None:
    assert load(["--train.wandb_name", "5e-5"], None).train.wandb_name == "5e-5"
    assert load(["--train.wandb_name", "2024"], None).train.wandb_name == "2024"
    path = write(tmp_path, "train: {wandb_name: 2024-01-31, wandb_project: '5e-5', output_dir: a-1e5}")
    train = load([path], None).train
    assert (train.wandb_name, train.wandb_project, train.output_dir) == ("2024-01-31", "5e-5", "a-1e5")


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (["--train.dyn_bsz"], True),
        (["--train.dyn_bsz", "true"], True),
        (["--train.dyn_bsz", "False"], False),
        (["train.dyn_bsz=no"], False),
        (["--train.dyn_bsz", "--train.seed=1"], True),
        (["--train.dyn_bsz", "train.seed=1"], True),
    ],
)
def test_switches(tokens: list[str], value: bool) -> None:
    assert load(tokens, None).train.dyn_bsz is value


def test_a_file_after_a_switch_is_the_file(tmp_path: Path) -> None:
    config = load(["--train.dyn_bsz", write(tmp_path, "train: {seed: 9}")], None)
    assert config.train.dyn_bsz
    assert config.train.seed == 9


@pytest.mark.parametrize("text", ["a,b", "a, b", "[a, b]", '["a", "b"]'])
def test_lists(text: str) -> None:
    assert load([f"--train.no_decay_params={text}"], None).train.no_decay_params == ("a", "b")


def test_a_prompt_is_one_text_and_a_list_of_them_is_written_as_one() -> None:
    def prompts(text: str) -> tuple[str, ...]:
        return load(["--train.sample_prompts", text], None).train.sample_prompts

    assert prompts("Hello, who are you?") == ("Hello, who are you?",)
    assert prompts('["Hello, who are you?", "And you?"]') == ("Hello, who are you?", "And you?")
    assert prompts("[INST] Hello, you [/INST]") == ("[INST] Hello, you [/INST]",)
    assert prompts("none") == ()


def test_lists_from_yaml_are_tuples_and_can_be_empty(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  no_decay_modules:\n    - A\n    - B\nmodel: {basic_modules: []}")
    config = load([path], None)
    assert config.train.no_decay_modules == ("A", "B")
    assert config.model.basic_modules == ()


@pytest.mark.parametrize("word", ["none", "None", "null", ""])
def test_none(word: str) -> None:
    config = load(["--model.model_path=a", f"--model.model_path={word}", f"model.moe_implementation={word}"], None)
    assert config.model.model_path is None
    assert load([f"train.no_decay_params={word}"], None).train.no_decay_params == ()
    assert config.model.moe_implementation is None


def test_a_negative_number_is_a_value() -> None:
    assert problems("--train.lr", "-1") == ["train.lr: must be at least 0, got -1.0"]


def test_mappings_by_longer_names_and_inline(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {encoders: {image: {config_path: siglip, scale: 1}}}")
    config = load([path, "model.encoders.image.scale=5e-1", "--model.encoders.audio.model_path", "whisper"], None)
    assert config.model.encoders == {
        "image": {"config_path": "siglip", "scale": 0.5},
        "audio": {"model_path": "whisper"},
    }
    config = load([path, '--model.encoders={"image": {"model_path": "x"}}', "model.encoders.image.scale=2"], None)
    assert config.model.encoders == {"image": {"model_path": "x", "scale": 2}}


def test_all_problems_at_once_one_line_each(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "train:\n  lr_warmup: 0.1\n  lr_decay_style: cosin\n  seed: x\n  dyn_bsz: 1\ntrian: {lr: 1}\ndata: 5\n",
    )
    found = problems(path, "--train.micro_batch_size", "1.5", "train.lr_warmup_ratio=2", "max_seq_len=3", verb="train")
    assert found == [
        f"train.lr_warmup: unknown argument; did you mean train.lr_warmup_ratio? ({path}:2)",
        f"trian: unknown argument; did you mean train? ({path}:6)",
        f"data: expects a mapping of arguments, got 5 ({path}:7)",
        "max_seq_len: unknown argument; did you mean data.max_seq_len?",
        f"train.lr_decay_style: 'cosin' is not one of constant, linear, cosine; did you mean cosine? ({path}:3)",
        f"train.seed: expects a whole number, got 'x' ({path}:4)",
        f"train.dyn_bsz: expects true or false, got 1; write true ({path}:5)",
        "train.micro_batch_size: expects a whole number, got 1.5",
        "train.lr_warmup_ratio: must be at most 1, got 2.0",
        "data.train_path: required; " + ARGUMENTS["data.train_path"].doc,
        "train.output_dir: required; " + ARGUMENTS["train.output_dir"].doc,
        "model.model_path: required, or model.config_path to start from random weights",
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train.lr_decay_rati", "train.lr_decay_ratio"),
        ("train.max_seq_len", "data.max_seq_len"),
        ("train.eval_path", "data.eval_path"),
        ("lr", "train.lr"),
        ("train.microbatch_size", "train.micro_batch_size"),
        ("modle.model_path", "model.model_path"),
        ("train.tensor_paralel_size", "train.tensor_parallel_size"),
        ("train.max-steps", "train.max_steps"),
    ],
)
def test_nearest_name(name: str, meant: str) -> None:
    assert problems(f"--{name}", "1") == [f"{name}: unknown argument; did you mean {meant}?"]


@pytest.mark.parametrize("name", ["zzzz", "train.neftune_noise_alpha", "train.trust_remote_code"])
def test_a_name_like_no_other(name: str) -> None:
    assert problems(f"{name}=1") == [f"{name}: unknown argument; see `tutti args`"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train.learning_rate", "did you mean train.lr?"),
        ("train.LR", "did you mean train.lr?"),
        ("model_name_or_path", "did you mean model.model_path?"),
        ("train.cutoff_len", "did you mean data.max_seq_len?"),
        ("train.resume_from_checkpoint", "did you mean train.load_checkpoint_path?"),
        ("train.betas", "write train.adam_beta1 and train.adam_beta2"),
    ],
)
def test_names_of_other_programs(name: str, hint: str) -> None:
    assert problems(f"--{name}", "1") == [f"{name}: unknown argument; {hint}"]


def test_synonyms_name_arguments_that_there_are() -> None:
    named = re.findall(r"\b(?:model|data|train|infer)\.\w+", " ".join(SYNONYMS.values()))
    assert set(named) <= set(ARGUMENTS)
    assert not {argument.leaf for argument in ARGUMENTS.values()} & set(SYNONYMS), "would never be looked up"


def test_a_dotted_name_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "train.lr: 1\n")
    assert problems(path) == [f"train.lr: in a file it is written as `lr:`, indented below `train:` ({path}:1)"]


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"train": {"seed": True}}, "train.seed: expects a whole number, got true"),
        ({"train": {"lr": "1e-5"}}, "train.lr: expects a number, got '1e-5'; leave the quotes out"),
        ({"train": {"dyn_bsz": "true"}}, "train.dyn_bsz: expects true or false, got 'true'; leave the quotes out"),
        ({"train": {"lr": float("nan")}}, "train.lr: expects a finite number, got nan"),
        ({"train": {"seed": 3.0}}, "train.seed: expects a whole number, got 3.0; write 3"),
        ({"train": {"seed": None}}, "train.seed: expects a whole number, got null; leave it out for its default"),
        (
            {"train": {"no_decay_params": "a, b"}},
            "train.no_decay_params: expects a list of strings, got 'a, b'; write [a, b]",
        ),
        ({"train": {"no_decay_params": [1]}}, "train.no_decay_params: expects a list of strings, got [1]"),
        ({"train": {"wandb_name": 7}}, "train.wandb_name: expects a string, got 7; put it in quotes"),
        ({"train": {"micro_batch_size": 0}}, "train.micro_batch_size: must be at least 1, got 0"),
        ({"data": {"max_seq_len": 1}}, "data.max_seq_len: must be at least 2, got 1"),
        ({"train": {"ckpt_manager": "x"}}, "train.ckpt_manager: 'x' is not one of dcp"),
        ({"data": {"dataloader_type": "x"}}, "data.dataloader_type: 'x' is not one of native"),
        ({"data": {"multisource_datasets_type": "x"}}, "data.multisource_datasets_type: 'x' is not one of interleave"),
        (
            {"data": {"datasets_type": "maping"}},
            "data.datasets_type: 'maping' is not one of mapping, iterable, nor module:factory; did you mean mapping?",
        ),
        (
            {"data": {"chat_template": "chatlm"}},
            "data.chat_template: 'chatlm' is not one of default, chatml, llama2, nor the path of a Jinja file; "
            "did you mean chatml?",
        ),
        (
            {"data": {"chat_date": "31.1.2026"}},
            "data.chat_date: '31.1.2026' is no date; write it as 2026-01-31",
        ),
        (
            {"data": {"image_min_pixels": 9, "image_max_pixels": 8}},
            "data.image_min_pixels: must not be above data.image_max_pixels (8), got 9",
        ),
        (
            {"data": {"video_min_pixels": 9, "video_max_pixels": 8}},
            "data.video_min_pixels: must not be above data.video_max_pixels (8), got 9",
        ),
        (
            {"train": {"loss_weights": {"mse": 2}}},
            "train.loss_weights: data_type conversation has losses of text, code, feature, flow, none of mse",
        ),
        (
            {"train": {"loss_weights": {"mse": -1}}, "data": {"data_type": "image"}},
            "train.loss_weights: mse must have a weight of 0 or more, got -1",
        ),
        (
            {"train": {"tensor_parallel_size": 2}, "data": {"data_type": "image"}},
            "train.tensor_parallel_size: not for a model of data_type image: its matrices are not split",
        ),
        (
            {"train": {"freeze": ["x"]}, "data": {"data_type": "image"}},
            "train.freeze: not for a model of data_type image: all of it is trained",
        ),
        (
            {"train": {"dyn_bsz": True}, "data": {"data_type": "diffusion"}},
            "train.dyn_bsz: not for a model of data_type diffusion: a micro batch has train.micro_batch_size pictures "
            "of one size, so that nothing is padded anyway",
        ),
        (
            {"train": {"context_parallel_size": 2}, "data": {"data_type": "diffusion"}},
            "train.context_parallel_size: not for a model of data_type diffusion: no ring is written for its attention"
            "; train.ulysses_parallel_size shares its tokens",
        ),
        (
            {"train": {"enable_profiling": True, "profile_start_step": 5}},
            "train.profile_end_step: must be above 1, which is the first step, and above train.profile_start_step (5), "
            "got 2",
        ),
    ],
)
def test_wrong_values(tree: dict, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(tree)
    assert caught.value.problems == [problem]


@pytest.mark.parametrize("value", ["mapping", "iterable", "my.module:make"])
def test_open_sets(value: str) -> None:
    assert from_dict({"data": {"datasets_type": value}}).data.datasets_type == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train:\n  lr: 1\n  seed: 2\n  lr: 3\n", "PATH:4: train.lr is given twice, before on line 2"),
        ("train: {lr: 1}\ndata: {}\ntrain: {}\n", "PATH:3: train is given twice, before on line 1"),
        ("train:\n  lr: [1\n", "PATH:3: is not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "train:\n\tlr: 1\n",
            "PATH:2: is not valid YAML: found character '\\t' that cannot start any token"
            ": indent with spaces, not tabs",
        ),
        ("- a\n", "PATH:1: expects groups such as `train:`, not a single value"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path, text)
    assert problems(path) == [problem.replace("PATH", path)]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert problems(f"{tmp_path}/no.yaml") == [f"{tmp_path}/no.yaml: No such file or directory"]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert problems(f"{tmp_path}/binary.yaml") == [f"{tmp_path}/binary.yaml: is not text in UTF-8"]


def test_an_empty_file_and_an_empty_group_are_defaults(tmp_path: Path) -> None:
    assert load([write(tmp_path, "")], None) == load([write(tmp_path, "train:\n")], None) == load([], None)


def test_one_file_only(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {}")
    assert problems(path, "b.yaml") == [
        f"b.yaml: unexpected; {path} is the configuration file already, and there can be one"
    ]


def test_one_dash_is_not_enough() -> None:
    assert problems("-train.lr=1") == ["-train.lr=1: unknown option; an argument is written --a.b VALUE or a.b=VALUE"]


def test_a_value_is_missing() -> None:
    assert problems("--train.lr") == ["train.lr: needs a value, as in --train.lr VALUE"]
    assert problems("--train.lr", "--train.seed", "1") == ["train.lr: needs a value, as in --train.lr VALUE"]


def test_yaml_anchors_and_merges(tmp_path: Path) -> None:
    path = write(tmp_path, "train: &a {seed: 3}\ndata:\n  train_path: &p rows\n  eval_path: *p\n")
    config = load([path], None)
    assert (config.data.eval_path, config.train.seed) == ("rows", 3)


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("train", ["data.train_path", "train.output_dir", "model.model_path"]),
        ("check", ["data.train_path", "model.model_path"]),
        ("infer", ["infer.model_path"]),
        (None, None),
    ],
)
def test_required(verb: str | None, names: list[str] | None) -> None:
    if names is None:
        load([], None)
    else:
        assert [problem.partition(":")[0] for problem in problems(verb=verb)] == names


def test_a_config_alone_is_enough_of_a_model() -> None:
    load([*NEEDED[:3], "model.config_path=conf"])


def test_defaults_that_follow_others() -> None:
    config = load(["model.model_path=m"], None)
    assert (config.model.config_path, config.model.tokenizer_path, config.infer.tokenizer_path) == ("m", "m", "m")
    config = load(["model.config_path=c"], None)
    assert (config.model.model_path, config.model.tokenizer_path) == (None, "c")
    config = load(["model.config_path=c", "model.model_path=m"], None)
    assert (config.model.config_path, config.model.tokenizer_path) == ("c", "m")
    columns = {"plaintext": "content_split", "conversation": "messages", "classification": "text", "dpo": "prompt"}
    for data_type, column in columns.items():
        assert load([f"data.data_type={data_type}"], None).data.text_keys == column
    assert load(["data.text_keys=a,b"], None).data.text_keys == "a,b"


def test_pairs_that_do_not_work_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ("train.enable_compile", "train.expert_parallel_size")
    monkeypatch.setattr("tutti.config.rules.NOT_TOGETHER", (pair,))
    (problem,) = problems("train.enable_compile=true", "train.expert_parallel_size=2")
    assert problem.startswith("train.enable_compile: not available yet together with train.expert_parallel_size; ")
    (problem,) = problems("train.enable_compile=true", "train.enable_batch_invariant_mode=true")
    start, _, why = problem.partition(", since ")
    assert start == "train.enable_batch_invariant_mode: cannot go together with train.enable_compile"
    assert "lengths" in why


_TEXT = st.text("aZ0 -:#'\"é~[]{},.\n", max_size=6)


def _values(name: str) -> st.SearchStrategy:
    argument = ARGUMENTS[name]
    low, high = argument.low or 0, argument.high
    values: st.SearchStrategy
    if argument.kind is tuple:
        values = st.lists(st.sampled_from(argument.values) if argument.values else _TEXT, max_size=3)
    elif argument.values:
        values = st.sampled_from(argument.values)
    elif argument.open_set:
        values = st.sampled_from([*argument.open_set.names, "some.module:factory", "./template.jinja"]).filter(
            lambda value: value in argument.open_set.names or argument.open_set.marks[0] in value  # type: ignore[union-attr]
        )
    elif argument.kind is bool:
        values = st.booleans()
    elif argument.kind is int:
        values = st.integers(int(low), 10**9)
    elif argument.kind is float:
        values = st.floats(low, high if high is not None else 1e9, allow_nan=False)
    elif argument.kind is dict:
        values = st.dictionaries(_TEXT, st.none() | st.booleans() | st.floats(-1, 1) | _TEXT)
    else:
        values = _TEXT | st.sampled_from(["5e-5", "1", "true", "2024-01-31", "a: b", "#", "[", "~"])
    return values | st.none() if argument.optional else values


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_written_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any configuration, with any of its arguments set, survives to_yaml and load with its explicit names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tutti.config.rules.NOT_TOGETHER", ())
        patch.setattr("tutti.config.load.contradictions", lambda config: [])
        tree: dict[str, dict] = {}
        for name in data.draw(st.sets(st.sampled_from(sorted(ARGUMENTS)), max_size=8)):
            if not name.startswith("train.profile_"):
                group, leaf = name.split(".")
                tree.setdefault(group, {})[leaf] = data.draw(_values(name), label=name)
        config = from_dict(tree)
        path = tmp_path_factory.getbasetemp() / "round.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        back = load([str(path)], None)
    assert back == config
    assert back.explicit == config.explicit
    assert back.model.basic_modules == config.model.basic_modules


def test_a_file_written_back_has_every_default_and_follows_overrides(tmp_path: Path) -> None:
    config = load([*NEEDED, "data.train_size=10_000_000"])
    path = write(tmp_path, to_yaml(config))
    for name in ARGUMENTS:
        assert f"  {name.partition('.')[2]}:" in Path(path).read_text()
    back = load([path, "model.model_path=other"])
    assert (back.model.config_path, back.model.tokenizer_path) == ("other", "other")
    assert "data.train_size" in back.explicit
    assert "data.train_sample" not in back.explicit


def test_a_file_written_back_and_edited_counts_the_edit_as_explicit(tmp_path: Path) -> None:
    text = to_yaml(load(NEEDED)).replace("seed: 42\n  enable_compile", "seed: 43\n  enable_compile")
    config = load([write(tmp_path, text)])
    assert config.train.seed == 43
    assert "train.seed" in config.explicit


def test_sizes_that_the_number_of_ranks_gave_follow_it_again(tmp_path: Path) -> None:
    path = write(tmp_path, to_yaml(resolve_sizes(load([*NEEDED, "train.micro_batch_size=2"]), 4)))
    assert "global_batch_size: 8" in Path(path).read_text()
    back = load([path])
    assert back.train.global_batch_size is None and back.train.micro_batch_size == 2
    assert resolve_sizes(back, 3).train.global_batch_size == 6
    edited = write(tmp_path, Path(path).read_text().replace("  global_batch_size: 8", "  global_batch_size: 12", 1))
    assert load([edited]).train.global_batch_size == 12
    asked = write(tmp_path, to_yaml(resolve_sizes(load([*NEEDED, "train.global_batch_size=4"]), 4)))
    assert load([asked]).train.global_batch_size == 4


def test_every_path_takes_homes_and_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/me")
    monkeypatch.setenv("RUNS", "/runs")
    paths = {name for name, argument in ARGUMENTS.items() if argument.path}
    assert paths >= {name for name in ARGUMENTS if name.endswith(("_path", "_dir"))}
    for name in paths - {"model.encoders", "model.decoders"}:
        for text, path in [("~/x.y", "/me/x.y"), ("${RUNS}/$RUNS.x", "/runs//runs.x"), ("./a~b", "./a~b")]:
            assert get(load([f"{name}={text}"], None), name) == path
        with pytest.raises(ConfigError, match=f"{name}: the environment variable NOT_SET in ./.NOT_SET is not set"):
            load([f"{name}=./$NOT_SET"], None)
        with pytest.raises(ConfigError, match=re.escape(f"{name}: ${{RUNS:-x}} in ./${{RUNS:-x}} is not replaced")):
            load([f"{name}=./${{RUNS:-x}}"], None)
    assert get(load(["data.train_path=~/a, $RUNS/b,c"], None), "data.train_path") == "/me/a, /runs/b,c"
    towers = coerce(ARGUMENTS["model.encoders"], {"image": {"model_path": "~/x", "note": "~/x"}})
    assert towers == {"image": {"model_path": "/me/x", "note": "~/x"}}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$NOT_SET").touch()
    assert load(["data.train_path=$NOT_SET"], None).data.train_path == "$NOT_SET"


def test_paths_that_lie_beside_the_file_and_not_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "data" / "rows.jsonl").touch()
    (tmp_path / "project" / "out").mkdir()
    text = "data: {train_path: data/rows.jsonl, eval_path: none}\ntrain: {output_dir: out}\n"
    write(tmp_path / "project", text)
    monkeypatch.chdir(tmp_path)
    assert problems("project/run.yaml") == [
        "data.train_path: data/rows.jsonl is not in the working directory, from which paths are taken, but in project, "
        "where the file lies: cd project (project/run.yaml:1)"
    ]
    monkeypatch.chdir(tmp_path / "project")
    assert load(["run.yaml"], None).data.train_path == "data/rows.jsonl"
    assert load([str(tmp_path / "project" / "run.yaml")], None).train.output_dir == "out"


def test_get_and_direct_construction() -> None:
    assert get(Config(), "train.lr") == 5e-5
    assert Config() == Config(explicit=frozenset({"train.lr"}))
