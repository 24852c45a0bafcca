"""CXR-LT 2024 task 2: 26 findings of chest X-rays, most of them rare; 406 images read by hand.

    python scripts/eval_cxr_lt.py outputs/stage2/export --data prepared --output outputs/eval

The folder after --data is what data_prep programs wrote to. Under `deepspeed` in place of python,
ranks divide the work; the same command goes on where it was interrupted. docs/evaluation.md defines
every number.
"""

from __future__ import annotations

from biascare.runs.evaluation_door import evaluate

if __name__ == "__main__":
    evaluate(__doc__, benchmark="cxr_lt")
