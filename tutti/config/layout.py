"""The layout of a run: the sizes of a configuration made complete for a number of ranks.

The world is a product of axes: W = pipeline * data * context * ulysses * tensor, and data = replicate * shard. All but
the data axis are given, so that data-parallel ranks are what is left: dp = W / (tp * pp * ulysses * cp). Experts are
spread over ranks that hold one replica of a stage together. A global batch is a whole number of micro batches on each
of the dp ranks. `fit` is pure: it takes the numbers, and gives the complete layout or an error that names sizes that
would do (`tutti.config.fits`). It is asked twice: before the training code is loaded, and when the model is known.
"""

from dataclasses import dataclass, replace

from tutti.config import Config, ConfigError
from tutti.config.fits import ModelFacts, Sizes, misfits


@dataclass(frozen=True)
class Layout:
    """The size of every axis, and the batch in numbers.

    world = pipeline * data * context * ulysses * tensor; data = replicate * shard; expert divides expert_ranks.
    global_batch_size = micro_batch_size * data * accumulation.
    """

    world: int
    data: int
    replicate: int
    shard: int
    tensor: int
    pipeline: int
    ulysses: int
    context: int
    expert: int
    global_batch_size: int
    accumulation: int

    @property
    def expert_ranks(self) -> int:
        """Ranks with different tokens that hold one replica of a stage: shard * context * ulysses * tensor."""
        return self.shard * self.context * self.ulysses * self.tensor


def fit(config: Config, world: int, facts: ModelFacts | None = None) -> Layout:
    """The layout of `config` on `world` ranks, for the model of `facts` if they are given.

    Raises ConfigError: which sizes do not fit, and which would.
    """
    sizes = Sizes.of(config.train, world)
    problems = misfits(sizes, facts)
    if problems:
        raise ConfigError(problems)
    replicate, shard = sizes.data_axes
    micro = sizes.micro_batch_size * replicate * shard
    global_batch_size = sizes.global_batch_size or micro
    return Layout(
        world=world,
        data=replicate * shard,
        replicate=replicate,
        shard=shard,
        **sizes.inner,
        expert=sizes.expert_parallel_size,
        global_batch_size=global_batch_size,
        accumulation=global_batch_size // micro,
    )


def resolve_sizes(config: Config, world: int) -> Config:
    """The same configuration with train.global_batch_size filled in for `world` ranks.  Raises what `fit` raises."""
    return replace(config, train=replace(config.train, global_batch_size=fit(config, world).global_batch_size))
