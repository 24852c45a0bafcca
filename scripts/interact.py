"""Click into images, look at the masks, correct them: a page in the browser.

    python scripts/interact.py outputs/demo/stage2/export outputs/demo/data/test
    python scripts/interact.py EXPORT scan.png --target liver
    python scripts/interact.py EXPORT --clicks clicks.json --output masks
    python scripts/interact.py EXPORT scan.png --replay outputs/interact/audit.jsonl

The queue begins with the case that the model is least sure of. Every prompt and decision is noted
in an audit log, which --replay does again and compares. docs/interact.md says more. Needs the extra
[ui]: pip install -c constraints.txt -e '.[ui]'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from biascare.runs.process import prepare_process


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="exported folder")
    parser.add_argument("inputs", nargs="*", help="PNG, JPEG or TIFF files, or record folders")
    parser.add_argument("--target", help="the structure in words, for all images")
    parser.add_argument("--modality", help="as records name it: ct, mri, ...")
    parser.add_argument("--mllm", help="where the base image-text model lies now")
    parser.add_argument("--order", choices=("uncertainty", "given"), default="uncertainty")
    parser.add_argument("--limit", type=int, default=200, help="most cases in the queue")
    parser.add_argument("--host", default="127.0.0.1", help="another one makes a token necessary")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--allow-host", nargs="*", default=[], help="names this machine is asked by"
    )
    parser.add_argument("--log", type=Path, default=Path("outputs/interact/audit.jsonl"))
    parser.add_argument("--clicks", type=Path, help="prompts in a JSON file; no server is started")
    parser.add_argument("--output", type=Path, default=Path("outputs/interact/masks"))
    parser.add_argument("--replay", type=Path, help="an audit log to do again with the inputs")
    options = parser.parse_intermixed_args(arguments)
    if options.clicks and (options.inputs or options.replay):
        parser.error("--clicks names its images itself and is not --replay; give it alone")
    if options.limit < 1:
        parser.error("--limit must be at least 1")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    try:
        prepare_process()
        from biascare.runs.interact import InteractRequest, masks_of_clicks, replay_log, serve

        request = InteractRequest(**vars(options))
        if options.clicks:
            made = masks_of_clicks(request)
            print(f"{len(made)} masks are in {request.output}, their log is {request.log}")
        elif options.replay:
            said, is_same = replay_log(request)
            print("\n".join(said))
            sys.exit(0 if is_same else 1)
        else:
            serve(request)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
