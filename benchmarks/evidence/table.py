"""The record of an evidence folder as a page of Markdown."""

from collections import Counter
from typing import Any

from ..tables import device_report
from .machine import in_words
from .parts import BAD

MOST_FAILURES = 30
REASON_LINES = 25


def page(content: dict[str, Any]) -> str:
    """All parts in a table, then what failed, then the tables of the benchmarks."""
    sections = [_head(content), _mixed_sources(content), _parts_table(content["parts"])]
    sections += [_findings(content), _failures(content["tests"])]
    if any(line.get("outcome") == "measured" for line in content["benchmarks"]):
        sections.append("## Benchmarks\n\n" + device_report(content["benchmarks"]))
    return "\n\n".join(filter(None, sections))


def _head(content: dict[str, Any]) -> str:
    about = content["environment"]
    title = "# Evidence" + (" of a dry run: nothing here was measured on a GPU" if content["dry_run"] else "")
    if not about:
        return title
    lines = [
        f"{about.get('device')}, torch {about.get('torch')}, triton {about.get('triton')}, CUDA {about.get('cuda')}, "
        f"driver {about.get('driver', 'none')}, Python {about.get('python')}; {about.get('time')}",
        f"Commit {about.get('commit') or 'not known'}, sources {about.get('sources')}.",
    ]
    if about.get("changed_files"):
        lines.append("Files were changed since the commit.")
    return "\n\n".join([title, *lines])


def _mixed_sources(content: dict[str, Any]) -> str:
    """What was found on which sources, where these are not the same for all that passed or was measured."""
    found: dict[str, Counter[str]] = {}
    for line in content["tests"]:
        if line["outcome"] == "passed":
            found.setdefault(line.get("sources") or "not known", Counter())[line["part"]] += 1
    for line in content["benchmarks"]:
        if line.get("outcome") == "measured":
            found.setdefault(line.get("sources") or "not known", Counter())["measured"] += 1
    if len(found) < 2:
        return ""
    rows = [
        f"- {name}: " + ", ".join(f"{number} {what}" for what, number in counts.items())
        for name, counts in found.items()
    ]
    head = (
        "**What passed or was measured did so on different sources**; `--again PART` repeats a part on those at hand:"
    )
    return "\n".join([head, "", *rows])


def _parts_table(parts: dict[str, dict[str, Any]]) -> str:
    rows = [
        "| part | what | outcome | counts | seconds | GPU before | GPU after |",
        "| --- | --- | --- | --- | ---: | --- | --- |",
    ]
    for name, entry in parts.items():
        counts = ", ".join(f"{number} {what}" for what, number in entry.get("counts", {}).items())
        outcome = entry["outcome"] + ("" if entry["is_complete"] else ", to be continued")
        rows.append(
            f"| {name} | {entry['title']} | {outcome} | {counts or '-'} | {entry['seconds']:.0f} "
            f"| {in_words(entry.get('gpu_before'))} | {in_words(entry.get('gpu_after'))} |"
        )
    return "\n".join(rows)


def _findings(content: dict[str, Any]) -> str:
    """Why parts are not done, beyond the number of their failed tests."""
    lines = []
    for name, entry in content["parts"].items():
        reason = entry.get("reason")
        if reason and "\n" in reason:
            lines.append(f"{name}:\n\n```\n{reason}\n```")
        elif reason:
            lines.append(f"{name}: {reason}")
    return "## What is not done\n\n" + "\n\n".join(lines) if lines else ""


def _failures(tests: list[dict[str, Any]]) -> str:
    failed = [line for line in tests if line["outcome"] in BAD]
    if not failed:
        return ""
    shown = []
    for line in failed[:MOST_FAILURES]:
        reason = "\n".join(line.get("reason", "").strip().splitlines()[-REASON_LINES:])
        shown.append(f"`{line['test']}` {line['outcome']}:\n\n```\n{reason}\n```")
    if len(failed) > MOST_FAILURES:
        shown.append(f"And {len(failed) - MOST_FAILURES} more, in the JSON beside this page.")
    return f"## {len(failed)} failed\n\n" + "\n\n".join(shown)
