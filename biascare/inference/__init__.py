"""The door for users: one image, one question, one click.

    model = BiasCareVL.from_pretrained("outputs/demo/stage2/export")
    segmentation = model.segment("scan.png", "liver", points=[(120, 88)])
    segmentation = segmentation.click(140, 60, positive=False)
    answer = model.ask("scan.png", "Is there a pneumothorax?", options=["yes", "no"])

`Segmenter` and `Answerer` are the same seams for batches: training's evaluation and the benchmark
runner use them, so that a number and a click come from one code path.
"""
