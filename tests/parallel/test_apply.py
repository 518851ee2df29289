"""`parallelize`: its effects on the process, besides the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tutti.parallel.apply import name_instructions


def test_code_is_cached_by_the_instructions_it_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codecache import compiled_fx_graph_hash

    graph = torch.fx.symbolic_trace(nn.Identity())
    keys: dict[str, set[str]] = {}
    for tag in ("", "mine"):
        for capability in ("default", "avx2", "avx2"):
            monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
            monkeypatch.setattr(torch.compiler.config, "cache_key_tag", tag)
            name_instructions()
            name_instructions()
            keys.setdefault(tag + capability, set()).add(compiled_fx_graph_hash(graph, [], {}, [])[0])
    assert [len(found) for found in keys.values()] == [1, 1, 1, 1]
    assert len(set.union(*keys.values())) == 4
