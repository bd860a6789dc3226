"""Probabilities that can be trusted: a temperature, answers of several classes with a known coverage, "none of these".

All of it is fitted to the logits of held-out pictures, on which the model was not trained, and stored in a small file
beside the adapter.

Sources. The temperature: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599, section 4.
Answers of several classes: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005, chapters 2 and 4 (by
class: Mondrian), with the score of Sadinle, Lei, Wasserman, Least Ambiguous Set-Valued Classifiers, JASA 2019, as
described by Angelopoulos, Bates, A Gentle Introduction to Conformal Prediction, arXiv 2107.07511, sections 1 and 4.
"None of these" by the largest logit: Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings,
ICML 2022, arXiv 1911.11132.

Letters: b or n pictures, c classes.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..adapters.config import PromptConfig
from ..adapters.folder import CALIBRATION, digest_of_weights
from ..utils.files import read_json, write_json

KEPT = 0.95  # share of right answers that are not rejected
_LEAST, _MOST = 1e-3, 1e4  # temperatures
# A class has a threshold of its own if it has this many times the fewest pictures that a coverage needs.
_ENOUGH = 2


@dataclass(frozen=True)
class Calibration:
    """A calibration of a classifier's logits on held-out pictures; `calibrate` makes one.

    `probabilities` are those of each picture's own class, after division of the logits by the temperature,
    {class: one for each of its pictures}; the keys are all classes in the measurement. A picture whose largest logit is
    below `reject_below` counts as none of the classes, which keeps the share `kept` of right answers; None: there were
    too few right answers. `pictures` names the pictures used, and `strangers` has the results for pictures of other
    things, if there were any. `settings` are the values that the adapter's changeable fields had, `weights` is the
    digest of its weights.
    """

    temperature: float
    probabilities: dict[str, list[float]]
    reject_below: float | None
    kept: float = KEPT
    pictures: str = "held-out pictures"
    strangers: dict[str, float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None

    @property
    def count(self) -> int:
        """n, the number of held-out pictures."""
        return sum(map(len, self.probabilities.values()))

    @property
    def largest_coverage(self) -> float:
        """The largest possible coverage: n / (n + 1)."""
        return self.count / (self.count + 1)

    def includes(self, class_names: Sequence[str]) -> bool:
        """Whether these are among its classes, so the temperature is valid for them."""
        return set(class_names) <= self.probabilities.keys()

    def is_for(self, class_names: Sequence[str]) -> bool:
        """Whether these are exactly its classes, in any order."""
        return set(class_names) == self.probabilities.keys()

    def scaled(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (b, c) with a calibrated softmax: divided by the temperature, which keeps the order."""
        return logits / self.temperature

    def answers(self, logits: torch.Tensor, class_names: Sequence[str], coverage: float) -> torch.Tensor:
        """Which classes belong to each picture's answer: logits (b, c) of the model -> booleans (b, c).

        The likeliest class always does, so no answer is empty. Raises ValueError as `least_probabilities` does.

        Example:
            >>> logits, labels = torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
            >>> trusted = calibrate(logits, labels, ["cat", "dog", "newt", "toad"])
            >>> trusted.answers(logits[:1], ["cat", "dog", "newt", "toad"], 0.9).sum().item()
            1
        """
        least = self.least_probabilities(coverage, class_names).to(logits.device)
        belongs = self.scaled(logits.double()).softmax(-1) >= least
        return belongs.scatter(-1, logits.argmax(-1, keepdim=True), True)

    def least_probabilities(self, coverage: float, class_names: Sequence[str]) -> torch.Tensor:
        """The least probability (c,) that a class needs to belong to an answer of this coverage.

        A class with enough pictures has a threshold of its own, so that the coverage holds for its own pictures too.
        The others share one; if they have too few pictures together, the classes with the next fewest join them.

        Raises ValueError for a `coverage` that is not between 0 and 1, or that needs more pictures.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"`coverage`={coverage!r}: choose a share between 0 and 1, such as 0.9.")
        count, fewest = self.count, _fewest(coverage)
        if count < fewest:
            raise ValueError(
                f"`coverage`={coverage} needs {fewest} held-out pictures and the adapter was calibrated with {count}, "
                f"which tell shares in steps of 1/{count + 1}, {self.largest_coverage:.3f} at most; ask for less, or "
                "calibrate it with more pictures."
            )
        by_number = sorted(self.probabilities, key=lambda name: len(self.probabilities[name]))
        small = [name for name in by_number if len(self.probabilities[name]) < _ENOUGH * fewest]
        shared = [p for name in small for p in self.probabilities[name]]
        for name in by_number[len(small) :]:
            if not small or len(shared) >= fewest:
                break
            small, shared = [*small, name], [*shared, *self.probabilities[name]]
        least = {name: _from_the_top(self.probabilities[name], coverage) for name in by_number[len(small) :]}
        least |= dict.fromkeys(small, _from_the_top(shared, coverage) if small else 0.0)
        return torch.tensor([least[name] for name in class_names], dtype=torch.float64)

    def rejected(self, logits: torch.Tensor) -> torch.Tensor:
        """Which pictures show none of the classes: logits (b, c) of the model -> booleans (b,).

        Raises ValueError if there were too few right answers.
        """
        if self.reject_below is None:
            raise ValueError(
                f"`reject`: to keep {self.kept} of the right answers takes {_fewest(self.kept)} of them, and the "
                "adapter was calibrated with fewer; calibrate it with more pictures, or keep fewer answers: "
                "`hf-tgpt calibrate --reject 0.8`."
            )
        return familiarity(logits) < self.reject_below

    def facts(self, class_names: Sequence[str]) -> dict[str, Any]:
        """The thresholds for another program, whose logits are already divided by the temperature."""
        shares = [share for share in (0.8, 0.9, 0.95, 0.99) if _fewest(share) <= self.count]
        below = None if self.reject_below is None else self.reject_below / self.temperature
        return {
            "temperature": self.temperature,
            **({"least_probabilities": {str(share): self.least_probabilities(share, class_names).tolist()
                                        for share in shares}, "reject_below": below}
               if self.is_for(class_names) else {}),
        }  # fmt: skip

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes calibration.json; the adapter's own files do not change."""
        write_json(Path(folder) / CALIBRATION, asdict(self))


def calibrate(
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_names: Sequence[str],
    *,
    unknown: torch.Tensor | None = None,
    kept: float = KEPT,
    **notes: Any,
) -> Calibration:
    """A calibration from the logits (n, c) of held-out pictures and their labels (n,).

    `unknown` (m, c) are the logits of pictures that show none of the classes; they serve only to measure how well the
    threshold separates them. `kept` is the share of right answers that must not be rejected, `notes` are other fields
    of a `Calibration`. Raises ValueError without a picture, for logits that are not finite and for a bad `kept`.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [1.0, 0.0], [0.0, 1.0], [4.0, 0.0]])
        >>> trusted = calibrate(logits, torch.tensor([0, 0, 1, 1]), ["cat", "dog"])
        >>> trusted.temperature > 1  # one of its two confident answers is wrong
        True
    """
    if not 0 < kept < 1:
        raise ValueError(f"`kept`={kept!r}: choose a share between 0 and 1, such as {KEPT}.")
    for name, values in {"logits": logits, "unknown": unknown}.items():
        if values is not None and (not len(values) or not values.isfinite().all()):
            raise ValueError(f"`{name}` must be of at least one picture, and finite; check the pictures and the model.")
    logits, labels = logits.double().cpu(), labels.cpu()
    temperature = fit_temperature(logits, labels)
    own = (logits / temperature).softmax(-1).gather(1, labels[:, None]).squeeze(1)
    by_class = {name: sorted(own[labels == label].tolist()) for label, name in enumerate(class_names)}
    right = familiarity(logits)[logits.argmax(-1) == labels].tolist()
    return Calibration(
        temperature=temperature,
        probabilities=by_class,
        reject_below=_from_the_top(right, kept) if len(right) >= _fewest(kept) else None,
        kept=kept,
        strangers=None if unknown is None else tell_apart(familiarity(logits), familiarity(unknown.double().cpu())),
        **notes,
    )


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature that minimises the cross entropy of logits (n, c) of pictures with these labels (n,).

    Departs from Guo et al. in a weak prior: normal with deviation 1 on the temperature's logarithm. Without it, a few
    pictures that are all classified correctly would make all answers certain.
    """
    low, high = math.log(_LEAST), math.log(_MOST)
    for _ in range(60):  # halves the interval in which the slope changes sign
        middle = (low + high) / 2
        scaled = logits.double() * math.exp(-middle)
        own = scaled.gather(1, labels[:, None]).squeeze(1)
        slope = float((own - (scaled.softmax(-1) * scaled).sum(-1)).sum()) + middle
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp((low + high) / 2)


def familiarity(logits: torch.Tensor) -> torch.Tensor:
    """How much pictures look like one of the classes: logits (b, c) of the model -> the largest ones (b,).

    For a model trained with a sigmoid, such as SigLIP, its sigmoid is the likeliest class's own probability.
    """
    return logits.double().amax(-1)


def tell_apart(known: torch.Tensor, unknown: torch.Tensor) -> dict[str, float]:
    """How well the scores (n,) of known pictures are separated from the lower scores (m,) of unknown ones.

    `auroc` is the share of pairs in which the known picture has the higher score, `fpr95` the share of unknown pictures
    that pass the threshold that keeps 95 % of the known ones.

    Example:
        >>> tell_apart(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        {'auroc': 0.875, 'fpr95': 0.5, 'pictures': 2}
    """
    below = torch.searchsorted(unknown.sort().values, known)
    up_to = torch.searchsorted(unknown.sort().values, known, side="right")
    least = known.sort(descending=True).values[math.ceil(0.95 * len(known)) - 1]
    return {
        "auroc": float((below + up_to).double().mean() / 2 / len(unknown)),
        "fpr95": float((unknown >= least).double().mean()),
        "pictures": len(unknown),
    }


def read_calibration(folder: str | os.PathLike[str]) -> Calibration | None:
    """The calibration of the adapter in a folder; None if it has none.

    One made with other weights causes a warning and is not used. Raises ValueError for a damaged file.
    """
    path = Path(folder) / CALIBRATION
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        known = {own.name for own in fields(Calibration)}
        calibration = Calibration(**{name: value for name, value in content.items() if name in known})
        values = [value for own in calibration.probabilities.values() for value in own]
        below = calibration.reject_below
        if not (0 < calibration.temperature < math.inf and values and all(0 <= value <= 1 for value in values)):
            raise ValueError("it has no temperature or no probabilities")
        if below is not None and not math.isfinite(below):
            raise ValueError(f"`reject_below`={below} is not finite")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}); remove it or write it again: `hf-tgpt calibrate`."
        ) from None
    if calibration.weights != digest_of_weights(folder):
        warnings.warn(
            f"{str(path)!r} was measured with other weights than the adapter's and is not used; write it again: "
            "`hf-tgpt calibrate`.",
            stacklevel=2,
        )
        return None
    return calibration


def settings_of(config: PromptConfig) -> dict[str, Any]:
    """The values of the fields that may change after training."""
    return {name: getattr(config, name) for name in config.changeable}


def _fewest(share: float) -> int:
    """The fewest pictures for this share: n pictures allow at most n / (n + 1)."""
    return math.ceil(round(share / (1 - share), 6))


def _from_the_top(values: Sequence[float], share: float) -> float:
    """The value that the next one exceeds with this probability: that at rank ceil((n + 1) share) from the top."""
    return sorted(values, reverse=True)[math.ceil(round((len(values) + 1) * share, 6)) - 1]
