"""The emulator finds what it is there for: the sm90 forward with one thing left out gives an error or wrong numbers."""

from __future__ import annotations

import pytest
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention, launchers
from flash_cosine_sim_attention.reference import plain_cosine_sim_attention
from flash_cosine_sim_attention.testing import make_inputs
from flash_cosine_sim_attention.variants import variant_for

from .emulator.build import build

VARIANT = variant_for("sm90", "forward", "bfloat16", 64, "bounded")
OMISSIONS = {
    "wait for the scores": "    wgmma_wait<kBehind>();\n",
    "wait for the values": "    if (!v_is_there) wait(smem.full_v[v.stage], v.phase);\n",
    "wait for a free slot": "      wait(smem.empty_k[stage], ring.phase ^ 1);\n",
    "release of a slot": "  if (thread.releases) arrive(smem.empty_v[previous.stage]);\n",
}


@pytest.mark.parametrize("omission", OMISSIONS)
def test_finds_a_missing(omission, tmp_path, tools_with_binding, serve_on_the_cpu):
    text, found = OMISSIONS[omission], []

    def leave_out(source: str) -> str:
        found.extend([text] * source.count(text))
        return source.replace(text, "")

    library = build(tmp_path, [VARIANT], tools_with_binding, change=leave_out)
    assert found, f"the kernel has no line {text!r} any more"
    serve_on_the_cpu(lambda variant, *_: launchers.exported(library, variant.name), "sm90")
    inputs = make_inputs((1,), 2, dtype=torch.bfloat16, nq=270, nk=400, d=64)
    exact, _ = plain_cosine_sim_attention(**inputs.to(torch.float64).arguments(), return_lse=True)

    def wrong() -> bool:
        try:
            out, _ = flash_cosine_sim_attention(**inputs.arguments(), return_lse=True, backend="sm90")
        except RuntimeError as error:
            return "CUDA error" in str(error)
        return not float((out - exact).abs().max()) < 0.1  # NaN is wrong, too

    assert any(wrong() for _ in range(6))  # copies land at other times in each
