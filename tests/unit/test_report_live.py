"""The live report: the same page, served on this machine, with what the run has written by then."""

from __future__ import annotations

import threading
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from cogvit.config.arguments import read_arguments
from cogvit.errors import ConfigError
from cogvit.report.__main__ import Arguments, live_server
from cogvit.report.figures import evaluation_table
from tests.unit.test_report import CONFIG, make_run


def test_follow_shows_what_the_run_has_written_by_then(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", CONFIG, 3)
    arguments = read_arguments(Arguments, [str(run), "--follow", "--port", "0"])
    assert arguments.follow
    server = live_server(arguments)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"
        pages = []
        for steps in (3, 7):
            make_run(run, CONFIG, steps)
            with urlopen(f"http://127.0.0.1:{port}/") as answer:
                pages.append(answer.read().decode())
        assert all('<meta http-equiv="refresh"' in page for page in pages)
        assert "<b>3</b><span>steps</span>" in pages[0] and "<b>7</b><span>steps</span>" in pages[1]
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"http://127.0.0.1:{port}/etc/passwd")
        (run / "metrics.jsonl").unlink()
        with urlopen(f"http://127.0.0.1:{port}/") as answer:
            assert "does not exist" in answer.read().decode()
        with pytest.raises(ConfigError, match=rf"--port {port} cannot be used: .*a free one"):
            live_server(read_arguments(Arguments, [str(run), "--follow", "--port", str(port)]))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("argv", "expected"), [(["gone", "--follow"], "gone does not exist"), ([".", "--follow", "--port", "x"], "no port")]
)
def test_what_cannot_be_followed(argv: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        live_server(read_arguments(Arguments, argv))


def test_baselines_and_chance_stand_in_one_row() -> None:
    def figure(value: float) -> dict[str, float]:
        return {"value": value, "chance": 0.1}

    knn = {"accuracy": figure(0.9), "accuracy_untrained": figure(0.5), "accuracy_pixels": figure(0.7)}
    page = evaluation_table({"knn_digits": knn, "linear_digits": {"accuracy": figure(0.2)}})
    first, second = page.partition("<tbody>")[2].split("</tr>")[:2]
    for value in ("90.0", "10.0", "50.0", "70.0"):
        assert f"{value}&#8239;%" in first
    assert second.count('data-value=""') == 2 and "untrained</th>" in page
    assert "untrained" not in evaluation_table({"linear_digits": {"accuracy": figure(0.2)}})
    assert evaluation_table({}) == ""
