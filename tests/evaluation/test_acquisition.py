"""What to label next: what a classifier is unsure of, and of that one of each kind."""

import pytest
import torch

from hf_tgpt.evaluation.acquisition import next_to_label, uncertainty


def blobs(sizes, seed=0):
    """Unit features of groups of similar pictures, and each one's group."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = 10 * torch.eye(len(sizes), 8)
    return torch.nn.functional.normalize(centres[groups] + torch.randn(len(groups), 8, generator=generator)), groups


def test_the_uncertain_are_chosen_and_each_group_of_them_is_there():
    features, groups = blobs([50, 5, 5, 60])
    unsure = groups < 3
    probabilities = torch.where(unsure[:, None], torch.tensor([0.4, 0.35, 0.25]), torch.tensor([0.9, 0.1, 0.0]))
    probabilities[:, 0] += torch.linspace(0, 0.05, len(groups))
    for seed in range(5):
        chosen = next_to_label(features, probabilities, 6, seed=seed)
        assert len(set(chosen)) == 6
        assert chosen == sorted(chosen)  # the rows are in the order of their uncertainty
        assert set(groups[chosen].tolist()) == {0, 1, 2}
    assert next_to_label(features, probabilities, 6) == next_to_label(features, probabilities, 6)


def test_the_most_uncertain_come_first_and_all_are_given_where_there_are_few():
    features, _ = blobs([4])
    probabilities = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [0.6, 0.4]])
    assert uncertainty(probabilities).tolist() == pytest.approx([0.2, 1.0, 0.6, 0.8])
    assert next_to_label(features, probabilities, 9) == [1, 3, 2, 0]
    assert next_to_label(features, probabilities, 2, share=0.1) == [1, 3]
    assert next_to_label(features[:0], probabilities[:0], 2) == []


def test_equal_pictures_and_a_single_class_are_no_obstacle():
    same = torch.nn.functional.normalize(torch.ones(30, 8))
    assert len(set(next_to_label(same, torch.ones(30, 1), 5))) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "`count`=0: choose 1 or more"),
        ({"share": 0}, "`share`=0: choose a share above 0"),
        ({"features": torch.full((4, 8), torch.nan)}, "must be finite"),
        ({"features": torch.ones(3, 8)}, "of 3 pictures and `probabilities` of 4"),
    ],
)
def test_bad_input_is_refused(changes, message):
    given = {"features": torch.ones(4, 8), "probabilities": torch.full((4, 2), 0.5), "count": 1}
    with pytest.raises(ValueError, match=message):
        next_to_label(**(given | changes))
