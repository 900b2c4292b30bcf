"""Where the reason of a failure is left."""

from __future__ import annotations

from pathlib import Path

from megatron_atum.errors import report_failure


def test_the_first_failure_of_a_host_is_reported(tmp_path: Path) -> None:
    report_failure("nobody asked", {})
    report_failure("no such host", {"SM_OUTPUT_DIR": str(tmp_path / "none")})
    report_failure("ConfigError: " + "x" * 5000, {"SM_OUTPUT_DIR": str(tmp_path)})
    report_failure("second", {"SM_OUTPUT_DIR": str(tmp_path)})
    assert [path.name for path in tmp_path.iterdir()] == ["failure"]
    text = (tmp_path / "failure").read_text()
    assert text.startswith("ConfigError: xxx") and len(text) == 1024
