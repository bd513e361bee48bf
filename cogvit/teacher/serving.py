"""What runs inside an actor: one teacher, and the threads that decode for it."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import torch
from numpy.typing import NDArray

from cogvit.config import TeacherConfig, TeachersConfig
from cogvit.errors import ConfigError
from cogvit.teacher.room import check_apart
from cogvit.teacher.stream import DecodeImage, FeatureRequest, answer, decoded
from cogvit.teacher.zoo import load_teacher


class TeacherActor:
    """One teacher in a process of its own, which decodes the images of a request while it answers the one before."""

    def __init__(
        self, member: TeacherConfig, config: TeachersConfig, decode: DecodeImage, ranks_gpus: frozenset[str]
    ) -> None:
        threads = max(1, int(config.actor_cpus))
        torch.set_num_threads(threads)
        self._name, self._decode, self._num_answered = member.name, decode, 0
        self._decoders = ThreadPoolExecutor(threads, "decode")
        self._turn = Lock()  # of the teacher: one request at a time
        self._teacher = load_teacher(
            member.path,
            config.precision,
            layer=member.layer,
            parts=tuple(member.parts),
            compiled=config.compile,
            device=_device(config, ranks_gpus),
        )

    def features(self, request: FeatureRequest) -> tuple[dict[str, NDArray[Any]], int]:
        """Answer a request: [M, C] float32, or bfloat16 as uint16, which numpy has no type for; and num_answered."""
        try:
            images = decoded(self._teacher, request, self._decode, self._decoders)
            with self._turn:
                found = answer(self._name, self._teacher, request, images)
        finally:
            with self._turn:
                self._num_answered += 1
        wire = {name: (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy() for name, x in found.items()}
        return wire, self._num_answered

    def num_answered(self) -> int:
        """Return how many requests it has answered, while it works on another: has it moved since one last looked?"""
        return self._num_answered


def _device(config: TeachersConfig, ranks_gpus: frozenset[str]) -> torch.device:
    """Return where an actor's teacher runs.

    Errors: ConfigError when Ray has given it a GPU that torch cannot use, or on which a rank trains.
    """
    if not config.actor_gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"torch {torch.__version__} on {socket.gethostname()} sees no GPU; pass --teachers.actor-gpus 0, or install"
            " its CUDA build there"
        )
    if not config.share_gpus:
        check_apart(str(torch.cuda.get_device_properties(0).uuid), ranks_gpus)
    return torch.device("cuda")
