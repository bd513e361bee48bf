"""What a model says of held-out images: exact matches, CIDEr-D, nats a token, and the blind model's beside them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cogvit.config import RunConfig
from cogvit.evaluate import Arguments, evaluate
from cogvit.evaluation.answers import answer_results, answers, exact, exams, nats_a_token
from cogvit.evaluation.cider import cider, words
from cogvit.evaluation.results import read_evaluation
from cogvit.model.config import ExpertConfig, VideoConfig
from cogvit.model.dialog import Turn
from cogvit.model.frame import ImageFrame
from data_pipeline.token_counts import Wording
from tests.conversations import indexed, said, talk, write_talks
from tests.data.corpus import write_tar
from tests.language import tiny_vlm
from tests.plain_vit import scramble

PROMPTS = dict(RunConfig().language.prompts)
WORDING = Wording(PROMPTS, "", VideoConfig())


def test_words_are_words_in_both_languages() -> None:
    assert words("A red, RED dog's nose.") == ("a", "red", "red", "dog's", "nose")
    assert words("红色的圆") == ("红", "色", "的", "圆") and words("...") == ()


def test_exact_looks_at_words_alone() -> None:
    right = [("the digit six",), ("red", "crimson"), ("blue",)]
    assert exact(["The digit six.", "Crimson", "blue sky"], right) == pytest.approx(2 / 3)


def test_cider_of_two_images_by_hand() -> None:
    """Words of both images weigh nothing; the others log 2 each, so cosines can be counted on fingers."""
    references = [["a red dog"], ["a blue cat"]]
    assert cider(["a red dog", "a blue cat"], references) == pytest.approx(10 * 3 / 4)  # no phrase has four words
    assert cider(["a blue cat", "a red dog"], references) == 0.0
    # "red" of "red dog": half of the words' squared weight, and no pair; one word less.
    expected = 10 * (1 / math.sqrt(2)) / 4 * math.exp(-4 / 72) / 2
    assert cider(["red", "none"], references) == pytest.approx(expected)
    # Twice the same word is clipped to once.
    assert cider(["red red dog", "x"], references) < cider(["a red dog", "x"], references)
    assert cider(["a red dog"], [["a red dog"]]) == 0.0 and cider([], []) == 0.0


def test_what_can_be_asked_of_held_out_samples(tmp_path: Path) -> None:
    index = indexed(write_talks(tmp_path))
    found = {f"{exam.task}_{exam.name}": exam for exam in exams(index, WORDING)}
    assert {name: len(exam.asked) for name, exam in found.items()} == {
        "caption_captions_en": 20, "caption_captions_zh": 10, "vqa_talks": 16,
    }  # fmt: skip
    caption = found["caption_captions_en"].asked[3]
    assert caption.turns == (Turn("user", (None, "What is this?")),) and caption.right == ("thing 3", "one thing")
    blind = found["vqa_talks"].blind()
    assert [len(one.images) for one in blind] == [len(one.images) for one in found["vqa_talks"].asked]
    assert all(
        one.images[0].tobytes() != other.images[0].tobytes()
        for one, other in zip(found["caption_captions_en"].asked, found["caption_captions_en"].blind(), strict=True)
    )


@pytest.mark.parametrize("every", [0, 1])
def test_several_answers_are_those_of_one_by_one_and_nats_are_those_of_logits(tmp_path: Path, every: int) -> None:
    index, model = indexed(write_talks(tmp_path, captions=6, talks=2)), tiny_vlm(expert=ExpertConfig(every))
    if every:  # learned tokens around each image
        model.frame = ImageFrame(model.language.cfg.embed_dim)
        scramble(model.frame)
    found = list(exams(index, WORDING))
    asked = [one for exam in found for one in exam.asked]
    together = answers(model, asked)
    for one, told in list(zip(asked, together, strict=True))[::4]:
        parts = [{"type": "image", "image": image} for image in one.images]
        texts = [{"type": "text", "text": part} for turn in one.turns for part in turn.parts if part]
        assert model.generate([{"role": "user", "content": [*parts, *texts]}], 64) == told
    one = asked[0]
    ids, images = model.prompt(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": one.images[0]}, {"type": "text", "text": PROMPTS["en"]}],
            }
        ]
    )
    end = model.tokenizer.eos_token_id
    answer = [*model.tokenizer(one.right[0], add_special_tokens=False)["input_ids"], end]
    with torch.no_grad():
        logits = model(torch.cat([ids, torch.tensor(answer)])[None], [images])[0]
    nats = F.cross_entropy(logits[len(ids) - 1 : -1], torch.tensor(answer))
    assert nats_a_token(model, [one]) == pytest.approx(float(nats), rel=1e-5)
    results = answer_results(model, found, ("caption", "vqa", "perplexity"))
    gap = results["perplexity_captions_en"]
    assert gap["nats_gap"]["value"] == pytest.approx(gap["nats"]["chance"] - gap["nats"]["value"])
    assert set(results["caption_captions_en"]) == {"exact", "cider"} and set(results["vqa_talks"]) == {"exact"}


def test_held_out_texts_without_an_image_are_not_taken_for_training_images(tmp_path: Path) -> None:
    for part in ("train", "heldout"):
        talks = [talk(f"{part}_{n}", said(f"What is {n}?", "a number")) for n in range(3)]
        write_tar(tmp_path / part / "talks-00000.tar", [member for members in talks for member in members])
        indexed(tmp_path / part)
    tiny_vlm().save_pretrained(tmp_path / "model")
    train, heldout, out = (str(tmp_path / name) for name in ("train", "heldout", "eval.json"))
    asked = Arguments(str(tmp_path / "model"), "vqa", heldout, train, out=out)
    assert evaluate(asked) == 0
    assert set(read_evaluation(Path(out))) == {"vqa_default"}
