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


def test_kinds_of_products_are_fitted_apart():
    times = [timing(128, 40, t1=1.0, t3=2.0, t5=0.5, t6=0.4), timing(128, 40, t1=1.0, t3=2.0)]
    assert tune.fit(tune.of_kind(times, "mma")) == [(None, None, 1)]
    assert tune.fit(tune.of_kind(times, "wgmma"), "wgmma") == [(128, None, 6)]


def test_header_can_be_rewritten():
    source = tune.HEADER.read_text()
    assert tune.num_tiles(source, "kConvTiles") == 5
    assert tune.num_tiles(source, "kConvWarpgroupTiles") == 5
    changed = tune.rewrite(source, [(16, None, 4), (None, None, 1)])
    assert "    {16, INT64_MAX, 4},\n    {INT32_MAX, INT64_MAX, 1},\n    // </tuned mma>" in changed
    assert tune.rewrite(changed, [(16, None, 4), (None, None, 1)]) == changed
    assert "    {64, INT64_MAX, 8},\n    // </tuned wgmma>" in tune.rewrite(
        changed, [(64, None, 8)], "wgmma"
    )
    with pytest.raises(ValueError, match="a table <tuned mma>"):
        tune.rewrite("no table", [])
