"""The record on disk: one image with everything known about it; and in one import what converters
and readers need.

    records = Records(folder)
    row = records[0]
    mask = decode_mask(row["targets"][0]["rle"], row["height"], row["width"])

One folder holds one dataset and one split: Arrow files in the layout of
`datasets.Dataset.save_to_disk` (`datasets.load_from_disk(folder)` opens it), `manifest.json`, and
two .npy files that list the units of the training stream. One row is one image (`record.py`); a row
is read by touching its own pages only (`reader.py`). The trade-off: a row cannot be changed in
place, a folder is written again as a whole (`writer.py`).
"""

from biascare.records.masks import decode_mask, encode_mask, mask_runs
from biascare.records.reader import Records, read_manifest
from biascare.records.record import (
    FEATURES,
    KINDS,
    MAX_AGE,
    MAX_IMAGE_PIXELS,
    MAX_OPTIONS,
    ROLES,
    SEXES,
    Record,
    Turn,
    check_row,
    checksum_of,
    image_size,
    question_problems,
    row_digest,
)
from biascare.records.writer import (
    FORMAT_VERSION,
    LANGUAGE_UNITS,
    MANIFEST,
    SEGMENTATION_UNITS,
    Part,
    PartWriter,
    RecordWriter,
    assemble,
    read_part,
    scratch_folder,
)

__all__ = [
    "FEATURES",
    "FORMAT_VERSION",
    "KINDS",
    "LANGUAGE_UNITS",
    "MANIFEST",
    "MAX_AGE",
    "MAX_IMAGE_PIXELS",
    "MAX_OPTIONS",
    "ROLES",
    "SEGMENTATION_UNITS",
    "SEXES",
    "Part",
    "PartWriter",
    "Record",
    "RecordWriter",
    "Records",
    "Turn",
    "assemble",
    "check_row",
    "checksum_of",
    "decode_mask",
    "encode_mask",
    "image_size",
    "mask_runs",
    "question_problems",
    "read_manifest",
    "read_part",
    "row_digest",
    "scratch_folder",
]
