"""Process 1 of two can read no video: torchrun faulty_scan.py FOLDER OUT, which gets RANK.json.

It has the videos and buckets of two scans, and how many files were opened after each; warnings.
"""

import json
import sys
from pathlib import Path

import torch
from tiny_recipe import tiny

from vtok_ext.data import clips, video_scan
from vtok_ext.data.video import VideoReadError
from vtok_ext.training.distributed import process_group, rank
from vtok_ext.training.setup import build_clips, index_kept_in

if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])
    opened, read_times = [], clips.read_times

    def read(path, *arguments, **options):
        opened.append(path.name)
        if rank() == 1:
            raise VideoReadError("a failure of the storage")
        return read_times(path, *arguments, **options)

    recipe = tiny(f"data.folder={folder}", "data.validation_clips=0")
    result, warnings = [], []
    with process_group(torch.device("cpu")), index_kept_in(out / "index.json"):
        for module in (clips, video_scan):
            module.read_times = read
        for _ in range(2):
            found, _ = build_clips(recipe.data, 0, warnings.append)
            result.append([[video.name for video in found.videos], found.bucket_of, len(opened)])
        (out / f"{rank()}.json").write_text(json.dumps([result, warnings]))
