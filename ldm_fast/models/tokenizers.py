"""Tokenizers: a closed vocabulary of words, and BERT's pieces of words.

BERT's tokenizer and CLIP's (see `clip.py`) come with the package transformers, which is imported when they are used.
"""

from __future__ import annotations

import difflib
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAD, UNKNOWN, START = "<pad>", "<unk>", "<start>"
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def split_words(text: str) -> list[str]:
    """Split into lower-case words without accents and single punctuation marks: "Piñata 2!" → ["pinata", "2", "!"].

    Characters that nobody sees (category Cf: zero-width spaces, directions of writing) are dropped.
    """
    if not isinstance(text, str):
        raise TypeError(f"a prompt must be a str, not {type(text).__name__}")
    decomposed = unicodedata.normalize("NFKD", text.replace("’", "'")).casefold()
    plain = "".join(c for c in decomposed if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
    return re.findall(r"[^\W_]+|[^\w\s]", plain)


class WordTokenizer:
    """Words → token ids of a closed vocabulary, padded to max_length.

    A prompt becomes <start> word word … <pad> <pad>. The empty prompt is padding alone: condition dropout trains it as
    "no condition". Ids are positions in `vocabulary`, which starts with the three special entries.
    """

    def __init__(self, vocabulary: Sequence[str], max_length: int = 32):
        if list(vocabulary[:3]) != [PAD, UNKNOWN, START]:
            raise ValueError(f"WordTokenizer: a vocabulary starts with {PAD}, {UNKNOWN}, {START}, not {vocabulary[:3]}")
        if len(set(vocabulary)) != len(vocabulary):
            raise ValueError("WordTokenizer: the vocabulary names a word twice")
        if max_length < 2:
            raise ValueError(f"WordTokenizer: max_length is {max_length}; at least 2 (start and one word) is needed")
        self.vocabulary = tuple(vocabulary)
        self.max_length = max_length
        self._ids = {word: i for i, word in enumerate(self.vocabulary)}

    @classmethod
    def from_captions(cls, captions: Iterable[str], max_length: int = 32) -> WordTokenizer:
        """Return a tokenizer of all words in the captions, sorted: it depends only on the set of captions."""
        words = {word for caption in captions for word in split_words(caption)}
        return cls([PAD, UNKNOWN, START, *sorted(words)], max_length)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def __call__(self, prompts: str | Sequence[str]) -> Tensor:
        """Return ids (B, max_length) int64. Warns (UserWarning) of a prompt that is cut and of unknown words."""
        rows = [self._encode(prompt) for prompt in as_list(prompts)]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.max_length)

    def _encode(self, prompt: str) -> list[int]:
        words = split_words(prompt)
        if len(words) > self.max_length - 1:
            kept = self.max_length - 1
            warnings.warn(
                f"the prompt has {len(words)} words; only the first {kept} are used, {len(words) - kept} are cut off",
                stacklevel=3,
            )
            words = words[:kept]
        unknown = dict.fromkeys(word for word in words if word not in self._ids)
        if unknown:
            named = ", ".join(self._describe_unknown(word) for word in unknown)
            warnings.warn(f"the model does not know {named}", stacklevel=3)
        ids = [self._ids[START]] if words else []
        ids += [self._ids.get(word, self._ids[UNKNOWN]) for word in words]
        return ids + [self._ids[PAD]] * (self.max_length - len(ids))

    def _describe_unknown(self, word: str) -> str:
        shown = word if len(word) <= 40 else word[:40] + "…"
        near = difflib.get_close_matches(word[:40], self.vocabulary[3:], n=1, cutoff=0.6)
        return f"'{shown}' (nearest known word: '{near[0]}')" if near else f"'{shown}'"


class WordPieceTokenizer:
    """BERT's tokenizer (uncased): words and pieces of words → ids of an open vocabulary, padded to max_length.

    A prompt becomes [CLS] piece piece … [SEP] [PAD] …. The empty prompt is [CLS] [SEP] [PAD] …, which means "no
    condition" to LDM's text-to-image models. `vocabulary` holds the pieces in the order of their ids.
    """

    def __init__(self, vocabulary: Sequence[str], max_length: int = 77):
        missing = [token for token in BERT_SPECIALS if token not in vocabulary]
        if missing:
            raise ValueError(f"WordPieceTokenizer: the vocabulary lacks {', '.join(missing)}")
        self.vocabulary = tuple(vocabulary)
        self.max_length = max_length
        with tempfile.TemporaryDirectory() as folder:  # the only way to hand over a vocabulary that all versions have
            Path(folder, "vocab.txt").write_text("".join(f"{token}\n" for token in self.vocabulary), encoding="utf-8")
            self._tokenizer = require_transformers().BertTokenizerFast.from_pretrained(folder)

    @classmethod
    def from_file(cls, path: str | Path, max_length: int = 77) -> WordPieceTokenizer:
        """Read a vocab.txt, one piece a line (for LDM's text-to-image models that of bert-base-uncased)."""
        return cls(Path(path).read_text(encoding="utf-8").splitlines(), max_length)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def __call__(self, prompts: str | Sequence[str]) -> Tensor:
        """Return ids (B, max_length) int64. Warns (UserWarning) of a prompt that is cut."""
        prompts = as_list(prompts)
        warn_of_cut_prompts(self._tokenizer, prompts, self.max_length)
        return padded_ids(self._tokenizer, prompts, self.max_length)


def as_list(prompts: str | Sequence[str]) -> list[str]:
    """Return one prompt or several as a list. TypeError if one is not a str."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"a prompt must be a str, not {type(prompt).__name__}")
    return prompts


def padded_ids(tokenizer: Any, prompts: list[str], max_length: int) -> Tensor:
    """Return what transformers' `tokenizer` makes of the prompts, cut and padded to (B, max_length) int64."""
    made = tokenizer(
        _without_surrogates(prompts), padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
    )
    ids: Tensor = made.input_ids
    return ids


def _without_surrogates(prompts: list[str]) -> list[str]:
    """Return prompts that are Unicode: what a command line gives for bytes that are not UTF-8 becomes U+FFFD."""
    return [re.sub("[\ud800-\udfff]", "\ufffd", prompt) for prompt in prompts]


def warn_of_cut_prompts(tokenizer: Any, prompts: list[str], max_length: int) -> None:
    """Warn (UserWarning) of every prompt that transformers' `tokenizer` cuts at max_length, and of what is lost."""
    for tokens in tokenizer(_without_surrogates(prompts), verbose=False).input_ids:
        if len(tokens) > max_length:
            lost = tokenizer.decode(tokens[max_length - 1 : -1]).strip()
            warnings.warn(
                f"the prompt is {len(tokens)} tokens long; only {max_length} are used, cut off: '{lost}'", stacklevel=3
            )


def require_transformers() -> Any:
    """Return the package transformers. ImportError, with how to get it, if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError('text encoders need the package transformers: pip install "ldm_fast[diffusers]"') from error
    return transformers
