"""Did the quickstart learn? Ends with exit status 1 unless the held-out loss fell below 80 % of predicting zero."""

import json
import sys
from pathlib import Path

LIMIT = 0.8

rows = [json.loads(line) for line in (Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines()]
heldout = [row for row in rows if "heldout_loss" in row]
first, last = heldout[0], heldout[-1]
ratio = last["heldout_loss"] / last["heldout_zero_loss"]
print(
    f"held-out loss {first['heldout_loss']:.3f} -> {last['heldout_loss']:.3f} after {last['step']} steps: "
    f"{ratio:.0%} of predicting zero (must be below {LIMIT:.0%})"
)
sys.exit(ratio >= LIMIT)
