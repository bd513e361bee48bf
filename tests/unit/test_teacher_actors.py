"""Everything here but the last test shares one Ray cluster and, as an actor costs seconds, most share its actors."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from cogvit.config import TeacherConfig, TeachersConfig
from cogvit.errors import ConfigError, DataError, TeacherUnavailable
from cogvit.teacher.actors import Cluster, TeacherPool, connect, plan_cluster
from cogvit.teacher.room import Asker, check_room, idle_gpus, lanes_of
from cogvit.teacher.serving import TeacherActor
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
    with connect(plan_cluster(""), num_cpus=6) as cluster:
        assert signal.getsignal(signal.SIGTERM) is on_sigterm
        yield cluster
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture(scope="module")
def alive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file whose absence makes an actor of `actors` die at its next image."""
    return tmp_path_factory.mktemp("marks") / "alive"


@pytest.fixture(scope="module")
def actors(cluster: Cluster, paths: dict[str, str], alive: Path) -> TeacherPool:
    alive.touch()
    return TeacherPool(config(paths), partial(teachers.draw_or_die, alive=str(alive)))


@pytest.fixture(scope="module")
def expected(paths: dict[str, str]) -> list[Features]:
    """What the teachers answer in this process."""
    return ask_all(LocalFeatures({n: load_teacher(path, "fp32") for n, path in paths.items()}, teachers.draw))


def config(paths: dict[str, str], max_wait_s: float = 120.0) -> TeachersConfig:
    members = tuple(TeacherConfig(name=name, path=path) for name, path in paths.items())
    return TeachersConfig(members=members, max_wait_s=max_wait_s)


def ask_all(source: FeatureSource) -> list[Features]:
    handles = [source.submit(request) for request in REQUESTS]
    return [source.result(handle) for handle in handles]


def assert_equal_bits(answers: list[Features], expected: list[Features]) -> None:
    assert len(answers) == len(expected) == len(REQUESTS)
    for answer, wanted in zip(answers, expected, strict=True):
        assert set(answer) == set(wanted)
        for name, features in wanted.items():
            assert answer[name].dtype == features.dtype and torch.equal(answer[name], features)


def test_actors_answer_as_teachers_in_this_process_to_the_bit(actors: TeacherPool, expected: list[Features]) -> None:
    assert actors.dims == {"siglip2": 32, "dinov3": 32}
    assert expected[0]["siglip2"].shape == (3 + 4 + 6, 32)
    assert_equal_bits(ask_all(actors), expected)


def test_bf16_travels_to_the_bit_from_several_actors(cluster: Cluster, paths: dict[str, str]) -> None:
    members = (TeacherConfig(name="rounded", path=paths["siglip2"]),)
    source = TeacherPool(
        TeachersConfig(members=members, actors_per_teacher=2, precision="bf16"), teachers.draw, Asker(3)
    )
    lanes = [source.submit(request).calls["rounded"].actor.lane for request in REQUESTS]
    assert lanes == [1, 0, 1, 0]  # ranks that ask at once begin at different actors
    teacher = load_teacher(paths["siglip2"], "bf16")
    answers = ask_all(source)
    assert answers[0]["rounded"].dtype == torch.bfloat16 == source.dtypes["rounded"]
    assert_equal_bits(answers, ask_all(LocalFeatures({"rounded": teacher}, teachers.draw)))


@pytest.mark.parametrize(("actors", "askers"), [(1, 1), (2, 1), (8, 1), (8, 3), (8, 8), (3, 8), (1024, 4096), (5, 4)])
def test_askers_know_a_few_actors_each_and_all_between_them(actors: int, askers: int) -> None:
    known = [lanes_of(actors, Asker(number, askers)) for number in range(askers)]
    most = max(2, -(-actors // askers))
    assert all(len(lanes) == len(set(lanes)) == min(actors, most) for lanes in known)
    asked = Counter(lane for lanes in known for lane in lanes)
    assert asked.keys() == set(range(actors)) and max(asked.values()) <= min(asked.values()) + 2


def test_actors_take_their_share_of_the_cluster(actors: TeacherPool) -> None:
    import ray

    def free() -> float:
        return ray.available_resources().get("CPU", 0.0)

    members = (TeacherConfig(name="half", path="tests.teachers:own"),)
    source = TeacherPool(TeachersConfig(members=members, actors_per_teacher=2, actor_cpus=0.5), teachers.draw)
    ask_all(source)
    # Of the cluster's 6 CPUs `actors` has one for each of its two; what earlier tests had comes back in Ray's own time.
    assert wait_until(lambda: free() == 6.0 - 2 * 1.0 - 2 * 0.5, 60), free()


@pytest.mark.parametrize(
    ("cpus", "gpus", "count", "room"),
    [
        (1.0, 0.0, 6, 6),
        (1.0, 0.0, 7, 6),
        (0.5, 0.25, 9, 8),
        (2.0, 1.0, 3, 2),
        (1.0, 0.3, 5, 4),
        (0.5, 0.4, 5, 4),
        (4.0, 0.0, 2, 1),
    ],
)
def test_more_actors_than_a_cluster_holds_are_refused_at_once(cpus: float, gpus: float, count: int, room: int) -> None:
    """One node of 4 CPUs and 2 GPUs, one of 2 CPUs, one that is gone."""
    resources = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 2.0}, {"CPU": 64.0, "GPU": 8.0}]
    nodes = [{"Alive": number < 2, "Resources": one} for number, one in enumerate(resources)]
    members = (TeacherConfig(name="one", path="tests.teachers:own"),)
    wanted = TeachersConfig(members=members, actors_per_teacher=count, actor_cpus=cpus, actor_gpus=gpus)
    check_room(replace(wanted, actors_per_teacher=room), nodes)
    if count > room:
        with pytest.raises(ConfigError, match=rf"^{count} teacher actors of .* room for {room} \(nodes: 4 CPUs"):
            check_room(wanted, nodes)


def test_a_cluster_without_gpus_and_a_torch_without_them_are_users_mistakes(cluster: Cluster) -> None:
    members = (TeacherConfig(name="fast", path="tests.teachers:own"),)
    wanted = TeachersConfig(members=members, actor_gpus=0.5)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"sees no GPU; pass --teachers\.actor-gpus 0"):
            TeacherActor(members[0], wanted, teachers.draw, frozenset())
        with pytest.raises(ConfigError, match=r"1 teacher actors of 1 CPUs and 0\.5 GPUs do not fit"):
            TeacherPool(wanted, teachers.draw)
    else:
        TeacherPool(wanted, teachers.draw)


def test_a_module_of_ones_own_is_imported_by_the_actor(cluster: Cluster) -> None:
    path = "tests.teachers:own"
    source = TeacherPool(config({"own": path}), teachers.draw)
    assert source.dims == {"own": 12}
    assert_equal_bits(ask_all(source), ask_all(LocalFeatures({"own": load_teacher(path, "fp32")}, teachers.draw)))


def test_an_actor_that_dies_in_the_middle_of_a_request_is_replaced(
    actors: TeacherPool, expected: list[Features], alive: Path
) -> None:
    alive.unlink()
    assert_equal_bits(ask_all(actors), expected)
    assert alive.exists()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("gil", [pytest.param(False, marks=pytest.mark.long), True])
def test_an_actor_that_hangs_is_replaced(
    cluster: Cluster, paths: dict[str, str], expected: list[Features], tmp_path: Path, gil: bool
) -> None:
    """Whether it can still say how it does or, in native code that keeps the GIL, not even that."""
    alive = tmp_path / "alive"
    alive.touch()
    members = (TeacherConfig(name=f"hanging{gil}", path=paths["siglip2"]),)
    decode = partial(teachers.draw_or_hang, alive=str(alive), gil=gil)
    source = TeacherPool(TeachersConfig(members=members, max_wait_s=120.0), decode)
    wanted = [{f"hanging{gil}": answer["siglip2"]} for answer in expected]
    assert_equal_bits(ask_all(source), wanted)
    alive.unlink()
    assert_equal_bits(ask_all(source), wanted)
    assert alive.exists()


def test_an_actor_with_a_queue_longer_than_the_patience_is_left_alone(cluster: Cluster, caplog: Any) -> None:
    """Another rank's requests lie before ours: ten seconds of them, where six of silence are a hang."""
    members = (TeacherConfig(name="slow", path="tests.teachers:own"),)
    crowd, hasty = (
        TeacherPool(TeachersConfig(members=members, max_wait_s=max_wait_s), teachers.draw_slowly)
        for max_wait_s in (120.0, 24.0)
    )
    one = teachers.request((1,), ((2, 2),))
    crowd.result(crowd.submit(one))
    wanted = hasty.result(hasty.submit(one))
    queue = [crowd.submit(one) for _ in range(10)]
    asked_s, handle = time.monotonic(), hasty.submit(one)
    assert torch.equal(hasty.result(handle)["slow"], wanted["slow"])
    assert time.monotonic() - asked_s > 24.0 / 4 and not caplog.records
    assert all(torch.equal(crowd.result(earlier)["slow"], wanted["slow"]) for earlier in queue)


def starve(rank: int, world: int) -> tuple[str, int, str]:
    """Ask on a cluster whose memory is always short; returns what ends it, the last generation and what was said."""
    os.environ |= {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("cogvit.teacher.actors").addHandler(handler)
    members = (TeacherConfig(name="starved", path="tests.teachers:own"),)
    with connect(plan_cluster(""), num_cpus=1):
        source = TeacherPool(TeachersConfig(members=members, max_wait_s=25.0), teachers.draw)
        try:
            source.result(source.submit(REQUESTS[0]))
        except TeacherUnavailable as error:
            return str(error), source.submit(REQUESTS[0]).calls["starved"].actor.generation, said.getvalue()
    raise AssertionError("an actor lived")


@pytest.mark.long
def test_an_actor_that_the_memory_monitor_kills_is_replaced(pool: Pool) -> None:
    ((end, generation, said),) = pool.run(starve, 1, (), timeout_s=120.0)
    assert "'starved' keeps failing" in end or "'starved' is silent" in end
    assert generation > 0, said


def test_requests_in_flight_at_a_killed_actor_are_sent_again(actors: TeacherPool, expected: list[Features]) -> None:
    import ray

    handles = [actors.submit(request) for request in REQUESTS]
    answers = [actors.result(handles[0])]
    ray.kill(handles[-1].calls["dinov3"].actor.handle)
    answers += [actors.result(handle) for handle in handles[1:]]
    assert_equal_bits(answers, expected)


def ask_from_another_process(rank: int, world: int, cluster: Cluster, config: TeachersConfig) -> list[Any]:
    with connect(cluster, num_cpus=0):
        import ray  # only now: it reads its authentication when it is imported

        before = len(ray.util.list_named_actors())
        answers = ask_all(TeacherPool(config, teachers.draw))
        return [answers, len(ray.util.list_named_actors()) - before]


def test_another_process_joins_and_takes_the_actors_that_are_there(
    cluster: Cluster, paths: dict[str, str], expected: list[Features], pool: Pool
) -> None:
    # A teacher of its own: the names of actors that died in other tests come free whenever Ray gets to it.
    shared = TeachersConfig(members=(TeacherConfig(name="shared", path=paths["siglip2"]),))
    source = TeacherPool(shared, teachers.draw)  # its actors live as long as it does
    here = ask_all(source)
    ((there, num_started),) = pool.run(ask_from_another_process, 1, (cluster, shared), timeout_s=120.0)
    wanted = [{"shared": answer["siglip2"]} for answer in expected]
    assert_equal_bits(here, wanted)
    assert_equal_bits(there, wanted)
    assert num_started == 0


def test_no_more_bytes_are_under_way_than_allowed(
    actors: TeacherPool, paths: dict[str, str], expected: list[Features]
) -> None:
    """One row of both teachers is 256 bytes; the requests ask for 13, 7, 0 and 25 rows."""
    careful = TeacherPool(replace(config(paths), max_in_flight_bytes=20 * 256), teachers.draw)
    handles = [careful.submit(request) for request in REQUESTS]
    assert [handle.size_bytes for handle in handles] == [13 * 256, 7 * 256, 0, 25 * 256]
    under_way: list[list[bool]] = []
    answers = []
    for handle in handles:
        under_way.append([bool(other.calls) for other in handles])
        answers.append(careful.result(handle))
    assert under_way == [[True, True, True, False], [True, True, True, False], [True] * 4, [True] * 4]
    assert_equal_bits(answers, expected)
    late_first = [careful.submit(request) for request in REQUESTS][::-1]  # the last is not sent yet
    assert_equal_bits([careful.result(handle) for handle in late_first][::-1], expected)


def test_silence_is_reported_with_the_way_out(actors: TeacherPool, paths: dict[str, str]) -> None:
    hasty = TeacherPool(config(paths, max_wait_s=0.0), teachers.draw)
    # "keeps failing" where its first actor, which an earlier test killed, is known to be dead at once.
    report = r"'siglip2' (is silent|keeps failing): no features in 0 s.*--teachers.max-wait-s"
    with pytest.raises(TeacherUnavailable, match=report):
        ask_all(hasty)


def test_a_shard_that_cannot_be_read_is_not_an_image_that_does_not_decode(actors: TeacherPool) -> None:
    handle = actors.submit(teachers.request((teachers.LOST,), ((2, 2),)))
    with pytest.raises(DataError, match=r"^cannot read shard.tar: no such file$"):
        actors.result(handle)


def test_a_fault_of_a_teacher_is_an_error_of_one_line_that_peers_are_told(actors: TeacherPool) -> None:
    handle = actors.submit(teachers.request((teachers.FAULTY,), ((2, 2),)))
    with pytest.raises(
        TeacherUnavailable, match=r"^teacher 'siglip2' failed: RuntimeError: out of luck; the log"
    ) as caught:
        actors.result(handle)
    assert "\n" not in str(caught.value)


def test_teachers_on_cpus_beside_gpus_are_said() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}}, {"Alive": False, "Resources": {"GPU": 8.0}}]
    wanted = TeachersConfig(members=(TeacherConfig(name="one", path="tests.teachers:own"),), actors_per_teacher=2)
    said = "on CPUs, 1 for each of 2 actors, and Ray may give them 2 GPUs; --teachers.actor-gpus"
    assert said in idle_gpus(wanted, nodes)
    assert idle_gpus(replace(wanted, actor_gpus=0.5), nodes) == ""
    if not torch.cuda.is_available():
        assert idle_gpus(wanted, nodes[1:]) == ""


def test_weights_that_do_not_load_are_a_users_mistake(cluster: Cluster, paths: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((Path(paths["siglip2"]) / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    source = TeacherPool(config({"broken": str(broken)}), teachers.draw)
    with pytest.raises(ConfigError, match=r"teacher 'broken' did not start: .*does not load") as caught:
        ask_all(source)
    assert "\n" not in str(caught.value)


def test_a_cluster_of_another_machine_is_refused() -> None:
    elsewhere = Cluster("192.0.2.1:6379", "run", host="elsewhere", token="secret")
    with pytest.raises(ConfigError, match=r"--teachers\.ray-address"), connect(elsewhere, 1):
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


def test_a_stopped_owner_leaves_no_process_and_no_file() -> None:
    token = os.urandom(32).hex()
    with tempfile.TemporaryDirectory(prefix="owner-", dir="/tmp") as scratch:  # a short path, as sockets need
        environment = os.environ | {"RAY_AUTH_TOKEN": token, "RAY_TMPDIR": scratch}
        owner = subprocess.Popen([sys.executable, "-c", OWNER], env=environment, stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None and ":" in owner.stdout.readline()
        assert len(processes_of(token)) > 3
        owner.send_signal(signal.SIGTERM)
        assert owner.wait(timeout=60) != 0
        owner.stdout.close()
        assert wait_until(lambda: not processes_of(token), 30), processes_of(token)
        assert os.listdir(scratch) == []
