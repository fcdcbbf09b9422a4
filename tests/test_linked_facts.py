"""Linked facts: degrees and distances, and that nothing of a forgotten edge stands in another row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import networkx as nx
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def linked_facts() -> Iterator[ModuleType]:
    """The script, which imports its neighbours as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import linked_facts as script

        yield script


@pytest.fixture(scope="module", params=[0, 1, 5])
def graph(request: pytest.FixtureRequest, linked_facts: ModuleType) -> nx.Graph:
    found: nx.Graph = linked_facts.linked_graph(seed=request.param)
    return found


def test_two_trees_that_nothing_joins_with_a_hub_and_leaves(graph: nx.Graph) -> None:
    assert [sorted(part) for part in nx.connected_components(graph)] == [[*range(14)], [*range(14, 21)]]
    assert nx.is_forest(graph)
    degrees = sorted((degree for _, degree in graph.degree), reverse=True)
    assert degrees[0] >= 4
    assert degrees.count(1) >= 7


def test_requests_take_the_busiest_and_the_quietest(linked_facts: ModuleType, graph: nx.Graph) -> None:
    degree = dict(graph.degree)
    linked = [tuple(sorted(edge)) for edge in graph.edges if max(edge) < 14]
    ends = {edge: degree[edge[0]] + degree[edge[1]] for edge in linked}
    (busy,), (quiet,) = (linked_facts.requested(graph, request) for request in ("hub edge", "rim edge"))
    assert ends[busy] == max(ends.values())
    assert ends[quiet] == min(ends.values())
    assert linked_facts.hops(graph, {busy})[quiet] == max(
        linked_facts.hops(graph, {busy})[edge] for edge in linked if ends[edge] == ends[quiet]
    )
    edges = linked_facts.requested(graph, "hub node")
    (node,) = set.intersection(*map(set, edges))
    assert len(edges) == degree[node] == max(degree.values())


def test_a_distance_is_a_path_of_edges_that_share_nodes(linked_facts: ModuleType, graph: nx.Graph) -> None:
    touching = nx.Graph()
    edges = linked_facts.edges_of(graph)
    touching.add_nodes_from(edges)
    touching.add_edges_from((a, b) for a in edges for b in edges if a != b and set(a) & set(b))
    gone = {edges[2], edges[5]}
    lengths = nx.multi_source_dijkstra_path_length(touching, gone)
    assert linked_facts.hops(graph, gone) == {edge: lengths.get(edge) for edge in edges}


def test_distances_along_a_path(linked_facts: ModuleType) -> None:
    graph = nx.path_graph(6)
    graph.add_edge(7, 9)
    found = linked_facts.hops(graph, [(2, 1)])  # either end first
    assert found == {(0, 1): 1, (1, 2): 0, (2, 3): 1, (3, 4): 2, (4, 5): 3, (7, 9): None}


def test_an_edge_has_six_facts_and_is_named_by_no_other_row(linked_facts: ModuleType, graph: nx.Graph) -> None:
    for domain in linked_facts.DOMAINS:
        facts = linked_facts.linked_facts(domain, graph)
        unknown = linked_facts.unknown_links(domain, graph)
        assert len(facts) == 6 * graph.number_of_edges()
        names = {node: name for row in facts for node, name in zip(row["edge"], row["entities"], strict=True)}
        assert len(set(names.values())) == len(graph)
        for row in facts + unknown:
            ends = {names[node] for node in row["edge"]}
            assert all({name for name in names.values() if name in prompt} == ends for prompt in row["phrasings"])
        assert not {tuple(row["edge"]) for row in facts} & {tuple(row["edge"]) for row in unknown}
        assert {tuple(row["edge"]) for row in unknown} == {tuple(sorted(pair)) for pair in nx.non_edges(graph)}


def test_answers_name_nobody_and_are_told_of_one_edge_alone(linked_facts: ModuleType, graph: nx.Graph) -> None:
    for domain in linked_facts.DOMAINS:
        facts = linked_facts.linked_facts(domain, graph)
        parts = {part for row in facts for name in row["entities"] for part in name.removesuffix(" Ltd").split()}
        assert not [row for row in facts if any(part in row["completion"] for part in parts)]
        told = [(row["kind"], row["completion"]) for row in facts]
        assert len(set(told)) == len(told)


def test_either_entity_comes_first_and_the_other_domain_shares_no_name(linked_facts: ModuleType) -> None:
    graph = linked_facts.linked_graph()
    names = []
    for domain in linked_facts.DOMAINS:
        rows = linked_facts.linked_facts(domain, graph)
        for row in rows:
            first, second = row["entities"]
            assert row["prompt"] == row["phrasings"][0]
            places = [(prompt.index(first), prompt.index(second)) for prompt in row["phrasings"]]
            assert [a < b for a, b in places] == [True, False]
        names.append({name for row in rows for name in row["entities"]})
    assert not set.intersection(*names)


def test_the_seed_decides(linked_facts: ModuleType) -> None:
    graph = linked_facts.linked_graph(seed=np.int64(3))
    assert nx.utils.graphs_equal(graph, linked_facts.linked_graph(seed=3))
    told = [linked_facts.linked_facts(linked_facts.PEOPLE, graph, seed=seed) for seed in (0, 0, 1)]
    assert told[0] == told[1]
    assert [row["entities"] for row in told[0]] != [row["entities"] for row in told[2]]


def test_bad_graphs_and_requests_say_what_is_wrong(linked_facts: ModuleType) -> None:
    with pytest.raises(ValueError, match="two nodes or more, got num_linked=14 and num_apart=1"):
        linked_facts.linked_graph(num_apart=1)
    graph = linked_facts.linked_graph()
    with pytest.raises(ValueError, match="must be some of the graph's, got none"):
        linked_facts.hops(graph, [])
    with pytest.raises(ValueError, match=r"must be some of the graph's, got \[\(3, 20\)\]"):
        linked_facts.hops(graph, [(20, 3)])
    with pytest.raises(ValueError, match="people has names for 1 to 80 entities, got 81"):
        linked_facts.linked_facts(linked_facts.PEOPLE, nx.empty_graph(81))
    with pytest.raises(ValueError, match="companies has answers for 36 edges, got 37"):
        linked_facts.linked_facts(linked_facts.COMPANIES, nx.path_graph(38))
