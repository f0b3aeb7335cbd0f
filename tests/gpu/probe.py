"""Asks phalanx-probe: inputs and cases go into a folder, outputs come out of it."""

import json
import os
import subprocess
from pathlib import Path

from safetensors.torch import load_file, save_file

SUITE = Path(__file__).resolve().parent


class Checks:
    """What was compared, and what was not as it should be."""

    def __init__(self):
        self.failures, self.rows = [], []

    def within(self, name, error, bound, unit=""):
        """Notes that a largest error is at most a bound; NaN never is."""
        ok = bool(error <= bound)
        self.rows.append({"name": name, "error": float(error), "bound": float(bound), "ok": ok})
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {float(error):.3e}, bound {float(bound):.3e}{unit}", flush=True)
        if not ok:
            self.failures.append(name)

    def equal(self, name, found, expected):
        """Notes that two tensors are the same bits."""
        same = found.shape == expected.shape and bool((found.cpu().contiguous().view(-1) == expected.cpu().contiguous().view(-1)).all())
        self.within(name, 0.0 if same else 1.0, 0.0, " (equal bits)")

    def end(self, result, figures=None):
        """Writes the result for the summary; the exit status."""
        Path(result).write_text(json.dumps({"checks": self.rows, "figures": figures or {}}, indent=1))
        print(f"{len(self.rows) - len(self.failures)} of {len(self.rows)} as they should be")
        return 1 if self.failures else 0


def put(folder, cases, inputs):
    """Writes what the probe reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    save_file({name: tensor.contiguous().cpu() for name, tensor in inputs.items()}, folder / "inputs.safetensors")


def ask(kind, folder, cases, inputs):
    """Outputs of `phalanx-probe KIND`, by name, on the CPU."""
    put(folder, cases, inputs)
    program = os.environ.get("PHALANX_PROBE", str(SUITE / "phalanx-probe"))
    # Ranks that share a GPU need a hardware queue each.
    subprocess.run([program, kind, str(folder)], check=True, env={"CUDA_DEVICE_MAX_CONNECTIONS": "32", **os.environ})
    return load_file(Path(folder) / "outputs.safetensors")
