"""The table of convolution tiles: what the tuning script makes of measurements, and the header."""

import pytest
import tune_causal_conv3d as tune


def timing(columns, blocks, **times):
    return tune.Timing(columns, blocks, {int(k[1:]): v for k, v in times.items()})


def test_fits_the_fastest_tile_of_every_interval():
    rows = tune.fit(
        [
            timing(3, 1000, t3=2.0, t4=1.0),
            timing(512, 3, t0=4.0, t3=1.0),
            timing(512, 40, t0=1.0, t3=1.1),
            timing(256, 50, t0=3.0, t3=2.9),  # outvoted: relative times count
            timing(512, 500, t0=1.0, t3=2.0),
        ]
    )
    assert rows == [(16, None, 4), (None, 4, 3), (None, None, 0)]


def test_header_can_be_rewritten():
    source = tune.HEADER.read_text()
    assert tune.num_tiles(source) == 5
    changed = tune.rewrite(source, [(16, None, 4), (None, None, 1)])
    assert "    {16, INT64_MAX, 4},\n    {INT32_MAX, INT64_MAX, 1},\n    // </tuned>" in changed
    assert tune.rewrite(changed, [(16, None, 4), (None, None, 1)]) == changed
    with pytest.raises(ValueError, match="between <tuned> and </tuned>"):
        tune.rewrite("no table", [])
