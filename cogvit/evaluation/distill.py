"""How much of what the teachers say of held-out images the student of stage 1 explains."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from cogvit.batch import to_device
from cogvit.errors import DataError
from cogvit.evaluation.metrics import Explained, explain
from cogvit.evaluation.places import PlaceSums, place_sums
from cogvit.evaluation.results import Evaluation, score
from cogvit.evaluation.samples import Pack, pack_rows, spread
from cogvit.evaluation.subject import Subject
from cogvit.objective.masking import mask_tokens
from cogvit.training.restore import Towers
from data_pipeline.loader import image_of

_MAX_IMAGES = 512  # of the held-out shards, evenly spread: real teachers are large


@dataclass(frozen=True)
class Fit:
    """How well one teacher's standardized features are predicted."""

    masked: Explained  # where the student does not see the patch, as in training
    everywhere: Explained  # at all patches of images without a mask
    masked_place: PlaceSums  # the same patches, guessed from their place in the image alone
    everywhere_place: PlaceSums

    def __add__(self, other: Fit) -> Fit:
        return Fit(
            self.masked + other.masked,
            self.everywhere + other.everywhere,
            self.masked_place + other.masked_place,
            self.everywhere_place + other.everywhere_place,
        )


def distill_results(subject: Subject) -> Evaluation:
    """Return the explained share of each teacher's variance around its per-channel mean; guessing the mean gives 0.

    Beside it (`_place`) what a patch's place alone explains: the mean over that place in other images.

    For stage 1. Errors: ConfigError when a teacher is gone or has changed, DataError when no image decodes.
    """
    from cogvit.teacher.standardize import Standardized, load_stats  # transformers takes seconds
    from cogvit.teacher.stream import FeatureRequest, LocalFeatures
    from cogvit.teacher.zoo import fingerprint, inspect_teacher, load_teacher

    config = subject.config
    assert config is not None, "stage 1 is a run"
    members = [member for member in config.teachers.members if "" in member.parts]
    specs = {member.name: inspect_teacher(member.path, member.layer) for member in members}
    fingerprints = {name: fingerprint(spec) for name, spec in specs.items()}
    way_out = "evaluate with the teachers of the run"
    stats = load_stats(subject.path / "teacher_stats.safetensors", fingerprints, config.teachers.standardize, way_out)
    teachers = {
        member.name: load_teacher(member.path, config.teachers.precision, layer=member.layer) for member in members
    }
    source = Standardized(LocalFeatures(teachers, image_of), stats)
    rows = spread(np.sort(np.concatenate([samples.rows for samples in subject.samples])), _MAX_IMAGES)

    def part() -> list[dict[str, Fit]]:
        fits = []
        for pack in pack_rows(subject.heldout, rows, subject.sizing, subject.ranks):
            grids = tuple((rows, columns) for rows, columns in pack.images.grid_hw.tolist())
            request = FeatureRequest(pack.samples, grids, tuple(pack.images.key.tolist()), mask_ratio=1.0)
            target = source.result(source.submit(request))
            fits.append(compare(subject.towers, pack, target, config.teachers.mask_ratio))
        return fits

    sums: dict[str, Fit] = {}
    for round_of_packs in zip_longest(*subject.ranks.gather(part), fillvalue={}):  # in the order of the packs
        for fits in round_of_packs:
            sums |= {name: sums[name] + fit if name in sums else fit for name, fit in fits.items()}
    if not all(fit.everywhere.count for fit in sums.values()):
        raise DataError(
            f"none of the {len(rows):,} held-out images decodes ({subject.heldout.name(int(rows[0]))} first);"
            " repair them or pass another --data"
        )
    return {
        f"distill_{name}": {
            "explained_masked": score(fit.masked.share(), 0.0),
            "explained_all": score(fit.everywhere.share(), 0.0),
            "explained_masked_place": score(fit.masked_place.share(), 0.0),
            "explained_all_place": score(fit.everywhere_place.share(), 0.0),
        }
        for name, fit in sums.items()
    }


@torch.inference_mode()
def compare(towers: Towers, pack: Pack, target: dict[str, Tensor], mask_ratio: float) -> dict[str, Fit]:
    """Compare the student's predictions for one pack with its teachers' standardized features of all tokens, [T, C]."""
    images = to_device(pack.images, towers.vision.mask_token.device)
    mask_T, good_T = mask_tokens(images, mask_ratio), images.weight[images.segment()] > 0
    blind_TD = towers.vision.forward_packed(images, mask_T).patch_TD
    seen_TD = towers.vision.forward_packed(images).patch_TD
    chosen_T, good_T = (mask_T & good_T).cpu(), good_T.cpu()
    fits = {}
    for name, head in towers.heads.items():
        if name in target:
            x_TC = target[name]
            masked, everywhere = head(blind_TD).cpu()[chosen_T], head(seen_TD).cpu()[good_T]
            fits[name] = Fit(
                explain(x_TC[chosen_T], masked),
                explain(x_TC[good_T], everywhere),
                place_sums(x_TC, pack.images, chosen_T),
                place_sums(x_TC, pack.images, good_T),
            )
    return fits
