"""ISIC 2018 task 3: seven diagnoses of skin lesions; the official test split of 1,512 images.

    python scripts/eval_isic2018.py outputs/stage2/export --data prepared --output outputs/eval

The folder after --data is what data_prep programs wrote to. Under `deepspeed` in place of python,
ranks divide the work; the same command goes on where it was interrupted. docs/evaluation.md defines
every number.
"""

from __future__ import annotations

from biascare.runs.evaluation_door import evaluate

if __name__ == "__main__":
    evaluate(__doc__, benchmark="isic2018")
