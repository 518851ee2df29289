"""Tests and benchmarks for a machine with a GPU, in one run: `make gpu`.

First come the tests that need an accelerator, which compare each path of training with the same run on the CPU. Then
come benchmarks: a dense Qwen3 of 1.7B parameters on packed rows of up to 8,192 tokens, and transformers' Trainer on the
same samples; a model with 64 experts; native sparse attention against full attention for 16,384 tokens; LoRA;
captioning, also with Trainer; compiled blocks; seconds to the first step.

Each part is a separate process with a time limit, so a part that fails or hangs does not affect the others. All of them
together may take eight minutes. After each part, the results so far are written to `--out` as Markdown and JSON,
together with the part's output.

For a machine without network: `python -m bench.gpu --requirements` lists the packages to install besides torch.
`--tiny` runs everything with small models on any device, to test this script.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import caption, workload
from bench.workload import run_python

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/train/test_gpu.py",
    "tests/attention/test_varlen.py::test_flash_kernel_equals_tiles_on_a_gpu",
    "tests/attention/test_flex.py::test_the_compiled_kernel_passes_its_trial_on_a_gpu",
    "tests/attention/test_sparse_triton.py::test_kernels_equal_tensor_operations_on_a_gpu",
    "tests/train/test_loss.py::test_gradients_of_many_chunks_on_a_gpu",
    "tests/model/test_experts_kernels.py::test_kernels_equal_the_plain_form_on_a_gpu",
    "tests/model/test_fused.py::test_a_model_on_a_gpu_keeps_its_values",
    "tests/parallel/test_activation_offload.py::test_device_memory_is_given_back_and_copies_are_right",
)
WARMUP_STEPS, STEPS = 4, 6
GROUPED, PADDED, KEPT = "Trainer, length-grouped", "Trainer, padded", "dense, without recomputation"


@dataclass(frozen=True)
class Scale:
    """The sizes of a run: the dense model, the model with experts, the longest samples, and width and number of layers
    of the captioning model."""

    dense: dict[str, Any]
    experts: dict[str, Any]
    longest: int
    sparse_length: int
    captioning: tuple[int, int]


_QWEN3_1B7 = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
}
_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40_960,
}
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 2000,
}
FULL = Scale(workload.MODEL | _QWEN3_1B7, workload.MODEL | _MOE, 8192, 16_384, (1536, 16))
TINY = Scale(
    workload.MODEL | _SMALL,
    workload.MODEL | _MOE | _SMALL | {"num_experts": 8, "num_experts_per_tok": 2},
    256,
    512,
    (96, 4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (runs/gpu)")
    parser.add_argument("--only", choices=("tests", "figures"), help="run only this half")
    parser.add_argument("--part", choices=PARTS, help="run only this part, in this process, and print JSON")
    parser.add_argument("--seconds", type=float, default=480.0, help="time limit for the whole run (480)")
    parser.add_argument("--tiny", action="store_true", help="small models, on any device")
    parser.add_argument("--requirements", action="store_true", help="print the packages that are needed, and exit")
    options = parser.parse_args()
    if options.requirements:
        print("\n".join(requirements()))
    elif options.part:
        print(json.dumps(PARTS[options.part].measure(TINY if options.tiny else FULL)))
    elif not (torch.accelerator.is_available() or options.tiny):
        sys.exit("bench.gpu: no GPU found; --tiny runs small models on a CPU")
    else:
        results = run_all(options)
        print(table(results))
        if results.get("tests", {}).get("status"):
            sys.exit(1)


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Run the tests and each part within `options.seconds`; write the results so far to `options.out` after each."""
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"device": _device(), "torch": torch.__version__}
    end = time.monotonic() + options.seconds
    if options.only != "figures":
        results["tests"] = run_tests(options.out / "tests.txt", min(TEST_SECONDS, options.seconds))
        _write(options.out, results)
    for name, part in PARTS.items() if options.only != "tests" else ():
        command = [sys.executable, "-m", "bench.gpu", "--part", name, *(["--tiny"] if options.tiny else [])]
        limit = min(part.seconds, end - time.monotonic())
        results[name] = run_part(command, options.out / f"{name}.txt", limit)
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
        _write(options.out, results)
    return results


def _write(out: Path, results: dict[str, Any]) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "results.md").write_text(table(results))


def requirements() -> list[str]:
    """The requirements of Tutti and its tests in pip's format, without torch and development tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], "accelerate", "bitsandbytes", "peft", "pytest", "pytest-xdist", "hypothesis"]
    return [line for line in lines if not line.startswith(("torch>", "torch="))]


def run_tests(said: Path, limit: float) -> dict[str, Any]:
    """Run the tests that need an accelerator for at most `limit` seconds: pytest's summary, the names of those that
    failed, and the exit status. What pytest prints goes to the file `said`.

    A test uses little of the device and one or two cores, so several run at once if there are enough cores.
    """
    start = time.perf_counter()
    processes = min(8, (os.cpu_count() or 1) // 2)
    status = _run([sys.executable, "-m", "pytest", "-vv", "-n", str(processes), *TESTS], said, limit)
    lines = said.read_text().splitlines()
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED", "ERROR"))]
    last = lines[-1].strip("= ") if lines else ""
    if status is None:
        last = f"stopped after {limit:.0f} s, {sum('PASSED' in line for line in lines)} had passed"
    return {"status": 1 if status is None else status, "summary": last, "failed": failed} | {
        "seconds": time.perf_counter() - start
    }


def run_part(command: list[str], said: Path, limit: float) -> dict[str, Any]:
    """Run a command; returns the figures from the last line of JSON that it prints, or `error` with the reason.

    The command and its child processes are killed after `limit` seconds. Its output goes to the file `said`.
    """
    if limit < 5:
        return {"error": "not started: no time left"}
    status = _run(command, said, limit)
    text = said.read_text()
    if status is None:
        return {"error": f"stopped after {limit:.0f} s"}
    if status:
        return {"error": text[-2000:] or f"exit status {status}"}
    figures = [line for line in text.splitlines() if line.startswith("{")]  # warnings may come after them
    if not figures:
        return {"error": text[-2000:] or "no figures in the output"}
    found: dict[str, Any] = json.loads(figures[-1])
    return found


def _run(command: list[str], said: Path, limit: float) -> int | None:
    """The exit status of a command; None if it had to be killed, with its child processes."""
    with said.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def dense(scale: Scale) -> dict[str, Any]:
    """The dense model on samples of different lengths."""
    return _of_model(scale, scale.dense)


def kept(scale: Scale) -> dict[str, Any]:
    """The dense model without activation checkpointing."""
    return _of_model(scale, scale.dense, **{"train.enable_gradient_checkpointing": False})


def trainer(scale: Scale, mode: str) -> dict[str, Any]:
    """transformers' Trainer on the same samples. mode: padded or grouped."""
    with tempfile.TemporaryDirectory() as place:
        workload.write_model(Path(place), scale.dense)
        return _trainer(Path(place), _work(scale), mode)


def lora(scale: Scale) -> dict[str, Any]:
    """LoRA of rank 16 on a bf16 base."""
    return _of_model(scale, scale.dense, **{"train.architecture": "lora", "train.enable_mixed_precision": False})


def experts(scale: Scale) -> dict[str, Any]:
    """The model with experts."""
    return _of_model(scale, scale.experts)


def compiled(scale: Scale) -> dict[str, Any]:
    """The dense model with torch.compile, without activation checkpointing."""
    return _of_model(scale, scale.dense, **{"train.enable_compile": True, "train.enable_gradient_checkpointing": False})


def sparse(scale: Scale) -> dict[str, Any]:
    """Milliseconds of one attention layer over one long sample, forward and backward: full and native-sparse."""
    from tutti.attention.sparse import NativeSparse, SparseSizes
    from tutti.core.device import faster_dtype

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dtype, length, heads, width = faster_dtype(device), scale.sparse_length, 16, 128
    layer = NativeSparse(heads * width, heads, width, width, SparseSizes(), 0.02).to(device, dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    shapes = ((heads, length, width), (4, length, width), (4, length, width))
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    gates, borders = torch.rand(heads, length, 3, device=device, dtype=dtype), torch.tensor([0, length])

    def full() -> torch.Tensor:
        query, key, value = (item[None] for item in inputs)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    times = {"full": _milliseconds(full), "native-sparse": _milliseconds(lambda: layer(*inputs, gates, borders, 0.1))}
    return {**times, "ratio": times["full"] / times["native-sparse"]}


def captioning(scale: Scale) -> dict[str, Any]:
    """Captioning with Tutti, and with transformers' Trainer on the same samples."""
    batches, workers = caption.WARMUP_STEPS + STEPS, max(1, (os.cpu_count() or 1) // 4)
    with tempfile.TemporaryDirectory() as place:
        caption.write_model(Path(place), *scale.captioning)
        count = batches * caption.BATCH_SIZE
        rows = caption.write_rows(Path(place), count, count, seed=0)
        ours, theirs = (run(Path(place), rows, workers) for run in (caption.run_tutti, caption.run_trainer))
    return {
        "tokens_per_second": caption.rate(ours),
        "Trainer's": caption.rate(theirs),
        "Tutti / Trainer": caption.rate(ours) / caption.rate(theirs),
        "data wait": ours["wait"],
    }


def startup(scale: Scale) -> dict[str, Any]:
    """Seconds that a run of one step takes in this process."""
    with tempfile.TemporaryDirectory() as place:
        workload.write_model(Path(place), scale.dense)
        start = time.perf_counter()
        _tutti(Path(place), _work(scale), scale.longest, **{"train.max_steps": 1})
        return {"seconds": time.perf_counter() - start}


class Part(NamedTuple):
    """A benchmark, and its time limit in seconds."""

    measure: Callable[[Scale], dict[str, Any]]
    seconds: float


TEST_SECONDS = 180.0
PARTS = {
    "dense": Part(dense, 90),
    GROUPED: Part(partial(trainer, mode="grouped"), 90),
    "experts": Part(experts, 90),
    "native-sparse": Part(sparse, 40),
    "LoRA": Part(lora, 90),
    "captioning": Part(captioning, 100),
    KEPT: Part(kept, 90),
    f"{KEPT}, compiled": Part(compiled, 120),
    PADDED: Part(partial(trainer, mode="padded"), 90),
    "start-up": Part(startup, 60),
}
"""The most important first, as time may run out before the last."""


def _of_model(scale: Scale, model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        workload.write_model(Path(place), model)
        return _tutti(Path(place), _work(scale), scale.longest, **changes)


def _work(scale: Scale) -> workload.Workload:
    """Samples of up to `scale.longest` tokens; a batch of 8 fills about two packed rows."""
    factor, batch = scale.longest / workload.MAX_LENGTH, 8
    work = workload.make_workload(STEPS, batch, WARMUP_STEPS * batch, seed=0)

    def stretched(samples: list[list[int]]) -> list[list[int]]:
        return [_stretched(sample, factor) for sample in samples]

    return workload.Workload(stretched(work.warmup), stretched(work.measured))


def _stretched(sample: list[int], factor: float) -> list[int]:
    """A sample with `factor` times the length, of words that all vocabularies of the benchmarks contain."""
    length = max(2, round(len(sample) * factor))
    words = [token % 1999 + 1 for token in sample[:-1]]
    return [*(words * (length // len(words) + 1))[: length - 1], workload.EOS]


def _tutti(folder: Path, work: workload.Workload, longest: int, **changes: Any) -> dict[str, Any]:
    """Figures of the steps after the warm-up: tokens per second and MFU of the median step, and peak memory."""
    workload.write_text(folder / "rows.jsonl", work.warmup + work.measured)
    arguments = {
        "model.config_path": folder,
        "data.train_path": folder / "rows.jsonl",
        "data.data_type": "plaintext",
        "data.max_seq_len": longest,
        "data.shuffle": False,
        "train.output_dir": folder / "run",
        "train.dyn_bsz": True,
        "train.micro_batch_size": 1,
        "train.lr": 1e-5,
        "train.max_steps": WARMUP_STEPS + STEPS,
        "train.init_device": "meta",
        "train.save_epochs": 0,
        "train.save_hf_weights": False,
    } | changes
    run_python("-m", "tutti", "train", *(f"{name}={value}" for name, value in arguments.items()))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line]
    timed = sorted(steps[WARMUP_STEPS:] or steps, key=lambda line: line["step_seconds"])
    middle = timed[len(timed) // 2]
    shutil.rmtree(folder / "run")
    return {
        "tokens_per_second": sum(line["trained_tokens"] for line in timed) / sum(x["step_seconds"] for x in timed),
        "mfu": middle["mfu"],
        "memory_gib": max(line["memory_gib"] for line in steps),
    }


def _trainer(folder: Path, work: workload.Workload, mode: str) -> dict[str, Any]:
    plan = {
        "warmup": work.warmup,
        "measured": work.measured,
        "batch_size": 2,
        "accumulation": 1,
        "compute_dtype": "bfloat16" if torch.accelerator.is_available() else workload.faster_dtype(),
        "gradient_checkpointing": True,
    }
    (folder / "workload.json").write_text(json.dumps(plan))
    said = run_python("-m", "bench._trainer", str(folder), mode).splitlines()
    result = json.loads(next(line for line in reversed(said) if line.startswith("{")))
    return {
        "tokens_per_second": result["trained_tokens"] / result["seconds"],
        "memory_gib": result["memory_gib"],
    }


def _milliseconds(run: Callable[[], torch.Tensor], count: int = 5) -> float:
    """Time of one forward and backward pass, after two warm-up passes."""
    for number in range(count + 2):
        if number == 2:
            _wait()
            start = time.perf_counter()
        run().sum().backward()
    _wait()
    return (time.perf_counter() - start) / count * 1e3


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"{results['device']}, torch {results['torch']}", ""]
    if "tests" in results:
        tests = results["tests"]
        lines += [f"Tests: {tests['summary']}", *(f"- {name}" for name in tests["failed"]), ""]
    lines += ["| | trained tokens/s | MFU | peak memory, GiB | other figures |", "| --- | ---: | ---: | ---: | --- |"]
    ours = results.get("dense", {}).get("tokens_per_second")
    for name in PARTS:
        figures = dict(results.get(name, {}))
        if "error" in figures:
            lines.append(f"| {name} | | | | failed: {(figures['error'].strip().splitlines() or [''])[-1][:120]} |")
        elif figures:
            speed, mfu = figures.pop("tokens_per_second", None), figures.pop("mfu", None)
            memory = figures.pop("memory_gib", None)
            if ours and speed and name in (GROUPED, PADDED):
                figures["Tutti / Trainer"] = ours / speed
            cells = [
                name,
                "" if speed is None else f"{speed:,.0f}",
                "" if mfu is None else f"{mfu:.0%}",
                "" if memory is None else f"{memory:.1f}",
                ", ".join(f"{key} {value:,.2f}" for key, value in figures.items()),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
