"""The GPU benchmark isolates its parts, kills those that hang, and writes results after each."""

import json
import sys
import time

from bench import gpu


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_fails_or_hangs_is_reported(tmp_path):
    said = tmp_path / "said.txt"
    good = gpu.run_part(python("print('loading'); print('{\"tokens_per_second\": 2.0}')"), said, 60)
    assert good == {"tokens_per_second": 2.0}
    assert gpu.run_part(python("print('{\"ratio\": 3.0}\\nWarning: leaked')"), said, 60) == {"ratio": 3.0}
    assert gpu.run_part(python("print('done')"), said, 60) == {"error": "done\n"}
    assert "no memory" in gpu.run_part(python("raise MemoryError('no memory')"), said, 60)["error"]
    start = time.monotonic()
    child = (
        "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', 'while 1: pass'])"
    )
    assert gpu.run_part(python(child), said, 5) == {"error": "stopped after 5 s"}
    assert time.monotonic() - start < 20 and said.read_text() == "begun\n"
    assert gpu.run_part(python("print('{}')"), said, 1) == {"error": "not started: no time left"}


def test_results_are_written_after_each_part(tmp_path, monkeypatch):
    seen = []

    def run_part(command, said, limit):
        path = tmp_path / "out" / "results.json"
        seen.append(list(json.loads(path.read_text())) if path.exists() else [])
        return {"error": "CUDA out of memory"} if "experts" in command else {"tokens_per_second": 100.0, "mfu": 0.5}

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--only", "figures", "--out", str(tmp_path / "out")])
    gpu.main()
    assert seen[1] == ["device", "torch", "dense"] and len(seen) == len(gpu.PARTS)
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| dense | 100 | 50% |" in table and "failed: CUDA out of memory" in table
    assert "Tutti / Trainer 1.00" in table


def test_a_part_runs_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--part", "native-sparse"])
    gpu.main()
    assert json.loads(capsys.readouterr().out)["ratio"] > 0
