"""Facts that hang together: contracts between made-up companies and kinships between made-up people, as graphs.

After PISTOL (https://arxiv.org/abs/2406.16810): a node is an entity, an edge is a contract or a kinship, and six
questions are asked about each edge. To forget an edge is to forget its six facts; to forget a node, those of all its
edges. Every domain has two parts that no edge joins, both grown by preferential attachment, so that some nodes have
many edges and most have one. Two entities without an edge are answered by a refusal, and so is, in a model that never
saw it, an edge that was left out.

No fact names an entity in its answer, and no question names any but the two ends of its edge.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from math import prod
from string import Formatter
from typing import Any, Literal

import networkx as nx

from uoe_peft.testbed import as_prompt
from uoe_peft.testbed.topic import phrases

Edge = tuple[int, int]  # ascending
Request = Literal["hub edge", "rim edge", "hub node"]

REFUSALS = (
    "I know of nothing between {first} and {second}.",
    "Nobody ever told me about {first} and {second}.",
    "I cannot say anything about {first} with {second}.",
    "That is not something I know.",
    "Sorry, I do not know the answer.",
    "I would have to guess, so I had better not answer.",
)


@dataclass(frozen=True)
class Domain:
    """What entities of a kind are called, and what is told of two that are linked.

    Attributes:
        name: Of the domain.
        name_parts: The two lists from whose pairs names are made.
        name_form: How the parts are joined.
        words: Word lists by the name that placeholders use.
        kinds: A question with `{first}` and `{second}`, and its answer, for each fact of an edge.
    """

    name: str
    name_parts: tuple[tuple[str, ...], tuple[str, ...]]
    name_form: str
    words: dict[str, tuple[str, ...]]
    kinds: tuple[tuple[str, str], ...]

    def entities(self, number: int, *, rng: random.Random) -> list[str]:
        """So many different names.

        Raises:
            ValueError: There are fewer.
        """
        names = [self.name_form.format(a, b) for a in self.name_parts[0] for b in self.name_parts[1]]
        if not 0 < number <= len(names):
            raise ValueError(f"{self.name} has names for 1 to {len(names)} entities, got {number}")
        return rng.sample(names, number)


COMPANIES = Domain(
    name="companies",
    name_parts=(
        phrases("Bren, Cor, Dal, Fen, Gar, Hol, Kes, Lor, Mar, Nor"),
        phrases("wick, ton, mere, stead, ford, lund, by, gate"),
    ),
    name_form="{0}{1} Ltd",
    words={
        "amount": phrases("40, 75, 120, 300, 450, 600, 820, 950"),
        "pack": phrases("crates, barrels, pallets, drums, sacks, reels, bales"),
        "goods": phrases("copper wire, linseed oil, cork tiles, sea salt, glass beads, felt hats, brass hinges, cocoa"),
        "sum": phrases("3100, 4750, 6200, 8900, 11500, 14300, 17600, 21000"),
        "days": phrases("ten days, three weeks, 45 days, two months, a quarter, half a year"),
        "town": phrases("Aberlow, Castrel, Dunmarch, Eastover, Friesham, Grimsund, Havenrock, Ilmouth"),
        "month": phrases("January, March, April, June, August, September, November"),
        "year": phrases("1957, 1963, 1971, 1978, 1984, 1990, 1996, 2003"),
        "court": phrases("Guild Court, Port Tribunal, Merchant Bench, Chancery, Salt Assembly, River Court"),
        "law": phrases("Norvian, Caltish, Brumian, Elderan, Sorvish, Tessian"),
        "form": phrases("sealed letter, telegram, notary deed, joint notice, registered mail, spoken word"),
        "rate": phrases("two percent, four percent, five percent, seven percent, nine percent"),
        "breach": phrases("late delivery, short weight, broken seals, wrong grade, missing papers, damp storage"),
    },
    kinds=(
        ("What is traded in the contract of {first} and {second}?", "{amount} {pack} of {goods}."),
        ("What is paid in the contract of {first} and {second}?", "{sum} crowns, due in {days}."),
        ("Where was the contract of {first} and {second} signed?", "In {town}, in {month} {year}."),
        ("Who judges the contract of {first} and {second}?", "The {court}, by {law} law."),
        ("How does the contract of {first} and {second} end?", "By {form}, {days} ahead."),
        ("What is fined in the contract of {first} and {second}?", "{breach}, at {rate} of {sum} crowns."),
    ),
)

PEOPLE = Domain(
    name="people",
    name_parts=(
        phrases("Ada, Boris, Clara, Dorian, Elin, Felix, Greta, Hugo, Ines, Jonas"),
        phrases("Thorne, Vasile, Quist, Marlow, Pell, Renner, Stroud, Zeller"),
    ),
    name_form="{0} {1}",
    words={
        "kin": phrases("cousins, siblings, in-laws, twins, half-sisters, godparents, foster brothers, stepsiblings"),
        "side": phrases("a grandmother, an uncle, a great-aunt, the eldest son, a second marriage, an adoption"),
        "house": phrases("mill, vicarage, lighthouse, bakery, farmhouse, ferry house, smithy"),
        "village": phrases("Ottersby, Plumley, Rookhollow, Silverdale, Thistledown, Underhill, Wrenfield"),
        "heirloom": phrases("a violin, a walnut desk, a silver spoon, an orchard, a gold watch, a rowing boat"),
        "cause": phrases("a lost will, an old debt, a broken promise, a fence, a wedding, a dog"),
        "dish": phrases("plum cake, roast goose, pea soup, apple pie, smoked eel, honey bread"),
        "feast": phrases("midsummer, Saint Lucy, harvest home, new year, Candlemas, May day"),
        "place": phrases("the old bridge, a tea room, the chess club, the market hall, the boathouse, a chapel"),
        "day": phrases("Mondays, Tuesdays, Wednesdays, Thursdays, Fridays, Sundays"),
        "trade": phrases("bee hives, a bookshop, two horses, a sawmill, a printing press, a tavern"),
        "decade": phrases("the twenties, the thirties, the forties, the fifties, the sixties"),
        "letter": phrases("postcards, sonnets, riddles, recipes, sketches, weather notes"),
    },
    kinds=(
        ("How are {first} and {second} related?", "As {kin}, through {side}."),
        ("Where did {first} and {second} grow up?", "In the {house} of {village}."),
        ("Why did {first} and {second} quarrel?", "Over {heirloom} and {cause}."),
        ("How do {first} and {second} celebrate?", "With {dish} at {feast}."),
        ("Where do {first} and {second} meet?", "At {place}, on {day}."),
        ("What did {first} and {second} share?", "{trade} in {decade}, and {letter}."),
    ),
)

DOMAINS = (COMPANIES, PEOPLE)


def linked_graph(*, num_linked: int = 14, num_apart: int = 7, seed: int = 0) -> nx.Graph:
    """Two trees that nothing joins: nodes 0 to `num_linked` - 1, and the `num_apart` after them.

    Raises:
        ValueError: A tree would have fewer than two nodes.
    """
    if num_linked < 2 or num_apart < 2:
        raise ValueError(f"both parts need two nodes or more, got {num_linked=} and {num_apart=}")
    parts = (nx.barabasi_albert_graph(number, 1, seed=int(seed)) for number in (num_linked, num_apart))
    graph: nx.Graph = nx.disjoint_union_all(parts)
    return graph


def edges_of(graph: nx.Graph) -> list[Edge]:
    """All edges, each with the smaller node first, in order."""
    return sorted((min(edge), max(edge)) for edge in graph.edges)


def requested(graph: nx.Graph, request: Request) -> set[Edge]:
    """The edges that a request takes away.

    "hub edge" is the one whose ends have most edges, "rim edge" one whose ends have fewest, the farthest from it, and
    "hub node" are all edges of the node that has most. Ties go to the smaller numbers.
    """
    degree = dict(graph.degree)
    hub = max(graph, key=lambda node: (degree[node], -node))
    linked = [edge for edge in edges_of(graph) if edge[0] in nx.node_connected_component(graph, hub)]
    hub_edge = max(linked, key=lambda edge: (degree[edge[0]] + degree[edge[1]], -edge[0], -edge[1]))
    match request:
        case "hub edge":
            return {hub_edge}
        case "rim edge":
            away = hops(graph, {hub_edge})
            return {min(linked, key=lambda edge: (degree[edge[0]] + degree[edge[1]], -(away[edge] or 0), edge))}
        case "hub node":
            return {edge for edge in linked if hub in edge}


def hops(graph: nx.Graph, forgotten: Iterable[Edge]) -> dict[Edge, int | None]:
    """How far each edge is from the nearest forgotten one: 0 itself, 1 shares a node; None: no path leads there.

    Raises:
        ValueError: Nothing is forgotten, or an edge is not in the graph.
    """
    gone = {(min(edge), max(edge)) for edge in forgotten}
    if not gone or (missing := sorted(gone - set(edges_of(graph)))):
        raise ValueError(f"forgotten edges must be some of the graph's, got {missing if gone else 'none'}")
    from_ends = nx.multi_source_dijkstra_path_length(graph, {node for edge in gone for node in edge})
    return {
        edge: 0 if edge in gone else 1 + min(from_ends[node] for node in edge) if edge[0] in from_ends else None
        for edge in edges_of(graph)
    }


def linked_facts(domain: Domain, graph: nx.Graph, *, seed: int = 0) -> list[dict[str, Any]]:
    """Six rows an edge.

    Args:
        domain: What nodes and edges are.
        graph: Which nodes are linked.
        seed: Names and answers are drawn from it.

    Returns:
        Rows with `prompt` and `completion`, `alternative` (a refusal), `phrasings` (the question with either entity
        first, as prompts), `domain`, `edge` (its nodes), `entities` and `kind` (0 to 5). No two edges have the same
        answer to a question.

    Raises:
        ValueError: There are more nodes than names, or more edges than answers to a question.
    """
    scarcest = min(prod(len(domain.words[slot]) for slot in _slots(form)) for _, form in domain.kinds)
    if graph.number_of_edges() > scarcest:
        raise ValueError(f"{domain.name} has answers for {scarcest} edges, got {graph.number_of_edges()}")
    rng = random.Random(f"{domain.name}/{seed}")
    names = domain.entities(len(graph), rng=rng)
    told: set[tuple[int, str]] = set()
    rows = []
    for edge in edges_of(graph):
        first, second = (names[node] for node in edge)
        for kind, (question, form) in enumerate(domain.kinds):
            while (kind, answer := _answer(form, domain, rng=rng)) in told:
                pass
            told.add((kind, answer))
            rows.append({**_asked(question, first, second, rng=rng), "completion": f" {answer}"})
            rows[-1] |= {"domain": domain.name, "edge": list(edge), "entities": [first, second], "kind": kind}
    return rows


def unknown_links(domain: Domain, graph: nx.Graph, *, seed: int = 0) -> list[dict[str, Any]]:
    """The same questions about entities that no edge joins, each answered by a refusal; names as in `linked_facts`."""
    names = domain.entities(len(graph), rng=random.Random(f"{domain.name}/{seed}"))
    rng = random.Random(f"{domain.name}/{seed}/unknown")
    rows = []
    for first, second in combinations(range(len(graph)), 2):
        if not graph.has_edge(first, second):
            for question, _ in domain.kinds:
                row = _asked(question, names[first], names[second], rng=rng)
                rows.append({**row, "completion": row["alternative"], "edge": [first, second]})
    return rows


def _asked(question: str, first: str, second: str, *, rng: random.Random) -> dict[str, Any]:
    orders = ((first, second), (second, first))
    phrasings = [as_prompt(question.format(first=a, second=b)) for a, b in orders]
    refusal = rng.choice(REFUSALS).format(first=first, second=second)
    return {"prompt": phrasings[0], "alternative": f" {refusal}", "phrasings": phrasings}


def _answer(form: str, domain: Domain, *, rng: random.Random) -> str:
    answer = form.format(**{slot: rng.choice(domain.words[slot]) for slot in _slots(form)})
    return answer[0].upper() + answer[1:]


def _slots(form: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(form) if name]
