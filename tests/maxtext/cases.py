"""Define small versions of MaxText's models: the keys for both packages, and those for one."""

from __future__ import annotations

from typing import NamedTuple

ROWS, LENGTH, VOCAB, UPDATES = 8, 32, 256, 5

BOTH = (
    f"vocab_size={VOCAB} max_target_length={LENGTH} steps=100 base_emb_dim=64 dtype=float32 "
    "weight_dtype=float32 sparse_matmul=false capacity_factor=-1 learning_rate=0.001 "
    "warmup_steps_fraction=0.02 load_balance_loss_weight=0.01 enable_dropout=false"
).split()
"""The dense path, dropless, unless a model says otherwise. The updates are the warm-up's two, the
first of which makes no step, and the cosine's first."""

MAXTEXT = (
    f"per_device_batch_size={ROWS} override_model_config=true run_name=run dataset_type=synthetic "
    "hardware=cpu attention=dot_product matmul_precision=highest enable_checkpointing=true "
    "async_checkpointing=false checkpoint_period=1 enable_goodput_recording=false "
    "monitor_goodput=false skip_jax_distributed_system=true log_config=false"
).split()
"""On one device, so that a device's batch is the whole one."""

OURS = ("num_simulated_devices=8", "per_device_batch_size=1", "remat_policy=none")


class Case(NamedTuple):
    """Describe one of MaxText's models.

    Attributes:
        model: name of its file.
        sizes: key=value pairs for both packages.
        updates: how many to make; 0: only logits; -1: only a checkpoint.
        layouts: layouts of the checkpoints to write, see `reference.save`.
    """

    model: str
    sizes: str
    updates: int = UPDATES
    layouts: tuple[str, ...] = ("state",)

    @property
    def keys(self) -> dict[str, str]:
        """Return the settings of the model and its training that both packages get, by key."""
        return dict(pair.split("=", 1) for pair in (*BOTH, *self.sizes.split()))


_HEADS = "base_num_query_heads=4 base_num_kv_heads=2 head_dim=16 "
_LATENT = (
    "base_num_query_heads=4 base_num_kv_heads=4 kv_lora_rank=32 qk_nope_head_dim=16 "
    "qk_rope_head_dim=8 v_head_dim=12 base_mlp_dim=96 base_moe_mlp_dim=48 num_experts=8 "
    "num_experts_per_tok=2 "
)
_EXPERTS = "base_mlp_dim=96 base_moe_mlp_dim=96 num_experts=8 num_experts_per_tok=2 "
_LLAMA4 = (
    "base_num_decoder_layers=8 base_mlp_dim=80 base_moe_mlp_dim=96 num_experts_per_tok=1 "
    "chunk_attn_window_size=8 "
)

_FLAT = " scan_layers=false"
_DEEPSEEK3 = _LATENT + "base_num_decoder_layers=4 first_num_dense_layers=1 q_lora_rank=24"

MOE = {
    "mixtral": Case(
        "mixtral-8x7b", _HEADS + _EXPERTS + "base_num_decoder_layers=2", layouts=("state", "decode")
    ),
    "deepseek2": Case("deepseek2-16b", _LATENT + "base_num_decoder_layers=3"),
    # MaxText's default path, which on a CPU is for one device; the flat model uses the dense path.
    "deepseek3": Case("deepseek3-671b", _DEEPSEEK3 + " sparse_matmul=true megablox=false"),
    "deepseek3-flat": Case("deepseek3-671b", _DEEPSEEK3 + _FLAT),
    "qwen3": Case("qwen3-30b-a3b", _HEADS + _EXPERTS + "base_num_decoder_layers=2"),
    "gpt-oss": Case(
        "gpt-oss-20b", _HEADS + _EXPERTS + "base_num_decoder_layers=4 sliding_window_size=8"
    ),
    "llama4-16e": Case("llama4-17b-16e", _HEADS + _LLAMA4 + "num_experts=8"),
    "llama4-128e": Case("llama4-17b-128e", _HEADS + _LLAMA4 + "num_experts=16"),
}

OTHERS = {
    "mixtral-flat": Case(MOE["mixtral"].model, MOE["mixtral"].sizes + _FLAT, -1),
    "llama2": Case(
        "llama2-7b", _HEADS + "base_mlp_dim=96 base_num_decoder_layers=2", 0, ("state", "params")
    ),
    "qwen3-dense": Case("qwen3-0.6b", _HEADS + "base_mlp_dim=96 base_num_decoder_layers=2", -1),
}
"""What is not trained: for its checkpoint, or for its logits."""

CASES = MOE | OTHERS
