"""Ask a question about an image; with options, say how likely each of them is.

    python examples/ask.py outputs/demo/stage2/export scan.png \\
        --question "Is there a pneumothorax?" --options yes no
"""

import argparse

from biascare import BiasCareVL

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="exported folder")
parser.add_argument("image")
parser.add_argument("--question", required=True)
parser.add_argument("--options", nargs="+", help="what the answer is chosen from")
options = parser.parse_args()

model = BiasCareVL.from_pretrained(options.model)
answer = model.ask(options.image, options.question, options=options.options)
print(f"{answer.text} (confidence {answer.confidence:.2f})")
for option, probability in answer.probabilities.items():
    print(f"  {option}: {probability:.2f}")
