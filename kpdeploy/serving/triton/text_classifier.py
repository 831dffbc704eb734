"""What TorchServe's stock text_classifier does before and after its model, without torchtext: NumPy and a vocabulary.

Copied into a version's folder as handler.py, where it stands alone. The steps, their order and the contractions are
those of TorchServe 0.12 (ts/torch_handler/text_handler.py and contractions.py, Apache-2.0), oddities included: a model
was trained on what they make of a text.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

TAGS = re.compile("<.*?>|&([a-z0-9]+|#[0-9]{1,6}|#x[0-9a-f]{1,6});")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
NGRAMS = 2
_CONTRACTIONS = """
ain't=is not; aren't=are not; can't=cannot; can't've=cannot have; 'cause=because; could've=could have; couldn't=could
not; couldn't've=could not have; didn't=did not; doesn't=does not; don't=do not; hadn't=had not; hadn't've=had not
have; hasn't=has not; haven't=have not; he'd=he would; he'd've=he would have; he'll=he will; he'll've=he he will have;
he's=he is; how'd=how did; how'd'y=how do you; how'll=how will; how's=how is; i'd=i would; i'd've=i would have; i'll=i
will; i'll've=i will have; i'm=i am; i've=i have; isn't=is not; it'd=it would; it'd've=it would have; it'll=it will;
it'll've=it will have; it's=it is; let's=let us; ma'am=madam; mayn't=may not; might've=might have; mightn't=might not;
mightn't've=might not have; must've=must have; mustn't=must not; mustn't've=must not have; needn't=need not;
needn't've=need not have; o'clock=of the clock; oughtn't=ought not; oughtn't've=ought not have; shan't=shall not;
sha'n't=shall not; shan't've=shall not have; she'd=she would; she'd've=she would have; she'll=she will; she'll've=she
will have; she's=she is; should've=should have; shouldn't=should not; shouldn't've=should not have; so've=so have;
so's=so as; that'd=that would; that'd've=that would have; that's=that is; there'd=there would; there'd've=there would
have; there's=there is; they'd=they would; they'd've=they would have; they'll=they will; they'll've=they will have;
they're=they are; they've=they have; to've=to have; wasn't=was not; we'd=we would; we'd've=we would have; we'll=we
will; we'll've=we will have; we're=we are; we've=we have; weren't=were not; what'll=what will; what'll've=what will
have; what're=what are; what's=what is; what've=what have; when's=when is; when've=when have; where'd=where did;
where's=where is; where've=where have; who'll=who will; who'll've=who will have; who's=who is; who've=who have;
why's=why is; why've=why have; will've=will have; won't=will not; won't've=will not have; would've=would have;
wouldn't=would not; wouldn't've=would not have; y'all=you all; y'all'd=you all would; y'all'd've=you all would have;
y'all're=you all are; y'all've=you all have; you'd=you would; you'd've=you would have; you'll=you will; you'll've=you
will have; you're=you are; you've=you have
"""
CONTRACTIONS = dict(entry.split("=") for entry in " ".join(_CONTRACTIONS.split()).split("; "))
# The first that fits is taken: can't of can't've.
_CONTRACTED = re.compile("|".join(CONTRACTIONS))


class Handler:
    """`settings`: labels (by class; may be empty), vocabulary (ids by token), unknown (the id of other tokens, or
    None) and most, how many ids the model takes."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._labels: Sequence[str] = settings["labels"]
        self._vocabulary: Mapping[str, int] = settings["vocabulary"]
        self._unknown: int | None = settings["unknown"]
        self._most: int = settings["most"]

    def prepare(self, body: bytes) -> Array:
        """int64 [tokens]: the ids of a text's words, then of its pairs of words.

        Raises:
            ValueError: it is no text, or not one that the model takes.
        """
        try:
            words = words_of(body.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"the text is not UTF-8: {error}") from None
        ids = [self._id(token) for token in tokens(words)]
        if not 0 < len(ids) <= self._most:
            raise ValueError(f"the text makes {len(ids)} tokens, the model takes 1 to {self._most}")
        return np.array(ids, np.int64)

    def _id(self, token: str) -> int:
        found = self._vocabulary.get(token, self._unknown)
        if found is None:
            raise ValueError(f"{token!r} is not in the vocabulary, which has no id for what it does not know")
        return found

    def answer(self, scores: Array) -> tuple[list[str], Array]:
        """The labels of all classes, in their order, and their probabilities; scores: float32 [classes], after the
        softmax, which is a part of the model."""
        labels = (self._labels[i] if i < len(self._labels) else "" for i in range(len(scores)))
        return [label or str(index) for index, label in enumerate(labels)], scores


def words_of(text: str) -> list[str]:
    text = TAGS.sub("", text).lower()
    text = _CONTRACTED.sub(_expanded, text).replace("'", "")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return text.translate(WITHOUT_PUNCTUATION).lower().split()


def _expanded(match: re.Match[str]) -> str:
    # The first letter stays, whatever the contraction stands for.
    return match[0][0] + CONTRACTIONS[match[0]][1:]


def tokens(words: Sequence[str]) -> Iterator[str]:
    """Every word, then for each n up to NGRAMS every n words that follow one another."""
    for n in range(1, NGRAMS + 1):
        for first in range(len(words) - n + 1):
            yield " ".join(words[first : first + n])
