"""The captioned set: splits, balanced answers, and the checker on the very frames that it reads."""

from collections import Counter, defaultdict

import pytest
import torch

from vtok_ext.data.captioned import (
    QUESTION_KINDS,
    CaptionedClips,
    caption_matches,
    caption_of,
    draw_scene,
    questions_of,
    read_scene,
    render,
)
from vtok_ext.data.captioned.questions import vocabulary
from vtok_ext.data.captioned.scene import COLOURS, DIRECTIONS, KINDS, event_frames, in_split


def test_splits_share_no_combination_and_every_value():
    for split, expected in (("train", 3 / 4), ("test", 1 / 4)):
        combinations = [
            (c, k, d)
            for c in COLOURS
            for k in KINDS
            for d in DIRECTIONS
            if in_split(c, k, d, split)
        ]
        assert len(combinations) == expected * len(COLOURS) * len(KINDS) * len(DIRECTIONS)
        # One attribute says nothing about another.
        for pair in ((0, 1), (0, 2), (1, 2)):
            counts = Counter((c[pair[0]], c[pair[1]]) for c in combinations)
            assert len(set(counts.values())) == 1
        scenes = [draw_scene(seed, 32, split) for seed in range(40)]
        assert all(in_split(s.colour, s.kind, s.direction, split) for x in scenes for s in x.shapes)


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_balanced_for_every_text(split):
    """A model that reads only the question is right as often as one that guesses."""
    answers = defaultdict(Counter)
    texts = defaultdict(Counter)
    for seed in range(3000):
        for question in questions_of(draw_scene(seed, 32, split)):
            answers[question.kind][question.answer] += 1
            texts[question.kind][question.text, question.answer] += 1
    assert set(answers) == set(QUESTION_KINDS)
    for kind, counts in answers.items():
        choices = len(QUESTION_KINDS[kind][0])
        assert set(counts) == set(QUESTION_KINDS[kind][0])
        assert max(counts.values()) / 3000 < 1 / choices + 0.035, kind
        # Per text there are fewer clips; the best guess per text together gains little.
        best = defaultdict(int)
        for (text, _), count in texts[kind].items():
            best[text] = max(best[text], count)
        assert sum(best.values()) / 3000 < 1 / choices + 0.06, kind


def test_events_are_short_apart_and_in_every_clip():
    for seed in range(200):
        scene = draw_scene(seed, 32)
        assert sorted(e.name for e in scene.events) == ["appearance", "blink", "reversal"]
        ends = [e.end for e in scene.events]
        assert all(e.end - e.begin == event_frames(32) == 3 for e in scene.events)
        begins = [e.begin for e in scene.events]
        assert all(a < b for a, b in zip(ends, begins[1:], strict=False)) and ends[-1] < 28


def agreement(split, seeds, height, width):
    """Part of the facts that the checker reads rightly, by name."""
    right, total = Counter(), Counter()
    for seed in seeds:
        scene = draw_scene(seed, 32, split)
        reading = read_scene(render(scene, height, width))
        facts = caption_matches(scene, reading)
        appearing = scene.shapes[-1]
        blink, appearance = scene.event("blink"), scene.event("appearance")
        facts["reversal"] = (
            reading.reversed_colour == scene.shapes[scene.event("reversal").shape].colour
        )
        facts["blink"] = reading.blinking_colour == scene.shapes[blink.shape].colour
        seen = reading.appearing
        facts["appearance"] = seen is not None and seen.colour == appearing.colour
        facts["appearing shape"] = seen is not None and seen.kind == appearing.kind
        facts["leaving"] = reading.leaves == (scene.leaving is not None)
        facts["order"] = reading.blink_first == (blink.begin < appearance.begin)
        for name, value in facts.items():
            right[name] += float(value)
            total[name] += 1
    return {name: right[name] / total[name] for name in total}


def test_checker_reads_99_percent_of_the_ground_truth():
    found = agreement("train", range(60), 64, 64)
    assert min(found.values()) >= 0.99, found
    found = agreement("test", range(30), 48, 80)
    assert min(found.values()) >= 0.99, found


def test_checker_is_not_fooled_by_noise_and_sees_an_empty_clip():
    generator = torch.Generator().manual_seed(0)
    scene = draw_scene(5, 32)
    clip = render(scene).float() + 12 * torch.randn(3, 32, 64, 64, generator=generator)
    reading = read_scene(clip.clamp(0, 255).to(torch.uint8))
    assert all(value == 1.0 for value in caption_matches(scene, reading).values())
    empty = read_scene(torch.full((3, 32, 64, 64), 47, dtype=torch.uint8))
    assert empty.lasting == {} and empty.appearing is None and not empty.leaves
    assert set(caption_matches(scene, empty).values()) == {0.0}


def test_clips_by_index():
    clips = CaptionedClips(3, 24, 32, 40, split="test")
    item = clips.clip(1)
    assert item.video.shape == (3, 24, 32, 40) and item.video.dtype == torch.uint8
    assert torch.equal(clips[5, 1], item.video) and len(clips) == 3
    assert not torch.equal(clips[0, 2], item.video)
    assert len(item.questions) == len(QUESTION_KINDS)


def test_vocabulary_covers_everything():
    words = set(vocabulary())
    for seed in range(100):
        scene = draw_scene(seed, 32)
        texts = [caption_of(scene, events=True)]
        texts += [f"{q.text} {q.answer}" for q in questions_of(scene)]
        assert words >= {word for text in texts for word in text.split()}


def test_errors():
    with pytest.raises(ValueError, match="num_frames must be >= 24, got 8"):
        draw_scene(0, 8)
    with pytest.raises(ValueError, match="split must be one of"):
        CaptionedClips(2, split="validation")
    with pytest.raises(ValueError, match="num_clips must be at least 1"):
        CaptionedClips(0)
    with pytest.raises(ValueError, match="height and width must be >= 1, got 0 and 8"):
        render(draw_scene(0), 0, 8)
    # What a decoder gives by default had read as an empty scene.
    with pytest.raises(TypeError, match="read_scene: clip must be uint8, got torch.float32"):
        read_scene(torch.zeros(3, 24, 16, 16))
    with pytest.raises(ValueError, match=r"clip must be \[3, T, H, W\], got \[1, 3, 24, 16, 16\]"):
        read_scene(torch.zeros(1, 3, 24, 16, 16, dtype=torch.uint8))
