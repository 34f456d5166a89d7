"""Classification by constrained decoding: greedy over a trie of the labels' tokens.

At each step a row takes the likeliest of the tokens that still lead to a label. It is done once a single label is
left, and leaves the batch; tokens without an alternative are fed along with the choice before them, not decoded; what
all prompts of a batch begin with is computed once.

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
from rankloom.evals.batches import bears_padding, device_of, evaluating, left_padded, positions, prompt_of, unwrapped


@dataclass(frozen=True, slots=True)
class Node:
    """A decision between labels, or a label's end."""

    tokens: list[int]
    """From the decision above to here: the first one was chosen there, the others have no alternative."""
    label: str
    """One that lies below; where there are no children, the one that was reached."""
    children: dict[int, Node]
    """By their first tokens."""


class LabelTrie:
    """All labels' token ids as a tree of the decisions between them; no label's tokens begin another's."""

    def __init__(self, labels: dict[str, list[int]]) -> None:
        """Raises DataError where there is no label, or where decoding could not tell two apart."""
        if not labels:
            raise DataError("there is no label to choose from")
        # as bytes, which compare at once: many labels may begin with the same thousand tokens
        by_tokens = sorted(labels, key=lambda label: np.array(labels[label], dtype=">u4").tobytes())
        for label, following in pairwise(by_tokens):  # who begins another begins the next
            if labels[following][: len(labels[label])] == labels[label]:
                raise DataError(f"labels {label!r} and {following!r}: the tokens of one begin the other's; rename one")
        paths = [labels[label] for label in by_tokens]
        self.longest = max(map(len, paths))
        self.num_decisions = 0
        """The most choices on the way to a label: the forwards after which every row of a batch is done."""
        self.root = Node([], by_tokens[0], {})
        """Its tokens are what all labels begin with."""
        growing = [(self.root, 0, len(paths), 0, 0)]
        while growing:  # without recursion: a label may have thousands of tokens
            node, start, stop, at, decisions = growing.pop()
            self.num_decisions = max(self.num_decisions, decisions)
            path, last = paths[start], paths[stop - 1]
            if stop - start == 1:
                node.tokens.extend(path[at:])
                continue
            end = next(i for i in range(at, len(path)) if path[i] != last[i])  # sorted: the rest agree up to there
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
    """The label that greedy decoding over the trie gives each row's prompt.

    Args:
        lockstep: take as many forwards a batch whatever the rows hold and choose, as the workers of a sharded model
            have to.
    """
    bare = unwrapped(model)
    batch_size = batch_size if bears_padding(bare) else 1
    order = sorted(range(len(rows)), key=lambda i: -rows[i].prompt_length)
    found: dict[int, str] = {}
    with evaluating(bare):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            prompts = [prompt_of(rows[i], bare, trie.longest) for i in indices]
            labels = _predict_batch(bare, prompts, trie, pad_id, lockstep)
            found.update(zip(indices, labels, strict=True))
    return [found[i] for i in range(len(rows))]


def _predict_batch(
    model: PreTrainedModel, prompts: list[list[int]], trie: LabelTrie, pad_id: int, lockstep: bool
) -> list[str]:
    device = device_of(model)
    labels = [trie.root.label] * len(prompts)
    active = list(range(len(prompts))) if trie.num_decisions else []
    nodes, feed = [trie.root] * len(active), [prompt + trie.root.tokens for prompt in prompts]
    caching = _caches_each_token(model, length=max(map(len, prompts)) + trie.num_decisions * trie.longest)
    cache: Cache | None = None
    mask_BT = torch.zeros(len(active), 0, dtype=torch.long, device=device)
    shared = _common_start(feed) if caching and len(active) > 1 else []
    if shared:  # a template's system prompt, an instruction: computed once for all rows
        cache = model(input_ids=torch.tensor([shared], device=device), use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(active))
        mask_BT = mask_BT.new_ones(len(active), len(shared))
        feed = [tokens[len(shared) :] for tokens in feed]
    elif lockstep and active:
        _idle_forward(model, pad_id)
    for _ in range(trie.num_decisions):
        if not active:
            if not lockstep:
                break
            _idle_forward(model, pad_id)
            continue
        # rows that are fed less get padding amid their tokens: it is masked, and counts as no position
        new = left_padded(feed, pad_id, device)
        mask_BT = torch.cat([mask_BT, new.attention_mask_BT], dim=1) if caching else new.attention_mask_BT
        output = model(
            input_ids=new.input_ids_BT,
            attention_mask=mask_BT,
            position_ids=positions(mask_BT)[:, -new.input_ids_BT.shape[1] :],
            past_key_values=cache,
            use_cache=caching,
            logits_to_keep=1,
        )
        cache = output.past_key_values if caching else None
        chosen = _likeliest(output.logits[:, -1], [list(node.children) for node in nodes])
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


def _idle_forward(model: PreTrainedModel, pad_id: int) -> None:
    """Take part in a sharded model's communication, for the sake of other workers."""
    model(input_ids=torch.tensor([[pad_id]], device=device_of(model)), use_cache=False)


def _caches_each_token(model: PreTrainedModel, length: int) -> bool:
    """Whether the cache keeps every one of `length` tokens by itself, so that padding amid a row can be masked.

    Not so with a recurrent state, beyond a sliding window, or where distance is counted by place in the cache: such
    models are run without a cache.
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


def _common_start(sequences: list[list[int]]) -> list[int]:
    """The tokens that all begin with; each keeps at least one of its own."""
    limit = min(map(len, sequences)) - 1
    together = zip(*(s[:limit] for s in sequences), strict=True)
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, together)]


def _likeliest(logits_BV: Tensor, choices: list[list[int]]) -> list[int]:
    """Each row's choice with the highest logit."""
    most = max(map(len, choices))
    choices_BC = torch.tensor([c + c[:1] * (most - len(c)) for c in choices], device=logits_BV.device)
    best_B1 = logits_BV.gather(1, choices_BC).argmax(dim=1, keepdim=True)
    found: list[int] = choices_BC.gather(1, best_B1)[:, 0].tolist()
    return found


def macro_f1(truths: Sequence[str], predictions: Sequence[str]) -> float:
    """The mean F1 over all labels that occur among the truths or the predictions, as scikit-learn's default."""
    pairs = list(zip(truths, predictions, strict=True))
    labels = {label for pair in pairs for label in pair}
    scores = []
    for label in labels:
        right = sum(t == p == label for t, p in pairs)
        scores.append(2 * right / sum((t == label) + (p == label) for t, p in pairs))
    return sum(scores) / len(scores)
