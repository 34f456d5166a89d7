"""Classification by constrained decoding: greedy over a trie of the labels' tokens.

At each step a row takes the likeliest of the tokens that still lead to a label. A row is done and leaves the batch when
a single label is left. Tokens without an alternative are fed together with the choice before them instead of decoded.
The common start of all prompts in a batch is computed once.

Shapes: B rows, T positions, V vocabulary, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from rankloom.data.render import Row
from rankloom.errors import DataError
from rankloom.evals.batches import (
    count_positions,
    cut_prompt,
    get_device,
    pad_left,
    supports_left_padding,
    unwrap,
    use_evaluation_mode,
)


@dataclass(frozen=True, slots=True)
class Node:
    """A decision between labels, or a label's end."""

    tokens: list[int]
    """Tokens from the decision above to here: the first was chosen there, the others have no alternative."""
    label: str
    """A label below this node; without children, the label that was reached."""
    children: dict[int, Node]
    """First token -> node."""


class LabelTrie:
    """A tree of the decisions between all labels' token ids; no label's tokens begin another's."""

    def __init__(self, labels: dict[str, list[int]]) -> None:
        """Build the tree.

        Args:
            labels: label -> token ids.

        Raises:
            DataError: there is no label, or one label's tokens begin another's.
        """
        if not labels:
            raise DataError("there is no label to choose from")
        # as bytes, which compare fast: many labels may begin with the same thousand tokens
        by_tokens = sorted(labels, key=lambda label: np.array(labels[label], dtype=">u4").tobytes())
        for label, following in pairwise(by_tokens):  # a prefix stands directly before a label that it begins
            if labels[following][: len(labels[label])] == labels[label]:
                raise DataError(f"labels {label!r} and {following!r}: the tokens of one begin the other's; rename one")
        paths = [labels[label] for label in by_tokens]
        self.longest = max(map(len, paths))
        self.num_decisions = 0
        """Most choices on a path to a label: the number of forwards after which every row of a batch is done."""
        self.root = Node([], by_tokens[0], {})
        """Holds the tokens that all labels begin with."""
        growing = [(self.root, 0, len(paths), 0, 0)]
        while growing:  # a loop instead of recursion: a label may have thousands of tokens
            node, start, stop, at, decisions = growing.pop()
            self.num_decisions = max(self.num_decisions, decisions)
            path, last = paths[start], paths[stop - 1]
            if stop - start == 1:
                node.tokens.extend(path[at:])
                continue
            end = next(
                i for i in range(at, len(path)) if path[i] != last[i]
            )  # the labels between are sorted, so they agree too
            node.tokens.extend(path[at:end])
            borders = [i for i in range(start + 1, stop) if paths[i][end] != paths[i - 1][end]]
            for first, behind in pairwise([start, *borders, stop]):
                child = node.children[paths[first][end]] = Node([], by_tokens[first], {})
                growing.append((child, first, behind, end, decisions + 1))


def predict_labels(
    model: nn.Module,
    rows: Sequence[Row],
    trie: LabelTrie,
    *,
    pad_id: int,
    batch_size: int,
    lockstep: bool = False,
) -> list[str]:
    """Return the label that greedy decoding over the trie chooses for each row's prompt.

    Args:
        pad_id: token id for padding.
        lockstep: run the same number of forwards for every batch, as the workers of a sharded model must.
    """
    bare = unwrap(model)
    batch_size = batch_size if supports_left_padding(bare) else 1
    order = sorted(range(len(rows)), key=lambda i: -rows[i].prompt_length)
    predictions: dict[int, str] = {}
    with use_evaluation_mode(bare):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            prompts = [cut_prompt(rows[i], bare, trie.longest) for i in indices]
            labels = _predict_batch(bare, prompts, trie, pad_id, lockstep)
            predictions.update(zip(indices, labels, strict=True))
    return [predictions[i] for i in range(len(rows))]


def _predict_batch(
    model: PreTrainedModel, prompts: list[list[int]], trie: LabelTrie, pad_id: int, lockstep: bool
) -> list[str]:
    device = get_device(model)
    labels = [trie.root.label] * len(prompts)
    active = list(range(len(prompts))) if trie.num_decisions else []
    nodes, feed = [trie.root] * len(active), [prompt + trie.root.tokens for prompt in prompts]
    caching = _caches_each_token(model, length=max(map(len, prompts)) + trie.num_decisions * trie.longest)
    cache: Cache | None = None
    mask_BT = torch.zeros(len(active), 0, dtype=torch.long, device=device)
    shared = _find_common_start(feed) if caching and len(active) > 1 else []
    if shared:  # such as a system prompt or an instruction
        cache = model(input_ids=torch.tensor([shared], device=device), use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(active))
        mask_BT = mask_BT.new_ones(len(active), len(shared))
        feed = [tokens[len(shared) :] for tokens in feed]
    elif lockstep and active:
        _run_idle_forward(model, pad_id)
    for _ in range(trie.num_decisions):
        if not active:
            if not lockstep:
                break
            _run_idle_forward(model, pad_id)
            continue
        # rows with fewer new tokens get padding between their tokens: it is masked and takes no position
        new = pad_left(feed, pad_id, device)
        mask_BT = torch.cat([mask_BT, new.attention_mask_BT], dim=1) if caching else new.attention_mask_BT
        output = model(
            input_ids=new.input_ids_BT,
            attention_mask=mask_BT,
            position_ids=count_positions(mask_BT)[:, -new.input_ids_BT.shape[1] :],
            past_key_values=cache,
            use_cache=caching,
            logits_to_keep=1,
        )
        cache = output.past_key_values if caching else None
        chosen = _choose_likeliest(output.logits[:, -1], [list(node.children) for node in nodes])
        reached = [node.children[token] for node, token in zip(nodes, chosen, strict=True)]
        left = [b for b, node in enumerate(reached) if node.children]
        for b in set(range(len(active))) - set(left):
            labels[active[b]] = reached[b].label
        if cache is not None and left and len(left) < len(active):
            kept = torch.tensor(left, device=device)
            cache.batch_select_indices(kept)
            mask_BT = mask_BT[kept]
        nodes = [reached[b] for b in left]
        feed = [[*([] if caching else feed[b]), *node.tokens] for b, node in zip(left, nodes, strict=True)]
        active = [active[b] for b in left]
    return labels


def _run_idle_forward(model: PreTrainedModel, pad_id: int) -> None:
    """Run a forward only to take part in a sharded model's communication, so that other workers do not wait."""
    model(input_ids=torch.tensor([[pad_id]], device=get_device(model)), use_cache=False)


def _caches_each_token(model: PreTrainedModel, length: int) -> bool:
    """Return whether the cache keeps each of `length` tokens separately, so that padding inside a row can be masked.

    It does not with a recurrent state, beyond a sliding window, or if distance is counted by place in the cache: such
    models run without a cache.
    """
    layers = DynamicCache(config=model.config).layers
    windows = [getattr(layer, "sliding_window", length) for layer in layers]
    if "local" in (getattr(model.config, "attention_layers", None) or ()):  # GPT-Neo's windows
        windows.append(model.config.window_size)
    return (
        min(windows, default=length) >= length
        and model.config.model_type != "mpt"  # its ALiBi; those of BLOOM and Falcon go by the mask
        and all(isinstance(at, DynamicLayer) and not isinstance(at, LinearAttentionCacheLayerMixin) for at in layers)
    )


def _find_common_start(sequences: list[list[int]]) -> list[int]:
    """Return the tokens that all sequences begin with, but leave at least one token to each."""
    limit = min(map(len, sequences)) - 1
    together = zip(*(s[:limit] for s in sequences), strict=True)
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, together)]


def _choose_likeliest(logits_BV: Tensor, choices: list[list[int]]) -> list[int]:
    """Return each row's choice with the highest logit."""
    most = max(map(len, choices))
    choices_BC = torch.tensor([c + c[:1] * (most - len(c)) for c in choices], device=logits_BV.device)
    best_B1 = logits_BV.gather(1, choices_BC).argmax(dim=1, keepdim=True)
    chosen: list[int] = choices_BC.gather(1, best_B1)[:, 0].tolist()
    return chosen


def compute_macro_f1(truths: Sequence[str], predictions: Sequence[str]) -> float:
    """Return the mean F1 over all labels among the truths or the predictions, as scikit-learn does by default."""
    pairs = list(zip(truths, predictions, strict=True))
    labels = {label for pair in pairs for label in pair}
    scores = []
    for label in labels:
        right = sum(t == p == label for t, p in pairs)
        scores.append(2 * right / sum((t == label) + (p == label) for t, p in pairs))
    return sum(scores) / len(scores)
