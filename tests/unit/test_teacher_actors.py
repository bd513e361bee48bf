"""Everything here shares one Ray cluster; pools with other decoders name their actors apart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import pytest
import torch

from cogvit.config import TeacherConfig, TeachersConfig
from cogvit.errors import ConfigError, DataError, TeacherUnavailable
from cogvit.teacher.actors import Cluster, TeacherPool, connect, plan_cluster
from cogvit.teacher.stream import Features, FeatureSource, LocalFeatures
from cogvit.teacher.zoo import load_teacher
from tests import teachers
from tests.pool import Pool

pytestmark = pytest.mark.timeout(180)

REQUESTS = [
    teachers.request((1, 2, None, 3), ((3, 3), (2, 5), (0, 0), (4, 4))),
    teachers.request((4, teachers.UNREADABLE, 5), ((3, 3), (2, 2), (3, 3))),
    teachers.request((None, None), ((0, 0), (0, 0))),
    teachers.request((6,), ((5, 5),), mask_ratio=1.0),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return teachers.write_teachers(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        raise AssertionError("the test process was asked to stop")

    previous = signal.signal(signal.SIGTERM, on_sigterm)
    with connect(plan_cluster(""), num_actors=12) as cluster:
        assert signal.getsignal(signal.SIGTERM) is on_sigterm
        yield cluster
    signal.signal(signal.SIGTERM, previous)


def config(
    paths: dict[str, str], prefix: str = "", precision: Literal["fp32", "bf16"] = "fp32", max_wait_s: float = 120.0
) -> TeachersConfig:
    members = tuple(TeacherConfig(name=prefix + name, path=path) for name, path in paths.items())
    return TeachersConfig(members=members, actors_per_teacher=2, precision=precision, max_wait_s=max_wait_s)


def ask_all(source: FeatureSource) -> list[Features]:
    handles = [source.submit(request) for request in REQUESTS]
    return [source.result(handle) for handle in handles]


def local(paths: dict[str, str], precision: Literal["fp32", "bf16"] = "fp32") -> list[Features]:
    return ask_all(LocalFeatures({n: load_teacher(path, precision) for n, path in paths.items()}, teachers.draw))


def assert_equal_bits(answers: list[Features], expected: list[Features], prefix: str = "") -> None:
    assert len(answers) == len(expected) == len(REQUESTS)
    for answer, wanted in zip(answers, expected, strict=True):
        assert {prefix + name for name in wanted} == set(answer)
        for name, features in wanted.items():
            assert answer[prefix + name].dtype == torch.float32
            assert torch.equal(answer[prefix + name], features)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_actors_answer_as_teachers_in_this_process_to_the_bit(
    cluster: Cluster, paths: dict[str, str], precision: Literal["fp32", "bf16"]
) -> None:
    prefix = f"{precision}-"
    pool = TeacherPool(config(paths, prefix, precision), teachers.draw)
    assert pool.dims == {f"{prefix}siglip2": 32, f"{prefix}dinov3": 32}
    expected = local(paths, precision)
    assert expected[0]["siglip2"].shape == (3 + 4 + 6, 32)
    assert_equal_bits(ask_all(pool), expected, prefix)


def test_an_actor_that_dies_in_the_middle_of_a_request_is_replaced(
    cluster: Cluster, paths: dict[str, str], tmp_path: Path
) -> None:
    decode = partial(teachers.draw_or_die, alive=str(tmp_path / "alive"))
    pool = TeacherPool(config(paths, "mortal-"), decode)
    assert_equal_bits(ask_all(pool), local(paths), "mortal-")
    assert (tmp_path / "alive").exists()


def test_killed_actors_are_replaced_and_requests_in_flight_are_sent_again(
    cluster: Cluster, paths: dict[str, str]
) -> None:
    import ray

    pool = TeacherPool(config(paths, "killed-"), teachers.draw)
    handles = [pool.submit(request) for request in REQUESTS]
    first = pool.result(handles[0])
    for name in ("killed-siglip2-0-0", "killed-siglip2-1-0", "killed-dinov3-1-0"):
        ray.kill(ray.get_actor(name))
    answers = [first, *(pool.result(handle) for handle in handles[1:])]
    assert_equal_bits(answers, local(paths), "killed-")
    assert_equal_bits(ask_all(pool), local(paths), "killed-")


def ask_from_another_process(rank: int, world: int, cluster: Cluster, config: TeachersConfig) -> list[Features]:
    with connect(cluster, num_actors=0):
        return ask_all(TeacherPool(config, teachers.draw))


def test_another_process_joins_and_uses_the_same_actors(cluster: Cluster, paths: dict[str, str], pool: Pool) -> None:
    import ray

    owners = TeacherPool(config(paths, "shared-"), teachers.draw)
    expected = ask_all(owners)
    before = ray.get_actor("shared-siglip2-0-0")
    (answers,) = pool.run(ask_from_another_process, 1, (cluster, config(paths, "shared-")), timeout_s=120.0)
    for answer, wanted in zip(answers, expected, strict=True):
        assert all(torch.equal(answer[name], wanted[name]) for name in wanted)
    assert ray.get_actor("shared-siglip2-0-0")._actor_id == before._actor_id


def test_silence_is_reported_with_the_way_out(cluster: Cluster, paths: dict[str, str]) -> None:
    pool = TeacherPool(config(paths, "slow-", max_wait_s=0.0), teachers.draw)
    with pytest.raises(TeacherUnavailable, match="'slow-siglip2' is silent: no features in 0 s"):
        ask_all(pool)


def test_a_shard_that_cannot_be_read_is_not_an_image_that_does_not_decode(
    cluster: Cluster, paths: dict[str, str]
) -> None:
    pool = TeacherPool(config(paths, "blind-"), teachers.unreadable_shard)
    with pytest.raises(DataError, match=r"^cannot read shard.tar: no such file$"):
        ask_all(pool)


def test_weights_that_do_not_load_are_a_users_mistake(cluster: Cluster, paths: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((Path(paths["siglip2"]) / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    pool = TeacherPool(config({"broken": str(broken)}), teachers.draw)
    with pytest.raises(ConfigError, match="teacher 'broken' did not start: .*does not load") as caught:
        ask_all(pool)
    assert "\n" not in str(caught.value)


def test_a_cluster_of_another_machine_is_refused() -> None:
    elsewhere = Cluster("192.0.2.1:6379", "run", host="elsewhere", token="secret")
    with pytest.raises(ConfigError, match="--teachers.ray-address"), connect(elsewhere, 1):
        pass


OWNER = """
import time
from cogvit.teacher.actors import connect, plan_cluster
with connect(plan_cluster(""), 1) as cluster:
    print(cluster.address, flush=True)
    time.sleep(600)
"""


def processes_of(token: str) -> list[int]:
    """All processes that inherited the owner's token."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (directory / "environ").read_bytes():
                found.append(int(directory.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], Any], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return bool(condition())


def test_a_stopped_owner_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    token = os.urandom(32).hex()
    environment = os.environ | {"RAY_AUTH_TOKEN": token, "TMPDIR": str(tmp_path)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER], env=environment, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and ":" in owner.stdout.readline()
    assert len(processes_of(token)) > 3
    owner.send_signal(signal.SIGTERM)
    assert owner.wait(timeout=60) != 0
    assert wait_until(lambda: not processes_of(token), 30), processes_of(token)
    assert list(tmp_path.iterdir()) == []
