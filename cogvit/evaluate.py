"""Evaluates a run or an export on held-out shards.

usage: python -m cogvit.evaluate RUN_OR_EXPORT [flags]
       launch/local.sh NPROC cogvit.evaluate RUN_OR_EXPORT [flags]    (or under torchrun or srun: ranks share the work)

--tasks NAME,...      any of the tasks below; by default all that RUN_OR_EXPORT can do
--data PATTERN        indexed held-out shards; by default what the run holds out: its data.eval_shards, or its share
                      data.held_out of the training shards
--train-data PATTERN  indexed shards that knn and linear learn from; by default the run's data.shards. Held-out images
                      that are among them, by their bytes, are left out of every task
--train-images N      let knn and linear learn from N images of a source, evenly spread; by default from all
--index-dir DIR       where the indexes of both lie; by default as in the run, or beside the shards
--prompts FILE        names of zeroshot's classes, by label, {"en": {"classes": ["cat", ["dog", "pup"]],
                      "templates": ["a photo of a {}."]}, "zh": ...}; a language without templates gets some
--resolution KIND     native or square: show images at their own shape or as squares of the encoder's size, under the
                      tasks' names with _native or _square; by default as the run was trained
--device KIND         auto, cuda or cpu; auto is a GPU where there is one (default: auto)
--out FILE            add the figures to a JSON file, {task: {metric: {"value": v, "chance": c}}}

knn, linear   classes of frozen features, by the nearest neighbors' votes and by logistic regression, beside the same
              encoder before training (accuracy_untrained) and plain pixels (accuracy_pixels)
zeroshot      classes by the nearest caption of the held-out samples, whose wording training may have seen, in each
              language; with --prompts also by the classes' names (zeroshot_..._names); needs the same
retrieval     captions of images and images of captions among all of a source, and among all sources, in each
              language: the share of queries that find one of their own among the first 1, 5 and 10 (r1, r5, r10); every
              caption of a sample counts, equal ones are one. Beside it what colors alone find (r1_color): a caption
              stands for the colors of the training images that have it; captions_of_training_images says how many do.
              And as other programs count (r1_usual): equal captions are apart, and only a sample's own are right. Needs
              a stage-2 run, or its export with --layout two_towers
caption       captions of a source in each language, as answers to what the run asked: the share that is one of the
              sample's own (exact), and CIDEr-D; needs a run of stage 3, or its export
vqa           answers to the first question of conversations: the share that is right (exact); needs the same
perplexity    nats a token of the right captions and answers, with the image and without; the gap is what another
              sample's image adds; needs the same. The chance of these three is the model's own, shown another image
distill       share of each teacher's variance around its per-channel mean that the student explains, at masked patches
              and at all patches of unmasked images; needs a stage-1 run and its teachers

Tasks run on each source of the held-out shards that has what they need: classes are whole numbers, `label` in the
samples' json or alone in a `.cls`. Every figure comes with what guessing gives. Images that do not decode are counted
and left out; more than one in a hundred stop the evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cogvit import checkout  # noqa: F401  before what lies beside cogvit
from cogvit.config import RunConfig
from cogvit.config.arguments import run_command
from cogvit.config.device import device_flag, local_device
from cogvit.config.environment import speaks, this_process
from cogvit.config.split import is_split, train_part
from cogvit.errors import ConfigError, DataError
from cogvit.evaluation.answers import answer_results, exams
from cogvit.evaluation.colors import KnownCaptions, color_features, known_captions
from cogvit.evaluation.distill import distill_results
from cogvit.evaluation.features import decoded, embed_images, embed_texts, image_features, pixel_features
from cogvit.evaluation.metrics import knn_accuracy, linear_accuracy, recall, recall_chance, zeroshot_accuracy
from cogvit.evaluation.prompts import Prompts, read_prompts
from cogvit.evaluation.ranks import joined
from cogvit.evaluation.results import Evaluation, Score, read_evaluation, score, table, write_evaluation
from cogvit.evaluation.samples import Samples, joined_sources, read_samples, rows_of, spread, unseen
from cogvit.evaluation.subject import Subject, load_subject
from cogvit.training.restore import untrained_towers
from data_pipeline.index import Index, load_index
from data_pipeline.token_counts import wording_of

ANSWERED = ("caption", "vqa", "perplexity")
TASKS = ("knn", "linear", "zeroshot", "retrieval", *ANSWERED, "distill")
CLASSIFIERS = {"knn": knn_accuracy, "linear": linear_accuracy}
RECALL_AT = (1, 5, 10)
_LABELS = ("knn, linear and zeroshot need", "a `label` in the json, or a .cls,")  # who needs what
MAX_SOURCES = 20  # that retrieval looks at one by one: a json may call each page a source
RESOLUTIONS: dict[str, Literal["naflex", "square"]] = {"native": "naflex", "square": "square"}


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    run_or_export: str
    tasks: str = ""
    data: str = ""
    train_data: str = ""
    train_images: str = ""
    index_dir: str = ""
    prompts: str = ""
    resolution: str = ""
    device: str = "auto"
    out: str = ""


def evaluate(arguments: Arguments) -> int:
    """Run the tasks, print their figures and add them to --out; returns the exit status.

    Ranks that a launcher has started share the encoding; the first one prints and writes.
    """
    device = local_device(device_flag(arguments.device), this_process())
    with joined() as ranks:
        asked, earlier = check_arguments(arguments)
        path = Path(arguments.run_or_export)
        subject = ranks.together(partial(load_subject, path, arguments.data, arguments.index_dir, ranks, device))
        subject = apart_from_training(subject, arguments)
        if arguments.resolution:
            subject = shown_at(subject, RESOLUTIONS[arguments.resolution])
        tasks = asked or possible_tasks(subject, named=bool(arguments.prompts))
        if not tasks:
            raise DataError(
                f"the held-out shards have neither labels nor captions; every task of {subject.path} needs them"
            )
        results = run_tasks(subject, tasks, arguments)
        if arguments.resolution:
            results = {f"{task}_{arguments.resolution}": figures for task, figures in results.items()}
        if speaks():
            print(table(results))
        if arguments.out and ranks.rank == 0:
            write_evaluation(Path(arguments.out), earlier | results)
    return 0


def check_arguments(arguments: Arguments) -> tuple[list[str], Evaluation]:
    """Return the tasks that are asked for and what --out holds already. Errors: ConfigError."""
    asked = arguments.tasks.split(",") if arguments.tasks else []
    for name in asked:
        if name not in TASKS:
            raise ConfigError(f"unknown task {name!r} in --tasks; tasks are {', '.join(TASKS)}")
    if arguments.resolution not in ("", *RESOLUTIONS):
        raise ConfigError(f"--resolution {arguments.resolution} must be one of {', '.join(RESOLUTIONS)}")
    if arguments.train_images and not (arguments.train_images.isdecimal() and int(arguments.train_images) > 0):
        raise ConfigError(f"--train-images {arguments.train_images} must be a whole number of at least 1")
    found = bool(arguments.out) and Path(arguments.out).exists()
    return asked, read_evaluation(Path(arguments.out)) if found else {}


def apart_from_training(subject: Subject, arguments: Arguments) -> Subject:
    """Return the subject without held-out images that are training images, which say nothing of other images.

    Errors: DataError when none is left.
    """
    try:
        train = _train_index(subject, arguments)
    except (ConfigError, DataError) as error:
        _note(f"held-out images are not compared with the training images: {error}")
        return subject
    samples, trained_on = [], []
    for held_out in filter(len, subject.samples):
        left = unseen(held_out, train)
        if len(left) < len(held_out):
            _note(
                f"{len(held_out) - len(left)} of {len(held_out)} held-out {held_out.source} are training images too:"
                " left out"
            )
        samples += [left] if len(left) else []
        trained_on += [] if len(left) else [held_out.source]
    if trained_on and not samples:  # without both, nothing is held out but videos or texts alone
        raise DataError("every held-out image is a training image too, byte for byte; hold out others (--data PATTERN)")
    return replace(subject, samples=tuple(samples), trained_on=tuple(trained_on))


def shown_at(subject: Subject, kind: Literal["naflex", "square"]) -> Subject:
    """Return the subject with images shown at their own shape or as squares of the encoder's size."""
    return replace(subject, sizing=replace(subject.sizing, kind=kind))


def possible_tasks(subject: Subject, *, named: bool) -> list[str]:
    """Return the tasks that a stage's towers and the held-out samples allow; named: classes have prompts."""
    possible = ["knn", "linear"] if subject.labeled else []
    if subject.towers.text is not None:
        named = named or any(samples.captions for samples in subject.labeled)
        possible += ["zeroshot"] if subject.labeled and named else []
        possible += ["retrieval"] if subject.captioned else []
    possible += list(ANSWERED) if subject.joint is not None else []
    return possible + (["distill"] if subject.towers.heads else [])


def run_tasks(subject: Subject, tasks: Sequence[str], arguments: Arguments) -> Evaluation:
    """Return the figures of some tasks. Errors: ConfigError or DataError when a task lacks what it needs."""
    if subject.towers.text is None and not {"zeroshot", "retrieval"}.isdisjoint(tasks):
        raise ConfigError(
            f"{subject.path} has no text tower; zeroshot and retrieval need the run of a stage 2, or its export with"
            " --layout two_towers"
        )
    if subject.joint is None and not set(ANSWERED).isdisjoint(tasks):
        raise ConfigError(
            f"{subject.path} has no language model; caption, vqa and perplexity need the run of a stage 3, or its"
            " export with --layout vlm or glm_ocr_full"
        )
    if not subject.towers.heads and "distill" in tasks:
        raise ConfigError(f"{subject.path} has no teachers; distill needs the run of a stage 1")
    results: Evaluation = {}
    if learned := [name for name in CLASSIFIERS if name in tasks]:
        results |= probe_results(subject, _train_index(subject, arguments), learned, arguments)
    if "zeroshot" in tasks:
        results |= zeroshot_results(subject, read_prompts(Path(arguments.prompts)) if arguments.prompts else {})
    if "retrieval" in tasks:
        results |= retrieval_results(subject, _known(subject, arguments))
    if asked := [name for name in ANSWERED if name in tasks]:
        results |= spoken_results(subject, asked)
    if "distill" in tasks:
        _note("distill: the student beside its teachers")
        results |= distill_results(subject)
    return results


def spoken_results(subject: Subject, tasks: Sequence[str]) -> Evaluation:
    """Ask the language model about held-out images. Errors: DataError when nothing can be asked."""
    assert subject.joint is not None and subject.talks is not None
    wording = replace(wording_of(subject.config or RunConfig()), video=subject.joint.video)
    found = list(exams(subject.talks, wording))
    for exam in found:
        _note(f"{', '.join(tasks)}: {len(exam.asked):,} {exam.name}")
    results = answer_results(subject.joint, found, tasks)
    if not results:
        raise DataError("the held-out shards have neither captions nor conversations; pass another --data")
    return results


def probe_results(subject: Subject, train_index: Index, classifiers: Sequence[str], arguments: Arguments) -> Evaluation:
    """Classify held-out samples by classifiers that learn from the training samples' frozen features."""
    results: Evaluation = {}
    for test in _needed(subject, subject.labeled, *_LABELS):
        rows = rows_of(train_index, test.source)
        train = read_samples(train_index, test.source, spread(rows, int(arguments.train_images or len(rows))))
        if not len(train) or train.label is None or test.label is None:
            raise DataError(f"the training shards have no labeled {test.source!r} samples; pass --train-data PATTERN")
        _note(f"{', '.join(classifiers)}: {len(train):,} training and {len(test):,} held-out {test.source}")
        chance = 1 / len(train.label.unique())
        for suffix, features in _feature_kinds(subject, train, test):
            kept = [decoded(x, samples) for x, samples in zip(features, (train, test), strict=True)]
            (learn, learn_label), (ask, ask_label) = (
                (x[places], samples.select(places).label)
                for x, samples, places in zip(features, (train, test), kept, strict=True)
            )
            for name in classifiers:
                assert learn_label is not None and ask_label is not None
                accuracy = CLASSIFIERS[name](learn, learn_label, ask, ask_label)
                results.setdefault(f"{name}_{test.source}", {})[f"accuracy{suffix}"] = score(accuracy, chance)
    return results


def _feature_kinds(subject: Subject, train: Samples, test: Samples) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield the metric's suffix with the features of both sets: trained, untrained and without an encoder."""
    towers = {"": subject.towers, "_untrained": untrained_towers(subject.path)}
    for suffix, tower in towers.items():
        encoder = tower.vision.to(subject.towers.vision.mask_token.device)
        features = [image_features(encoder, samples, subject.sizing, subject.ranks) for samples in (train, test)]
        yield suffix, (features[0], features[1])
    yield "_pixels", (pixel_features(train, subject.ranks), pixel_features(test, subject.ranks))


def zeroshot_results(subject: Subject, prompts: Mapping[str, Prompts]) -> Evaluation:
    """Classify held-out samples by the captions of their classes, and by the classes' names in prompts."""
    results: Evaluation = {}
    for samples in _needed(
        subject, subject.labeled, "knn, linear and zeroshot need", "a `label` in the json, or a .cls,"
    ):
        assert samples.label is not None
        _note(f"zeroshot: {len(samples):,} {samples.source}")
        samples, image = _embedded(subject, samples)
        assert samples.label is not None
        captions = [(language, *pairs) for language, pairs in _captions_as_prompts(samples).items()]
        named = [(f"{language}_names", *one.texts()) for language, one in prompts.items()]
        for how, texts, labels in captions + named:
            if int(samples.label.max()) > max(labels):
                raise ConfigError(
                    f"{samples.source} has the label {int(samples.label.max())} and --prompts {how[:2]} names"
                    f" {max(labels) + 1} classes; name all of them"
                )
            accuracy = zeroshot_accuracy(image, samples.label, embed_texts(subject, texts), torch.tensor(labels))
            results[f"zeroshot_{samples.source}_{how}"] = {"accuracy": score(accuracy, 1 / len(set(labels)))}
    if not results:
        raise DataError("no captions say what the held-out classes are called; pass --prompts FILE")
    return results


def _captions_as_prompts(samples: Samples) -> dict[str, tuple[list[str], list[int]]]:
    assert samples.label is not None
    labels = samples.label.tolist()
    found = {}
    for language, captions in samples.captions.items():
        pairs = sorted({(label, text) for label, own in zip(labels, captions, strict=True) for text in own})
        found[language] = ([text for _, text in pairs], [label for label, _ in pairs])
    return found


def _known(subject: Subject, arguments: Arguments) -> KnownCaptions | None:
    """Look at the training images of the sources that have captions; None where there are none to look at."""
    try:
        train = _train_index(subject, arguments)
    except (ConfigError, DataError):
        return None  # it was said: held-out images are not compared with the training images either
    sources = [samples.source for samples in subject.captioned]
    caption_field = subject.config.data.caption_field if subject.config is not None else ""
    return known_captions(train, sources, caption_field, subject.ranks)


def retrieval_results(subject: Subject, known: KnownCaptions | None = None) -> Evaluation:
    """Find any caption of an image and any image of a caption, among those of a source and among those of all.

    known: what colors alone would find is shown beside it, and how many captions are of training images.
    """
    results: Evaluation = {}
    parts = _needed(subject, subject.captioned, "retrieval needs", "captions")
    whole = [joined_sources(parts, "all")] if len(parts) > 1 else []
    if len(parts) > MAX_SOURCES:
        _note(f"retrieval: {len(parts):,} sources are more than {MAX_SOURCES}; among all of them alone")
        parts = []
    for samples in [*parts, *whole]:
        _note("\n".join([f"retrieval: {len(samples):,} {samples.source}", *samples.lacking]))
        samples, image = _embedded(subject, samples)
        color = color_features(samples, subject.ranks) if known is not None else image
        for language, captions in samples.captions.items():
            place = {caption: n for n, caption in enumerate(dict.fromkeys(text for own in captions for text in own))}
            text = embed_texts(subject, list(place))
            own = [[place[caption] for caption in dict.fromkeys(texts)] for texts in captions]
            right = torch.tensor([(n, caption) for n, texts in enumerate(own) for caption in texts])
            apart = torch.tensor([(n, at) for at, n in enumerate(n for n, texts in enumerate(own) for _ in texts)])
            task = f"retrieval_{samples.source}_{language}"
            results[task] = _recalls(image, text, right, "")
            if known is not None:
                results[task] |= _recalls(color, known.features(language, list(place)), right, "_color")
                share = known.share(language, list(place))
                results[task]["captions_of_training_images"] = score(share, 0.0)
                _note(f"{task}: {share:.0%} of the captions are of training images too: new images of what these show")
            results[task] |= _recalls(image, text[right[:, 1]], apart, "_usual")
    return results


def _embedded(subject: Subject, samples: Samples) -> tuple[Samples, Tensor]:
    """Return the samples whose images decode, and these in the shared space."""
    features = image_features(subject.towers.vision, samples, subject.sizing, subject.ranks)
    places = decoded(features, samples)
    if len(places) < len(samples):
        _note(f"{len(samples) - len(places)} of {len(samples)} {samples.source} do not decode: left out")
    return samples.select(places), embed_images(subject, features[places])


def _recalls(image: Tensor, text: Tensor, right: Tensor, suffix: str) -> dict[str, Score]:
    """Return the recalls in both directions; right holds pairs of an image and a text."""
    return {
        f"{direction}_r{k}{suffix}": score(
            recall(query, gallery, pairs, k), recall_chance(pairs, len(query), len(gallery), k)
        )
        for direction, query, gallery, pairs in (
            ("image_to_text", image, text, right),
            ("text_to_image", text, image, right.flip(1)),
        )
        for k in RECALL_AT
    }


def _needed(subject: Subject, found: list[Samples], tasks: str, what: str) -> list[Samples]:
    if not found:
        gone = ", ".join(subject.trained_on)
        raise DataError(
            f"no source of the held-out shards has what {tasks}: {what} of all its samples"
            + (f" (left out, because all of their images are training images: {gone})" if gone else "")
            + "; pass another --data"
        )
    return found


def _train_index(subject: Subject, arguments: Arguments) -> Index:
    shards, index_dir, where = arguments.train_data, arguments.index_dir, ""
    if subject.config is not None:
        index_dir = index_dir or subject.config.data.index_dir
        if not shards:  # the run's own, without what it holds out
            shards = subject.config.data.shards
            where = train_part(subject.config.data).where if is_split(subject.config.data) else ""
    if not shards:
        raise ConfigError(f"{subject.path} names no training shards; knn and linear need --train-data PATTERN")
    return load_index(shards, index_dir, where=where)


def _note(line: str) -> None:
    if speaks():
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, evaluate))
