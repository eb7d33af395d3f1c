"""Each kernel moves what its work must move, and nothing for tiles that are not in the worklist."""

import pytest
import torch

from bench import traffic_report

from .hardened import recorded

# isort: split
from sparseft.kernels.masked_grad import masked_grad_


@pytest.mark.parametrize("part", ["masked_grad_rows", "entry_rows", "topk_rows"])
def test_within_the_bounds(part):
    for row in getattr(traffic_report, part)():
        assert row.ratio > 0.9 and (row.bound is None or row.ratio <= row.bound), row


def test_inactive_tiles_cost_nothing():
    """The kernel's traffic is the sum over the tiles of the worklist, to the byte."""
    p = traffic_report.clustered(256, 6, 0.2)
    operand = torch.zeros(64, 256, dtype=torch.bfloat16)
    bytes_of = []
    for tiles in (p.tiles, p.tiles[:2].clone(), p.tiles[2:].clone()):
        with recorded() as launches:
            masked_grad_(torch.zeros(len(p)), operand, operand, p.rows, p.cols, tiles, p.local, p.tile, False)
        (launch,) = traffic_report.of("_tiles", launches)
        bytes_of.append(sum(launch.loads[n].requested + launch.stores[n].requested for n in ("a", "b", "local", "out")))
    assert bytes_of[0] == bytes_of[1] + bytes_of[2] > 0
