"""The matrix of ordered pairs: cells show numbers with intervals, or words if there is none."""

import pandas as pd

from lib.report.figures import heatmaps, style


def test_every_pair_has_its_cell_and_its_words():
    frame = pd.DataFrame(
        [
            {
                "first": "one_part",
                "second": "other",
                "state": "works",
                "loss": -0.2,
                "loss_low": -0.3,
                "loss_high": -0.1,
            },
            {"first": "other", "second": "one_part", "state": "refused", "loss": None},
        ]
    )
    figure = heatmaps.pairs(frame, ["one_part", "other"], {"loss": "loss, nats/token", "prefill": "log-speed"})
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert any(text.startswith("−0.200\n−0.300 to") for text in words)
    assert words.count("refused") == 2 and words.count("works") == 1, "a panel without its column says the state"
    assert style.png(figure).startswith(b"\x89PNG")


def test_a_value_rounded_to_zero_has_no_sign():
    cell = {"first": "a", "second": "b", "state": "works", "loss": -1e-8, "loss_low": -1e-7, "loss_high": 2e-7}
    figure = heatmaps.pairs(pd.DataFrame([cell]), ["a", "b"], {"loss": "loss, nats/token"})
    assert "0.000\n0.000 to\n0.000" in [text.get_text() for text in figure.axes[0].texts]


def test_one_pair_and_no_number_at_all():
    frame = pd.DataFrame(
        [{"first": "a", "second": "b", "state": "crashed"}, {"first": "b", "second": "a", "state": "refused"}]
    )
    assert style.png(heatmaps.pairs(frame, ["a", "b"], {"loss": "loss"}))
