"""Language modelling: the cross-entropy of every trained token, given the tokens before it."""

from __future__ import annotations

from torch import Tensor

from tutti.config import Config
from tutti.model.drawing import draws
from tutti.model.flow_decoder import read_flow
from tutti.model.omni_config import decoder_folder, regresses
from tutti.train.head import Head
from tutti.train.tasks import Sums, Task


class LanguageModelling(Task):
    """Sums over trained tokens."""

    def loss(self, hidden: Tensor, head: Head) -> Sums:
        loss, losses = head.cross_entropy(hidden)
        return {"loss": loss, **self.by_source(losses, head.batch.segment_sources[head.batch.target_segment])}


def make_task(config: Config) -> Task:
    if regresses(config.model) or read_flow(config.model) is not None:
        from tutti.train.tasks.draw_continuous import ContinuousDrawing

        return ContinuousDrawing.of(config)
    if decoder_folder(config.model) is None and not draws(config):
        return LanguageModelling()
    from tutti.train.tasks.draw_codes import CodeDrawing  # which needs what language modelling alone does not

    return CodeDrawing.of(config)
