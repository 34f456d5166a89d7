"""Fused evaluation: the same rows through every member's adapter, in one forward per batch.

The loss equals that of `evals.loss`. The accuracy equals that of `evals.labels`, greedy decoding over the labels' trie,
but needs no generation: decoding yields the true label if and only if the true token is the likeliest choice at each
decision along the true label, and at each decision the model sees the row's own tokens, as in the loss's forward.

Shapes: M predicted tokens, V vocabulary, D decisions of a tally, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rankloom.data.render import Row
from rankloom.evals.labels import LabelTrie
from rankloom.models.staging import upload
from rankloom.training.fused.forward import Scores
from rankloom.training.fused.packing import Example, Packed


@dataclass(frozen=True)
class Evaluation:
    """One member's scores on a set of rows."""

    loss: float
    """Mean cross-entropy per trained token, in nats."""
    accuracy: float | None
    """Share of rows with the right label under constrained decoding; None where the data has no labels."""
    num_rows: int
    metric: float | None = None
    """The user's own metric; None where there is none."""


@dataclass(frozen=True)
class Question:
    """A row to evaluate: its tokens, and the decisions along its label in the trie."""

    example: Example
    decisions: tuple[tuple[int, tuple[int, ...], int], ...] | None
    """(index among the predicted tokens, the tokens to choose from, the right one's index among these) of each
    decision; None: the label is unknown, so the row counts as wrong."""

    @classmethod
    def from_row(cls, row: Row, trie: LabelTrie | None, labels: dict[str, list[int]]) -> Question:
        """Prepare a row; `labels` has each label's tokens, and a `trie` of None is for data without labels."""
        example = Example.from_row(row)
        if trie is None:
            return cls(example, ())
        if row.completion not in labels:
            return cls(example, None)
        decisions, node, at = [], trie.root, len(trie.root.tokens)
        while node.children:
            token, choices = labels[row.completion][at], tuple(node.children)
            predicted = int(np.searchsorted(example.predicting_M, row.prompt_length + at - 1))
            decisions.append((predicted, choices, choices.index(token)))
            node = node.children[token]
            at += len(node.tokens)
        return cls(example, tuple(decisions))


@dataclass
class EvaluationSums:
    """One member's sums over the rows so far."""

    loss_sum: float = 0.0
    weight: float = 0.0
    correct: int = 0
    num_rows: int = 0

    def summarize(self, labelled: bool) -> Evaluation:
        return Evaluation(
            self.loss_sum / self.weight, self.correct / self.num_rows if labelled else None, self.num_rows
        )


def count(tallies: Sequence[EvaluationSums], questions: Sequence[Question], packed: Packed, scores: Scores) -> None:
    """Add a forward's results to the tallies.

    Args:
        packed: every question once per tally, tally by tally.
        scores: the forward's scores of `packed`.
    """
    losses_M = scores.losses_M * packed.weights_M
    loss_sums = losses_M.view(len(tallies), -1).double().sum(1).tolist()
    weight = sum(question.example.weight for question in questions)
    right = _find_right(len(tallies), questions, scores)
    for t, tally in enumerate(tallies):
        tally.loss_sum += loss_sums[t]
        tally.weight += weight
        tally.correct += int(right[t].sum())
        tally.num_rows += len(questions)


def _find_right(num_tallies: int, questions: Sequence[Question], scores: Scores) -> np.ndarray:
    """Return [tallies, questions]: whether the label is predicted."""
    right = np.ones((num_tallies, len(questions)), dtype=bool)
    right[:, [q for q, question in enumerate(questions) if question.decisions is None]] = False
    ends = np.cumsum([len(question.example.predicting_M) for question in questions])
    found = [
        (q, ends[q] - len(question.example.predicting_M) + at, choices, truth)
        for q, question in enumerate(questions)
        for at, choices, truth in question.decisions or ()
    ]
    if not found:
        return right
    most = max(len(choices) for _, _, choices, _ in found)
    arrays = {
        "at_D": np.array([at for _, at, _, _ in found]),
        "choices_DC": np.array([[*c, *c[:1] * (most - len(c))] for _, _, c, _ in found]),
        "truth_D": np.array([truth for _, _, _, truth in found]),
    }
    on_device = upload(arrays, scores.losses_M.device)
    at_D, choices_DC, truth_D = (on_device[name] for name in arrays)
    rows_TD = torch.arange(num_tallies, device=at_D.device)[:, None] * int(ends[-1]) + at_D
    chosen_RC = scores.chosen(rows_TD.flatten(), choices_DC.repeat(num_tallies, 1))
    wrong_TD = (chosen_RC.argmax(-1).view(num_tallies, -1) != truth_D).cpu().numpy()
    for t, d in np.argwhere(wrong_TD):
        right[t, found[d][0]] = False
    return right
