"""Count the FLOPs of attention kernels by hand, in the forms that compilers print."""

from __future__ import annotations

import pytest

from moe_shard.lowering.collectives import extract_collectives
from moe_shard.lowering.work import product_flops

GPU = """HloModule m, entry_computation_layout={()->f32[]}

ENTRY %main () -> bf16[2,6,4,16] {
  %q = bf16[2,6,4,8]{3,2,1,0} parameter(0)
  %k = bf16[2,10,1,8]{3,2,1,0} parameter(1)
  %v = bf16[2,10,1,16]{3,2,1,0} parameter(2)
  ROOT %call = bf16[2,6,4,16]{3,2,1,0} custom-call(%q, %k, %v), TRITON
}
"""
TPU = """HloModule m, entry_computation_layout={()->f32[]}

ENTRY %main () -> bf16[4,6,16] {
  %a = s8[1,2,2]{2,1,0} parameter(0)
  %b = s8[1,2,2]{2,1,0} parameter(1)
  %q = bf16[4,6,8]{2,1,0} parameter(2)
  %k = bf16[10,8]{1,0} parameter(3)
  %v = bf16[10,16]{1,0} parameter(4)
  ROOT %call = bf16[4,6,16]{2,1,0} custom-call(%a, %b, %q, %k, %v), MOSAIC
}
"""
KINDS = {
    "TRITON": (
        'custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/NAME/pallas_call"}'
    ),
    "MOSAIC": (
        'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/NAME_segmented_residuals"}'
    ),
}


@pytest.mark.parametrize(
    ("hlo", "name", "flops"),
    [
        (GPU, "attention_forward", 2 * 4 * 6 * 10 * (8 + 16)),
        (GPU, "attention_dq", 2 * 4 * 6 * 10 * (2 * 8 + 16)),
        (GPU, "attention_dkv", 2 * 4 * 6 * 10 * (2 * 8 + 2 * 16)),
        (GPU, "my_attention_kernel", 0),
        (TPU, "splash_mqa_fwd", 4 * 6 * 10 * (8 + 16)),
        (TPU, "splash_mqa_dkv", 4 * 6 * 10 * (2 * 8 + 2 * 16)),
        (TPU, "other", 0),
    ],
)
def test_half_of_all_pairs_is_counted(hlo: str, name: str, flops: int) -> None:
    for kind, text in KINDS.items():
        hlo = hlo.replace(kind, text.replace("NAME", name))
    module = extract_collectives(hlo).walk.module
    (computation,) = module.computations.values()
    assert product_flops(computation, computation.instruction("call")) == flops
