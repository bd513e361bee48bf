"""What runs inside an actor, in this process: who decodes when, and on whose GPU."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from cogvit.batch import SampleRef
from cogvit.config import TeacherConfig, TeachersConfig
from cogvit.errors import ConfigError
from cogvit.teacher.room import check_apart, free_gpus
from cogvit.teacher.serving import TeacherActor
from cogvit.teacher.stream import Pixels
from tests import teachers

REQUEST = teachers.request((1, 2, None, 3), ((3, 3), (2, 5), (0, 0), (4, 4)))


def test_a_rank_and_an_actor_never_meet_on_a_gpu() -> None:
    assert free_gpus(["4", "5", "6", "7"], {0, 1}) == ["6", "7"]
    assert free_gpus(["GPU-1"], {0}) == []
    check_apart("GPU-2", {"GPU-1"})
    with pytest.raises(ConfigError, match=r"GPU-1, on which a rank trains; .* --teachers\.share-gpus true"):
        check_apart("GPU-1", {"GPU-1"})


def test_an_actor_decodes_the_next_request_while_its_teacher_answers(tmp_path: Path) -> None:
    """The images of a request by as many threads as it has CPUs, and one request ahead; answers as ever."""
    seen: list[tuple[int, str]] = []
    gate = threading.Event()

    def decode(sample: SampleRef, key: int | None, size_hw_px: tuple[int, int]) -> Pixels | None:
        seen.append((sample.sample_id, threading.current_thread().name))
        return teachers.draw(sample, key, size_hw_px)

    config = TeachersConfig(
        members=(TeacherConfig(name="dinov3", path=teachers.write_teachers(tmp_path)["dinov3"]),), actor_cpus=2.0
    )
    actor = TeacherActor(config.members[0], config, decode, frozenset())
    answer_of = actor._teacher.features
    held = SimpleNamespace(
        features=lambda images, grids: (gate.wait(20.0), answer_of(images, grids))[1],
        **{name: getattr(actor._teacher, name) for name in ("input_px", "parts", "dim", "dtype")},
    )
    actor._teacher = held
    with ThreadPoolExecutor(2) as callers:
        asked = [callers.submit(actor.features, request) for request in (REQUEST, REQUEST)]
        deadline_s = time.monotonic() + 20.0
        while len(seen) < 6 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert len(seen) == 6, "both requests are decoded though the teacher has answered none"
        gate.set()
        (first, _), (second, _) = (call.result(20.0) for call in asked)
    assert {name.split("_")[0] for _, name in seen} == {"decode"}
    assert actor.num_answered() == 2
    assert (first["dinov3"] == second["dinov3"]).all()
