"""Every command, Python block and link of every guide, and the notebook, run as a reader would run them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.data.corpus import picture
from tests.dist.test_layouts import COVER, MORE, SINGLE
from tests.e2e.corpus import write_world
from tests.e2e.test_commands import ROOT, SMALL, TEACHERS, environment, run

GUIDES = (
    "README.md", "data_pipeline/README.md", "launch/README.md", "configs/README.md", "cogvit/README.md",
    "tools/README.md", "tools/bench/README.md", "CONTRIBUTING.md", "configs/COMING_FROM.md", "tests/README.md",
)  # fmt: skip
# What this test cannot run as it stands, and where it is run instead; sbatch is for tests/slurm.
ELSEWHERE = {
    "make demo": "continuous integration runs it before the tests",
    "make demo-rl": "by hand, in ten minutes; tests/e2e/test_stage4.py runs its stages small",
    "python -m cogvit.train demo_rl --init runs/demo_rl/start --rl.tasks digits,my_task.py:Mine --out runs/mine": (
        "needs what make demo-rl has made"
    ),
    "make test": "this is it",
    "make check": "continuous integration runs it first",
    "python -m tools.index_shards '/data/*.tar' --merge 64": "tests/data makes the parts that it joins",
    "pip install .": "tests/unit/test_install.py builds the wheel",
    'python -m cogvit.generate DIR --image picture.png --prompt "What is this?"': "its own tests make a model to ask",
    "python -m tools.make_demo_language_model tiny --corpus runs/demo/corpus --out runs/demo/language": "its own tests",
    "python -m tools.make_demo_language_model smollm2 --out runs/smollm2": "needs a package of 140 MB",
}


@dataclass(frozen=True)
class Block:
    """A code block of a guide."""

    guide: str
    language: str
    text: str


def blocks() -> list[Block]:
    found = []
    for guide in GUIDES:
        text = (ROOT / guide).read_text()
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            found.append(Block(guide, language, block))
    return found


def commands() -> list[str]:
    """Every line of a block without a language, once, with the lines it goes on and without its comment."""
    lines = [line for block in blocks() if not block.language for line in block.text.replace("\\\n", " ").splitlines()]
    plain = [re.sub(r"\s+", " ", re.sub(r"\s+#.*", "", line)).strip() for line in lines]
    return [line for line in dict.fromkeys(plain) if line]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's folders, shards, held-out shards, teachers, and a reader's photos with captions."""
    directory = write_world(tmp_path_factory.mktemp("guides"))
    for name in ("cogvit", "configs", "data_pipeline", "launch", "tools"):
        (directory / name).symlink_to(ROOT / name)
    (directory / "photos").mkdir()
    names = {"a": "jpg", "b": "png", **{f"{number:03d}": "jpg" for number in range(60)}}
    for seed, (name, extension) in enumerate(names.items()):
        image_format = "JPEG" if extension == "jpg" else "PNG"
        data = picture(30 + seed % 40, 30 + seed % 7, seed=seed, image_format=image_format)
        (directory / "photos" / f"{name}.{extension}").write_bytes(data)
        (directory / "photos" / f"{name}.txt").write_text(f"picture {seed}\n")
    return directory


def cut_to_size(command: str, world: Path) -> list[str]:
    """A training command of a guide with two small steps; the one for many machines on this one."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        here = {
            "4": "1", "8": "2", "HOST:29500": "127.0.0.1:0", "stage1_cogvit_l": "demo_stage1",
            "/data/{0000..4095}.tar": "shards", "/runs/stage1": str(world / "runs" / "torchrun"),
        }  # fmt: skip
        return [*(here.get(word, word) for word in words), *TEACHERS, "--schedule.steps", "2", *SMALL]
    if {"cogvit.train", "demo_stage2"} & set(words) or (words[0] == "launch/local.sh" and words[2] == "stage2_small"):
        if "--help" in words:
            return words
        small = {"--schedule.steps": "2", **dict(zip(SMALL[::2], SMALL[1::2], strict=True))}
        for flag in small.keys() & set(words):
            words[words.index(flag) + 1] = small.pop(flag)
        return [*words, *(word for pair in small.items() for word in pair)]
    return words


@pytest.mark.timeout(2400)
def test_every_command_of_every_guide_runs(world: Path) -> None:
    wanted = [line for line in commands() if line not in ELSEWHERE and not line.startswith("sbatch")]
    assert len(wanted) >= 12
    for command in wanted:
        if command.startswith(("mkdir", "tar")):
            subprocess.run(["bash", "-c", command], cwd=world, check=True)
        else:
            run(world, cut_to_size(command, world), timeout_s=600.0)
    for block in blocks():  # behind the commands, which have made what these read
        if block.language == "python" and re.search(r"from_pretrained\(\"(exported|two_towers)\"", block.text):
            run(world, [sys.executable, "-c", block.text])
    run(world, [sys.executable, "-c", notebook_code()])
    with Image.open(world / "sheet.png") as sheet:
        assert sheet.size == (6 * 160, 2 * 160) and len(sheet.getcolors(10**6) or []) > 100


def notebook_code() -> str:
    """The notebook's cells in order as one program that keeps the picture which it shows."""
    cells = json.loads((ROOT / "tools" / "notebooks" / "first_look.ipynb").read_text())["cells"]
    assert all(cell.get("outputs", []) == [] for cell in cells), "stored without outputs"
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return "\n".join([*code, 'sheet.save("sheet.png")'])


def test_what_is_run_elsewhere_is_still_in_a_guide() -> None:
    assert set(ELSEWHERE) <= set(commands())


@pytest.mark.parametrize("guide", GUIDES)
def test_links_of_guides_lead_somewhere(guide: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / guide).read_text()):
        assert target.startswith("https://") or ((ROOT / guide).parent / target).exists(), target


def test_the_readme_is_two_screens() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120


def test_presets_of_the_guide_are_those_that_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from cogvit.config.flags import preset_names; print(*preset_names())"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    for guide in ("README.md", "configs/README.md"):
        rows = [line.split("|")[1] for line in (ROOT / guide).read_text().splitlines() if line.startswith("| `")]
        named = {name for row in rows for name in re.findall(r"`((?:demo|stage|rl|cogvlm|cogagent)\w+)`", row)}
        assert named == set(done.stdout.split())


def test_the_readme_counts_the_runs_of_all_layouts() -> None:
    num_runs = len({*SINGLE, *MORE, *COVER})
    assert f"weights and moments of {num_runs} runs" in (ROOT / "README.md").read_text()
