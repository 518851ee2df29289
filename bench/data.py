"""Rows per second that become packed micro batches with loss masks: `datasets.map`, as used with Trainer, against
Tutti.

`python -m bench.data [--rows 20000] [--rounds 5] [--threads 2]`. The rows are those of data/quickstart/chat.jsonl,
repeated, in ChatML. Trainer's way is to render, tokenize and mask each row in `Dataset.map` (the template marks the
assistant's text), in one process or in as many as there are threads, and to fill batches of 2,048 tokens in row order;
reading the file into a `Dataset` is not timed. Tutti uses its loader, from the file on disk. Imports are not timed.
Contenders run in turns, each in its own process. Reports medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "data" / "quickstart"
BUDGET = 2048
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(CONTENDERS[options.run](options.file, options.threads)))
        return
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    totals = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        lines = (QUICKSTART / "chat.jsonl").read_text().splitlines(keepends=True)
        path.write_text("".join(lines[number % len(lines)] for number in range(options.rows)))
        for _ in range(options.rounds):
            for name, values in rates.items():
                result = _run(name, path, options.threads)
                values.append(options.rows / result["seconds"])
                totals[name] = (result["tokens"], result["trained"])
    ours = rates["Tutti"]
    print("| | rows/s | from | to | Tutti / this |\n| --- | ---: | ---: | ---: | ---: |")
    for name, values in rates.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(ours, values, strict=True))
        print(f"| {name} | {statistics.median(values):,.0f} | {min(values):,.0f} | {max(values):,.0f} | {ratio:.2f} |")
    same = len(set(totals.values())) == 1
    print(f"\n{options.rows:,} rows, {options.rounds} rounds, {options.threads} threads; ", end="")
    print("all agree on tokens and trained tokens" if same else f"tokens and trained tokens differ: {totals}")


def _run(name: str, path: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.data", "--run", name, "--file", str(path), "--threads", str(threads)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true" if name == "Tutti" else "false",
    }
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{name} failed:\n{result.stderr[-4000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def _tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(QUICKSTART / "tokenizer.json"), eos_token="<|endoftext|>", chat_template=CHATML
    )


def _counted(seconds: float, batches: list[Any]) -> dict[str, Any]:
    trained = sum(len(batch.target_index) for batch in batches)
    return {"seconds": seconds, "tokens": sum(batch.num_tokens for batch in batches), "trained": trained}


def _mapped(path: str, processes: int) -> dict[str, Any]:
    import numpy as np
    from datasets import disable_caching, load_dataset

    from tutti.core.batch import IGNORE, Batch, Sample, pack

    tokenizer = _tokenizer()

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        labels = [token if trained else IGNORE for token, trained in zip(ids, mask, strict=True)]
        return {"input_ids": ids, "labels": [*labels[1:], IGNORE]}

    disable_caching()
    with tempfile.TemporaryDirectory() as folder:
        data = load_dataset("json", data_files=path, split="train", cache_dir=folder)
        start = time.perf_counter()
        data = data.map(encode, num_proc=processes if processes > 1 else None, remove_columns=data.column_names)
        batches, held, room = list[Batch](), list[Sample](), BUDGET
        for row in data.with_format("numpy"):
            sample = Sample(row["input_ids"].astype(np.int32), row["labels"].astype(np.int32))
            if len(sample) > room:
                batches.append(pack(held))
                held, room = [], BUDGET
            held.append(sample)
            room -= len(sample)
        batches.append(pack(held))
        return _counted(time.perf_counter() - start, batches)


def _tutti(path: str, threads: int) -> dict[str, Any]:
    import torch

    from tutti.config import Config, DataConfig
    from tutti.core.batch import Batch
    from tutti.core.dist import World
    from tutti.data.encode import make_encoder
    from tutti.data.index import build_index
    from tutti.data.pack import BestFit
    from tutti.data.prefetch import Collator, PackedSamples
    from tutti.data.source import open_sources

    tokenizer = _tokenizer()
    dist = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    config = Config(data=DataConfig(train_path=path))
    start = time.perf_counter()
    encoder = make_encoder(config, tokenizer, vocab_size=len(tokenizer))
    sources = open_sources(config)
    index = build_index(sources, encoder, dist, num_workers=threads, silent=False, argument="data.train_path")
    samples = PackedSamples(index, sources, Collator(encoder, None, 0))
    packer, batches = BestFit(config.data.dyn_bsz_buffer_size, BUDGET, config.train.seed), list[Batch | ValueError]()
    drawn = iter(list(zip(index.length.tolist(), range(len(index)), strict=True)))
    while (taken := packer.take(lambda: next(drawn, None), BUDGET, len(batches))) is not None:
        batches.append(samples.__getitems__([number for _, number in taken]))
    batches.append(samples.__getitems__([number for _, number in packer.open]))
    seconds = time.perf_counter() - start
    return _counted(seconds, [batch for batch in batches if isinstance(batch, Batch)])


CONTENDERS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "datasets.map": lambda path, threads: _mapped(path, 1),
    "datasets.map, one process per thread": _mapped,
    "Tutti": _tutti,
}


if __name__ == "__main__":
    main()
