"""The results of measurements, as files and as text."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmprune.measurement.monitor import UtilisationWatch
from llmprune.utils.files import write_json, write_text


def save(results: dict[str, Any], watch: UtilisationWatch, out: Path) -> None:
    """Write the results as CSV, the device's utilisation (if it is reported), and speed.json."""
    as_table, utilisation = files_beside(out)
    write_text(as_table, as_csv(rows(results)))
    if watch.samples:
        write_text(utilisation, as_csv([vars(sample) for sample in watch.samples]))
    write_json(out, results)  # last: a job that was stopped before it measures again


def files_beside(out: Path) -> tuple[Path, Path]:
    """The paths of the CSV files: of the results, and of the device's utilisation."""
    return out.with_suffix(".csv"), out.with_suffix(".utilisation.csv")


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row for each model and setting."""
    return [
        {
            "model": name,
            "kind": kind,
            **{k: v for k, v in entry.items() if not isinstance(v, dict)},
            **{
                f"{k}_{part}": v
                for k, values in entry.items()
                if isinstance(values, dict)
                for part, v in values.items()
            },
        }
        for name, found in results["models"].items()
        for kind in ("prefill", "generation")
        for entry in found[kind]
    ]


def as_csv(lines: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV; rows may have different columns."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def speed_table(results: dict[str, Any]) -> str:
    """The results as text."""
    lines = [f"{results['device']}, {results['dtype']}; {results['repeats']} runs after {results['warmups']} warm-ups"]
    for name, found in results["models"].items():
        operations = found["macs_per_token"]
        lines.append(
            f"\n{name}: {found['parameters']:,} parameters ({found['parameters_without_embeddings']:,} without "
            "embeddings)" + (f", {operations:,} MACs per token" if operations else "")
        )
        for kind in ("prefill", "generation"):
            for entry in found[kind]:
                shape = f"  {kind:11} batch {entry['batch']:<4} {entry['prompt_tokens']} tokens"
                shape += f" → {entry['output_tokens']}" if "output_tokens" in entry else ""
                shape += "" if entry.get("cached", True) else " uncached"
                if "latency_s" not in entry:
                    lines.append(f"{shape:45} out of memory")
                    continue
                latency = entry["latency_s"]
                text = f"{latency['mean'] * 1e3:9.2f} ± {latency['std'] * 1e3:.2f} ms"
                text += f" {entry['tokens_per_s']:10.1f} tokens/s {entry['peak_memory_bytes'] / 1e6:8.1f} MB"
                if "speedup" in entry:
                    speedup = entry["speedup"]
                    text += f"  {speedup['p50']:.2f}× ({speedup['p10']:.2f}–{speedup['p90']:.2f})"
                lines.append(f"{shape:45} {text}")
    return "\n".join(lines)
