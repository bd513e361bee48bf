"""What a user gets: a wheel that holds `cogvit` alone, and commands that say what such an installation lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from cogvit.checkout import lacking

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, as `pip install .` builds it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("cogvit", "configs", "data_pipeline", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(command, cwd=source, check=True, timeout=300)
    (path,) = out.glob("*.whl")
    return path


def test_a_wheel_holds_cogvit_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        assert {name.split("/")[0] for name in names} == {"cogvit", info}
        assert archive.read(f"{info}/top_level.txt").decode().split() == ["cogvit"]
        assert sum(member.file_size for member in archive.infolist()) < 5e6
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    plain = {line.split(";")[0] for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line}
    assert {line.split("<")[0].split(">")[0] for line in plain} == {"torch", "einops", "numpy", "pillow", "safetensors"}


@pytest.mark.parametrize("command", ["train", "report"])
def test_a_wheel_says_what_training_needs(wheel: Path, tmp_path: Path, command: str) -> None:
    """In a folder that has a configs/ of its own, which is left alone."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "work" / "configs").mkdir(parents=True)
    (tmp_path / "work" / "configs" / "__init__.py").write_text("raise RuntimeError('mine')")
    done = subprocess.run(
        [sys.executable, "-m", f"cogvit.{command}", "demo_stage1"],
        cwd=tmp_path / "work", env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "get a checkout and run pip install -e '.[train]'" in line


def test_a_checkout_comes_before_folders_of_the_same_names(tmp_path: Path) -> None:
    for name in ("configs", "tools", "data_pipeline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('mine')")
    command = [sys.executable, "-m", "cogvit.train", "demo_stage2", "--help", "schedule"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "mine" not in done.stderr and "--schedule.steps N" in done.stdout


def other_python(version: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run another Python in the checkout; the test is skipped where there is none, also behind pyenv's shims."""
    command, environment = f"python{version}", {**os.environ, "PYENV_VERSION": version, **variables}
    there = shutil.which(command)
    if there is None or subprocess.run([there, "-c", ""], env=environment, capture_output=True).returncode:
        pytest.skip(f"no {command} on this machine")
    return subprocess.run([there, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_every_source_compiles_on_later_pythons(version: str, tmp_path: Path) -> None:
    """Without a warning. Their torch is not at hand here: what runs there is told in cogvit/README.md."""
    folders = ("cogvit", "configs", "data_pipeline", "tools")
    done = other_python(version, "-W", "error", "-m", "compileall", "-q", *folders, PYTHONPYCACHEPREFIX=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert any(tmp_path.rglob("vit.*.pyc"))


def test_an_earlier_python_is_one_line() -> None:
    done = other_python("3.10", "-m", "cogvit.train", "demo_stage2", PYTHONPATH=str(ROOT))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: cogvit needs Python 3.11 to 3.13, and ")
    assert other_python("3.10", "-c", "import cogvit", PYTHONPATH=str(ROOT)).stderr.splitlines()[-1].startswith(
        "ImportError: cogvit needs Python 3.11 to 3.13"
    )  # fmt: skip


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lacking(ROOT) == ""
    monkeypatch.setattr("cogvit.checkout.find_spec", lambda name: None if name in ("ray", "tqdm") else name)
    assert lacking(ROOT) == f"ray, tqdm cannot be imported; run pip install -e '.[train]' in {ROOT}"
