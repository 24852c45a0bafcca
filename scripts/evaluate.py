"""Evaluate a model on held-out records: finished cases, a summary, a table, a contact sheet.

    python scripts/evaluate.py outputs/demo/stage2/export \\
        --segmentation outputs/demo/data/test --language outputs/demo/data/test \\
        --output outputs/evaluation

    python scripts/evaluate.py weights/lite_medsam.pth --vision litemedsam --prompt box \\
        --segmentation outputs/data/pack/btcv/test --output outputs/litemedsam

    python scripts/evaluate.py outputs/stage2/export --suite vqa_rad,pathvqa --data prepared \\
        --output outputs/suite

The second form takes foreign vision weights as they are; the third runs benchmarks, each as
its own program does, and loads the model once. Writes cases.jsonl, metrics.json and
contact_sheet.png to the output folder (of a suite, to a folder per benchmark); numbers can be
computed again from cases.jsonl without the model. The same command goes on where it was
interrupted; `deepspeed scripts/evaluate.py` divides the work among ranks.
"""

from __future__ import annotations

from biascare.runs.evaluation_door import evaluate


def main() -> None:
    evaluate(__doc__)


if __name__ == "__main__":
    main()
