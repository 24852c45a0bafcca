"""Segment a structure by a click, correct the mask by a second one, save it.

    python examples/click.py outputs/demo/stage2/export scan.png --target liver \\
        --at 120 88 --not-at 60 40 --output mask.png
"""

import argparse

from PIL import Image

from biascare import BiasCareVL

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="exported folder")
parser.add_argument("image")
parser.add_argument("--target", help="the structure in words")
parser.add_argument("--at", type=float, nargs=2, required=True, metavar=("X", "Y"))
parser.add_argument("--not-at", type=float, nargs=2, metavar=("X", "Y"), help="a correction")
parser.add_argument("--output", default="mask.png")
options = parser.parse_args()

model = BiasCareVL.from_pretrained(options.model)
found = model.segment(options.image, options.target, points=[options.at])
if options.not_at:
    found = found.click(*options.not_at, positive=False)
print(f"{found.mask.sum()} pixels, expected Dice {found.predicted_dice:.2f}")
print(f"uncertainty {found.uncertainty:.2f} (the higher, the sooner an expert should look)")
Image.fromarray(found.mask).save(options.output)
