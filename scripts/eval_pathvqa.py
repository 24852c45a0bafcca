"""PathVQA: closed and open questions about pathology; the official test split of 6,719 questions.

    python scripts/eval_pathvqa.py outputs/stage2/export --data prepared --output outputs/eval

The folder after --data is what data_prep programs wrote to. Under `deepspeed` in place of python,
ranks divide the work; the same command goes on where it was interrupted. docs/evaluation.md defines
every number.
"""

from __future__ import annotations

from biascare.runs.evaluation_door import evaluate

if __name__ == "__main__":
    evaluate(__doc__, benchmark="pathvqa")
