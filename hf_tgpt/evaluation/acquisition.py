"""Which pictures to label next, by pool-based active learning in batches: uncertain ones that differ from each other.

Source: Zhdanov: Diverse mini-batch Active Learning, arXiv 1901.05954, section 3: the most informative examples are
clustered, and the one nearest to each centre is chosen. Informativeness is measured by the margin (Scheffer, Decomain,
Wrobel: Active Hidden Markov Models for Information Extraction, IDA 2001).

Letters: n pictures without a label, c classes, d numbers in a feature, k pictures to choose.
"""

from __future__ import annotations

import math

import torch

SHARE = 0.5  # of all pictures: the more uncertain ones
_ROUNDS = 20  # of k-means; by then the centres hardly move


def uncertainty(probabilities: torch.Tensor) -> torch.Tensor:
    """1 minus the margin between the two likeliest classes, (n, c) -> (n,): 1 where they are equally likely.

    Example:
        >>> uncertainty(torch.tensor([[0.75, 0.25], [0.5, 0.5]])).tolist()
        [0.5, 1.0]
    """
    if probabilities.shape[1] < 2:
        return torch.ones(len(probabilities), dtype=probabilities.dtype, device=probabilities.device)
    first, second = probabilities.topk(2).values.unbind(-1)
    return 1 - (first - second)


def next_to_label(
    features: torch.Tensor,
    probabilities: torch.Tensor,
    count: int,
    *,
    share: float = SHARE,
    seed: int = 0,
) -> list[int]:
    """The rows of up to `count` pictures to label next, the most uncertain first.

    features (n, d) at unit length, probabilities (n, c). Among the most uncertain `share` of all pictures, k-means with
    k centres takes the picture nearest to each centre. `seed` is for drawing the first centres. Raises ValueError for a
    `count` below 1, a `share` that is not above 0 and at most 1, and inputs that are not finite or not of the same
    pictures.

    Departs from the paper, which clusters the 10 k most uncertain pictures: half of the pool was better on all data
    sets that were tried, and with few labels the most uncertain pictures are often just odd.

    Example:
        >>> features = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [1.0, 1.0]]))
        >>> probabilities = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.6, 0.4], [1.0, 0.0]])
        >>> sorted(next_to_label(features, probabilities, 2, share=0.1) + [2])  # the two that are most uncertain
        [0, 1, 2]
    """
    if count < 1:
        raise ValueError(f"`count`={count}: choose 1 or more.")
    if not 0 < share <= 1:
        raise ValueError(f"`share`={share}: choose a share above 0, at most 1.")
    if len(features) != len(probabilities):
        raise ValueError(f"`features` are of {len(features)} pictures and `probabilities` of {len(probabilities)}; "
                         "give both of the same.")  # fmt: skip
    if not (features.isfinite().all() and probabilities.isfinite().all()):
        raise ValueError("`features` and `probabilities` must be finite; check the pictures and the model.")
    unsure = uncertainty(probabilities)
    order = unsure.argsort(descending=True, stable=True)
    if len(order) <= count:
        return order.tolist()
    shortlist = order[: max(count, math.ceil(share * len(order)))]
    chosen = shortlist[_representatives(features[shortlist].float(), count, seed)]
    return chosen[unsure[chosen].argsort(descending=True, stable=True)].tolist()


def _representatives(points: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The rows of points (n, d) that are nearest to the centres of k-means, `count` different ones."""
    if len(points) <= count:
        return torch.arange(len(points), device=points.device)
    centres = _start(points, count, seed)
    for _ in range(_ROUNDS):
        nearest = torch.cdist(points, centres).argmin(-1)
        sizes = nearest.bincount(minlength=count)[:, None]
        means = torch.zeros_like(centres).index_add_(0, nearest, points) / sizes.clamp_min(1)
        moved = torch.where(sizes > 0, means, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    distances, chosen = torch.cdist(points, centres), list[int]()
    for column in distances.T.clone():
        column[chosen] = torch.inf  # a point that two centres are nearest to
        chosen.append(int(column.argmin()))
    return torch.tensor(chosen, device=points.device)


def _start(points: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """First centres (k, d) by k-means++: each is drawn with its squared distance to the others as weight.

    Source: Arthur, Vassilvitskii: k-means++: The Advantages of Careful Seeding, SODA 2007.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [int(torch.randint(len(points), (1,), generator=generator))]
    squares = torch.full((len(points),), torch.inf)
    while len(rows) < count:
        squares = torch.minimum(squares, (points - points[rows[-1]]).square().sum(-1).cpu())
        squares[rows] = 0
        weights = squares if squares.sum() > 0 else torch.ones(len(points))
        rows.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[rows]
