"""`tutti check` finds errors that a run would meet."""

from pathlib import Path

import pytest

from tests.train.runs import tiny_config, write_model_config
from tutti.check.run import check


def test_missing_and_damaged_weights_are_told_before_training(tmp_path: Path) -> None:
    folder = Path(write_model_config(tmp_path / "model"))
    config = tiny_config(tmp_path, **{"model.model_path": str(folder)})
    with pytest.raises(ValueError, match=r"model\.model_path: no weights in .*model \(model\.safetensors"):
        check(config)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or no weight file"):
        check(config)
