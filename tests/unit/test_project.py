"""The project's own files: pins that agree, and the size limits of make check."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.check_size import main

ROOT = Path(__file__).resolve().parents[2]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_a_range_around_its_pin_in_the_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = dict(line.split("==") for line in lines)  # nothing but NAME==VERSION: no hosts, no local versions
    assert all(re.fullmatch(r"[\w.]+", version) for version in locked.values())
    extras = project["optional-dependencies"].values()
    for requirement in map(Requirement, [*project["dependencies"], *(line for extra in extras for line in extra)]):
        assert "==" not in str(requirement)
        assert locked[normalized(requirement.name)] in requirement.specifier


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1\n" * 400, None),
        ("x = 1\n" * 401, "long.py: 401 lines, the limit is 400"),
        ("def f():\n" + "    x = 1\n" * 59, None),
        ("class A:\n    def f(self):\n" + "        x = 1\n" * 60, "long.py:2: f has 61 lines, the limit is 60"),
    ],
)
def test_size_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, complaint: str | None) -> None:
    (tmp_path / "long.py").write_text(source)
    assert main([str(tmp_path)]) == (1 if complaint else 0)
    assert complaint is None or complaint in capsys.readouterr().out


def test_pytest_enters_every_folder_of_tests(request: pytest.FixtureRequest) -> None:
    """Its default skips folders named dist, which holds the parity of all layouts."""
    skipped = request.config.getini("norecursedirs")
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert "dist" in folders
    assert not [folder for folder in folders for pattern in skipped if fnmatch(folder, pattern)]


def test_every_word_of_a_ray_cluster_has_its_token_and_no_dashboard() -> None:
    """CVE-2023-48022: whoever reaches a cluster without a token runs code on it."""
    tops = ("cogvit", "data_pipeline", "launch", "tools", "configs")
    files = [ROOT / "README.md", *(path for top in tops for path in (ROOT / top).rglob("*"))]
    texts = [path.read_text() for path in files if path.suffix in (".md", ".py", ".sh")]
    starts = [line for text in texts for line in text.splitlines() if "ray start --head" in line]
    assert len(starts) >= 2
    for start in starts:
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in start and "--include-dashboard=false" in start, start
