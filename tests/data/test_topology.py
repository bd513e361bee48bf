"""Topology: which ranks balance together and which shares are theirs, from addresses of any kind."""

import socket
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvit.errors import ConfigError
from data_pipeline.topology import Span, local_address, topology_of


@given(
    nodes=st.integers(1, 12),
    per_node=st.integers(1, 8),
    shares=st.sampled_from([1, 2, 4, 6, 8, 12, 60]),
    rotate=st.integers(0, 5),
)
def test_groups_are_nodes_and_take_every_part_of_every_share_once(nodes, per_node, shares, rotate):
    addresses = [f"leaf{node // 4}.node{node}" for node in range(nodes) for _ in range(per_node)]
    addresses = addresses[rotate:] + addresses[:rotate]
    topology = topology_of(addresses, shares)
    assert sorted(rank for group in topology.groups for rank in group) == list(range(nodes * per_node))
    seats = [topology.seat(rank) for rank in range(nodes * per_node)]
    for rank, seat in enumerate(seats):
        mates = [
            other for other in range(len(seats)) if (seats[other].shares, seats[other].span) == (seat.shares, seat.span)
        ]
        assert seat.num_ranks == len(mates) and mates.index(rank) in range(seat.num_ranks)
        assert [addresses[other] for other in mates] == [addresses[rank]] * per_node
    spans = [seats[group[0]].span or seats[group[0]].shares for group in topology.groups]
    edges = [(span.start, span.stop) if isinstance(span, range) else (span.begin, span.end) for span in spans]
    assert edges[0][0] == 0 and edges[-1][1] == shares
    assert all(one[1] == other[0] for one, other in pairwise(edges))
    assert {end - begin for begin, end in edges} == {Fraction(shares, nodes)}
    assert sorted({seat.rank for seat in seats}) == list(range(seats[0].num_ranks))
    assert len(topology.groups) == nodes
    assert all((seat.span is None) == (shares % nodes == 0) for seat in seats)


def test_neighbors_on_the_line_of_shares_are_under_one_switch():
    addresses = [f"spine.leaf{number % 2}.node{number}" for number in range(4)]
    topology = topology_of(addresses, 2)
    assert topology.groups == ((0,), (2,), (1,), (3,))  # the nodes of leaf0, and those of leaf1
    assert topology.seat(3).shares == topology.seat(1).shares == range(1, 2)
    assert topology.seat(3).span == Span(Fraction(3, 2), Fraction(2), (Fraction(3, 2),))


def test_nodes_have_shares_by_their_ranks():
    topology = topology_of(["a", "a", "b"], 4)
    assert topology.groups == ((0, 1), (2,))
    assert [topology.seat(rank).shares for rank in range(3)] == [range(3), range(3), range(2, 4)]


def test_address_is_the_files_then_slurms_then_the_hosts(tmp_path, monkeypatch):
    host = socket.gethostname()
    monkeypatch.delenv("SLURM_TOPOLOGY_ADDR", raising=False)
    assert local_address("") == host
    monkeypatch.setenv("SLURM_TOPOLOGY_ADDR", "spine.leaf1.node1")
    assert local_address("") == "spine.leaf1.node1"
    path = tmp_path / "topology"
    path.write_text(f"other leaf0.other\n{host} leaf7.mine\n")
    assert local_address(str(path)) == "leaf7.mine"
    path.write_text("other leaf0.other\n")
    with pytest.raises(ConfigError, match=f"no line 'HOST ADDRESS' for {host}"):
        local_address(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        local_address(str(tmp_path / "gone"))
