"""Operators of ai.onnx that no rule can be right for, or worth having: what is around them stays, and why."""

from __future__ import annotations

_COUNT = "gives as many results as the data say, which is only known when the model runs"
_RANDOM = "draws random numbers: a cut model would draw others, and could not be checked"
_SEQUENCE = "works on a sequence of tensors, which has no axes"
_OPTIONAL = "works on a value that may be missing, which has no axes"
_TEXT = "works on text"
_CLASSES = "sums up a loss over classes, which all count"

WITHOUT: dict[str, str] = {
    "Bernoulli": _RANDOM,
    "ConcatFromSequence": _SEQUENCE,
    "ImageDecoder": "decodes an image",
    "MaxUnpool": "puts entries at places that are counted through all channels",
    "Multinomial": _RANDOM,
    "NegativeLogLikelihoodLoss": _CLASSES,
    "NonMaxSuppression": _COUNT,
    "NonZero": _COUNT,
    "Optional": _OPTIONAL,
    "OptionalGetElement": _OPTIONAL,
    "OptionalHasElement": _OPTIONAL,
    "RandomNormal": _RANDOM,
    "RandomNormalLike": _RANDOM,
    "RandomUniform": _RANDOM,
    "RandomUniformLike": _RANDOM,
    "RegexFullMatch": _TEXT,
    "SequenceAt": _SEQUENCE,
    "SequenceConstruct": _SEQUENCE,
    "SequenceEmpty": _SEQUENCE,
    "SequenceErase": _SEQUENCE,
    "SequenceInsert": _SEQUENCE,
    "SequenceLength": _SEQUENCE,
    "SequenceMap": _SEQUENCE,
    "SoftmaxCrossEntropyLoss": _CLASSES,
    "SplitToSequence": _SEQUENCE,
    "StringConcat": _TEXT,
    "StringNormalizer": _TEXT,
    "StringSplit": _TEXT,
    "TfIdfVectorizer": "counts words of a vocabulary",
    "Unique": _COUNT,
}
"""Operator -> what it does that pins what it touches, as a user reads it."""
