"""The teacher: a linear classifier on words and letters that gives the probability of each class for a text.

With a few thousand labelled pieces, such a classifier generalises better than a small language model. Fitted to the
same training text, it labels prompts without a label: unlabelled text, text cut anywhere, or joined pieces. A proxy
model that learns from its probabilities sees far more text than the labelled pieces (distillation, Hinton et al.,
2015). Reads training text only.

Shapes: N texts, L classes in the order of `corpus.classes`.
"""

import functools
from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline, make_union

from lib.models.tasks import corpus

SHORTEST, LONGEST = 130, 560  # characters of the texts that it is fitted to


@functools.cache
def fitted(part: str) -> Pipeline:
    """Return the classifier of corpus `part`, fitted to the training pieces of its classes; takes about ten seconds."""
    texts, labels = [], []
    for document in corpus.documents(part):
        for piece in document.pieces if document.label is not None else ():
            cuts = [piece[at : at + LONGEST] for at in range(0, len(piece), LONGEST - 60)]
            cuts = [corpus.masked(text, part) for text in cuts if len(text) > SHORTEST]
            texts += cuts
            labels += [document.label] * len(cuts)
    words = TfidfVectorizer(token_pattern=r"\w+", ngram_range=(1, 2), sublinear_tf=True)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, min_df=2)
    classifier = LogisticRegression(C=30.0, class_weight="balanced", max_iter=200)
    return make_pipeline(make_union(words, letters), classifier).fit(texts, labels)


def probabilities(part: str, texts: Sequence[str]) -> np.ndarray:
    """Return the probability of each class for each text of corpus `part`, [N, L]. Class names in texts are masked."""
    return fitted(part).predict_proba([corpus.masked(text, part) for text in texts])
