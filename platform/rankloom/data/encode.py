"""Texts to token ids, the same way for training and for serving."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class Encoder:
    """A tokenizer's way with texts that begin a row and with texts that follow others."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        tokenizer("a")  # takes off what a tokenizer.json may have set: truncation, padding
        first = tokenizer.convert_ids_to_tokens(self.encode(["a"])[0][:1])
        self._adds_space = first[0].startswith(("▁", "Ġ"))
        bos = tokenizer.bos_token_id
        self.bos: list[int] = [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []
        """The token that this tokenizer puts before every text, if it does."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts that begin a row."""
        if not texts:
            return []
        if self._tokenizer.is_fast:
            # without offsets, which take longer than all else; other threads run meanwhile, as with `encode` they don't
            backend = self._tokenizer.backend_tokenizer
            return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
        ids: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return ids

    def encode_rest(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts that follow others, tokenised apart from them."""
        if not self._adds_space:
            return self.encode(texts)
        # this tokenizer puts a space before any text, which would not be there amid a row: a line break takes its place
        (anchor,) = self.encode(["\n"])
        after_anchor = self.encode([f"\n{text}" for text in texts])
        return [
            ids[len(anchor) :] if ids[: len(anchor)] == anchor else self.encode([text])[0]
            for ids, text in zip(after_anchor, texts, strict=True)
        ]
