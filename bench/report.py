"""Write docs/comparison.md and docs/comparison.svg from the results."""

import statistics

from bench.contestants import CONTESTANTS, OURS, ROOT, SERVER_PINS, TUNED
from bench.measures import MEASURES

HIGHER = ("requests/s", "of 20 requests", "right")  # higher is better
UNRANKED = ("slow clients",)
BYTECODE = (
    "Ours have bytecode of the standard library; without it, each container compiles at its start what it imports."
)
SPEED = (
    "granian handles connections in Rust, uWSGI in C. waitress checks less of a request and logs none. With a quota on "
    "two CPUs, our threads pass the interpreter from one CPU to the other; gunicorn's processes do not."
)
FEW = "waitress accepts 100 connections, uWSGI queues 100; the others wait: see the 99th percentile. granian uses Rust."
# Why somebody else is ahead, by the beginning of a figure's title.
WHY = {
    "unpacked": BYTECODE,
    "build without cache": f"The tutorials have one stage. {BYTECODE} `minimal` then selects files.",
    "rebuild after a change of": "Ours download in one step, for `make wheels`, install in another, and compile.",
    "rebuild after an edit": "Ours compile the code to bytecode.",
    "`docker stop` under load": "Those that stop sooner cut clients off.",
    "median time, ms: quota of one CPU, 256": FEW,
    "median time, ms: a CPU of its own, 256": FEW,
    "requests/s": SPEED,
    "median time": SPEED,
    "99th percentile": SPEED,
}

HEAD = """<!-- Written by `make bench`. -->
# Compared with what people use instead

`make bench` measures all of this and writes this page. All images have the same base image, the same application and
the versions of requirements.txt. Containers have a quota of one CPU and 256 MB, unless a section says otherwise.

A number is the median of three runs, of six for start, memory and speed (smallest to largest, if they differ). What is
in an image, and unusual requests, are counted once. **Bold**: as good as the best, within the spread of the runs. Where
others are ahead of one of ours, the last column refers to the reason. An empty cell: it has none.

Compare ratios: other machines have other numbers. This was {machines}. Below each table is how long the same
computation took before and after it: so much did the speed of the machine itself vary.

- `runtime` and `minimal` are ours. They log each request, as do uWSGI and the tutorial, but not the others.
  `runtime, no log` has `ACCESS_LOG=0`.
- `tutorial` is the image of most tutorials, with Flask's development server. `copy first` copies all files before it
  installs.
- The others are the common two stages, each with the server that its name says and four processes or threads:
  {versions}. gunicorn's manual asks for a buffering proxy in front, which helps against slow clients.
- `waitress` does not stop on SIGTERM, as it is the container's first process: Docker kills it after 10 s.
- `waitress, tuned` is `{tuned}`,
  with `docker run --stop-signal=SIGINT`. What it gains over `waitress` is settings; what ours gain over it is code.

Their Dockerfiles are in [bench/contestants](../bench/contestants).

![The most important figures as bars.](comparison.svg)
"""


def cell(values: list[float]) -> str:
    """Return the median of values, with their range."""
    lowest, median, highest = (number(each) for each in (min(values), statistics.median(values), max(values)))
    return median if lowest == highest else f"{median} ({lowest} to {highest})"


def number(value: float) -> str:
    """Return a number with three digits, or all of them if it is larger than 100 or whole."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def is_better(title: str, one: list[float], other: list[float]) -> bool:
    """Return whether all values of one are better than the median of the other, or its median than all of those."""
    if title.startswith(HIGHER):
        return is_better("", [-value for value in one], [-value for value in other])
    return max(one) < statistics.median(other) or statistics.median(one) < min(other)


def table(measure: str, figures: dict[str, dict[str, list[float]]]) -> str:
    """Return a Markdown table: a row for each figure, a column for each contestant. Below it, the reasons."""
    names = [name for name in CONTESTANTS if any(name in values for values in figures.values())]
    lines = [f"| | `make bench ONLY=` | {' | '.join(names)} | ahead of ours |", "|---" * (len(names) + 3) + "|"]
    reasons: list[str] = []
    for title, values in figures.items():
        ranked = {} if title.startswith(UNRANKED) else values
        ahead = {name: {each for each in ranked if is_better(title, ranked[each], ranked[name])} for name in ranked}
        cells = [cell(values[name]) if name in values else "" for name in names]
        cells = [f"**{text}**" if ahead.get(name) == set() else text for name, text in zip(names, cells, strict=True)]
        why = ""
        if any(ahead[name] - OURS for name in OURS & set(ahead)):
            reason = next((reason for start, reason in WHY.items() if title.startswith(start)), "**not known**")
            reasons += [reason] if reason not in reasons else []
            why = f"see {reasons.index(reason) + 1}"
        lines.append(f"| {title} | `{measure}` | {' | '.join(cells)} | {why} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def page(results: dict) -> str:
    """Return docs/comparison.md."""
    runs = [each["run"] for each in results.values()]
    machines = dict.fromkeys(", ".join(value for key, value in run.items() if key != "noise") for run in runs)
    parts = [
        HEAD.format(
            machines="; and ".join(machines),
            versions=", ".join(SERVER_PINS.values()).replace("==", " "),
            tuned=TUNED,
        )
    ]
    for measure, result in results.items():
        heading, _, explanation = MEASURES[measure].__doc__.partition("\n")
        parts.append(f"## {heading.removesuffix('.')}\n")
        parts += [" ".join(explanation.split()) + "\n"] if explanation.strip() else []
        noise = "Noise: {:.2f} to {:.2f} s\n".format(*result["run"]["noise"])
        parts += [table(measure, result["figures"]).rstrip() + "\n", noise]
    return "\n".join(parts)


def write(results: dict) -> None:
    """Write the page and the plot."""
    (ROOT / "docs/comparison.md").write_text(page(results))
    plot({title: values for result in results.values() for title, values in result["figures"].items()})


# The charts, by the beginning of a figure's title.
CHARTS = {
    "compressed, added": "MB added to the base image, compressed (less is better)",
    "rebuild after an edit": "Seconds to rebuild after an edit (less is better)",
    "`docker run` to the first": "Seconds from `docker run` to a response (less is better)",
    "requests/s: quota of one CPU, 64": "Requests/s, 64 connections, one CPU (more is better)",
    "of 48 clients": "Of 48 clients, cut off by a stop (less is better)",
    "of 20 requests, answered within 1 s beside 3": "Of 20, answered beside slow clients (more is better)",
}


def plot(figures: dict[str, dict[str, list[float]]]) -> None:
    """Draw a bar chart for each of CHARTS that was measured, in colors that can be read on white and on black."""
    import matplotlib as mpl

    gray = "#767676"
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "", "svg.fonttype": "none", "font.size": 10, "ytick.color": gray})
    mpl.rcParams.update({"text.color": gray, "axes.edgecolor": gray, "axes.titlecolor": gray, "ytick.left": False})
    mpl.rcParams.update({"xtick.bottom": False, "xtick.labelbottom": False})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 2, figsize=(10, 9), layout="constrained")
    figure.suptitle("Blue: ours. Gray: what people use instead.")
    for (beginning, heading), axis in zip(CHARTS.items(), axes.flat, strict=True):
        values = next((found for title, found in figures.items() if title.startswith(beginning)), {})
        names = [name for name in reversed(CONTESTANTS) if name in values and name != "runtime, no log"]
        medians = [statistics.median(values[name]) for name in names]
        bars = axis.barh(names, medians, color=["#3b82f6" if name in OURS else "#9ca3af" for name in names])
        axis.bar_label(bars, [number(median) for median in medians], padding=3)
        axis.set_title(heading, loc="left", fontsize=9)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.margins(x=0.2)
    figure.savefig(ROOT / "docs/comparison.svg", transparent=True, metadata={"Date": None})
