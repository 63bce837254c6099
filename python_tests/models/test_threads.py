"""One model in two threads: no state of a call is the model's or the process's."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def test_two_threads_share_a_model(model, clip):
    """Each gets at every turn what it gets alone."""
    videos = [clip(1, 5, 16, 16, seed=1), clip(1, 9, 24, 16, seed=2)]
    start = threading.Barrier(2)

    def run(video):
        with torch.no_grad():  # a thread has a mode of its own
            encoding = model.encode(video)
            return encoding.latent, model.decode(encoding)

    def run_again(video):
        found = []
        for _ in range(4):
            start.wait(60)
            found.append(run(video))
        return found

    alone = [run(video) for video in videos]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run_again, videos))
    for expected, turns in zip(alone, together, strict=True):
        for found in turns:
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
