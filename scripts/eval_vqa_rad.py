"""VQA-RAD: closed and open questions about radiology images; official test split.

    python scripts/eval_vqa_rad.py outputs/stage2/export --data prepared --output outputs/eval

The folder after --data is what data_prep programs wrote to. Under `deepspeed` in place of python,
ranks divide the work; the same command goes on where it was interrupted. docs/evaluation.md defines
every number.
"""

from __future__ import annotations

from biascare.runs.evaluation_door import evaluate

if __name__ == "__main__":
    evaluate(__doc__, benchmark="vqa_rad")
