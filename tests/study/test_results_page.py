"""docs/results.md is what its raw numbers say, and the check notices when it is not."""

import shutil

from scripts.results_page import ROOT, main


def test_the_page_is_that_of_its_numbers(tmp_path, capsys):
    assert main(["--check"]) == 0
    page = tmp_path / "results.md"
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "results")
    written = (ROOT / "docs" / "results.md").read_text()
    page.write_text(written.replace("| small_rates | learning_rate", "| rates | learning_rate", 1))
    assert main([f"--page={page}", "--check"]) == 1
    assert main([f"--page={page}"]) == 0
    assert page.read_text() == written
    for broken in ("<!-- tabels of ", "<!-- tables in "):
        page.write_text(written.replace("<!-- tables of ", broken, 1))
        assert main([f"--page={page}", "--check"]) == 2
        assert "each needs both of its lines" in capsys.readouterr().err
    cut = written.replace("<!-- end -->", "", 1)
    page.write_text(cut)
    assert main([f"--page={page}"]) == 2
    assert page.read_text() == cut
    page.write_text(written)
    numbers = tmp_path / "results" / "attention.json"
    numbers.write_text(numbers.read_text().replace('"eval_loss": 5', '"eval_loss": 4', 1))
    assert main([f"--page={page}"]) == 2
    assert "checksum" in capsys.readouterr().err
