"""Captions of scenes, and questions whose answers the words of the question do not tell.

A question names at most one attribute of a shape, and scenes are drawn such that given one
attribute the others are uniform: for every text the answers are equally frequent. Nor does one
picture tell the answers of motion and events, but for two things: an appearing shape has none of
the colours that last (1 in 6 instead of 1 in 8 on average), and where in its quarter a shape is
gives a hint at its direction (an encoder that tells places apart is right in 6 of 10). What remains
is the chance of a few clips; `python_tests` measures it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vtok_ext.data.captioned.scene import COLOURS, DIRECTIONS, KINDS, Scene, Shape

# Kind of question -> (answers, whether seeing one picture may be enough).
QUESTION_KINDS = {
    "colour": (tuple(COLOURS), True),
    "shape": (KINDS, True),
    "count": (("1", "2", "3"), True),
    "direction": (tuple(DIRECTIONS), False),
    "speed": (("slowly", "fast"), False),
    "reversal": (("yes", "no"), False),
    "blink": (("yes", "no"), False),
    "appearance": (tuple(COLOURS), False),
    "appearing shape": (KINDS, False),
    "disappearance": (("yes", "no"), False),
    "order": (("yes", "no"), False),
}

# Kinds that a scene of one shape has no question of.
OF_SEVERAL_SHAPES = ("reversal", "blink")


@dataclass(frozen=True)
class Question:
    """A question of one `kind` of QUESTION_KINDS, and its answer, one word."""

    kind: str
    text: str
    answer: str


def caption_of(scene: Scene, *, events: bool = False) -> str:
    """Returns what happens, such as "a red circle moves left slowly".

    Args:
        scene: of the clip; shapes are told in the order of their quarters.
        events: whether the short events follow, in the order of time.
    """
    lasting = sorted(scene.lasting, key=lambda shape: shape.quarter)
    parts = [f"a {s.colour} {s.kind} moves {s.direction} {s.speed}" for s in lasting]
    text = " and ".join(parts)
    if not events:
        return text
    told = []
    for event in scene.events:
        shape = scene.shapes[event.shape]
        verb = {"reversal": "turns", "blink": "blinks", "appearance": "appears"}[event.name]
        told.append(f"the {shape.colour} {shape.kind} {verb}")
    return f"{text} . " + " then ".join(told)


def questions_of(scene: Scene) -> list[Question]:
    """Returns one question of every kind that the scene answers, always in the same order.

    A scene of one shape has none about reversal and blink.
    """
    lasting = scene.lasting
    # Which shape is asked about must not depend on what is asked: it is the one named first by
    # quarter, and the last for the speed.
    first = min(lasting, key=lambda shape: shape.quarter)
    last = max(lasting, key=lambda shape: shape.quarter)
    blink, appearance = scene.event("blink"), scene.event("appearance")
    order = "yes" if blink.begin < appearance.begin else "no"
    found = [
        # The shape that appears may be of this kind, too.
        Question("colour", f"what colour is the {first.kind} at the start", first.colour),
        Question("shape", f"what shape is {first.colour}", first.kind),
        Question("count", "how many shapes are there at the start", str(len(lasting))),
        Question("direction", f"where does the {first.colour} shape move", first.direction),
        Question("speed", f"how does the {last.colour} shape move", last.speed),
        Question(
            "appearance",
            "what colour is the shape that appears for a moment",
            _colour(scene, appearance.shape),
        ),
        Question(
            "appearing shape",
            "what shape appears for a moment",
            scene.shapes[appearance.shape].kind,
        ),
        Question(
            "disappearance",
            "does a shape leave before the end",
            "no" if scene.leaving is None else "yes",
        ),
        Question("order", "does a shape blink before another appears", order),
    ]
    if len(lasting) > 1:  # else the only one does
        for name, verb in zip(OF_SEVERAL_SHAPES, ("turn", "blink"), strict=True):
            shape, answer = _asked_about(scene, name)
            found.append(Question(name, f"does the {shape.colour} shape {verb}", answer))
    return found


def _asked_about(scene: Scene, name: str) -> tuple[Shape, str]:
    """Returns a lasting shape and whether the event happens to it: "yes" of every other clip."""
    event = scene.event(name)
    rng = random.Random(f"{name}/{scene}")
    others = [shape for i, shape in enumerate(scene.lasting) if i != event.shape]
    if rng.random() < 0.5:
        return scene.shapes[event.shape], "yes"
    return rng.choice(others), "no"


def _colour(scene: Scene, index: int) -> str:
    return scene.shapes[index].colour


def vocabulary() -> list[str]:
    """Returns every word of captions, questions and answers, sorted."""
    sentences = [
        "a moves and slowly fast . the turns blinks appears then",
        "what colour is the shape how many shapes are there at the start where does move",
        "that for a moment leave before the end blink turn another appears 1 2 3 yes no",
        " ".join((*COLOURS, *KINDS, *DIRECTIONS)),
    ]
    return sorted({word for sentence in sentences for word in sentence.split()})
