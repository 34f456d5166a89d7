"""Free greedy generation to the end of the turn, and the reference texts to compare it with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from rankloom.data.render import Row
from rankloom.evals.batches import (
    cut_prompt,
    get_device,
    pad_left,
    supports_cache,
    supports_left_padding,
    unwrap,
    use_evaluation_mode,
)

ROOM = 8
"""Tokens generated beyond the longest completion: enough to see that a generation does not end in time."""

# all given, because a model's own generation settings, such as a repetition penalty, fill the gaps
PLAIN_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}


def decode_references(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[str]:
    """Return the rows' completions, read back from their tokens as generations are: a tokenizer may normalise text."""
    return [_decode(tokenizer, row.input_ids[row.prompt_length :]) for row in rows]


def decode_prompts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[str]:
    """Return the text before each row's completion, without special tokens."""
    return [_decode(tokenizer, row.input_ids[: row.prompt_length]) for row in rows]


def generate_completions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int,
    lockstep: bool = False,
) -> list[str]:
    """Return the greedy continuation of each row's prompt, in the rows' order, without the end of the turn.

    Args:
        lockstep: decode until all workers of a sharded model are done; each must have an equal number of batches.
    """
    bare, device = unwrap(model), get_device(model)
    ends = end_ids(tokenizer, rows)
    limit = max(len(row.input_ids) - row.prompt_length for row in rows) + ROOM
    batch_size = batch_size if supports_left_padding(bare) else 1
    order = sorted(range(len(rows)), key=lambda i: -rows[i].prompt_length)
    texts: dict[int, str] = {}
    with use_evaluation_mode(bare):
        caching = supports_cache(bare)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            sequences = [cut_prompt(rows[i], bare, limit) for i in indices]
            batch = pad_left(sequences, tokenizer.pad_token_id, device)
            generated = bare.generate(
                input_ids=batch.input_ids_BT,
                attention_mask=batch.attention_mask_BT,
                max_new_tokens=limit,
                use_cache=caching,
                eos_token_id=sorted(ends),
                pad_token_id=tokenizer.pad_token_id,
                synced_gpus=lockstep,
                **PLAIN_GREEDY,
            )
            for i, tokens in zip(indices, generated[:, batch.input_ids_BT.shape[1] :].tolist(), strict=True):
                length = next((t for t, token in enumerate(tokens) if token in ends), len(tokens))
                texts[i] = _decode(tokenizer, tokens[:length])
    return [texts[i] for i in range(len(rows))]


def end_ids(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> set[int]:
    """Return the tokens that end a generation: the tokenizer's EOS and the last special token of each completion."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {tokenizer.eos_token_id} - {None}
    for row in rows:
        ends.update([t for t in row.input_ids[row.prompt_length :] if t in special][-1:])
    return ends


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
