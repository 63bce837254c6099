"""Procedural clips of coloured shapes with captions, questions, and a checker that reads them."""

from vtok_ext.data.captioned.checker import SceneReading, caption_matches, read_scene
from vtok_ext.data.captioned.clips import CaptionedClip, CaptionedClips
from vtok_ext.data.captioned.questions import QUESTION_KINDS, Question, caption_of, questions_of
from vtok_ext.data.captioned.scene import Scene, draw_scene, render

__all__ = [
    "QUESTION_KINDS",
    "CaptionedClip",
    "CaptionedClips",
    "Question",
    "Scene",
    "SceneReading",
    "caption_matches",
    "caption_of",
    "draw_scene",
    "questions_of",
    "read_scene",
    "render",
]
