"""Generated reports to numbers: word overlap by its standard programs, and clinical findings.

    scores = report_scores(predictions, references)
    scores["bleu1"], scores["bleu1_signature"], scores["rouge1"], scores["clinical_f1"]["macro"]

The same pairs score .39 to .76 by four conventions of BLEU-1, so each number has the signature or
the name of its own. Word overlap does not see a denial; only the findings do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics.bleu import BLEU

from biascare.evaluation.metrics.answers import words
from biascare.evaluation.metrics.findings import clinical_f1


def bleu1(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """(corpus BLEU of single words in [0, 1], signature) by sacrebleu; case is folded."""
    metric = BLEU(max_ngram_order=1, lowercase=True)
    score = metric.corpus_score(list(predictions), [list(references)]).score / 100
    return float(score), str(metric.get_signature())


def bleu1_no_bp(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over reports of the share of the prediction's words that the reference has, each as
    often: without a penalty for brevity, so that one right word scores 1. For comparison with
    numbers published under the name of BLEU-1 alone."""
    return _mean(
        (Counter(words(said)) & Counter(words(wanted))).total() / len(words(said))
        if words(said)
        else 0.0
        for said, wanted in zip(predictions, references, strict=True)
    )


def rouge1_each(
    predictions: Sequence[str], references: Sequence[str], *, stemmer: bool = False
) -> list[float]:
    """F1 of single words of every report by rouge-score, in [0, 1]."""
    # Here, because it loads NLTK: every evaluation would wait for it, and few have reports.
    from rouge_score.rouge_scorer import (  # type: ignore[import-untyped, unused-ignore]
        RougeScorer,
    )

    scorer = RougeScorer(["rouge1"], use_stemmer=stemmer)
    pairs = zip(predictions, references, strict=True)
    return [float(scorer.score(wanted, said)["rouge1"].fmeasure) for said, wanted in pairs]


def rouge1(
    predictions: Sequence[str], references: Sequence[str], *, stemmer: bool = False
) -> float:
    """Mean over reports of `rouge1_each`."""
    return _mean(rouge1_each(predictions, references, stemmer=stemmer))


def report_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """All of them; None where there is no report."""
    if not references:
        return {"num": 0}
    score, signature = bleu1(predictions, references)
    return {
        "num": len(references),
        "num_empty": sum(not said.strip() for said in predictions),
        "bleu1": score,
        "bleu1_signature": signature,
        "bleu1_no_bp": bleu1_no_bp(predictions, references),
        "rouge1": rouge1(predictions, references),
        "rouge1_stemmed": rouge1(predictions, references, stemmer=True),
        "clinical_f1": clinical_f1(predictions, references),
    }


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found) if found else float("nan")
