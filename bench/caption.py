"""Image captioning with a vision-language model: transformers' Trainer against Tutti, and the cost of the data.

`python -m bench.caption [--part speed,index,memory,soak]`. The model is a Qwen2.5-VL of 2 million parameters, with
about 220 tokens per picture. Pictures are JPEGs of four shapes with 448 pixels along the longer side. Captions mix
short labels and long descriptions: their lengths are log-normal (mean 200 tokens, at most 1,024).

- speed: trained tokens per second. Trainer pads batches of 8 random samples; Tutti packs as many tokens on average.
  Both process pictures with the same class and the same number of workers, and see each picture once. Contenders run in
  turns, each in its own process. `data wait`: the fraction of a step during which Tutti waits for its workers.
- index: rows indexed per second; this reads the sizes of pictures from their headers and tokenizes the texts.
- memory: the memory of each worker over 500 micro batches.
- soak: 500 steps on 20,000 indexed rows with small pictures and short captions, about 8 rows per step, with a narrower
  model, so that it takes only minutes. Reports data wait and the memory of each worker, then runs a few steps of
  Trainer. `--seconds` stops it early; to resume it, use the same `--folder` again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.workload import run_python

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "data" / "quickstart" / "tokenizer.json"
QUESTION = "What is shown?"
SHAPES = ((448, 448), (448, 336), (336, 448), (448, 252))
BATCH_SIZE, ACCUMULATION = 8, 1
MAX_LENGTH, MICRO_BATCH = 1344, 3
WARMUP_STEPS, WAIT_FROM = 2, 3
SOAK_SIDE, SOAK_WORDS, SOAK_WIDTH, SOAK_LENGTH, SOAK_BATCH = 112, 8, 96, 480, 8
SOAK_TRAINER_STEPS, SOAK_WARMUP = 15, 20
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder: Path, width: int = 192, layers: int = 4) -> None:
    """Write a model folder of this width and number of layers, without weights: config.json and the processor."""
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER), eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=names
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
    tokenizer.chat_template = TEMPLATE
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), TEMPLATE)
    processor.save_pretrained(folder)
    ids: dict[str, Any] = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    heads = width // 48
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 10, 10]}
    Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": width * 8 // 3,
            "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads // 2, "max_position_embeddings": 4096,
            "rope_parameters": rope, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": layers // 2, "hidden_size": width // 2, "intermediate_size": width, "num_heads": width // 96,
            "out_hidden_size": width, "fullatt_block_indexes": [layers // 2 - 1],
        },
        **ids,
    ).save_pretrained(folder)  # fmt: skip


def write_pictures(folder: Path, count: int, seed: int, side: int = 448) -> list[str]:
    """Write `count` JPEGs of noise at several scales, `side` pixels along the longer side; returns their names."""
    from PIL import Image

    random, names = np.random.default_rng(seed), []
    for number in range(count):
        width, height = (edge * side // 448 for edge in SHAPES[number % len(SHAPES)])
        coarse, fine = (
            Image.fromarray(random.integers(0, 255, (side, side, 3), np.uint8)).resize((width, height), 3)
            for side in (7, 60)
        )
        names.append(f"{seed}-{number}.jpg")
        Image.blend(coarse, fine, 0.3).save(folder / names[-1], quality=85)
    return names


def captions(count: int, seed: int, mean: int = 67) -> Iterator[str]:
    """Captions of random words, log-normal in length, `mean` on average."""
    random = np.random.default_rng(seed)
    rows = (ROOT / "data" / "quickstart" / "images.jsonl").read_text().splitlines()
    words = [word for row in rows for word in json.loads(row)["caption"].split()]
    # Three tokens a word, by the tokenizer of the quickstart.
    lengths = np.exp(random.normal(np.log(mean) - 0.5, 1.0, count)).round().clip(1, min(330, 12 * mean)).astype(int)
    return (" ".join(random.choice(words, length)) for length in lengths)


def write_rows(folder: Path, count: int, pictures: int, seed: int, side: int = 448, words: int = 67) -> Path:
    """Write `count` rows that cycle through `pictures` pictures; other arguments as in `write_pictures`, `captions`."""
    names = write_pictures(folder, pictures, seed, side)
    path = folder / f"rows{seed}.jsonl"
    made = zip(range(count), captions(count, seed, words), strict=True)
    path.write_text("".join(json.dumps({"image": names[n % pictures], "caption": text}) + "\n" for n, text in made))
    return path


def settings(folder: Path, rows: Path, workers: int) -> dict[str, Any]:
    """The arguments of a run of Tutti on `rows`."""
    import torch

    return {
        "model.config_path": folder / "config.json",
        "model.tokenizer_path": folder,
        "data.train_path": rows,
        "data.row_template": {"user": f"<image>{QUESTION}", "assistant": "{caption}"},
        "data.max_seq_len": MAX_LENGTH,
        "data.num_workers": workers,
        "data.drop_last": False,
        "train.output_dir": folder / "run",
        "train.dyn_bsz": True,
        "train.micro_batch_size": MICRO_BATCH,
        "train.global_batch_size": MICRO_BATCH * ACCUMULATION,
        "train.compute_dtype": "auto" if torch.accelerator.is_available() else "float32",
        "train.lr": 1e-4,
        "train.enable_gradient_checkpointing": False,
        "train.save_epochs": 0,
        "train.save_hf_weights": False,
    }


def run_tutti(folder: Path, rows: Path, workers: int) -> dict[str, float]:
    """Train with Tutti; returns trained tokens and seconds of the timed steps, and the data wait."""
    run_python("-m", "tutti", "train", *_arguments(settings(folder, rows, workers)))
    return _timed(folder)


def _arguments(given: dict[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in given.items()]


def _timed(folder: Path) -> dict[str, float]:
    """The figures of a run, from its metrics."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "step_seconds" in line and line["step"] > WARMUP_STEPS]
    late = [line for line in timed if line["step"] > WAIT_FROM] or timed
    return {
        "trained_tokens": sum(line["trained_tokens"] for line in timed),
        "seconds": sum(line["step_seconds"] for line in timed),
        "wait": sum(line["data_seconds"] for line in late) / sum(line["step_seconds"] for line in late),
        "trained": sum(line["trained_tokens"] for line in lines if "step_seconds" in line),
        "steps": max(line.get("step", 0) for line in lines),
    }


def run_trainer(folder: Path, rows: Path, workers: int) -> dict[str, float]:
    """Train with transformers' Trainer; returns the same figures, without the data wait."""
    return json.loads(run_python("-m", "bench._caption_trainer", str(folder), str(rows), str(workers)).splitlines()[-1])


def speed(rounds: int, steps: int, workers: int) -> None:
    """Print the table of trained tokens a second."""
    contenders = {"Trainer, padded": run_trainer, "Tutti": run_tutti}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    count = (WARMUP_STEPS + steps) * BATCH_SIZE * ACCUMULATION
    for number in range(rounds):
        for name, run in contenders.items():
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                write_model(folder)
                found[name].append(run(folder, write_rows(folder, count, count, seed=number), workers))
            print(f"round {number + 1}/{rounds}  {name:18} {rate(found[name][-1]):8.1f} tokens/s, load "
                  f"{os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)  # fmt: skip
    print("| | trained tokens/s | relative to Trainer, padded | data wait |\n| --- | ---: | ---: | ---: |")
    for name, results in found.items():
        ratios = [rate(ours) / rate(theirs) for ours, theirs in zip(results, found["Trainer, padded"], strict=True)]
        wait = f"{statistics.median(one['wait'] for one in results):.1%}" if "wait" in results[0] else ""
        middle = statistics.median(map(rate, results))
        print(f"| {name} | {middle:.0f} | {statistics.median(ratios):.2f} | {wait} |")
    trained = {name: [int(one["trained"]) for one in results] for name, results in found.items()}
    print(f"\n{rounds} rounds, {workers} workers; trained tokens of each: {trained}")


def rate(result: dict[str, float]) -> float:
    """Trained tokens per second."""
    return result["trained_tokens"] / result["seconds"]


def open_data(folder: Path, rows: Path, workers: int) -> Any:
    """The indexed data of a Tutti run."""
    import torch
    from transformers import AutoProcessor

    from tutti.config.load import from_dict
    from tutti.core.dist import World
    from tutti.data.loader import build_data

    tree: dict[str, dict[str, Any]] = {}
    for name, value in settings(folder, rows, workers).items():
        group, _, leaf = name.partition(".")
        tree.setdefault(group, {})[leaf] = str(value) if isinstance(value, Path) else value
    processor = AutoProcessor.from_pretrained(folder)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    size = len(processor.tokenizer)
    return build_data(
        from_dict(tree), processor.tokenizer, world=world, dp_rank=0, dp_size=1, vocab_size=size, processor=processor
    )


def index(count: int, workers: int) -> None:
    """Print the number of rows indexed per second."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder)
        rows = write_rows(folder, count, pictures=1000, seed=0)
        start, used = time.perf_counter(), _cpu_seconds()
        found = open_data(folder, rows, workers)
        seconds, used = time.perf_counter() - start, _cpu_seconds() - used
    print(f"index: {count / seconds:,.0f} rows/s ({found.report.rows:,} rows in {seconds:.1f} s, {workers} workers), "
          f"{count / used:,.0f} rows per second of core time")  # fmt: skip


def _cpu_seconds() -> float:
    """Processor time of this process and its finished children, in seconds."""
    return sum(os.times()[:4])


def memory(steps: int, workers: int) -> None:
    """Print the memory of each worker over `steps` micro batches, after a few to warm up."""
    import multiprocessing

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder)
        rows = write_rows(folder, steps * BATCH_SIZE, pictures=400, seed=0)
        seen: list[list[tuple[float, float]]] = []
        done = 0
        for step in open_data(folder, rows, workers).train():
            done += len(step.micro_batches)
            if done > 20 * workers:
                seen.append([_resident(child.pid) for child in multiprocessing.active_children()])
            if done >= steps:
                break
    for name, part in (("without the shared cache", 0), ("with the shared cache", 1)):
        for worker in range(workers):
            held = [step[worker][part] for step in seen]
            middle = statistics.median(held)
            print(f"worker {worker + 1}, {name}: {middle:.0f} MiB, {min(held) / middle - 1:+.1%} to "
                  f"{max(held) / middle - 1:+.1%} over {done} micro batches")  # fmt: skip


def soak(steps: int, count: int, workers: int, folder: Path | None, seconds: float) -> None:
    """Print data wait, workers' memory and speed of `steps` steps, and the speed of Trainer. folder: of the run, which
    resumes if it exists. seconds: stop the run after this time."""
    with tempfile.TemporaryDirectory() as place:
        folder = folder or Path(place)
        folder.mkdir(exist_ok=True)
        small: dict[str, Any] = {"pictures": 400, "side": SOAK_SIDE, "words": SOAK_WORDS}
        rows = folder / "rows0.jsonl"
        if not rows.is_file():
            write_model(folder, SOAK_WIDTH)
            rows = write_rows(folder, count, seed=0, **small)
        given = settings(folder, rows, workers) | {
            "data.max_seq_len": SOAK_LENGTH, "train.micro_batch_size": 1, "train.global_batch_size": 1,
            "train.max_steps": steps, "train.load_checkpoint_path": "auto",
        }  # fmt: skip
        command = [sys.executable, "-m", "tutti", "train", *_arguments(given)]
        held = _watch(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL), seconds)
        ours = _timed(folder)
        print(f"soak: {ours['steps']:.0f} steps over {count:,} rows: {rate(ours):.0f} trained tokens/s, data wait "
              f"{ours['wait']:.2%}, load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
        for number, values in enumerate(held.values()):
            middle, tenth = statistics.median(values), max(1, len(values) // 10)
            first, last = (statistics.median(some) for some in (values[:tenth], values[-tenth:]))
            most, least, grown = max(values) / middle - 1, min(values) / middle - 1, last / first - 1
            print(f"worker {number + 1}: {middle:.0f} MiB without the shared cache, {least:+.1%} to {most:+.1%}, "
                  f"{grown:+.1%} from the first to the last tenth of the run")  # fmt: skip
        some = write_rows(folder, (WARMUP_STEPS + SOAK_TRAINER_STEPS) * SOAK_BATCH, seed=1, **small)
        arguments = (str(folder), str(some), str(workers), str(SOAK_BATCH))
        theirs = json.loads(run_python("-m", "bench._caption_trainer", *arguments).splitlines()[-1])
        print(f"Trainer, padded batches of {SOAK_BATCH}, {SOAK_TRAINER_STEPS} steps: {rate(theirs):.0f} trained "
              f"tokens/s; Tutti / Trainer: {rate(ours) / rate(theirs):.2f}")  # fmt: skip


def _watch(run: subprocess.Popen[bytes], seconds: float) -> dict[int, list[float]]:
    """Sample the memory of each child of a run, in MiB, every half second after SOAK_WARMUP seconds until the run ends.
    seconds: terminate the run after this time."""
    held: dict[int, list[float]] = {}
    begun = time.monotonic()
    while run.poll() is None:
        time.sleep(0.5)
        if (passed := time.monotonic() - begun) > seconds:
            run.terminate()
            seconds = float("inf")
        if passed < SOAK_WARMUP:
            continue
        with contextlib.suppress(OSError, KeyError):  # it has ended
            for pid in map(int, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()):
                held.setdefault(pid, []).append(_resident(pid)[0])
    longest = max(map(len, held.values()), default=0)
    return {pid: values for pid, values in held.items() if len(values) > longest / 2}


def _resident(pid: int | None) -> tuple[float, float]:
    """Anonymous and total resident memory of a process, in MiB."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    found = {line[0]: int(line[1]) / 1024 for line in lines if line and line[0] in ("VmRSS:", "RssAnon:")}
    return found["RssAnon:"], found["VmRSS:"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="speed,index,memory", help="comma-separated parts to measure (all but soak)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of the contenders (3)")
    parser.add_argument("--steps", type=int, default=8, help="timed optimizer steps per round (8)")
    parser.add_argument("--rows", type=int, default=20_000, help="rows to index (20,000)")
    parser.add_argument("--soak-steps", type=int, default=500, help="optimizer steps of the soak (500)")
    parser.add_argument("--folder", type=Path, help="folder that keeps the soak's run (none)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop the soak after this time (never)")
    parser.add_argument("--batches", type=int, default=500, help="micro batches of the part memory (500)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (2)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each training process (2)")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(options.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    parts = options.part.split(",")
    print(f"load {os.getloadavg()[0]:.1f}, {options.threads} threads")
    if "speed" in parts:
        speed(options.rounds, options.steps, options.workers)
    if "index" in parts:
        index(options.rows, options.workers)
    if "soak" in parts:
        soak(options.soak_steps, options.rows, options.workers, options.folder, options.seconds)
    if "memory" in parts:
        memory(options.batches, options.workers)


if __name__ == "__main__":
    main()
