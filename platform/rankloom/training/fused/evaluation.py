"""FusedEvaluator: questions through the adapters of many slots, in forwards within a token budget of their own.

Shapes: see `validation.py`, which scores the forwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rankloom.data import Row, TaskData
from rankloom.errors import TrialError
from rankloom.evals.labels import LabelTrie
from rankloom.evals.score import select_validation_rows
from rankloom.models.staging import upload
from rankloom.training.fused.forward import FusedForward
from rankloom.training.fused.validation import Evaluation, EvaluationSums, Question, count

ON_CPU = 1024
"""Most tokens per forward on a CPU: more tokens take memory and gain no speed."""
KEEPING_NOTHING = 8
"""On a GPU, tokens per forward for each token of a step, whose activations are kept; where no logits are made."""
ROW_TOO_LONG = "a row of {} tokens alone does not fit into memory; lower data.max_length"


class FusedEvaluator:
    """Evaluates slots on validation rows.

    Args:
        step_tokens: most positions per forward and backward of a step.
    """

    def __init__(self, forward: FusedForward, data: TaskData, step_tokens: int) -> None:
        self.forward, self.data = forward, data
        if forward.base.device.type == "cpu":
            self.token_budget = min(step_tokens, ON_CPU)
        else:
            self.token_budget = step_tokens * (KEEPING_NOTHING if forward.chunked else 1)
        self._trie = LabelTrie(data.labels) if data.labels is not None else None
        self._validation: dict[int | None, list[Question]] = {}

    def evaluate(self, slots: list[int], rows: Sequence[Row] | None, limit: int | None) -> list[Evaluation]:
        """Score slots, in their order, on `rows`, or (None) on the first `limit` validation rows.

        Args:
            slots: ascending.

        Raises:
            TrialError: a single row does not fit into memory.
        """
        questions = self._list_questions(limit) if rows is None else self._make_questions(rows)
        tallies = [EvaluationSums() for _ in slots]
        with torch.no_grad():
            self._evaluate(slots, tallies, questions)
        return [tally.summarize(self._trie is not None) for tally in tallies]

    def _evaluate(self, slots: list[int], tallies: list[EvaluationSums], questions: list[Question]) -> None:
        """Add every question's result for every slot to `tallies`."""
        while questions:
            longest = len(questions[0].example.ids_T)
            num_slots = max(1, min(len(slots), self.token_budget // longest))
            num_rows = max(1, self.token_budget // (num_slots * longest))
            batch, questions = questions[:num_rows], questions[num_rows:]
            for i in range(0, len(slots), num_slots):
                self._evaluate_batch(slots[i : i + num_slots], tallies[i : i + num_slots], batch)

    def _evaluate_batch(self, slots: list[int], tallies: list[EvaluationSums], questions: list[Question]) -> None:
        examples = [question.example for question in questions]
        try:
            arranged = self.forward.arrange(examples * len(slots), [slot for slot in slots for _ in examples])
            with self.forward.apply_route(arranged, upload(arranged.arrays, self.forward.base.device)) as packed:
                count(tallies, questions, packed, self.forward.score(packed))
            return
        except torch.OutOfMemoryError:
            if len(slots) * len(questions) == 1:
                raise TrialError(ROW_TOO_LONG.format(len(examples[0].ids_T))) from None
        num_tokens = len(slots) * sum(len(example.ids_T) for example in examples)
        self.token_budget = max(1, min(self.token_budget, num_tokens // 2))
        self._evaluate(slots, tallies, questions)

    def _list_questions(self, limit: int | None) -> list[Question]:
        """Return the first `limit` validation rows as questions; each limit is prepared once."""
        if limit not in self._validation:
            self._validation[limit] = self._make_questions(select_validation_rows(self.data, limit))
        return self._validation[limit]

    def _make_questions(self, rows: Sequence[Row]) -> list[Question]:
        """Return rows as questions, the longest first: the batch that needs the most memory then fails first."""
        questions = [Question.from_row(row, self._trie, self.data.labels or {}) for row in rows]
        return sorted(questions, key=lambda question: -len(question.example.ids_T))
