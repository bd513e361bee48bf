"""What a step's answers say of a policy: rewards and how many prompts were answered well, for each source."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

from cogvit.rl.collect import Taken

PASSED = 0.99  # a reward from which on an answer counts as right


def figures(taken: Taken, version: int) -> dict[str, float]:
    """Return the figures of what a step trains on, of which there is at least one answer.

    "reward" is the mean over prompts, "pass_SOURCE" the share of prompts of which at least one answer is right (pass@k,
    k answers each), "staleness" by how many steps the weights that answered were older, a mean over tokens,
    "answer_length_tokens" the mean length of all that was said in an episode, "equal_groups" the share of prompts whose
    answers are all worth the same, which teach nothing; "aborted_prompts", "failed_prompts" and "stale_prompts" what
    else became of prompts, "rollout_s" how long the step waited; "answers_per_s" and "rollout_tokens_per_s" are those
    of whole steps, training included: where answers come while a step trains, it hardly waits.
    """
    rewards = [[sample.reward or 0.0 for sample in answer.samples] for answer in taken.answers]
    found = {"reward": fmean(map(fmean, rewards))}
    sources: dict[str, list[list[float]]] = {}
    for answer, own in zip(taken.answers, rewards, strict=True):
        sources.setdefault(answer.request.source, []).append(own)
    for source, groups in sources.items():
        found[f"reward_{source}"] = fmean(map(fmean, groups))
        found[f"pass_{source}"] = fmean(float(max(own) >= PASSED) for own in groups)
    samples = [sample for answer in taken.answers for sample in answer.samples]
    spans = [span for sample in samples for turn in sample.turns for span in turn.spans]
    tokens, ends = sum(span.tokens for span in spans), Counter(entry.end for entry in taken.entries)
    lost = {f"{end}_prompts": float(ends[end]) for end in ("aborted", "failed", "stale")}
    return (
        found
        | lost
        | {
            "staleness": sum((version - span.version) * span.tokens for span in spans) / max(tokens, 1),
            "answer_length_tokens": tokens / len(samples),
            "equal_groups": fmean(float(max(own) == min(own)) for own in rewards),
            "rollout_s": taken.waited_s,
            "answers_per_s": len(samples) / max(taken.whole_s, 1e-9),
            "rollout_tokens_per_s": tokens / max(taken.whole_s, 1e-9),
        }
    )
