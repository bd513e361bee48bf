"""Which prompts a run asks: number by number, a source by its weight, an episode by the number's hash."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count

import torch

from cogvit.config import RunConfig
from cogvit.draws import mix
from cogvit.errors import ConfigError
from cogvit.rl.rollout import Request, Speech

_SEED_SALT = 0x65706973  # "epis"
FIRST_UNASKED_EPISODE = (1 << 31) + (1 << 30)  # from here on neither runs nor tools.make_demo_tasks ask
_EPISODES = (1 << 31) - 1  # seeds are below it: numpy's and Python's generators take them all


def weights_of(config: RunConfig, sources: Sequence[str]) -> dict[str, float]:
    """Return the sources' weights in the mixture, all of them positive.

    Errors: ConfigError names a source that a mixture leaves out: nobody would ask its task.
    """
    weights = dict(config.rl.mixture) or dict.fromkeys(sources, 1.0)
    if left_out := [source for source in sources if source not in weights]:
        raise ConfigError(f"--rl.mixture gives {left_out[0]!r} no weight; name it, or leave its task out of --rl.tasks")
    return weights


def prompts(config: RunConfig, weights: Mapping[str, float], ended: Collection[str]) -> Iterator[Request]:
    """Yield the requests of a run in their order without end, but those that have ended; a function of the run's seed.

    weights: of the sources. ended: ids of requests.
    """
    speech = speech_of(config)
    owed = dict.fromkeys(weights, 0.0)
    total = sum(weights.values())
    for number in count():
        for source, weight in weights.items():
            owed[source] += weight / total
        source = max(owed, key=lambda name: owed[name])  # the first of equals
        owed[source] -= 1.0
        request_id = f"{source}-{number}"
        if request_id not in ended:
            yield Request(request_id, source, episode_seed(config.seed, number), config.rl.group, speech)


def speech_of(config: RunConfig) -> Speech:
    """Return how a run's answers are drawn."""
    own = config.rl
    return Speech(seed=config.seed, max_new_tokens=own.max_new_tokens, temperature=own.temperature)


def episode_seed(seed: int, number: int) -> int:
    """Return the seed of the episode of a prompt; runs of other seeds have others."""
    return int(mix(torch.tensor(seed), _SEED_SALT, number)) % _EPISODES
