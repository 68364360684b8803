"""Claims about every picture: what it says, that it is readable, that it needs no global state."""

# Artists are read back through attributes that matplotlib's own types leave open.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from drawn import episode, overlapping, shares_of, words
from tdhook_like.viz import episode_heatmap, key_bars, waterfall

PICTURES = {
    "bars": lambda target, **more: key_bars(
        {"LRP": shares_of(0), "Integrated gradients": shares_of(1), "Saliency": shares_of(2)},
        target=target,
        truth={"cart": 3.0, "pole": 471.0, ("agents", "noise"): -1.0},
        **more,
    ),
    "heat map": lambda target, **more: episode_heatmap(
        episode(),
        torch.arange(40) % 2,
        target=target,
        feature_names={"cart": ["position", "angular velocity"]},
        **more,
    ),
    "waterfall": lambda target, **more: waterfall(
        {"pole.angular velocity": -0.55, "cart": 0.13, "noise": -0.05, "echo": 0.007},
        total=0.01,
        target=target,
        bias=0.31,
        **more,
    ),
}


@pytest.fixture(params=PICTURES)
def picture(request):
    return PICTURES[request.param]


def test_every_picture_names_its_target_in_the_title(picture):
    assert "logits[left]" in picture("logits[left]").get_suptitle()


def test_every_picture_says_what_it_clips(picture):
    assert "clip" in words(picture("state_value"))


@pytest.mark.parametrize("target", ["v", "log-probability of the action of the left agent " * 2])
def test_no_text_is_drawn_over_another(picture, target):
    assert overlapping(picture(target)) == []


def test_every_picture_is_saved_as_png(picture, tmp_path):
    for name in ("picture.png", "picture"):
        figure = picture("v", path=tmp_path / name)
        assert isinstance(figure, Figure)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_dollars_in_names_are_not_formulas():
    figure = waterfall({"cash $x_1$": 1.0}, total=1.0, target="gain in $ and $")
    figure.canvas.draw()
    assert r"gain in \$ and \$" in figure.get_suptitle()


def test_threads_draw_the_same_pictures_at_the_same_time(tmp_path):
    def draw(number: int) -> bytes:
        path = tmp_path / f"{number}.png"
        PICTURES["heat map"]("q", path=path)
        return path.read_bytes()

    alone = draw(-1)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(draw, range(8))) == {alone}


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_metrics_import_no_matplotlib_and_pictures_no_global_figure_state():
    printed = run(
        "import sys, tdhook_like.metrics; print('matplotlib' in sys.modules)\n"
        "import tdhook_like.viz as viz\n"
        "viz.waterfall({'a': 1.0}, total=1.0, target='q').canvas.draw()\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert printed.split() == ["False", "False"]


def test_a_missing_matplotlib_is_reported_in_words():
    printed = run(
        "import sys; sys.modules['matplotlib'] = None\n"
        "from tdhook_like.errors import TdhookLikeError\n"
        "try:\n    import tdhook_like.viz\n"
        "except ImportError as error:\n"
        "    print(isinstance(error, TdhookLikeError), error)\n"
    )
    assert printed.startswith("True")
    assert "pip install tdhook_like[viz]" in printed
