"""Clusters of equal size: spherical k-means in which every cluster takes the same number of vectors.

Letters: I vectors, N their dimensions, E clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

_ROUNDS = 30  # at most; it settles in 5 to 20


def balanced_clusters(directions: Tensor, num_clusters: int, *, generator: torch.Generator) -> Tensor:
    """The cluster of each vector; all clusters have the same size.

    Rounds of k-means by the cosine to the centres, with :func:`assign_evenly` in place of the nearest centre. It is a
    heuristic, and the best round is kept.

    Args:
        directions: Unit vectors, or zero. Shape `(I, N)`.
        num_clusters: E; it divides I.
        generator: Draws the first centres.

    Returns:
        Shape `(I,)`, int64, 0 to E - 1.
    """
    centres = _spread_centres(directions, num_clusters, generator)
    best: Tensor | None = None
    clusters: Tensor | None = None
    best_sum = -torch.inf
    for _ in range(_ROUNDS):
        cosine = directions @ centres.T  # (I, E)
        before, clusters = clusters, assign_evenly(cosine)
        total = float(cosine.gather(1, clusters.unsqueeze(1)).sum())
        if total > best_sum:
            best, best_sum = clusters, total
        if before is not None and torch.equal(before, clusters):
            break
        sums = torch.zeros_like(centres).index_add_(0, clusters, directions)
        centres = normalize(sums, dim=1)
    assert best is not None
    return best


def assign_evenly(gain: Tensor) -> Tensor:
    """Assign each vector to a cluster, the same number to all, so that the sum of the gains is nearly the greatest.

    In each round the vectors ask for the best cluster that has room. Where too many ask for one, those stay that would
    lose most elsewhere, the cluster is full, and the others ask again: E rounds at most.

    Args:
        gain: What is gained where a vector comes into a cluster. Shape `(I, E)`, I divisible by E.

    Returns:
        Shape `(I,)`, int64.
    """
    num_vectors, num_clusters = gain.shape
    room = torch.full((num_clusters,), num_vectors // num_clusters)
    clusters = torch.full((num_vectors,), -1)
    while (waiting := (clusters < 0).nonzero().flatten()).numel():
        open_gain = gain[waiting].masked_fill(room == 0, -torch.inf)  # (W, E)
        top = open_gain.topk(min(2, num_clusters), dim=1)
        loss = top.values[:, 0] - top.values[:, -1]  # infinite where only one has room
        asked = top.indices[:, 0]
        over = [c for c in range(num_clusters) if int((asked == c).sum()) > int(room[c])]
        # Without a full cluster all are settled at once; with one, only its own are, and the others think again.
        for cluster in over or range(num_clusters):
            asking = (asked == cluster).nonzero().flatten()
            kept = asking[loss[asking].argsort(descending=True, stable=True)[: int(room[cluster])]]
            clusters[waiting[kept]] = cluster
            room[cluster] -= len(kept)
    return clusters


def _spread_centres(directions: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Vectors far from each other, drawn as in k-means++. Shape `(E, N)`."""
    chosen = [int(torch.randint(len(directions), (), generator=generator))]
    for _ in range(num_clusters - 1):
        nearest = (directions @ directions[chosen].T).amax(dim=1)
        distance = (1 - nearest).clamp(min=0)
        distance[chosen] = 0
        if not distance.any():  # fewer distinct vectors than clusters
            distance = torch.ones_like(distance)
            distance[chosen] = 0
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return directions[chosen]
