"""What a notebook shows, completion, and when the note about kernels comes."""

from __future__ import annotations

import copy
import pickle
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import lightning_deepr
from lightning_deepr import DeepR, LinearDecay, connectivity_report, densify, sparsify, zoo


class Cells(HTMLParser):
    """Collect the cells of a table, and check that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "br":
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def network() -> nn.Module:
    return sparsify(nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 3)), 0.2)


def test_a_report_and_a_network_show_tables() -> None:
    net = network()
    report = connectivity_report(net)
    cells = Cells(report._repr_html_()).cells
    assert cells[: len(report.columns)] == list(report.columns)
    for row in report:
        assert row["name"] in cells and f"{row['active']:,}" in cells and f"{row['connectivity']:.3%}" in cells
    shown = net._repr_html_()  # type: ignore[operator]
    assert Cells(shown).cells == cells and "<b>Sequential</b>" in shown and "(1): ReLU()" in shown
    Cells(connectivity_report(nn.Linear(3, 3))._repr_html_())


def test_a_copy_shows_itself_and_a_dense_network_is_ordinary_again() -> None:
    net = network()
    copied = copy.deepcopy(net)
    with torch.no_grad():
        next(iter(net.parameters())).zero_()
    assert copied._repr_html_._network() is copied and net._repr_html_._network() is net  # type: ignore[union-attr]
    before = set(vars(nn.Sequential()))
    assert set(vars(densify(copied))) == before
    pickle.loads(pickle.dumps(copied))


def test_a_callback_shows_its_settings() -> None:
    assert repr(DeepR(0.01)) == "DeepR(connectivity=0.01)"
    text = repr(DeepR(0.01, l1=LinearDecay(2e-4), log_statistics="all"))
    assert "l1=LinearDecay(" in text and "log_statistics='all'" in text


@pytest.mark.parametrize("package", [lightning_deepr, zoo, lightning_deepr.pictures])
def test_completion(package: object) -> None:
    assert set(package.__all__) <= set(dir(package))  # type: ignore[attr-defined]
    for name in dir(package):
        getattr(package, name)
