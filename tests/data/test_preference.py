"""Pairs of answers: all row formats give the same pair, and errors say what is wrong with a row."""

import json
import pickle

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.train.runs import QUICKSTART
from tutti.config.load import from_dict
from tutti.core.batch import IGNORE, Sample, pack
from tutti.core.dist import World
from tutti.data.loader import build_data
from tutti.data.preencoded import PreEncoded
from tutti.data.preference import make_pair_encoder
from tutti.data.source import BadRow, Row

TOKENIZER = AutoTokenizer.from_pretrained(QUICKSTART)
VOCABULARY = len(TOKENIZER)

ASK = {"role": "user", "content": "Name a colour."}
GOOD = {"role": "assistant", "content": "Blue."}
BAD = {"role": "assistant", "content": "Seven, I think."}
EARLIER = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]


def encoder(max_seq_len: int = 512, **data: object):
    config = from_dict({"data": {"data_type": "dpo", "max_seq_len": max_seq_len, **data}})
    return make_pair_encoder(config, TOKENIZER, vocab_size=VOCABULARY)


def encode(value: dict, **settings: object) -> Sample | str:
    """The row's pair, or the reason why there is none."""
    (result,) = encoder(**settings)([Row(value, "rows.jsonl", 7)], source=3)
    if isinstance(result, BadRow):
        assert (result.file, result.line) == ("rows.jsonl", 7)
        return result.reason
    (sample,) = result
    return sample


def sides(sample: Sample) -> list[tuple[str, str]]:
    """Text and trained text of the chosen and the rejected answer."""
    parts = zip(np.split(sample.input_ids, [sample.split]), np.split(sample.labels, [sample.split]), strict=True)
    return [(TOKENIZER.decode(ids), TOKENIZER.decode(labels[labels != IGNORE])) for ids, labels in parts]


def chat(*messages: dict) -> str:
    return TOKENIZER.apply_chat_template(list(messages), tokenize=False)


WANT = [(chat(ASK, GOOD), "Blue.<|im_end|>"), (chat(ASK, BAD), "Seven, I think.<|im_end|>")]
DIALOGUE = "\n\nHuman: Name a colour.\n\nAssistant:"
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Name a colour."}],
    "chosen": {"from": "gpt", "value": "Blue."},
    "rejected": {"from": "gpt", "value": "Seven, I think."},
}
SHAPES = {
    "texts": {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven, I think."},
    "messages": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "one message": {"prompt": [ASK], "chosen": GOOD, "rejected": BAD},
    "conversations": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "conversations and their prompt": {"prompt": "Name a colour.", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "conversations and their prompt's messages": {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "text prompt, messages": {"prompt": "Name a colour.", "chosen": [GOOD], "rejected": [BAD]},
    "sharegpt": SHAREGPT,
    "alpaca": {"instruction": "Name a", "input": "colour.", "chosen": "Blue.", "rejected": "Seven, I think."},
    "dialogues": {"chosen": f"{DIALOGUE} Blue.", "rejected": f"{DIALOGUE} Seven, I think."},
    "dialogue prompt": {"prompt": DIALOGUE, "chosen": " Blue.", "rejected": " Seven, I think."},
    "json text": {"prompt": json.dumps([ASK]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    "empty columns": {"prompt": None, "messages": [ASK], "chosen": "Blue.", "rejected": "Seven, I think."},
}


@pytest.mark.parametrize("value", SHAPES.values(), ids=SHAPES)
def test_shapes(value):
    sample = encode(value)
    assert isinstance(sample, Sample), sample
    assert sample.source == 3
    want = (
        WANT if "instruction" not in value else [(text.replace("a colour", "a\ncolour"), done) for text, done in WANT]
    )
    assert sides(sample) == want


def test_another_column_holds_the_prompt():
    value = {"question": "Name a colour.", "chosen": "Blue.", "rejected": "Seven, I think."}
    assert sides(encode(value, text_keys="prompt,question")) == WANT


def test_what_both_begin_with_is_not_trained_on():
    sample = encode({"chosen": [*EARLIER, ASK, GOOD], "rejected": [*EARLIER, ASK, BAD]})
    assert [trained for _, trained in sides(sample)] == [trained for _, trained in WANT]


def test_several_turns_of_an_answer_are_trained_on():
    more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    sample = encode({"prompt": [ASK], "chosen": [GOOD, *more], "rejected": [BAD]})
    assert sides(sample)[0][1] == "Blue.<|im_end|>Yes.<|im_end|>"


def test_system_and_loss_mask_hold_as_in_conversations():
    answer = [GOOD, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    masked = [{**answer[0], "loss_mask": 0}, *answer[1:]]
    sample = encode({"system": "Be brief.", "prompt": "Name a colour.", "chosen": masked, "rejected": [BAD]})
    system = {"role": "system", "content": "Be brief."}
    assert sides(sample) == [
        (chat(system, ASK, *answer), "Yes.<|im_end|>"),
        (chat(system, ASK, BAD), "Seven, I think.<|im_end|>"),
    ]


BAD_ROWS = {
    "no rejected": ({"prompt": "x", "chosen": "a"}, "has no column rejected; its columns are prompt, chosen"),
    "equal": ({"prompt": "x", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    "equal tokens": ({"prompt": "x", "chosen": [GOOD], "rejected": [{**GOOD, "name": "me"}]}, "the same once they are"),
    "other prompts": (
        {"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "Name two."}, BAD]},
        "chosen and rejected do not begin with the same prompt",
    ),
    "other later prompts": (
        {"chosen": [*EARLIER, ASK, GOOD], "rejected": [*EARLIER, {**ASK, "content": "Name two."}, BAD]},
        "part at message 2, which in chosen is not an assistant's but of role user: the prompt must be the same",
    ),
    "another prompt": (
        {"prompt": "Name two.", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        "chosen is a conversation that does not hold the prompt of its row",
    ),
    "no answer": ({"chosen": [ASK, GOOD], "rejected": [ASK]}, "no trained token: rejected has no answer"),
    "masked": (
        {"prompt": [ASK], "chosen": [{**GOOD, "loss_mask": 0}], "rejected": [BAD]},
        "chosen: no trained token",
    ),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "chosen is text, and the row has no prompt (data.text_keys)"),
    "number": ({"prompt": "x", "chosen": 1, "rejected": "b"}, "chosen must be text or messages, not int"),
    "prompt of another kind": ({"prompt": 1, "chosen": "a", "rejected": "b"}, "the prompt must be text or messages"),
    "empty": ({"prompt": "x", "chosen": [], "rejected": "b"}, "chosen is an empty conversation"),
    "role": (
        {"prompt": "x", "chosen": [{"role": "wizard", "content": "a"}], "rejected": "b"},
        "chosen: message 0 has unknown role 'wizard'",
    ),
}


@pytest.mark.parametrize(("value", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(value, reason):
    found = encode(value)
    assert isinstance(found, str) and reason in found, found


def test_a_long_pair_loses_the_beginning_of_its_prompt_alike_on_both_sides():
    value = {"prompt": "word " * 40, "chosen": "Blue.", "rejected": "Seven, I think."}
    whole = encode(value)
    for length in (len(whole) - 1, len(whole) - 20):
        sample = encode(value, max_seq_len=length)
        cut = -(-(len(whole) - length) // 2)
        assert len(sample) == len(whole) - 2 * cut <= length
        assert sample.split == whole.split - cut
        assert sample.input_ids.tolist() == [
            *whole.input_ids[cut : whole.split],
            *whole.input_ids[whole.split + cut :],
        ]
        assert [trained for _, trained in sides(sample)] == [trained for _, trained in WANT]


def test_answers_that_are_too_long_are_told():
    reason = encode({"prompt": "x", "chosen": "a " * 30, "rejected": "b " * 30}, max_seq_len=64)
    assert "is longer than data.max_seq_len 64, and the answers leave no room" in reason


def test_a_bad_row_leaves_the_others_alone():
    rows = [Row(SHAPES["texts"], "f", 1), BadRow("f", 2, "broken"), Row({"chosen": "a"}, "f", 3), Row(SHAREGPT, "f", 4)]
    results = pickle.loads(pickle.dumps(encoder()))(rows)
    assert [isinstance(result, BadRow) for result in results] == [False, True, True, False]
    assert sides(results[3][0]) == WANT


def test_a_pair_is_packed_as_two_sequences():
    samples = [encode(SHAPES["texts"]), encode({"prompt": "x", "chosen": "one", "rejected": "two and three"})]
    batch = pack(samples, pad_to=200)
    lengths = [n for one in samples for n in (one.split, len(one) - one.split)]
    assert batch.lengths() == lengths
    assert batch.cu_seqlens[:5].tolist() == np.cumsum([0, *lengths]).tolist()
    starts = batch.position_ids == 0
    assert starts.nonzero().flatten()[:4].tolist() == batch.cu_seqlens[:4].tolist()
    assert batch.segment_sources.tolist()[:4] == [3] * 4 and batch.num_sequences == 4
    for segment in range(4):
        begin, end = batch.cu_seqlens[segment : segment + 2].tolist()
        mine = batch.target_index[batch.target_segment == segment]
        assert len(mine) and (mine >= begin).all() and (mine < end).all()


def ready(sample: Sample) -> str | None:
    (result,) = PreEncoded(encoder(), 512, VOCABULARY, pairs=True)([Row(sample, "f", 1)])
    return result.reason if isinstance(result, BadRow) else None


def test_ready_made_pairs():
    sample = encode(SHAPES["texts"])
    assert ready(sample) is None
    assert "split of a Sample must lie within it" in ready(Sample(sample.input_ids, sample.labels))
    labels = sample.labels.copy()
    labels[sample.split :] = IGNORE
    assert "no trained token" in ready(Sample(sample.input_ids, labels, split=sample.split))


def write_rows(path, count):
    lines = [
        json.dumps(
            {
                "prompt": f"Count to {i}. " + "Go on. " * (i % 5),
                "chosen": "one two " * (i % 7 + 1),
                "rejected": f"no {i}",
            }
        )
        for i in range(count)
    ]
    path.write_text("\n".join(lines))
    return str(path)


def data_of(path, *, dp_rank=0, dp_size=1, **data):
    tree = {
        "data": {"train_path": path, "data_type": "dpo", "max_seq_len": 128, "num_workers": 0, **data},
        "train": {"dyn_bsz": True, "micro_batch_size": 2, "global_batch_size": 8, "dpo_reference": "on_the_fly"},
    }
    ranks = World(0, 1, 0, device=None)
    return build_data(from_dict(tree), TOKENIZER, world=ranks, dp_rank=dp_rank, dp_size=dp_size, vocab_size=VOCABULARY)


def fingerprint(batch):
    return [(micro.input_ids.tolist(), micro.cu_seqlens.tolist()) for micro in batch.micro_batches]


def test_a_global_batch_counts_pairs(tmp_path):
    data = data_of(write_rows(tmp_path / "rows.jsonl", 60))
    for batch in data.train():
        pairs = [micro.num_sequences // 2 for micro in batch.micro_batches]
        assert batch.num_targets == batch.num_samples == sum(pairs)
        assert batch.source_targets == {"rows": batch.num_targets}
        assert batch.trained_tokens == sum(len(micro.target_index) for micro in batch.micro_batches)
        assert batch.source_tokens == {"rows": batch.trained_tokens}
        assert [len(names) for names in batch.names] == pairs


def test_names_find_each_pair_on_any_number_of_ranks_and_in_a_scan(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 60)

    def by_name(batches):
        found = {}
        for batch in batches:
            for names, micro in zip(batch.names, batch.micro_batches, strict=True):
                borders = micro.cu_seqlens.tolist()
                for place, name in enumerate(names):
                    found[name] = micro.input_ids[borders[2 * place] : borders[2 * place + 2]].tolist()
        return found

    scanned = by_name(data_of(path).scan())
    assert sorted(scanned) == list(range(60))
    halves = [by_name(data_of(path, dp_rank=rank, dp_size=2).train()) for rank in (0, 1)]
    assert halves[0] and halves[1] and not set(halves[0]) & set(halves[1])
    for name, ids in (halves[0] | halves[1]).items():
        assert ids == scanned[name]


def test_scanning_leaves_the_position(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 60)
    untouched, scanned = data_of(path), data_of(path)
    list(scanned.scan())
    assert scanned.state_dict() == untouched.state_dict()
    assert list(map(fingerprint, scanned.train())) == list(map(fingerprint, untouched.train()))


@pytest.mark.parametrize("datasets_type", ["mapping", "iterable"])
def test_going_on_gives_the_same_pairs(tmp_path, datasets_type):
    changes = {"datasets_type": datasets_type} | ({"train_size": 4000} if datasets_type == "iterable" else {})
    path = write_rows(tmp_path / "rows.jsonl", 60)
    data = data_of(path, **changes)
    batches = data.train()
    next(batches)
    state = data.state_dict()
    rest = list(map(fingerprint, batches))
    again = data_of(path, **changes)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert rest and list(map(fingerprint, again.train())) == rest


def test_large_data_is_read_again_as_pairs(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", 60)
    kept = list(map(fingerprint, data_of(path).train()))
    monkeypatch.setattr("tutti.data.index.KEEP_TOKENS", 0)
    assert list(map(fingerprint, data_of(path).train())) == kept
