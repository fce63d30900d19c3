"""Model cards: a README.md in the Hub's form, made from the metadata of a file.

python -m lightning_deepr.zoo.write_cards FOLDER [NAME_OR_PATH ...]
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

LIBRARY = "lightning-deepr"
PICTURE = "connectivity.png"
CITATION = """## Citation

The algorithm:

```bibtex
@inproceedings{bellec2018deep,
  title     = {Deep Rewiring: Training very sparse deep networks},
  author    = {Bellec, Guillaume and Kappel, David and Maass, Wolfgang and Legenstein, Robert},
  booktitle = {International Conference on Learning Representations},
  year      = {2018},
  url       = {https://openreview.net/forum?id=BJ_wN01C-}
}
```"""
_UNKNOWN, _WATTS = "not recorded", 10
_SPARSE_FROM_THE_START = {"DeepR", "SET", "FixedRandom"}
# the Hub's names of the tasks and of the data sets
_TASKS = {
    "lenet300_100": "image-classification",
    "cifar10_cnn": "image-classification",
    "timit_blstm": "audio-classification",
    "char_transformer": "text-generation",
}
DATA_SETS = {
    "mnist": "ylecun/mnist",
    "cifar-10": "uoft-cs/cifar10",
    "cifar10": "uoft-cs/cifar10",
    "tiny shakespeare": "karpathy/tiny_shakespeare",
}


def card(
    info: Mapping[str, Any], *, repo_id: str | None = None, picture: str | None = PICTURE, recipe: str | None = None
) -> str:
    """Write the card of a model.

    Args:
        info: the result of ``zoo.info`` for the model. The card leaves out what is not recorded there.
        repo_id: the model's repository on the Hub; None: the model is in the package only.
        picture: the path of the picture of the connectivity; None: there is no picture.
        recipe: the path of the recipe's YAML beside the card; None: it is not there.

    Returns:
        Markdown with the Hub's metadata at the beginning.

    Example::

        >>> card({"name": "net", "license": "MIT", "connectivity": {"rows": [], "total": 1000, "active": 10}}).splitlines()[:3]
        ['---', 'library_name: lightning-deepr', 'license: mit']
    """
    name = str(info.get("name") or (repo_id or "model").rpartition("/")[2])
    parts = [
        _front(info, name),
        f"# {name}\n\n{_summary(info)}",
        _use(info, name, repo_id),
        section("Input", _input(info)),
        section("Connectivity", table(info) + (f"\n\n![connectivity]({picture})" if picture else "")),
        section("Metrics", metrics_table(info)),
        section("Training", _training(info, recipe)),
        section("File", _file(info)),
        section("Licence", _licence(info)),
        CITATION,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def card_of_class(module: nn.Module, front_matter: Mapping[str, Any], **details: Any) -> str:
    """Write the card of a user's own class (``SparseHubMixin``): its connectivity and how to load it.

    Args:
        module: a module with converted weights.
        front_matter: the metadata of its class, from the mixin.
        details: the ``model_card_kwargs`` of ``save_pretrained``; each becomes a section.
    """
    from lightning_deepr.conversion.report import connectivity_report

    # the user's class, without the one that torch derives for parametrized modules
    written = next(cls for cls in type(module).__mro__ if cls.__module__ != "torch.nn.utils.parametrize")
    kind = written.__name__
    source = "" if written.__module__ == "__main__" else f"from {written.__module__} import {kind}\n\n"
    use = (
        "The repository has the weights without the class: you need its code.\n\n"
        f"```python\n{source}net = {kind}.from_pretrained(...)  # in eval mode\n```"
    )
    rows = {"connectivity": connectivity_report(module).to_dict()}
    parts = [
        front_matter_of({"library_name": LIBRARY, **{key: value for key, value in front_matter.items() if value is not None}}),
        f"# {kind}\n\n{_summary({**rows, 'architecture': kind})}",
        section("Use", use),
        section("Connectivity", table(rows)),
        *(section(title.replace("_", " ").capitalize(), str(text)) for title, text in details.items()),
        CITATION,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(info: Mapping[str, Any], name: str) -> str:
    """Write the YAML at the beginning of the card, with the Hub's ``model-index``."""
    task = _TASKS.get(str(info.get("architecture")))
    fields: dict[str, Any] = {
        "library_name": LIBRARY,
        "license": licence_of(info),
        "pipeline_tag": task,
        "tags": [
            "sparse",
            "deep-r",
            "dynamic-sparse-training",
            *([str(info["architecture"])] if info.get("architecture") else []),
        ],
    }
    data = data_of(info)
    if data.get("name") and (hub_name := DATA_SETS.get(str(data["name"]).lower())):
        fields["datasets"] = [hub_name]
    results = [
        {"type": _plain_name(metric), "name": metric.replace("_", " ").capitalize(), "value": rounded(numbers["value"])}
        for metric, numbers in metrics(info).items()
        if numbers.get("value") is not None
    ]
    if results:
        data_set = {
            "name": str(data.get("name") or "unknown"),
            "type": DATA_SETS.get(str(data.get("name")).lower(), "unknown"),
        }
        if data.get("split"):
            data_set["split"] = str(data["split"])
        fields["metrics"] = sorted({result["type"] for result in results})
        fields["model-index"] = [
            {"name": name, "results": [{"task": {"type": task or "other"}, "dataset": data_set, "metrics": results}]}
        ]
    return front_matter_of({key: value for key, value in fields.items() if value is not None})


def table(info: Mapping[str, Any]) -> str:
    """Write the table of the connections per tensor, in Markdown."""
    recorded = info.get("connectivity") or {}
    lines = ["| tensor | shape | potential | connections | connectivity |", "|---|---|---:|---:|---:|"]
    for row in recorded.get("rows", []):
        shape = " x ".join(str(size) for size in row["shape"])
        share = row["active"] / row["total"] if row["total"] else 0.0
        lines.append(f"| `{row['name']}` | {shape} | {row['total']:,} | {row['active']:,} | {share:.3%} |")
    if recorded.get("total"):
        share = recorded["active"] / recorded["total"]
        lines.append(f"| **all** | | {recorded['total']:,} | {recorded['active']:,} | {share:.3%} |")
    dense = recorded.get("left_out") or {}
    note = f"\n\nDense: {', '.join(f'`{name}`' for name in dense)}." if dense else ""
    return "\n".join(lines) + note


def metrics(info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Collect the recorded metrics: {name: {value of this file, mean, std, seeds and any other entries}}.

    A metric may be recorded as a number or as a dict.
    """
    found = {}
    for name, value in (info.get("metrics") or {}).items():
        numbers = dict(value) if isinstance(value, Mapping) else {"value": value}
        if isinstance(value, (Mapping, int, float)) and not isinstance(value, bool):
            found[str(name)] = numbers
    return found


def metrics_table(info: Mapping[str, Any]) -> str:
    """Write the table of the metrics of this file, with mean and spread over seeds."""
    found = metrics(info)
    if not found:
        return ""
    lines = ["| metric | this file | mean ± standard deviation over seeds | seeds |", "|---|---:|---:|---|"]
    for name, numbers in found.items():
        mean, spread = numbers.get("mean"), numbers.get("std")
        seeds = numbers.get("seeds", "")
        over = "" if mean is None else _number(mean) + ("" if spread is None else f" ± {_number(spread)}")
        listed = (
            ", ".join(str(seed) for seed in seeds) if isinstance(seeds, Sequence) and not isinstance(seeds, str) else str(seeds)
        )
        value = numbers.get("value")
        counted = f" ({numbers['correct']:,} of {numbers['examples']:,})" if _counted(numbers) else ""
        lines.append(f"| {name.replace('_', ' ')} | {'' if value is None else _number(value)}{counted} | {over} | {listed} |")
    if table_of_runs := runs_table(info):
        lines += ["", table_of_runs]
    notes = [
        f"{name.replace('_', ' ')}: {key.replace('_', ' ')} {value}."
        for name, numbers in found.items()
        for key, value in numbers.items()
        if key not in ("value", "mean", "std", "seeds", "correct", "examples") and isinstance(value, (str, int, float))
    ]
    if _part(info.get("recipe")).get("name") and any(_counted(numbers) for numbers in found.values()):
        notes.append("Measure it again: `lightning-deepr zoo verify --data FILE`.")
    return "\n".join(lines) + ("\n\n" + " ".join(notes) if notes else "")


def runs_table(info: Mapping[str, Any]) -> str:
    """Write the table of the trained seeds: accuracy, digest, CPU seconds and a proxy of the energy, or "not recorded".

    ``info["runs"]`` has {seed, correct, examples, sha256, cpu_seconds, wall_seconds}, all but the seed optional.
    """
    counted = [numbers for numbers in metrics(info).values() if isinstance(numbers.get("seeds"), Sequence)]
    given = [dict(run) for run in info.get("runs") or [] if isinstance(run, Mapping) and "seed" in run]
    runs: dict[Any, dict[str, Any]] = {run["seed"]: run for run in given}
    seeds = [seed for seed in (counted[0]["seeds"] if counted else []) if isinstance(seed, int)]
    if not runs and len(seeds) < 2 and not info.get("recipe"):
        return ""
    own = info.get("seeds", info.get("seed"))
    of_file = own[0] if isinstance(own, Sequence) and not isinstance(own, str) and len(own) == 1 else own
    lines = ["| seed | right | sha256 of its file | CPU seconds | energy proxy |", "|---|---:|---|---:|---:|"]
    for seed in sorted({*runs, *seeds}, key=str):
        run = runs.get(seed, {})
        if seed == of_file and counted and _counted(counted[0]):
            run = {**counted[0], **run}
        spent, clock = run.get("cpu_seconds"), run.get("wall_seconds")
        cells = [
            f"{seed} (this file)" if seed == of_file else str(seed),
            f"{run['correct']:,} of {run['examples']:,}" if _counted(run) else _UNKNOWN,
            "below" if seed == of_file else f"`{run['sha256']}`" if run.get("sha256") else _UNKNOWN,
            (_UNKNOWN if spent is None else f"{spent:,.0f}") + (f" ({clock:,.0f} s on the clock)" if clock else ""),
            _UNKNOWN if spent is None else f"{spent * _WATTS / 3600:.3g} Wh",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if line := _not_recorded(lines[2:]):
        lines.append(line)
    if any(run.get("cpu_seconds") is not None for run in runs.values()):
        lines.append(f"\nEnergy proxy: CPU seconds times {_WATTS} W, a nominal figure for one core. Nothing was metered.")
    return "\n".join(lines) if len(lines) > 2 else ""


def _not_recorded(rows: Sequence[str]) -> str:
    """Say what the table lacks, and for which seeds."""
    columns = ("accuracy", "digest", "CPU seconds and energy proxy")
    cells = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]
    found = []
    for column, name in enumerate(columns, 1):
        seeds = [row[0].removesuffix(" (this file)") for row in cells if row[column].startswith(_UNKNOWN)]
        if seeds:
            found.append(f"{name} of {'every seed' if len(seeds) == len(cells) else 'seed ' + ', '.join(seeds)}")
    if not found:
        return ""
    return f"\nNot recorded when this was trained, and not estimated here: {'; '.join(found)}. The mean above is of that time."


def _summary(info: Mapping[str, Any]) -> str:
    recorded, data = info.get("connectivity") or {}, data_of(info)
    said = f"`{info['architecture']}`" if info.get("architecture") else "A network"
    if data.get("name"):
        said += f" trained on {data['name']}"
    if recorded.get("total"):
        said += (
            f", with {recorded['active']:,} of {recorded['total']:,} connections ({recorded['active'] / recorded['total']:.2%})"
        )
    method = _method(info)
    if method in _SPARSE_FROM_THE_START:
        said += ". It was sparse from the first step of its training to the last"
    elif method:
        said += f". Its connections were found by {method}"
    said += ". The file holds K values and K places for each sparse weight."
    return said + (f"\n\n{info['description']}" if info.get("description") else "")


def _use(info: Mapping[str, Any], name: str, repo_id: str | None) -> str:
    where = f'"{repo_id}", source="hub"' if repo_id else f'"{name}"'
    own = "" if info.get("architecture") in _TASKS else ", module=Net()"
    lines = [
        "```python",
        "# pip install lightning-deepr",
        "from lightning_deepr import zoo",
        "",
        "# an nn.Module in eval mode, computed from its connections; dense=True for ordinary weights",
        f"net = zoo.load({where}{own})",
        *_RAW.get(_kind_of_input(info), []),
        "```",
    ]
    if repo_id:
        lines += [
            "",
            'Pin what you use: `revision="<commit hash>"`. Only safetensors and JSON are read; no code comes from this '
            "repository.",
        ]
    lines += ["", "To go on training it, give it to a `lightning.Trainer` with `DeepR()` among its callbacks."]
    return section("Use", "\n".join(lines))


# from a raw file to a class; ``tests/hub/test_cards.py`` runs them
_RAW = {
    "image": [
        "",
        "from PIL import Image",
        "",
        'image = Image.open("image.png")',
        "print(zoo.predict(net, image))  # the class and its probability",
        "logits = net(net.preprocess(image)[None])  # the same by hand",
    ],
    "speech": [
        "",
        "import soundfile",
        "",
        'wave, rate = soundfile.read("recording.wav", dtype="int16")',
        "frames = zoo.predict(net, wave, rate=rate)  # the class of each 10 ms and its probability",
        "logits = net(net.preprocess(wave, rate)[None])  # the same by hand",
    ],
    "text": [
        "",
        'text = "ROMEO:\\n"',
        "print(zoo.predict(net, text))  # the next character and its probability",
        "for _ in range(200):",
        "    probabilities = net(net.preprocess(text)[None])[0, -1].softmax(0)  # by hand",
        "    text += net.preprocess.classes[probabilities.multinomial(1)]",
        "print(text)",
    ],
}


def _kind_of_input(info: Mapping[str, Any]) -> str:
    """Return the kind of input that ``zoo.info`` has recognized: with it comes a task."""
    return str(info["input"]["kind"]) if "task" in info and isinstance(info.get("input"), Mapping) else ""


def _input(info: Mapping[str, Any]) -> str:
    """Say how the raw input looks, and what ``net.preprocess`` makes of it."""
    kind = _kind_of_input(info)
    given = info["input"] if kind else {}
    if kind == "image":
        size = f"{given['height']} x {given['width']}"
        side, colour = given.get("crop"), "grey" if given["channels"] == 1 else "red, green and blue"
        values = {"unit": "values in 0 to 1, without a further normalization", "standardized": "each image with mean 0 and "
                  "standard deviation 1"}[given["values"]]  # fmt: skip
        shape = [given["channels"], side or given["height"], side or given["width"]]
        lines = [
            f"- Raw: an image of {size} pixels, {colour}, 8 bits (or floats"
            " in 0 to 1). A square image of another size is resized.",
            f"- The network takes float32 [batch, {', '.join(map(str, shape))}]: "
            + (f"the central crop of {side} x {side}, " if side else "")
            + f"{values}. `net.preprocess(image)` does it.",
        ]
    elif kind == "speech":
        lines = [
            f"- Raw: one channel at {given['rate']:,} samples per second (a higher rate is converted), int16 or floats in -1 "
            "to 1.",
            f"- The network takes float32 [batch, frames, {len(given['mean'])}], a frame for each 10 ms: 13 MFCC of a 25 ms "
            "window, their deltas and delta-deltas, normalized by the mean and standard deviation of the training recordings. "
            "`net.preprocess(wave, rate)` does it, with `pip install 'lightning-deepr[timit]'`.",
        ]
    elif kind == "text":
        return (
            f"- Raw: a text of these {len(given['classes'])} characters: `{json.dumps(''.join(given['classes']))}`.\n"
            f"- The network takes int64 [batch, characters], at most {given['context']}: the numbers of the last characters. "
            "`net.preprocess(text)` does it. It returns logits of the character after each."
        )
    else:
        return ""
    if given.get("classes"):
        lines.append(f"- Classes: {', '.join(given['classes'])}.")
    return "\n".join(lines)


def _training(info: Mapping[str, Any], recipe: str | None) -> str:
    lines = []
    if _method(info):
        given = info.get("hyperparameters") or _part(info.get("algorithm"))
        listed = ", ".join(f"{key} = {_short(value)}" for key, value in given.items() if key != "name" and value is not None)
        lines.append(f"- algorithm: {_method(info)}" + (f" ({listed})" if listed else ""))
    seeds = info.get("seeds", info.get("seed"))
    if seeds is not None:
        lines.append(f"- seeds: {_short(seeds)}")
    data = data_of(info)
    if data:
        said = ", ".join(
            f"{key} `{value}`" if "sha" in key or "sum" in key else f"{key} {_short(value)}" for key, value in data.items()
        )
        lines.append(f"- data: {said}")
    recorded = _part(info.get("recipe"))
    if recorded.get("name"):
        file = f"[`{recipe}`]({recipe})" if recipe else f"`{recorded['name']}`"
        lines.append(f"- recipe: {file}")
        overrides = recorded.get("overrides") or []
        if isinstance(overrides, Mapping):
            overrides = [f"--{key} {shlex.quote(_short(value))}" for key, value in overrides.items()]
        own = info.get("seeds", info.get("seed"))
        seed = own[0] if isinstance(own, list) and len(own) == 1 else own
        seeded = [f"--seed_everything {seed}"] if isinstance(seed, int) else []
        command = recorded.get("command") or " ".join(
            ["lightning-deepr fit --config", str(recorded["name"]), *map(str, overrides), *seeded]
        )
        lines.append(f"\n```bash\n{command}\n```")
    return "\n".join(lines)


def _file(info: Mapping[str, Any]) -> str:
    version = info.get("package_version", info.get("version"))
    said = {
        "format": info.get("format_version"),
        "bytes": info.get("bytes"),
        "sha256": f"`{info['sha256']}`" if info.get("sha256") else None,
        "written by": f"{LIBRARY} {version}" if version else None,
        "architecture": f"`{info['architecture']}`" if info.get("architecture") else None,
        "its arguments": f"`{_short(info['arguments'])}`" if info.get("arguments") else None,
        "numbers that are not sparse": info.get("dense_parameters"),
    }
    return "\n".join(
        f"- {key}: {value:,}" if isinstance(value, int) else f"- {key}: {value}" for key, value in said.items() if value
    )


def _licence(info: Mapping[str, Any]) -> str:
    return str(info["license"]) if info.get("license") else ""


def licence_of(info: Mapping[str, Any]) -> str | None:
    """Return the Hub's identifier of the licence: SPDX's in small letters, or "other"."""
    if not info.get("license"):
        return None
    spdx = str(info["license"]).lower()
    return (
        spdx
        if spdx in {"apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-sa-3.0", "cc0-1.0"}
        else "other"
    )


def data_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is recorded of the data: name, split, sha256."""
    return _part(info.get("data", info.get("dataset")))


def _method(info: Mapping[str, Any]) -> str:
    return str(_part(info.get("algorithm")).get("name", ""))


def _part(value: Any) -> dict[str, Any]:
    """Return a recorded value as a dict; a bare name becomes its "name"."""
    return dict(value) if isinstance(value, Mapping) else {} if value is None else {"name": value}


def _plain_name(metric: str) -> str:
    """Return the Hub's name of a metric: "accuracy" for "test_accuracy"."""
    return metric.lower().removeprefix("test").strip(" _/")


def _counted(numbers: Mapping[str, Any]) -> bool:
    return all(type(numbers.get(key)) is int for key in ("correct", "examples"))


def _number(value: Any) -> str:
    return f"{rounded(value):g}" if isinstance(value, float) else str(value)


def rounded(value: Any) -> Any:
    """Round a metric to 4 decimals, the precision of 10,000 test examples; a smaller one keeps two digits."""
    return round(value, 4) or float(f"{value:.2g}") if isinstance(value, float) else value


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def section(title: str, text: str) -> str:
    """Write a section of a card; without a text there is none."""
    return f"## {title}\n\n{text}" if text else ""


def front_matter_of(fields: Mapping[str, Any]) -> str:
    """Write the YAML at the beginning of a card."""
    import yaml  # type: ignore[import-untyped]

    return "---\n" + yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=120) + "---"
