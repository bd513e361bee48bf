"""The data plane on Ray. This is the only module of the package that imports Ray.

Ray is imported inside the functions because it reads its authentication from the environment when it is first imported;
whoever calls has joined a cluster already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from cogvit.errors import CogViTError

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_tasks(task: Callable[[Item], Result], items: Iterable[Item], *, in_flight: int) -> Iterator[Result]:
    """Run a task on each item in Ray's workers, so many at a time; yields the results as they come.

    Ray runs a task again whose worker died. Errors: the first CogViTError of a task.
    """
    import ray

    remote = ray.remote(num_cpus=1, max_retries=3)(_attempt)
    waiting = iter(items)
    running = [remote.remote(task, item) for item in islice(waiting, in_flight)]
    while running:
        (ready,), running = ray.wait(running, num_returns=1)
        running += [remote.remote(task, item) for item in islice(waiting, 1)]
        answer = ray.get(ready)
        if isinstance(answer, CogViTError):
            raise answer
        yield answer


def _attempt(task: Callable[[Any], Any], item: Any) -> Any:
    """Run a task; an error that the user can act on comes back as itself, not wrapped in Ray's."""
    try:
        return task(item)
    except CogViTError as error:
        return error
