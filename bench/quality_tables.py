"""Tables of what pruning leaves of a model: by recipe, jointly rounded, after gradients, mixed."""

from __future__ import annotations

import functools
from collections.abc import Callable

from bench.bounds import RESULTS

Rows = Callable[[str], list[dict[str, str]]]
Table = Callable[[list[str], list[list[str]]], str]


def quality(rows: Rows, table: Table) -> str:
    """Perplexity and KLD of recipes without gradients, and with them: half of the weights."""
    names = {
        "magnitude": "magnitude",
        "wanda": "Wanda",
        "wanda, research code": "Wanda, research code",
        "sparsegpt": "SparseGPT",
        "sparsegpt, research code": "SparseGPT, research code",
        "sparsegpt, refitted": "SparseGPT, refitted",
        "ria, permuted, refitted": "RIA, permuted, refitted",
        "admm": "ADMM",
    }
    measured = rows("quality_c4.csv")
    found = [row for row in measured if " 128x512 " in row["calibration"]]
    dense = next(row for row in measured if row["method"] == "dense")
    body = [["dense", "–", f"{float(dense['perplexity']):.1f}", "0"]]
    for pattern in ("unstructured", "8:16", "4:8", "2:4"):
        for row in found:
            half = row["sparsity"].startswith("0.5") and row["pattern"] == pattern
            if half and row["method"] in names:
                perplexity, kld = f"{float(row['perplexity']):.1f}", f"{float(row['kld']):.2f}"
                ours = "research code" not in row["method"]
                wide = (
                    ", passes in float32" if ours and "bfloat16" not in row["calibration"] else ""
                )
                body.append([names[row["method"]] + wide, pattern, perplexity, kld])
    for row in rows("recovery.csv"):
        method, _, then = row["case"].partition(", ")
        base, pattern = method.split(" ", 1)
        if then and base in names:
            kind = "unstructured" if "%" in pattern else pattern
            kld, name = f"{float(row['kl']):.2f}", f"{names[base]}, {then}"
            body.append([name, kind, f"{float(row['perplexity']):.1f}", kld])
    return table(["method", "pattern", "perplexity", "KLD"], body)


def recipes(rows: Rows, table: Table) -> str:
    """Everything that `bench_quality` measured, with what it cost."""
    forms = {"sparsity": "{:.0%}", "perplexity": "{:.1f}", "kld": "{:.3f}"}
    costs = {"seconds": "{:.0f} s", "processor_s": "{:.0f} s", "added_mb": "{:.0f} MB"}
    body, forms, measured = [], forms | costs, rows("quality_c4.csv")
    for row in measured:
        numbers = [form.format(float(row[k])) if row[k] else "–" for k, form in forms.items()]
        how = row["calibration"].partition(" ")[2].replace("x", " × ")
        name = row["method"].replace("owl 10 0.2", "owl (M 10, λ 0.2)")
        body.append([name, row["pattern"] or "–", numbers[0], how, *numbers[1:]])
    head = ["method", "pattern", "zeros", "calibrated on", "perplexity", "KLD"]
    head += ["elapsed", "processor", "memory"]
    return "\n".join([table(head, body), "", *_owl(measured)])


def _owl(measured: list[dict[str, str]]) -> list[str]:
    """What OWL leaves of the perplexity that layers pruned alike have, at 70 %."""
    left = {r["method"]: float(r["perplexity"]) for r in measured if r["sparsity"][:3] != "0.5"}
    return [
        f"- {name} at 70 % with OWL: {left[f'{method}, owl'] / left[method]:.2f} times the "
        f"perplexity without it; with M = 10 and λ = 0.2, "
        f"{left[f'{method}, owl 10 0.2'] / left[method]:.2f} times."
        for method, name in (("wanda", "Wanda"), ("admm", "ADMM"))
    ]


def joint_rounding(rows: Rows, table: Table) -> str:
    """KLD of 2:4 with 16-, 8- and 4-bit values, mask, integers and scales chosen together."""
    held = {
        "admm": "16 bits",
        "admm, 8 bits": "8 bits, a scale for a row",
        "admm, 4 bits": "4 bits, a scale for 128 columns",
    }
    found = {row["method"]: row for row in rows("quality_c4.csv") if row["pattern"] == "2:4"}
    exact = float(found["admm"]["kld"])
    body = []
    for method, name in held.items():
        perplexity, kld = (float(found[method][number]) for number in ("perplexity", "kld"))
        body.append([name, f"{perplexity:.1f}", f"{kld:.3f}", f"{kld / exact:.2f}×"])
    return table(["values", "perplexity", "KLD", "of 16 bits"], body)


def recovery(rows: Rows, table: Table) -> str:
    """What reconstruction and recovery give back, with cost, on two texts."""
    found = rows("recovery.csv")
    forms = {"kl": "{:.3f}", "perplexity": "{:.1f}"}
    forms |= {f"prose_{name}": form for name, form in list(forms.items())}
    own, prose = (f"{float(found[0][f'dense_{of}perplexity']):.1f}" for of in ("", "prose_"))
    body = [["dense", "0", own, "0", prose, "", ""]]
    for row in found:
        cost = f"{float(row['processor_s']) / 60:.1f} min", f"{float(row['peak_mb']) / 1000:.1f} GB"
        numbers = [form.format(float(row[name])) for name, form in forms.items()]
        body.append([row["case"], *numbers, *cost])
    head = ["case", "KLD", "perplexity", "KLD, prose", "perplexity, prose", "processor", "peak"]
    by_case = {row["case"]: row for row in found}
    notes = []
    for name, row in by_case.items():
        start = by_case.get(name.rpartition(", ")[0])
        if start is None:
            continue
        before, after = float(start["prose_kl"]), float(row["prose_kl"])
        verdict = "nearer to the dense model" if after < before else "it overfits: farther"
        notes.append(
            f"- {name}: on the prose, {verdict} than its start (KLD {before:.3f} → {after:.3f})."
        )
    return "\n".join([table(head, body), *([""] if notes else []), *notes])


def searched(rows: Rows, table: Table) -> str:
    """Each choice for all sublayers beside the mix that errs least of those no larger."""
    if not (RESULTS / "cpu" / "search.csv").is_file():
        return "Not measured on this version yet."
    found = rows("search.csv")
    dense = max(int(row["bytes"]) for row in found)

    def cells(row: dict[str, str]) -> list[str]:
        kls = (f"{float(row[name]):.3f}" for name in ("kl", "kl_held_out"))
        return [f"{int(row['bytes']) / dense:.1%}", *kls]

    body, notes = [], []
    for row in reversed(found):
        if not row["name"].startswith("all ") and row["name"] != "found":
            continue
        no_larger = [other for other in found if int(other["bytes"]) <= int(row["bytes"])]
        rival = min(no_larger, key=lambda other: float(other["kl"]))
        label = row["name"]
        if label == "found":
            uniform = [other for other in no_larger if other["name"].startswith("all ")]
            rival, row = row, min(uniform, key=lambda other: float(other["kl"]))
            label = f"{row['name']}, the best within the budget"
        mixed = ["itself", "", ""] if rival is row else cells(rival)
        body.append([label, *cells(row), *mixed])
        if rival is not row:
            less = 1 - float(rival["kl_held_out"]) / float(row["kl_held_out"])
            verdict = f"{less:.0%} less" if less > 0 else f"{-less:.0%} more"
            at = f"{int(rival['bytes']) / dense:.1%} of the bytes"
            notes.append(
                f"- {row['name']} beside a mix at {at}: {verdict} KL on the text held out."
            )
    facts = found[0]
    windows, context = facts["windows"].split("x")
    generations, offspring = facts["generations"].split("x")
    notes.append(
        f"- {facts['searched_windows']} of {windows} windows of {context} tokens are searched on, "
        f"the others held out; {generations} generations of {offspring} mixes; "
        f"{float(facts['processor_s']) / 60:.1f} minutes of one core."
    )
    head = ["all sublayers alike", "bytes", "KL", "KL held out"]
    head += ["mix that is no larger: bytes", "KL", "KL held out"]
    return "\n".join([table(head, body), "", *notes])


def blocks(rows: Rows, table: Table) -> dict[str, Callable[[], str]]:
    """The measured blocks by name.

    Args:
        rows: Reads a file of results.
        table: Draws a table from its head and its lines.
    """
    drawn = (quality, recipes, joint_rounding, recovery, searched)
    return {each.__name__: functools.partial(each, rows, table) for each in drawn}
