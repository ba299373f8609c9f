"""One rank of an evaluation: `python -m tests.evaluation.ranks JOBS`, JOBS a JSON list of arguments of `evaluate`."""

import json
import sys
from pathlib import Path

from ijepa.errors import Failed
from ijepa.evaluation.ranks import joined
from ijepa.evaluation.run import evaluate, evaluate_videos

if __name__ == "__main__":
    with joined():
        for job in json.loads(sys.argv[1]):
            job["output"] = Path(job["output"])
            try:
                evaluate_videos(**job) if "data" in job else evaluate(**job)
            except Failed as error:
                print(error, file=sys.stderr)
