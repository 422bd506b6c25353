"""What a trained model is worth: the Assessment, what --pretrained prints, report.html."""

import base64
import dataclasses
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import PROJECT, execute, load_tiny, options, run_script, runs, words
from PIL import Image

from training import assessment, report
from training.assessment import area_under_roc, assess, calibration_error, other_images
from utils.data import SemiSupervisedData
from utils.metrics import read_metrics
from utils.settings import read_settings

CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell"))), None)


class Fixed:
    """In place of Inference: what it returns for each batch is given, (N, K)."""

    def __init__(self, log_joint):
        self.rows, self.log_p_y = log_joint, torch.zeros(log_joint.shape[1])

    def log_joint(self, x):
        rows, self.rows = self.rows[:len(x)], self.rows[len(x):]
        return rows


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_figures_of_given_predictions(capsys):
    _, settings = read_settings(options(test_bs=10))
    data = load_tiny()
    images = data.test_x[:10]
    y = torch.arange(10)
    p = torch.full((10, 10), 0.1 / 9)
    p[torch.arange(10), [0, 1, 2, 3, 4, 5, 6, 8, 9, 9]] = 0.9         # 7 and 8 are wrong
    of_images = Fixed(p.log() + torch.arange(10.0)[:, None])            # log p(x) = 0, 1, ..., 9
    others = Fixed(torch.full((5 * assessment.N_OTHERS, 10), -2.0 - np.log(10)))
    found = assess(of_images, others, data, (images, y), "test", settings)
    assert found.error == pytest.approx(0.2) and found.log_p == pytest.approx(4.5)
    assert found.nll == pytest.approx(-(8 * np.log(0.9) + 2 * np.log(0.1 / 9)) / 10, rel=1e-5)
    assert found.calibration_error == pytest.approx(0.1, abs=1e-6)      # 0.9 sure, 0.8 right
    assert found.confusion[7].tolist() == [0] * 8 + [1, 0] and found.confusion[8, 9] == 1
    assert found.confusion.sum() == 10 and found.confusion.diagonal().sum() == 8
    assert found.mistakes.tolist() == [7, 8]
    kinds = ("noise", "black", "constant", "inverted", "shuffled pixels")
    assert found.auroc == dict.fromkeys(kinds, 1.0)
    found.show()
    out = capsys.readouterr().out
    assert out.splitlines()[-3].split() == ["7", *"........", "1", ".", "100.00%"]
    assert max(map(len, out.splitlines())) < 80
    assert "An AUROC of 1 means that log p(x) of the test images is always higher." in words(out)
    dark = dataclasses.replace(found, auroc={"black": 0.0}, confusion=1135 * found.confusion)
    dark.show()
    out = capsys.readouterr().out
    assert "black 0.000" in out and "a black one is the easiest" in words(out)
    assert max(map(len, out.splitlines())) < 80


def test_calibration_error_by_bins():
    """Two bins: confidence 0.95 and half right, confidence 0.55 and all right."""
    confidence = torch.tensor([0.95, 0.95, 0.55, 0.55])
    correct = torch.tensor([True, False, True, True])
    assert calibration_error(confidence, correct) == pytest.approx((0.45 + 0.45) / 2)
    assert calibration_error(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 0
    assert calibration_error(torch.tensor([0.0]), torch.tensor([False])) == 0


def test_area_under_roc():
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])
    assert area_under_roc(a, b) == 0.75 and area_under_roc(b, a) == 0.25
    assert area_under_roc(a, torch.tensor([-torch.inf, 2.0])) == 0.75
    for value in (torch.inf, torch.nan):
        assert math.isnan(area_under_roc(a, torch.tensor([value, 0.0])))


def test_images_of_other_kinds():
    _, settings = read_settings(options())
    data = load_tiny()
    kinds = other_images(data, data.test_x, settings)
    images = data.test_x[:assessment.N_OTHERS]
    assert all(x.shape == images.shape and x.dtype == torch.uint8 and int(x.max()) <= 16
               for x in kinds.values())
    assert torch.equal(kinds["inverted"].int(), 16 - images.int())
    shuffled = kinds["shuffled pixels"]
    assert torch.equal(shuffled.flatten(1).sort(1)[0], images.flatten(1).sort(1)[0])
    assert not torch.equal(shuffled, images)
    assert (kinds["constant"].flatten(1).amax(1) == kinds["constant"].flatten(1).amin(1)).all()
    assert torch.equal(kinds["noise"], other_images(data, data.test_x, settings)["noise"])


def test_digits_are_another_kind_of_mnist():
    _, settings = read_settings(options(data="mnist"))
    x, y = torch.zeros(300, 1, 28, 28, dtype=torch.uint8), torch.arange(300) % 10
    data = SemiSupervisedData(x, y, x, y, torch.arange(10), grey_levels=256)
    digits = other_images(data, x, settings)["scikit-learn's digits"]
    assert digits.shape == (200, 1, 28, 28) and int(digits.max()) == 255


def test_what_pretrained_prints(capsys):
    line = ["--config", str(PROJECT / "configs" / "digits.yaml"), "--pretrained", "--device", "cpu"]
    assert run_script([*line, "--draws", "2"]) == 0
    out = capsys.readouterr().out
    assert float(re.search(r"bits/dim +(\S+)", out)[1]) <= 2.05
    for pattern in (r"Test error   [0-4]\.\d\d% \(\d\.\d\d, \d\.\d\d\)",
                    r"-log p\(y\|x\)  0\.\d{4} nats",
                    r"Calibration  \d\.\d\d% expected", r"\n +8 .* 30 .* 14\.29%\n",
                    r"AUROC of log p\(x\).*: noise 1\.000, black 0\.\d{3}, constant 1\.000"):
        assert re.search(pattern, out) or re.search(pattern, words(out)), pattern
    assert run_script([*line, "--test", "false"]) == 0
    assert "Validation error" in capsys.readouterr().out


POINTS = {"data": "moons", "model": "toy", "l": 2, "ssl_dim": -1, "ssl_l": 1, "ssl_k": 1,
          "supervised": 10}


def report_of_a_run(folder, **changes):
    assert run_script(options(**changes)) == 0
    run, = runs(folder)
    return run, (run / "report.html").read_text()


def test_the_report_of_a_run_is_one_file(tmp_path):
    run, page = report_of_a_run(tmp_path, epochs=2, name="a & b <c>")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    # Curves for wide pages, samples of two temperatures, mistakes; the curves for narrow pages.
    assert len(pictures) == page.count("<img") == 4 and page.count("<source") == 1
    for picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture))).load()
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(", page)
    assert "a &amp; b &lt;c&gt;" in page and "<c>" not in page
    row = read_metrics(run / "metrics.csv")[-1]
    assert f"<td>{1 - row['test_acc']:.2%}</td>" in page and f"{row['test_bpd']:.4f}" in page
    assert "<td>ssl_model</td><td>cond-flow</td>" in page
    assert re.search(r"; started at commit [0-9a-f]{7}(, with changes)?, ended on the CPU, ", page)
    mistakes = np.asarray(Image.open(run / "mistakes.png").convert("L"))
    assert (mistakes < 100).mean() > 0.1                        # black backgrounds of digits


def test_the_report_of_points(tmp_path):
    run, page = report_of_a_run(tmp_path, epochs=1, **POINTS)
    assert page.count("<img") == 3 and "Density" in page and "bits/dim" not in page
    assert not (run / "mistakes.png").exists()


def test_a_report_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("no report")
    monkeypatch.setattr(report, "write_report", fail)
    assert run_script(options(epochs=1)) == 0
    run, = runs(tmp_path)
    assert (run / "model.torch").exists() and not (run / "report.html").exists()
    assert "Report failed (RuntimeError); the run is not" in words(capsys.readouterr().out)
    assert "no report" in (run / "traceback.txt").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("changes, n", [({}, 4), (POINTS, 3)], ids=["images", "points"])
def test_the_report_in_a_browser(tmp_path, changes, n):
    """In a frame as narrow as a phone every picture is loaded, nothing is wider than the frame,
    each row of the confusion of classes is one line high, and the console has no error."""
    _, page = report_of_a_run(tmp_path, epochs=1, **changes)
    (tmp_path / "page.html").write_text(f"""<iframe width="360" height="800"></iframe><script>
        const frame = document.querySelector("iframe");
        frame.onload = () => {{
            const report = frame.contentDocument, root = report.documentElement;
            const heights = [...report.querySelectorAll(".wide tr")].map(row => row.offsetHeight);
            document.title = [[...report.images].filter(i => i.complete && i.naturalWidth).length,
                              root.scrollWidth <= root.clientWidth,
                              Math.max(...heights) - Math.min(...heights) <= 1].join();
        }};
        frame.srcdoc = {json.dumps(page).replace("</", "<" + chr(92) + "/")};</script>""")
    done = execute(tmp_path, [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
                              f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
                              "--virtual-time-budget=5000", "--dump-dom",
                              f"file://{tmp_path / 'page.html'}"])
    assert f"<title>{n},true,true</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
