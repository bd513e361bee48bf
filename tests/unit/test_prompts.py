"""Zero-shot prompts from a file, square and native images, and the form that clip_benchmark takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cogvit.config.arguments import run_command
from cogvit.errors import ConfigError
from cogvit.evaluate import Arguments, evaluate, shown_at
from cogvit.evaluation.clip_benchmark import load_for_clip_benchmark
from cogvit.evaluation.features import embed_images, embed_texts, image_features
from cogvit.evaluation.metrics import zeroshot_accuracy
from cogvit.evaluation.prompts import TEMPLATES, Prompts, read_prompts
from cogvit.evaluation.results import read_evaluation
from cogvit.evaluation.samples import read_images
from cogvit.evaluation.subject import load_subject
from data_pipeline.caption import LANGUAGES
from tests.runs_on_disk import VISION, contrast_run, write_shards
from tools.export import Arguments as Export
from tools.export import export


@pytest.fixture(scope="module")
def stage2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stage2")
    return contrast_run(directory / "run", write_shards(directory / "data"))


def write_prompts(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_every_language_has_templates() -> None:
    assert set(TEMPLATES) == set(LANGUAGES)
    assert all(template.count("{}") == 1 for templates in TEMPLATES.values() for template in templates)


def test_names_go_into_every_template(tmp_path: Path) -> None:
    path = write_prompts(
        tmp_path / "p.json", {"en": {"classes": ["cat", ["dog", "puppy"]], "templates": ["a {}", "{}!"]}}
    )
    texts, labels = read_prompts(Path(path))["en"].texts()
    assert texts == ["a cat", "cat!", "a dog", "dog!", "a puppy", "puppy!"]
    assert labels == [0, 0, 1, 1, 1, 1]


def test_zeroshot_by_prompts_in_two_languages_and_resolutions(stage2: Path, tmp_path: Path) -> None:
    names = {"en": {"classes": ["red", "green", "blue"]}, "zh": {"classes": ["0", "1", "2"], "templates": ["\u56fe{}"]}}
    prompts = write_prompts(tmp_path / "p.json", names)
    for resolution in ("native", "square"):
        argv = [str(stage2), "--tasks", "zeroshot", "--prompts", prompts, "--resolution", resolution]
        assert run_command([*argv, "--out", str(tmp_path / "eval.json")], "", Arguments, evaluate) == 0
    figures = read_evaluation(tmp_path / "eval.json")
    spoken = ("en", "zh", "en_names", "zh_names")
    tasks = [f"zeroshot_colors_{how}_{kind}" for kind in ("native", "square") for how in spoken]
    assert list(figures) == tasks and all(one["accuracy"]["chance"] == pytest.approx(1 / 3) for one in figures.values())
    # As computed by hand.
    subject = load_subject(stage2)
    samples = subject.labeled[0]
    texts, labels = Prompts((("red",), ("green",), ("blue",)), TEMPLATES["en"]).texts()
    image = embed_images(subject, image_features(subject.towers.vision, samples, subject.sizing))
    accuracy = zeroshot_accuracy(image, samples.label, embed_texts(subject, texts), torch.tensor(labels))
    assert figures["zeroshot_colors_en_names_native"]["accuracy"]["value"] == pytest.approx(accuracy)


def test_images_are_squares_or_keep_their_shape(stage2: Path) -> None:
    subject = load_subject(stage2)
    sizes_px = np.array([12, 16]), np.array([16, 16])
    assert shown_at(subject, "square").sizing.grids(*sizes_px).tolist() == [[4, 4], [4, 4]]
    assert shown_at(shown_at(subject, "square"), "naflex").sizing.grids(*sizes_px).tolist() == [[3, 4], [4, 4]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"en": {"classes": ["red", "green"]}}, ["label 2", "names 2 classes"]),
        ({"fr": {"classes": ["rouge"]}}, ["'fr'", "en, zh"]),
        ({"en": {"classes": ["red"], "templates": ["a photo"]}}, ["'a photo'", "one {}"]),
        ({"en": {"classes": ["red", []]}}, ["every class needs a name"]),
        ({"en": ["red"]}, ["does not hold"]),
    ],
)
def test_prompts_that_do_not_fit(
    stage2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, expected: list[str]
) -> None:
    prompts = write_prompts(tmp_path / "p.json", content)
    argv = [str(stage2), "--tasks", "zeroshot", "--prompts", prompts]
    assert run_command(argv, "", Arguments, evaluate) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and all(word in message for word in expected), message


def test_unknown_resolution(stage2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([str(stage2), "--resolution", "huge"], "", Arguments, evaluate) == 2
    assert "--resolution huge" in capsys.readouterr().err


def test_clip_benchmark_gets_the_embeddings_of_our_own_evaluation(stage2: Path) -> None:
    model, transform, tokenizer = load_for_clip_benchmark(stage2, "cpu")
    subject = load_subject(stage2)
    samples = subject.labeled[0]
    size_hw_px = torch.tensor([[12, 16]] * len(samples)).numpy()
    images = [Image.fromarray(pixels) for pixels in read_images(samples.index, samples.rows, size_hw_px)]
    batch = torch.stack([transform(image) for image in images])
    assert batch.shape == (len(samples), 3, VISION.image_size, VISION.image_size)
    assert -1.0 <= float(batch.min()) < -0.5 and 0.5 < float(batch.max()) <= 1.0
    texts = ["a red picture", "\u56fe1", "a much longer caption that is cut at sixteen tokens"]
    with torch.inference_mode():
        text = F.normalize(model.encode_text(tokenizer(texts)), dim=1)
        image = F.normalize(model.encode_image(batch), dim=1)
    torch.testing.assert_close(text, embed_texts(subject, texts), atol=1e-5, rtol=1e-4)
    square = tuple(VISION.image_size for _ in range(2))
    features = torch.stack([model.vision(transform(one)[None])["patch_tokens"][0].mean(0) for one in images])
    torch.testing.assert_close(image, embed_images(subject, features.detach()), atol=1e-5, rtol=1e-4)
    assert transform(images[0].resize((40, 9))).shape[1:] == square


def test_clip_benchmark_takes_an_export(stage2: Path, tmp_path: Path) -> None:
    assert export(Export(str(stage2), str(tmp_path / "both"), "two_towers")) == 0
    assert export(Export(str(stage2), str(tmp_path / "vision"))) == 0
    texts, image = ["a red picture", "\u56fe1"], torch.rand(2, 3, VISION.image_size, VISION.image_size)
    embeddings = []
    for path in (stage2, tmp_path / "both"):
        model, _, tokenizer = load_for_clip_benchmark(str(path), "cpu")
        with torch.inference_mode():
            embeddings.append(torch.cat([model.encode_text(tokenizer(texts)), model.encode_image(image)]))
    assert torch.equal(*embeddings)
    with pytest.raises(ConfigError, match=r"no text tower.*--layout two_towers"):
        load_for_clip_benchmark(tmp_path / "vision", "cpu")
