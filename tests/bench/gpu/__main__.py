"""`python -m tests.bench.gpu`: every shipped recipe on one GPU, without data, in at most ten minutes; with `--crops`
one of them on real crops, too.

For each recipe: a step's rate, time by part, launches, waits and peak memory, with torch.compile and without, beside
the datasheet, a large matrix product, the calculated peak and the published step; the first three float32 losses beside
the CPU's; one step in bf16 and one in fp16; a checkpoint, and the step after it done again from it. What the time is
given to is planned ahead; what it is too short for is left out, and said. On real crops: a short pre-training through
loader, views and step, its rate and what it waits for data, and zero-shot scores on other crops before and after. Exit
code 1 where a check fails, 2 where nothing can be tried.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.bench.gpu.crops import Request

NEEDED = ("torch", "torchvision", "timm", "pydantic")


def main() -> int:
    """Exit code."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return _refused(f"not installed: {', '.join(missing)}", "pip install torch timm pydantic")
    import torch

    if not torch.cuda.is_available():
        hint = "run it where nvidia-smi lists one, with a PyTorch for CUDA and for its driver"
        return _refused(f"PyTorch {torch.__version__} sees no GPU", hint)
    from datapipe.core.errors import UserError
    from tests.bench.gpu.run import tried
    from tests.bench.gpu.settings import file_of, recipes

    arguments = _arguments(recipes())
    if absent := [one for one in arguments.recipes or () if not file_of(one).is_file()]:
        return _refused(f"no such recipe: {', '.join(absent)}", f"a file, or one of {', '.join(recipes())}")
    torch.set_num_threads(arguments.threads)
    try:
        chosen = arguments.recipes or recipes()
        report = tried(chosen, arguments.kinds, minutes=arguments.minutes, tiny=arguments.tiny, out=arguments.out,
                       request=_request(arguments))  # fmt: skip
    except UserError as error:
        return _refused(f"{error.what}: {error.where}", error.hint)
    except KeyboardInterrupt:
        print(f"interrupted; what was found until then is in {arguments.out}", file=sys.stderr)
        return 130
    print(f"\n{report}\n\nwritten to {arguments.out}")
    return 1 if report.failed else 0


def _refused(what: str, hint: str) -> int:
    print(f"error: {what}\n  try: {hint}", file=sys.stderr)
    return 2


def _request(arguments: argparse.Namespace) -> "Request | None":
    from tests.bench.gpu.crops import RECIPE, Request, recipe_of

    if not arguments.crops:
        return None
    recipe = recipe_of(arguments.recipes) if arguments.recipes else RECIPE
    return Request(arguments.crops, arguments.scored, recipe, arguments.crops_seconds, arguments.crops_steps)


def _arguments(known: list[str]) -> argparse.Namespace:
    from tests.bench.gpu.plan import KINDS

    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help=f"files, or some of {', '.join(known)}")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is asked (default: all)")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all of it (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"), help="JSON file (default %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    parser.add_argument("--tiny", action="store_true", help="narrow models on small images: tries the bench itself")
    parser.add_argument("--crops", metavar="FOLDER", default="", help="real crops for a short pre-training of the "
                        "first recipe named that learns without labels (default: pass_vits); of a set in the layout of "
                        "Market-1501 its bounding_box_train")  # fmt: skip
    parser.add_argument("--scored", metavar="FOLDER", default="", help="labelled set to score on (default: --crops)")
    parser.add_argument("--crops-seconds", type=float, default=90.0, help="of its steps (default %(default)s)")
    parser.add_argument("--crops-steps", type=int, default=0, help="number of its steps, in place of seconds")
    arguments = parser.parse_args()
    if not arguments.minutes > 0 or arguments.threads < 1:
        parser.error("--minutes and --threads must be positive")
    if not arguments.crops_seconds > 0 or arguments.crops_steps < 0:
        parser.error("--crops-seconds must be positive, --crops-steps not negative")
    if arguments.scored and not arguments.crops:
        parser.error("--scored needs --crops: what is trained on")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
