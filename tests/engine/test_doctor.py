"""The doctor's report is complete, and its self-test can fail."""

from __future__ import annotations

import pytest
import torch

from qwen1m_ext import doctor, ops


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor() == 0
    out = capsys.readouterr().out
    for word in ("qwen1m_ext", "torch", "cpu kernels", "gpu", "cuda kernels", "2 DCA borders"):
        assert word in out
    assert out.count("- ok:") == 12 and "everything is in order" in out
    for name in ops.OP_NAMES:
        assert f"op {name}: CPU" in out


def test_a_wrong_kernel_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An attention that ignores the second border passes with 0 and 1 borders and fails with 2."""
    honest = ops.prefill_attention

    def forgetful(out: torch.Tensor, *args: object) -> None:
        honest(out, *args)  # type: ignore[arg-type]
        out[224:] *= 1.1

    monkeypatch.setattr(ops, "prefill_attention", forgetful)
    assert doctor.run_doctor() == 1
    out = capsys.readouterr().out
    assert out.count("FAILED: prefill_attention") == 2 and "2 checks FAILED" in out
